"""The one exception a user can cause; commands print it as a single sentence and exit with code 2."""


class UserError(Exception):
    """Input or settings that cannot be used: names the file, line, field or flag, and what is allowed.

    No ValueError: tyro catches those of a nested config and prints them its own way.
    """
