"""From scores to a plan under a budget, and what can serve the result."""
