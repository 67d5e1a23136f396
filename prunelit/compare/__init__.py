"""Several methods on one model, in one table."""
