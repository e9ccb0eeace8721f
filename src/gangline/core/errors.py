"""Every error that gangline raises on purpose. A message names the thing, gives the numbers and ends with the
way out.
"""


class GanglineError(Exception):
    """Base of all errors raised by gangline."""


class UsageError(GanglineError):
    """An argument or option cannot be honoured."""


class UnsupportedModelError(GanglineError):
    """The model holds experts in a way that no adapter knows; names the class."""


class ConformanceError(GanglineError):
    """Our view of a router or of the experts does not reproduce the model's own result."""


class CheckpointError(GanglineError):
    """A checkpoint file is missing, truncated, corrupt or lacks a tensor."""


class FormatError(GanglineError):
    """Bytes or a shape do not fit the format they are said to have."""


class PackError(GanglineError):
    """An expert pack cannot be written, or fails its checksum."""


class BudgetError(GanglineError):
    """The memory budget is too small; carries the smallest one that would work."""

    def __init__(self, message: str, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class ContextError(GanglineError):
    """A prompt or a generation is longer than the planned context."""


class StoreError(GanglineError):
    """The expert store was asked for something it cannot hold, or reading an expert failed."""
