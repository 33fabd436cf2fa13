"""Equalized odds of ensembles: metrics, a linear program over what members vote, and derived predictors.

After FairSISA, arXiv 2312.07420. Predictions come in as arrays of votes or scores, so any ensemble will do.
Read statistics.py, odds.py, predictor.py, metrics.py; dual.py is the linear program inside jit. groups.py and study.py
connect them to records and to a comparison of all methods.
"""
