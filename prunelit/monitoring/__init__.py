"""Callbacks that watch a job: dashboard, report of the run, checkpoints, loggers."""
