"""The errors a user may meet: each message is one clear sentence."""

from __future__ import annotations


class TurboLabError(Exception):
    """Base of every error meant for a person; ``str(error)`` is one clear sentence."""


class BadInput(TurboLabError, ValueError):
    """A parameter has a value that is not allowed.

    Example:
        >>> str(BadInput("steps", 0, "use an integer from 1 to 1000"))
        'steps=0 is not allowed: use an integer from 1 to 1000.'
    """

    def __init__(self, parameter: str, value: object, allowed: str) -> None:
        self.parameter, self.value, self.allowed = parameter, value, allowed
        super().__init__(f"{parameter}={value!r} is not allowed: {allowed.rstrip('.')}.")


class MissingPiece(TurboLabError, RuntimeError):
    """Something outside the package is not there: a GPU, weights, a package, a hub."""


class StoreError(TurboLabError, OSError):
    """The artefact store cannot read or write: read-only, full or damaged."""


class StoreWarning(UserWarning):
    """What the store found on disk and how it goes on: something damaged, or somebody else."""


class NonFinite(TurboLabError, ArithmeticError):
    """A loss or a gradient stopped being a number during training."""
