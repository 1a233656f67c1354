"""The one error that is meant for the person at the command line."""


class UserError(Exception):
    """A one-line message naming the file or option and what it must be; the command line exits with 2."""
