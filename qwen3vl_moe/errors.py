"""Errors that a user can cause.

Each carries one line that names the file, tensor, option or size at fault and the way out. Programs catch
:class:`UserError`, print ``error: <line>`` to stderr and exit with status 2; anything else is a bug and keeps its
traceback.
"""


class UserError(ValueError):
    """Base of every error that the user, not the program, has to mend."""


class ConfigError(UserError):
    """A config.json that this implementation does not support, or that contradicts itself."""


class CheckpointError(UserError):
    """Weights that are missing, damaged, of another layout, or not to be had."""


class PromptError(UserError):
    """A prompt or an image that cannot be used."""


class OptionError(UserError):
    """A sampling parameter or an engine option outside of what is possible."""
