"""The command line: options, config files, and one module for each command."""
