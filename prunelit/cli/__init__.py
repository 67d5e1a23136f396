"""The command line: options, config files and the commands, one file each."""
