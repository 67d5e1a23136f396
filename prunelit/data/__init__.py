"""From sources to models and token ids: folders, hub ids, packages and texts."""
