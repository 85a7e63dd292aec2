"""A quantity with its known value."""

from dataclasses import dataclass

__all__ = ["Oracle"]


@dataclass(frozen=True)
class Oracle:
    """A quantity with its known value.

    Args:
        name: what it is.
        expected: the value it must have.
        got: the value it has.
        tolerance: largest difference that is no fault; words must be equal.
    """

    name: str
    expected: float | str
    got: float | str
    tolerance: float = 0.0

    @property
    def holds(self) -> bool:
        if isinstance(self.expected, str) or isinstance(self.got, str):
            return self.expected == self.got
        return abs(self.got - self.expected) <= self.tolerance  # never so if it is not a number
