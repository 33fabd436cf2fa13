"""What can go wrong that is not a defect: commands print it as one sentence and exit with code 2 or 1."""


class UserError(Exception):
    """Input or settings that cannot be used: names the file, line, field or flag, and what is allowed.

    No ValueError: tyro catches those of a nested config and prints them its own way.
    """


class RunError(Exception):
    """A run that cannot go on though its input is fine: a full disk, a damaged checkpoint. Exit code 1."""


class NonFiniteLoss(RunError):
    """The loss became infinite or NaN, and the run stopped there."""
