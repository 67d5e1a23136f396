"""Plain data about models and cuts: the declarations of families, the shapes of layers, scores and plans."""
