"""Metrics, baselines and intervals: pure functions of predictions and truth."""
