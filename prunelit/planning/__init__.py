"""From scores to a pruning plan under a budget, and which programs can serve the pruned model."""
