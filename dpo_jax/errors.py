"""The one exception that speaks to the user.

Everything that a user can mend (a file, a row, a field, an option, a shape that does not divide) is raised as
`InputError`. The command line prints its message as one line and exits with code 2; any other exception is a bug.
"""


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, where (file, row, field), and how to mend it."""
