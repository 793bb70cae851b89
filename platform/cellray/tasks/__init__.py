"""Downstream tasks, metrics, baselines, the report."""
