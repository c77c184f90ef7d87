"""Errors that a user can cause.

Each carries one line that names the file, tensor, option or size at fault and the way out. Programs catch
:class:`UserError`, print ``error: <line>`` to stderr and exit with status 2; anything else is a bug and keeps its
traceback.
"""

_MOST_CHARACTERS = 1000  # of a message; what is longer quotes something that was not meant to be read


class UserError(ValueError):
    """Base of every error that the user, not the program, has to mend.

    Its text is one line that a terminal or a log can show as it is, whatever the names and reasons within hold.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """``text`` without what could act on a terminal or end a line (control characters, marks of direction, halves of
    surrogate pairs): these are written as Python writes them, ``\\x1b``. The middle of a very long text is left out."""
    text = _clipped(text)
    if text.isprintable():
        return text
    return _clipped("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _clipped(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: half - 3]} ... {text[3 - half :]}"


class ConfigError(UserError):
    """A config.json that this implementation does not support, or that contradicts itself."""


class CheckpointError(UserError):
    """Weights that are missing, damaged, of another layout, or not to be had."""


class PromptError(UserError):
    """A prompt or an image that cannot be used."""


class OptionError(UserError):
    """A sampling parameter or an engine option outside of what is possible."""


class RankError(UserError):
    """One of the processes that compute a model together has ended."""


class NumbersError(UserError):
    """A model whose numbers are not finite: its weights or settings are damaged, or its dtype is too narrow."""
