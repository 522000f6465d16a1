"""The one exception that a user can mend."""


class AsrKdError(Exception):
    """A problem in what the user gave; the message names who, what was got, what was expected, and the remedy.

    The command line prints it as one line and exits with code 2.
    """
