"""Errors that a user can cause and mend."""


class UserError(ValueError):
    """Says what is wrong, where (file, row, field) and what to do. Scripts print it as one line and exit with 2."""
