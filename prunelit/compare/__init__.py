"""Comparison of several pruning methods on one model."""
