"""The errors that a user gets as one sentence, in three kinds that say what can be done about them.

Every error that the package raises on purpose derives from one of the three kinds, and from the built-in exception
that callers expect (`FileNotFoundError`, `ValueError`, ...). Any other exception that leaves a job is a bug, whose
traceback goes into a log file (see `commandline`).
"""


class CnnrayError(Exception):
    """Base class; the message is one sentence for the user."""

    exit_code = 1
    """Exit code of a job that this error ends."""


class TransientError(CnnrayError):
    """Trouble that may pass by itself, such as throttling or a lost connection: trying again may help."""


class PermanentError(CnnrayError):
    """Trouble that lasts until somebody changes something, such as denied access, a missing file or a full disk."""


class BadInputError(CnnrayError):
    """Flags, tables, bundles or image bytes that are not what was expected: reading them again gives the same."""
