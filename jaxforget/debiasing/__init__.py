"""Modular debiasing: sparse differences that take an attribute out of a model, switched on per request.

Source: arXiv 2205.15171, on the gates of arXiv 2012.07463. Read differences.py, objective.py, run.py.
"""
