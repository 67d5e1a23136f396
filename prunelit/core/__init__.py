"""Plain data about models and pruning: declarations of families, shapes of layers, scores and plans."""
