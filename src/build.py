"""The only place that turns config nodes into objects. What a config may name is limited to a few packages."""

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from src.core.errors import UserError
from src.core.spec import DataSpec

__all__ = ["build", "build_model", "plain"]

_ALLOWED = ("src.", "torch.optim.", "torch.nn.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")


def build(node: DictConfig | dict[str, Any]) -> Any:
    """The object that a node describes by `_target_`; with `_partial_: true` a function of the remaining arguments.

    A node without `_target_` gives a dict of what its values describe. Lists and dicts arrive as plain Python types.
    """
    described = plain(node) if isinstance(node, DictConfig) else node
    _refuse_references(described)
    for path, target_node in _target_nodes(described):
        _require_arguments(path, target_node, _allowed_target(path, target_node["_target_"]))
    try:
        return instantiate(described, _convert_="all")
    except InstantiationException as error:
        raise _explained(error) from error


def plain(node: DictConfig) -> dict[str, Any]:
    """A config node as nested dicts, lists and numbers, with every reference resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True))


def build_model(node: DictConfig | dict[str, Any], spec: DataSpec, name: str) -> Any:
    """The model of a config for the data at hand; a refusal names both."""
    try:
        return build(node)(spec=spec)
    except UserError as error:
        raise UserError(f"model={name} with data={spec.name}: {error}") from error
    except InstantiationException as error:
        raise _explained(error) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"model={name} with data={spec.name}: its parts do not fit together: {error}") from error


def _refuse_references(node: Any, path: str = "") -> None:
    """Refuse what would turn into something else after it was checked: an escaped reference, resolved a second time."""
    if isinstance(node, str) and "${" in node:
        raise UserError(f"{path.rstrip('.')}={node} holds a reference that is not resolved; write the value itself")
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        _refuse_references(key, f"{path}{key}.")
        _refuse_references(value, f"{path}{key}.")


def _target_nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All nodes with a `_target_` in a plain node, with their paths, which end in a dot."""
    if isinstance(node, dict) and "_target_" in node:
        yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _target_nodes(value, f"{path}{key}.")


def _allowed_target(path: str, target: str) -> Callable[..., Any]:
    """What a target names; refuses one outside the allowed packages, also if reached through them (`src.runs.os.system`).

    A run's config may come from a stranger, so only classes and our own public functions are built: a method or a helper
    may do anything with its arguments (`load_from_checkpoint` unpickles, `src.runs._git` runs what its options name).
    """
    allowed = ", ".join(name.rstrip(".") for name in _ALLOWED)
    refusal = (
        f"{path}_target_={target} may not be built; a config may name classes and public functions defined in {allowed}"
    )
    if not str(target).startswith(_ALLOWED):
        raise UserError(refusal)
    try:
        found = get_object(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path}_target_={target} does not exist ({error})") from error
    home = f"{getattr(found, '__module__', '')}."
    is_public_function = isinstance(found, FunctionType) and not found.__qualname__.startswith("_")
    is_our_function = is_public_function and home.startswith("src.") and found.__qualname__ == found.__name__
    if not home.startswith(_ALLOWED) or not (isinstance(found, type) or is_our_function):
        raise UserError(refusal)
    return found


def _require_arguments(path: str, node: dict[str, Any], found: Callable[..., Any]) -> None:
    """Refuse a key that is no argument; Hydra would say so only at the call, which for `_partial_` may be much later."""
    arguments = inspect.signature(found).parameters
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        return
    for key in node:
        if key not in arguments and not key.startswith("_"):
            known = ", ".join(arguments)
            raise UserError(f"{path}{key} is not an argument of {node['_target_']}; allowed: {known}")


def _explained(error: InstantiationException) -> Exception:
    """The user's error inside Hydra's, if there is one; else Hydra's in one sentence if it is about arguments."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, TypeError):
            return UserError(f"the config does not fit what it builds: {cause} ({str(error).splitlines()[-1]})")
        cause = cause.__cause__
    return error
