"""What can go wrong that is not a defect: commands print it as one sentence and exit with code 2 or 1."""


class UserError(Exception):
    """Input or settings that cannot be used: names the file, line, field or flag, and what is allowed.

    No ValueError: tyro catches those of a nested config and prints them its own way.
    """


class NonFiniteLoss(Exception):
    """The loss became infinite or NaN, and the run stopped there: exit code 1."""
