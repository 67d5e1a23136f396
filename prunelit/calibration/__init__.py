"""Runs of text through a model: observed activations, gradients, perplexity, and a cache of the results."""
