"""Callbacks that watch a job: dashboard, run report, checkpoints, loggers."""
