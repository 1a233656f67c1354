"""Errors that are meant for the person at the command line."""


class UserError(Exception):
    """A one-line message naming the file or option and what it must be; the command line exits with 2."""


class UnsuitableWeightsError(UserError):
    """The network's values left the range in which its arithmetic is exact: it cannot treat this picture."""


class UnwritableError(UserError):
    """A place takes no file, whichever it be: its disk is full, its folder gone or closed."""


class ReportedError(UserError):
    """A UserError that another process of the same job has met, and reports."""


class LostPeerError(UserError):
    """Another process of the same job has ended early, and connections to it are broken."""


def reason(error: Exception) -> str:
    """What an exception of the system or of a library says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
