"""The mistakes of a user, apart from bugs of jdrop."""


class UserError(ValueError):
    """A mistake of the user; the message is a sentence that says what is wrong and how to mend it.

    The command prints the message alone. Any other exception is a bug, and shows its traceback.
    """


class RunError(UserError):
    """A folder that does not hold the run that was asked for, holds damaged files, or is in use."""
