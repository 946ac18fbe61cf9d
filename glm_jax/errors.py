"""The one exception for bad input, which the doors print as a single line."""


class UserError(ValueError):
    """What a user gave is wrong: a file, a row, a field, a folder, a setting.

    The message says what is wrong, where (file, line, field), and what to do about it. The doors
    print it as one line and exit with code 2; the traceback needs `--verbose`. Raise it for input
    only: a mistake in our own code is any other exception.
    """
