"""The space of a search, from Hydra's sweep expressions to Optuna's distributions and back to overrides.

choice(a,b) or a,b      one of them                 range(2,9) or range(0,1,0.1)    a step of it, without its end
interval(1e-4,1e-2)     a number, ends included     int(interval(4,64))             a whole number, ends included
tag(log, interval(...)) the same, even in its logarithm
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from src.core.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["Space", "read_space"]

_DIGITS = 4  # of a number drawn from an interval, so that an override can be read and typed


@dataclass(frozen=True)
class Space:
    """What a search varies.

    Args:
        fixed: overrides of every trial.
        expressions: what is varied, by key, as it was written.
        distributions: the same for Optuna.
    """

    fixed: list[str]
    expressions: dict[str, str]
    distributions: "dict[str, BaseDistribution]"

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """What the command line would say for the parameters of a trial."""
        return [f"{key}={_value(self.distributions[key], params[key])}" for key in self.distributions]


def read_space(params: Mapping[str, Any], arguments: Sequence[str], config_loader: Any) -> Space:
    """The space of a YAML's `params` and of the command line, which replaces what the YAML says of the same key; what is
    typed last counts.

    Raises `UserError` for what is no space.
    """
    lines = [f"{key}={_written(key, value)}" for key, value in params.items()]
    try:
        parsed = OverridesParser.create(config_loader).parse_overrides([*lines, *arguments])
    except HydraException as error:
        raise UserError(f"hydra.sweeper.params: {str(error).splitlines()[0]}") from error
    typed = {override.get_key_element() for override in parsed[len(lines) :]}
    counting = [o for o in parsed[: len(lines)] if o.get_key_element() not in typed] + parsed[len(lines) :]
    swept = {override.get_key_element() for override in counting if override.is_sweep_override()}
    last = {override.get_key_element(): override for override in counting}
    counting = [o for o in counting if o.get_key_element() not in swept or o is last[o.get_key_element()]]
    varied = {override.get_key_element(): override for override in counting if override.is_sweep_override()}
    return Space(
        [str(override.input_line) for override in counting if not override.is_sweep_override()],
        {key: str(override.input_line).partition("=")[2] for key, override in varied.items()},
        {key: _distribution(override) for key, override in varied.items()},
    )


def _written(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int, float)):
        raise UserError(f"hydra.sweeper.params: {key} must be written as on the command line, as in {key}: choice(1,2)")
    return str(value)


def _distribution(override: Override) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value, line = override.value(), override.input_line
    if isinstance(value, IntervalSweep):
        low, high, is_log = value.start, value.end, "log" in value.tags
        assert low is not None
        assert high is not None
        if low > high:
            raise UserError(f"{line}: its first end is behind its second one")
        if is_log and low <= 0:
            raise UserError(f"{line}: there is no logarithm of {low}")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=is_log)
        return FloatDistribution(float(low), float(high), log=is_log)
    if isinstance(value, RangeSweep) and value.tags:
        raise UserError(f"{line}: a range has no tags; write tag(log, int(interval(4,64)))")
    options = list(override.sweep_string_iterator())
    if not options:
        raise UserError(f"{line} names no value")
    if isinstance(value, RangeSweep) and len(options) > 1:
        numbers = sorted(float(option) for option in options)
        step = abs(value.step)
        if all(isinstance(number, int) for number in (value.start, value.stop, value.step)):
            return IntDistribution(int(numbers[0]), int(numbers[-1]), step=int(step))
        return FloatDistribution(numbers[0], numbers[-1], step=float(step))
    return CategoricalDistribution(options)


def _value(distribution: "BaseDistribution", value: Any) -> str:
    from optuna.distributions import FloatDistribution

    if not isinstance(distribution, FloatDistribution):
        return str(value)
    rounded = float(f"{value:.{_DIGITS}g}") if distribution.step is None else float(f"{value:.12g}")
    return repr(min(max(rounded, distribution.low), distribution.high))
