"""What the entry points share: checking the command line before anything heavy is imported, and errors in one sentence."""

import difflib
import errno
import functools
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.core.errors import UserError
from src.core.ranks import global_rank
from src.jobs import end_with_parent
from src.runs import config_hash
from src.sweeping import (
    handing_on_errors,
    is_sweep,
    job_name,
    register_plugins,
    require_asked_rightly,
    sweep,
    sweep_directory,
)

__all__ = ["run_entry_point"]

log = logging.getLogger(__name__)

_FAULTS_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

_FEW_KEYS = 30

CONF = Path(__file__).resolve().parent.parent / "conf"


def run_entry_point(
    config_name: str,
    task: Callable[[DictConfig], Any],
    check: Callable[[DictConfig], None],
    end_sweep: Callable[[Path, DictConfig], bool] | None = None,
) -> None:
    """Run `task` under Hydra with the config composed from the command line.

    Args:
        config_name: file in `conf/`.
        task: called with the config; a `UserError` from it ends the program with its sentence, without a traceback.
        check: called with the config before Hydra makes any directory; raises `UserError` if it cannot be.
        end_sweep: called with the directory of a sweep and the config of its first job when it has ended, however it has;
            says whether all of it is done.
    """
    OmegaConf.register_new_resolver("config_hash", lambda *, _root_: config_hash(_root_), replace=True)
    OmegaConf.register_new_resolver("job_name", lambda *, _root_: job_name(_root_), replace=True)
    OmegaConf.register_new_resolver("or", lambda first, second: second if first is None else first, replace=True)
    register_plugins()
    threading.excepthook = _leave_the_disk_to_the_main_thread
    end_with_parent()
    # Hydra lets a mapping have new keys only with a +
    sys.argv[1:] = [f"+{argument}" if argument.startswith("objective={") else argument for argument in sys.argv[1:]]
    overrides = [argument for argument in sys.argv[1:] if _is_override(argument)]
    first: DictConfig | None = None
    directory: Path | None = None
    if not any(flag in sys.argv[1:] for flag in ("--help", "-h", "--hydra-help", "--version")):
        try:
            if end_sweep is not None:
                require_asked_rightly(overrides)
            for config in _compose_all(config_name, overrides):
                check(config)
                first = first or config
            directory = None if first is None or not is_sweep() else sweep_directory(overrides, first.get("sweep"))
        except UserError as error:
            sys.exit(_in_one_line(error))
    decorated = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(_with_short_errors(task))
    if first is None or (is_sweep() and end_sweep is None):
        return decorated()
    if end_sweep is None or directory is None:
        return _run(decorated)
    sweep(decorated, directory, first, end_sweep)
    return None


def _run(decorated: Callable[[], Any]) -> Any:
    """One run; Hydra, which makes its directory, would say with a traceback that it cannot."""
    try:
        with handing_on_errors():
            return decorated()
    except OSError as error:
        sys.exit(f"error: cannot write to {error.filename}: {error.strerror or error} (set hydra.run.dir=)")
    except HydraException as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")


def _leave_the_disk_to_the_main_thread(failed: threading.ExceptHookArgs) -> None:
    """A thread that writes, as TensorBoard's, meets a full disk like the main one, which says it in a sentence."""
    if not isinstance(failed.exc_value, OSError) or failed.exc_value.errno not in _FAULTS_OF_THE_DISK:
        threading.__excepthook__(failed)


def _is_override(argument: str) -> bool:
    """Whether an argument is for the config; those with a dash are Hydra's own."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith(("+", "~")))


def _in_one_line(error: UserError) -> str:
    """What the user is told; a library's message in it may have had several lines."""
    return f"error: {' '.join(str(error).split())}"


def _with_short_errors(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    @functools.wraps(task)
    def wrapped(config: DictConfig) -> Any:
        try:
            return task(config)
        except UserError as error:
            if global_rank() == 0:  # the others found the same
                log.error(_in_one_line(error))
            failure: Exception = CompactHydraException(str(error))
        except OSError as error:
            if error.errno not in _FAULTS_OF_THE_DISK:
                raise
            log.error(f"error: {error.strerror}: {error.filename or 'a file of the run'}; what was saved before is kept")
            failure = error
        except Exception as error:
            log.exception("this is a fault of the program, not of its user:")
            failure = error
        if HydraConfig.get().mode is RunMode.RUN:
            sys.exit(1)
        raise failure  # for the launcher of a sweep, which goes on with the next job

    return wrapped


def _compose_all(config_name: str, overrides: list[str]) -> Iterator[DictConfig]:
    """The config of the command line; for a sweep one config for each value that occurs in it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            loader = GlobalHydra.instance().config_loader()  # lists the options of model=glob(*)
            parsed = OverridesParser.create(loader).parse_overrides(overrides)
            _require_options(parsed)
            parsed += _space(config_name, parsed)
            _require_options(parsed)
            singles = list(_single_values(parsed))
        except HydraException as error:
            head, *told = str(error).splitlines()
            if not head.startswith(("Error parsing override", "LexerNoViableAlt")):
                raise UserError(head) from error
            given = head.partition("'")[2].rstrip("'") if head.startswith("Error") else head.partition(": ")[2]
            is_plain = told and " while evaluating " in told[0]  # the others are of Hydra's grammar
            why = told[0] if is_plain else "quote special characters, as in \"key='a (b)'\""
            raise UserError(f"{given} cannot be understood: {why}") from error
        default = functools.cache(functools.partial(_with_groups_only, config_name, parsed))  # the same for all of them
        for single in singles:
            try:
                config = compose(config_name, overrides=single)
                if missing := sorted(OmegaConf.missing_keys(config)):
                    raise UserError(f"{missing[0]} must be given: {missing[0]}=...")
                OmegaConf.to_container(config, resolve=True)
                _require_known_parts(config, config_name, single, parsed)
                _require_types(config, default(), parsed)
                of_sweep = [one for one in parsed if one.key_or_group.startswith(("hydra.launcher.", "hydra.sweeper."))]
                if of_sweep:
                    whole = compose(config_name, overrides=single, return_hydra_config=True)
                    _require_types(whole, default(with_hydra=True), of_sweep)
            except HydraException as error:
                swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
                one_job = OverridesParser.create(loader).parse_overrides(single)
                raise UserError(_explain(error, config_name, one_job, swept)) from error
            except OmegaConfBaseException as error:
                raise UserError(f"{str(error).splitlines()[0]} (in the config key {error.full_key})") from error
            yield config


def _space(config_name: str, parsed: list[Override]) -> list[Override]:
    """What the sweeper's `params` vary beside the command line. Refuses a search that is none, or a space for no search."""
    is_multirun = is_sweep()
    for override in parsed:
        if override.key_or_group == "search" and (override.is_sweep_override() or not is_multirun):
            one = "one at a time, as in " if override.is_sweep_override() else ""
            raise UserError(f"{override.input_line} is a sweep: {one}python -m src.train -m search={_options(override)[0]}")
    if not is_multirun:
        return []
    try:
        single = next(_single_values(parsed))
        config = compose(config_name, overrides=single, return_hydra_config=True)
    except HydraException:
        return []  # the same error is explained when all is composed
    given = {override.get_key_element() for override in parsed}
    params = config.hydra.sweeper.get("params") or {}
    lines = [f"{key}={value}" for key, value in params.items() if key not in given]
    found = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(lines)
    sweeper = config.hydra.runtime.choices["hydra/sweeper"]
    for override in [*parsed, *found]:
        if override.is_interval_sweep() and sweeper in ("grid", "basic"):
            raise UserError(
                f"{override.input_line} has no end of values to try one by one; search it with hydra/sweeper=optuna, or "
                "name values"
            )
    return found


def _single_values(parsed: list[Override]) -> Iterator[list[str]]:
    """The overrides with one value each: all first values, then in turn every other part, and every other kind of value."""
    of_hydra = [override for override in parsed if override.is_sweep_override() and override.is_hydra_override()]
    values = [_values(override) for override in parsed if override not in of_hydra]  # its own to check
    first = [options[0] for options in values]
    yield first
    groups = _groups()
    for i, options in enumerate(values):
        is_part = options[0].partition("=")[0].lstrip("+") in groups
        kinds = {option: option if is_part else _kind(option) for option in options}
        for kind in dict.fromkeys(kinds.values()):
            other = next(option for option in options if kinds[option] == kind)
            if other == options[0]:
                continue
            yield [*first[:i], other, *first[i + 1 :]]


def _kind(override: str) -> str:
    """What kind of value an override gives: one of each is enough to know whether it can be."""
    value = OmegaConf.create({"it": None})
    value.merge_with_dotlist([f"it={override.partition('=')[2]}"])
    return type(value.it).__name__


def _values(override: Override) -> list[str]:
    """The overrides that it stands for, each of one value; the ends of an interval and of a range."""
    line, value = str(override.input_line), override.value()
    if not override.is_sweep_override():
        return [line]
    key = line.partition("=")[0]
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    values = list(override.sweep_string_iterator())
    if not values:
        raise UserError(f"{line} names no value, so there is nothing to run")
    if override.is_range_sweep():
        values = list(dict.fromkeys([values[0], values[-1]]))
    return [f"{key}={value}" for value in values]


def _require_options(parsed: list[Override]) -> None:
    """Refuse an option that its group does not have, with the nearest one. (Hydra passes over a missing experiment.)"""
    for override in parsed:
        group = CONF / override.key_or_group
        options = sorted(file.stem for file in group.glob("*.yaml"))
        if override.is_hydra_override():  # it brings options of its own
            loader = GlobalHydra.instance().config_loader()
            options = loader.get_group_options(override.key_or_group, ObjectType.CONFIG)
        for option in _options(override) if group.is_dir() else ():
            if option not in options:
                allowed = ", ".join(options) or "none so far"
                raise UserError(
                    f"{override.key_or_group}={option} does not exist{_nearest(option, options)}; allowed: {allowed}"
                )


def _options(override: Override) -> list[str]:
    """The options of a group that an override names: one, a list of them, or one for each job of a sweep."""
    if override.is_delete():
        return []
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    value = override.value()
    return [str(option) for option in (value if isinstance(value, list) else [value])]


def _explain(error: HydraException, config_name: str, job: list[Override], swept: set[str]) -> str:
    """Hydra's message in one sentence, with the nearest key that exists; of a sweep with the parts that this job has."""
    message = str(error)
    parts = [str(override.input_line) for override in job if override.key_or_group in swept & _groups()]
    for override in job:
        key = override.key_or_group
        if re.search(rf"(?:'|\b){re.escape(key)}(?:'|\b)", message):
            with_parts = "".join(f" with {part}" for part in parts)
            known = _known_keys(config_name, [one for one in job if one.key_or_group != key], key)
            given = override.get_key_element().lstrip("+~")  # with the part that a group was given for
            plain = [name for name in known if name.partition("@")[0] not in _groups()]
            nearest = _nearest(given, known) or _all_of_few(plain)
            return f"{given} is not a key of the config{with_parts}{nearest}"
    return message.splitlines()[0]


def _require_known_parts(config: DictConfig, config_name: str, single: list[str], parsed: list[Override]) -> None:
    """Refuse a top-level key that only an experiment or a `+` brings: nothing would read it."""
    if not any(
        override.key_or_group in ("experiment", "search") or override.is_add() or override.is_force_add()
        for override in parsed
    ):
        return
    root = OmegaConf.load(CONF / f"{config_name}.yaml")
    groups = {group for entry in root.defaults if isinstance(entry, DictConfig) for group in entry}
    choices = compose(config_name, overrides=single, return_hydra_config=True).hydra.runtime.choices
    same_groups = [f"{group}={choice}" for group, choice in choices.items() if group in groups and choice is not None]
    known = [str(key) for key in compose(config_name, overrides=same_groups)]
    for key in map(str, config):
        if key not in known:
            raise UserError(f"{key} is not a part of the config, so nothing would read it{_nearest(key, known)}")


def _require_types(config: DictConfig, default: DictConfig, parsed: list[Override]) -> None:
    """Refuse a value of another kind than the default's: a word for a number, a fraction for a whole number."""
    kinds = (
        (bool, bool, "true or false"),
        (int, int, "a whole number"),
        (float, (int, float), "a number"),
        (ListConfig, ListConfig, "a list"),
    )
    for override in parsed:
        key = override.key_or_group
        wanted, given = OmegaConf.select(default, key), OmegaConf.select(config, key)
        for kind, allowed, name in kinds:
            if isinstance(wanted, kind):
                is_bool_for_number = isinstance(given, bool) and kind is not bool
                if given is not None and (is_bool_for_number or not isinstance(given, allowed)):
                    raise UserError(f"{key}={given} must be {name}, as in {key}={str(wanted).replace(' ', '')}")
                break


def _known_keys(config_name: str, parsed: list[Override], key: str) -> list[str]:
    """All keys and groups that an override may name, given the groups that were chosen; Hydra's if the key is one.

    A group is named only where this config has it: as it is, or as `group@part` (`optim@optim.generator` of a GAN).
    """
    whole = _with_groups_only(config_name, parsed, with_hydra=True)
    if key.startswith("hydra."):
        return list(_paths(whole.hydra, "hydra."))
    own = [str(group) for group in whole.hydra.runtime.choices if str(group).partition("/")[0] != "hydra"]
    hydras = [group for group in _groups() if group.startswith("hydra/")]
    return [*own, *hydras, *_paths(OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"]), "")]


@functools.cache
def _groups() -> set[str]:
    return {path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()} - {"hydra"}


def _with_groups_only(config_name: str, parsed: list[Override], with_hydra: bool = False) -> DictConfig:
    """The config with the groups that were chosen, and every value at its default."""
    groups = _groups()
    chosen = [
        str(override.input_line)
        for override in parsed
        if override.key_or_group in groups and not override.is_sweep_override()
    ]
    try:
        return compose(config_name, overrides=chosen, return_hydra_config=with_hydra)
    except HydraException:
        return compose(config_name, return_hydra_config=with_hydra)


def _paths(node: Any, prefix: str) -> Iterator[str]:
    if not isinstance(node, DictConfig):
        return
    for key in node:
        path = f"{prefix}{key!s}"
        yield path
        if not OmegaConf.is_missing(node, key):
            yield from _paths(node._get_node(key), f"{path}.")


def _nearest(name: str, known: list[str]) -> str:
    """`; did you mean X?`: the same key or group elsewhere, or the nearest by the whole path, or by its last part.

    Never the name itself: it may be one, and yet not what can be set there.
    """
    known = [path for path in known if path != name]
    last, group = name.rpartition(".")[2], name.partition("@")[0]
    by_last = {path.rpartition(".")[2]: path for path in known}
    elsewhere = [path for path in known if path.endswith(f".{last}") or path.partition("@")[0] == group]
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0)
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    close = close or [by_last[match] for match in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else ""


def _all_of_few(known: list[str]) -> str:
    return f"; allowed: {', '.join(known)}" if len(known) <= _FEW_KEYS else ""
