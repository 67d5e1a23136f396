"""The model as files on disk: headers and facts of a folder, and weights that stay there until they are read."""
