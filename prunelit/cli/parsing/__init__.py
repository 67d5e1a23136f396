"""How command lines are read: options as the source declares them, aliases, parsers, help pages, completion."""
