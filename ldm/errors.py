"""Errors that end a program with one line. Any other error is a bug and keeps its traceback."""

MAX_MESSAGE = 500  # letters


class InputError(ValueError):
    """The input is wrong. The message says what is wrong, where, and what to do, on one line."""

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))


class RunError(RuntimeError):
    """A run can't go on, for example because the disk is full or the loss diverged. The message is one line, too."""

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))


def one_line(message: object, limit: int = MAX_MESSAGE) -> str:
    """A message as one line of at most `limit` printable letters. A long one keeps its start and its end, the advice.

    Messages quote files and paths, which can hold anything: line ends become spaces, and characters that are not
    printable are escaped.
    """
    text = str(message)
    if len(text) > 2 * limit:  # escaping makes it longer, never shorter
        text = _cut(text, 2 * limit)
    text = " ".join(text.splitlines())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _cut(text, limit) if len(text) > limit else text


def _cut(text: str, limit: int) -> str:
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
