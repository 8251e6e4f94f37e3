"""Options of the commands that do not train."""
