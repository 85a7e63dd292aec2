"""The exceptions that carry a sentence for the user."""

__all__ = ["NotApplicable", "PrunedError", "UserError", "require_at_least", "require_number", "require_sizes"]


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message says what was given, what is allowed and where to set it. Entry points print it without a traceback.
    """


class PrunedError(Exception):
    """A search gave a training up before its end; the message says why."""


class NotApplicable(Exception):  # noqa: N818 - it is an answer, not a fault
    """A metric or a capability has no value here; the message says why. Evaluation records it in the results."""


def require_number(key: str, value: float | None, least: float) -> None:
    """Raise `UserError` if a setting is not set, or below its smallest allowed value."""
    if value is None:
        raise UserError(f"{key}=null must be a number of at least {least}")
    require_at_least(key, value, least)


def require_sizes(**sizes: int | None) -> None:
    """Raise `UserError` unless all of these settings of a network are whole numbers of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            given = "null" if value is None else value
            raise UserError(f"has a network with {name}={given}, which must be a whole number of at least 1")


def require_at_least(key: str, value: float | None, least: float) -> None:
    """Raise `UserError` if a setting is below its smallest allowed value; None means that it is not set."""
    if value is not None and not value >= least:
        raise UserError(f"{key}={value} must be at least {least}")
