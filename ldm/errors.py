"""A user's mistake is answered in one line; everything else is a bug and keeps its traceback."""


class InputError(ValueError):
    """What was given is at fault. The message says what is wrong, where, and what to do, on one line."""


class RunError(RuntimeError):
    """A run can't go on for a reason that lies outside the program: a full disk, a diverged loss. One line, too."""
