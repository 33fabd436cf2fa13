"""Stereotypes in language models.

scoring.py: log-probabilities of sentences. measures.py: what benchmarks make of them, with bootstrap intervals.
generation.py: what models write about two groups, and scorers for it. benchmarks.py: all of these on one or two models.
"""
