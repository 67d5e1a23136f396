"""The short commands, one file each: a plain function, and `run`, which parses its options and calls it."""
