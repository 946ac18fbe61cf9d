"""What ends a program without being a mistake in it; the doors print it as a single line."""

import signal

FETCH = ("Models are not downloaded by their names: fetch the folder first (hf download, "
         "modelscope download) and give its path")


class UserError(ValueError):
    """What a user gave is wrong: a file, a row, a field, a folder, a setting.

    The message says what is wrong, where (file, line, field), and what to do about it. The doors
    print it as one line and exit with code 2; the traceback needs `--verbose`. Raise it for input
    only: a mistake in our own code is any other exception.
    """


class Interrupted(Exception):
    """The run was told to stop, and has saved what is sound: `signal` says by what."""

    def __init__(self, signum: int, step: int, saved: bool):
        on = ("which is saved; the same command goes on from there" if saved else
              "which is not saved, since its numbers are not finite; the same command goes on from "
              "the last good checkpoint")
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, {on}")
        self.signal = signum
