"""Options of the chains of commands."""
