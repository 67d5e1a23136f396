"""Commands on what finished runs have left."""
