"""The error that a user's mistake raises."""


class UserError(ValueError):
    """Bad input from the user: one message that says what, where and what to do."""
