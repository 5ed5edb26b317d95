"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake or a situation that the user can mend.

    The message is shown without a traceback. It names the file, the key or flag and its value, says what
    was expected, and what to do.
    """
