"""Recovery: training a pruned model back to quality, and merging its adapters."""
