"""The exceptions that speak to the user.

Everything that a user can mend (a file, a row, a field, an option, a shape that does not divide) is raised as
`InputError`. The command line prints its message as one line and exits with code 2; any other exception is a bug, but
for `DoesNotFit`, which is the answer of `dpo-jax plan` where it is no.
"""


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, where (file, row, field), and how to mend it."""


class DoesNotFit(Exception):
    """A plan that needs more memory than its devices have. The command line prints the one line and exits with 3."""
