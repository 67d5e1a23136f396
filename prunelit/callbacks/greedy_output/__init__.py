"""Greedy Output Approximation: similar heads first, then units whose output has the least second moment."""

from prunelit.callbacks.greedy_output.callback import GreedyOutput

__all__ = ["GreedyOutput"]
