"""Loading of models and texts from their sources: folders, hub ids, packages and files."""
