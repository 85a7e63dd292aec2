"""The README's commands and options exist; what it says a mistake looks like is what it looks like."""

import functools
import importlib.util
import itertools
import re
import shlex
import subprocess

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from tests.commands import ROOT, call
from tests.configs import CONF, compose_config, compose_model, options

README = ROOT / "README.md"
TEXT = README.read_text() if README.exists() else ""
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
CONTEXTS = [
    ("config",),
    ("config", "model=dcgan"),
    ("config", "model=flow_image"),
    ("config", "model=cvae_quadrants"),
    ("config", "model=latent"),
    ("config", "model=gpt2", "data=text_file", "data.path=x", "tokenizer=bpe"),
    ("config", "data=mnist"),
    ("config", "data=stacked_mnist"),
    ("config", "data=image_folder", "data.path=x"),
    ("config", "data=table", "data.path=x"),
    ("config", "data=two_moons"),
    ("config", "data=gaussian_mixture"),
    ("config", "search=vae"),
    ("sample", "run=x"),
]  # where an option may belong: the root, and what is chosen beside

pytestmark = pytest.mark.skipif(not README.exists(), reason="there is no README.md yet")


def _commands() -> list[list[str]]:
    """All `python -m` and `make` commands, without variables before and comments behind, but those that show a mistake."""
    lines = [line for language, block in BLOCKS if language != "console" for line in _lines(block)] + INLINE
    commands = sorted({tuple(_words(line)) for line in lines})
    return [list(words) for words in commands if words[:1] == ("make",) or words[:2] == ("python", "-m")]


def _lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def _words(line: str) -> list[str]:
    words = shlex.split(line.removeprefix("$ "), comments=True) if line.count('"') % 2 == line.count("'") % 2 == 0 else []
    return list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\S*", word), words))


def _mistakes() -> list[tuple[list[str], str]]:
    """The commands that are shown with the error they end in."""
    lines = [line for language, block in BLOCKS if language == "console" for line in _lines(block)]
    pairs = itertools.pairwise(lines)
    return [(_words(command), said) for command, said in pairs if command.startswith("$ ") and said.startswith("error: ")]


def _inline_options() -> list[str]:
    """Options in the running text, one or several, as `optim.lr=3e-4`."""
    option = r"[a-z_]+([.@][a-z_]+)*=[^\s.]\S*"
    return sorted({text for text in INLINE if re.fullmatch(rf"{option}( {option})*", text)})


def _values(given: str) -> list[str]:
    """One value, several with commas between, or the first end of an interval."""
    if interval := re.search(r"interval\((.*?),", given):
        return [interval[1]]
    return [given] if given[:1] in ("[", "{") else given.split(",")


def _require_composes(root: str, overrides: list[str]) -> None:
    """All values of all overrides are accepted, and every option of a group has its YAML."""
    parts = [(key, _values(value)) for key, _, value in (override.partition("=") for override in overrides)]
    for key, values in parts:
        group = key.partition("@")[0]
        if (CONF / group).is_dir():
            assert set(",".join(values).strip("[]").split(",")) <= set(options(group))
    names_metrics = root not in ("config", "evaluate") or any("metric" in key or key == "search" for key, _ in parts)
    without = () if names_metrics else ("metric=[]",)  # which compose faster
    for chosen in itertools.product(*(values for _, values in parts)):
        compose_config(*(f"{key}={value}" for (key, _), value in zip(parts, chosen, strict=True)), *without, root=root)


def _has_keys(context: tuple[str, ...], option: str) -> bool:
    """Whether the config of a context has the keys of an option, so that it is tried first."""
    config = _config_of(context)
    return all(_has_key(config, key) for key in _plain_keys(option))


def _has_key(config: DictConfig, key: str) -> bool:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and last in node.keys()  # noqa: SIM118  a value that must be given is one, too


def _plain_keys(option: str) -> list[str]:
    """What it sets by key, and does not choose by group."""
    keys = (one.partition("=")[0].lstrip("+~") for one in option.split())
    return [key for key in keys if "@" not in key and not (CONF / key).is_dir()]


@functools.cache
def _config_of(context: tuple[str, ...]) -> DictConfig:
    root, *chosen = context
    if root != "config" or not chosen or "search=vae" in chosen:
        return compose_config(*chosen, root=root)
    return compose_model(*chosen)  # the first context has the metrics


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_command_exists(command):
    if command[0] == "make":
        assert {word for word in command[1:] if "=" not in word} <= TARGETS
        return
    module, arguments = command[2], command[3:]
    assert importlib.util.find_spec(module) is not None
    if module in ("src.train", "src.evaluate", "src.sample", "src.export") and "--help" not in arguments:
        root = module.removeprefix("src.").replace("train", "config")
        _require_composes(root, [word for word in arguments if "=" in word and "..." not in word])


@pytest.mark.parametrize(
    ("command", "said"), _mistakes(), ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistake_ends_as_shown(command, said):
    found = call(command[2].removeprefix("src."), *command[3:])
    assert found.code == 1
    assert found.text.strip() == said


@pytest.mark.parametrize("option", _inline_options())
def test_option_in_the_text_exists(option):
    only_sets_keys = len(_plain_keys(option)) == len(option.split())
    if only_sets_keys and any(_has_keys(context, option) for context in CONTEXTS):
        return None
    for root, *beside in sorted(CONTEXTS, key=lambda context: not _has_keys(context, option)):
        try:
            return _require_composes(root, [*beside, *option.split()])
        except HydraException:
            continue
    raise AssertionError(f"{option} is accepted by none of {CONTEXTS}")


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!https?:|#)[^)]+)\)", TEXT))))
def test_linked_file_exists(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("model", options("model"))
def test_every_model_is_in_the_table(model):
    assert f"| `{model}` |" in TEXT


def test_make_help_explains_every_target():
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {word for line in said.splitlines() for word in line.split()[:2]}
    assert {"setup", "train", "test", "test-all", "lint", "tensorboard", "clean"} <= named
