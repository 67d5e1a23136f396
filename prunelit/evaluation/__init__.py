"""Evaluation of a model: perplexity, zero-shot tasks, speed, completions; alone or against the dense model."""
