"""The one exception for what a user can correct."""


class UserError(Exception):
    """A mistake or a situation that the user can correct.

    The message is shown without a traceback. It names the file, the key or flag and its value, says what
    was expected, and what to do.
    """
