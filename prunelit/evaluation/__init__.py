"""What a model is worth: perplexity, zero-shot tasks, speed, text; alone or against the dense model."""
