"""The YAML files that come with prunelit: found by their names, and copied out by `prunelit init`."""
