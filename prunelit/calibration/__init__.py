"""Text through a model, observed: activations, gradients, perplexity, and the cache of what was computed."""
