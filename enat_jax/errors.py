"""The error a user can make: the command line shows its one line, without a traceback."""


class UserError(ValueError):
    """Something to be put right by who runs the program; the message is one clear line."""
