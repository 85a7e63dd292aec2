"""A program that becomes two, as the processes of a training on two devices: `python -m tests.two_ranks FOLDER CACHE`.

It does all that `test_distributed.py` looks at, one thing after the other, and writes down what each process ends with; the
tests do the same things in one process. Starting it costs seconds, so it is started once.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from src.build import build
from src.core.collectives import broadcast_from_first, num_ranks, own_rank
from src.core.rng import Noise, StreamNoise
from src.core.sound import MU_LAW, Sound, to_pcm
from src.core.spec import DISCRETE, DataSpec, Values
from src.data.arrays import Arrays, Split
from src.data.loading import ArrayData
from src.evaluation.protocol import Drawn, draw_together
from src.experiment import load_data, load_model
from src.objectives.quantization import Codebook
from src.training.callbacks.checkpoint import LastAndBest
from src.training.fit import make_trainer, make_training_module
from src.training.meter import NonFiniteLossError
from src.training.module import TrainingModule
from tests.composition import remember_compositions
from tests.configs import compose_model

NUM_STEPS = 20  # of ten to an epoch
GLOBAL_BATCH = 128
RANK, NUM_RANKS = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
PLAYERS = ("generator", "discriminator")
# Adam divides a gradient that is next to nothing by one that is, so that rounding alone would move its weight
STEADY_GAN = ["model=gan", *(f"+optim.{player}.eps=1e-5" for player in PLAYERS)]
SAME = {  # what must be the same on two devices as on one: batches to an update, and the rest
    "vae": (1, ["model=vae"]),
    "gan": (1, STEADY_GAN),
    "gan with both penalties": (1, [*STEADY_GAN, "adversarial_loss=relativistic", "penalty=r1_r2"]),
    "gan with spectral norm": (1, [*STEADY_GAN, "adversarial_loss=hinge", "model.spectral_norm=true"]),
    "vae in rounds": (2, ["model=vae", "training.gradient_clip_norm=1.0"]),
    "gmm": (1, ["model=gmm", "model.num_components=4"]),
    "gmm by minibatches": (1, ["model=gmm", "model.num_components=4", "model.minibatch=true"]),
    "gmm of classes": (1, ["model=gmm", "model.num_components=4", "model.conditional=true"]),
    "transformer": (
        1,
        [
            "model=transformer",
            "data=text_file",
            "data.path=TEXT",
            "data.context=8",
            "network.num_layers=1",
            "network.num_heads=2",
            "network.width=16",
            "+optim.eps=1e-4",
            "training.schedule.examples=2560.0",
        ],
    ),
    "gan with two critics in rounds": (
        2,
        [*STEADY_GAN, "training.n_critic=2", "training.gradient_clip_norm=0.5"],
    ),
}
SMALL_WAVENET = (
    "model=wavenet", "model.window=32", "model.context=8", "model.num_windows=2", "network.width=8", "network.skip_width=8",
    "network.num_layers=3", "network.num_stacks=1", "optim.eps=1e-4",
)  # fmt: skip
SMALL_DCGAN = ("model=dcgan", "generator.width=8", "discriminator.width=8")
CUT = 13


class Rows(Logger):
    """Keeps what is logged, but for the speed."""

    name, version = "rows", "0"

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, {name: value for name, value in metrics.items() if "per_second" not in name}))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class Share(Noise):
    """Draws for a whole batch and hands out those parts of it that are asked for, one after the other."""

    def __init__(self, num_parts: int, own: list[int]) -> None:
        self._stream = StreamNoise(0)
        self._num_parts, self._own = num_parts, own
        self._left: list[Tensor] = []

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._next("normal", shape, like)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._next("uniform", shape, like)

    def _next(self, kind: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if not self._left:
            whole = getattr(self._stream, kind)((shape[0] * self._num_parts, *shape[1:]), like)
            self._left = [whole.chunk(self._num_parts)[part] for part in self._own]
        return self._left.pop(0)


class UseNoise(L.Callback):
    def __init__(self, noise: Noise) -> None:
        self._noise = noise

    def on_fit_start(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        pl_module._noise = self._noise


class Quiet(L.pytorch.callbacks.ProgressBar):
    """No progress bar."""

    def disable(self) -> None: ...


class SaveAfter(L.Callback):
    def __init__(self, step: int, file: Path) -> None:
        self._step, self._file = step, file

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        if pl_module.step == self._step:
            trainer.save_checkpoint(self._file)


class SignalAfter(L.Callback):
    """Asks the second process alone to end."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        if pl_module.step == self._step and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)


class BreakAfter(L.Callback):
    """Makes the loss of the second process alone not a number."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: TrainingModule, batch: Any, *_: object) -> None:
        if pl_module.step == self._step and trainer.global_rank == 1:
            batch.x.fill_(float("nan"))


def configured(*overrides: str) -> DictConfig:
    """`compose_model`, but quicker: groups are composed, once; values are set in a copy."""
    groups = ("model=", "data=", "trainer=", "adversarial_loss=", "penalty=")
    config = compose_model(*(line for line in overrides if line.startswith(groups)))
    values = OmegaConf.from_dotlist([line.lstrip("+") for line in overrides if not line.startswith(groups)])
    with open_dict(config):
        return cast("DictConfig", OmegaConf.merge(config, values))


def fit(
    cache: Path,
    *overrides: str,
    callbacks: tuple[L.Callback, ...] = (),
    resume: Path | None = None,
    data: ArrayData | None = None,
    max_steps: int | None = NUM_STEPS,
) -> tuple[TrainingModule, Rows]:
    """A short training on the digits, or on `data`, on as many devices as there are processes; steps are updates."""
    overrides = tuple(line.replace("=TEXT", f"={_text(cache)}") for line in overrides)
    config = configured(
        "trainer=ddp" if NUM_RANKS > 1 else "trainer=default", "trainer.accelerator=cpu", f"trainer.devices={NUM_RANKS}",
        "trainer.val_every_n_epochs=1", "training.log_every_n_steps=1", "loader.num_workers=0",
        "loader.eval_batch_size=50", f"data.cache={cache}", *overrides,
    )  # fmt: skip
    k = config.training.get("accumulate_batches", 1)
    config.loader.batch_size = GLOBAL_BATCH // NUM_RANKS // k
    config.trainer.max_steps = None if max_steps is None else max_steps * k
    with open_dict(config):
        config.name = {"model": "a model", "data": "digits"}
    L.seed_everything(0, verbose=False)
    data = data or load_data(config)
    optimizers = build(config.get("optim", {}))
    module = make_training_module(load_model(config, data.spec), optimizers, build(config.training), config.seed)
    rows = Rows()
    trainer = make_trainer(default_root_dir=cache, callbacks=[*callbacks, Quiet()], logger=[rows], **build(config.trainer))
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, rows


def _text(cache: Path) -> Path:
    """A text of ten batches of windows of eight, and what is held out."""
    file = cache / "of_two_ranks.txt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        unfinished.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(550)))
        unfinished.rename(file)
    return file


def few_held_out(cache: Path) -> ArrayData:
    """The digits with a single validation example."""
    arrays = load_data(configured("model=vae", f"data.cache={cache}")).arrays
    val = arrays.splits["val"]
    few = Split(val.x[:1], val.y[:1])
    arrays = Arrays(arrays.spec, arrays.source_levels, dict(arrays.splits) | {"val": few}, arrays.fingerprint)
    return ArrayData(arrays, GLOBAL_BATCH // NUM_RANKS, eval_batch_size=50, num_workers=0, seed=0)


def drawn(cache: Path) -> Drawn:
    """Samples of an untrained conditional GAN, whose weights are another's in each process until rank 0 gives its own."""
    config = configured("model=cgan", "generator.width=8", "discriminator.width=8", f"data.cache={cache}")
    with open_dict(config):
        config.name = {"model": "cgan", "data": "digits"}
        config.seed = own_rank()
    data = load_data(config)
    model = load_model(config, data.spec)
    broadcast_from_first(model)
    return draw_together(model, "cgan", data, num_samples=70, batch_size=16, seed=3)


def learnt_codes(revive_below: float) -> dict[str, Tensor]:
    """A codebook after some batches, of which each process has its share; two of its eight codes have no use."""
    torch.manual_seed(0)
    codebook, noise = Codebook(8, 2, decay=0.8, revive_below=revive_below), StreamNoise(own_rank())
    batches = StreamNoise(1).normal((30, 24, 2), torch.zeros(()))
    for batch in batches:
        z = batch.chunk(num_ranks())[own_rank()]
        codebook.learn(z, codebook.indices(z).clamp(max=5), noise)
    return codebook.state_dict()


def same(name: str, cache: Path) -> dict[str, Any]:
    """One of the trainings of `SAME`, where each batch of each process has its share of the noise of one global batch."""
    k, overrides = SAME[name]
    in_rounds = [f"training.accumulate_batches={k}"] if k > 1 else []
    module, rows = fit(
        cache, *overrides, *in_rounds,
        callbacks=(UseNoise(Share(k * NUM_RANKS, [i * NUM_RANKS + RANK for i in range(k)])),),
    )  # fmt: skip
    return outcome(module, rows)


def same_at_once(name: str, cache: Path) -> dict[str, Any]:
    """The same in one process that takes the global batch at once."""
    return outcome(*fit(cache, *SAME[name][1], callbacks=(UseNoise(Share(1, [0])),)))


def few(cache: Path) -> dict[str, Any]:
    """A training where the second process has the only validation example."""
    noise = UseNoise(Share(NUM_RANKS, [RANK]))
    return outcome(*fit(cache, "model=vae", data=few_held_out(cache), callbacks=(noise,)))


def sounds() -> ArrayData:
    """Short clips of noise in mu-law, a quarter of each padded."""
    sound = Sound(4000, 64, MU_LAW, n_fft=16, hop=8, num_mels=4, log_low=-16.0, log_high=2.0)
    spec = DataSpec("noise", "tokens", (64,), Values(DISCRETE, 0.0, 255.0, 256), ("a", "b"), sound=sound)
    x = to_pcm(0.3 * StreamNoise(2).normal((10 * GLOBAL_BATCH, 64), torch.zeros(())))
    x[:, 48:] = 0
    clips = Split(x.numpy(), np.arange(len(x)) % 2)
    arrays = Arrays(spec, None, {"train": clips, "val": Split(clips.x[:60], clips.y[:60])}, "noise")
    return ArrayData(arrays, GLOBAL_BATCH // NUM_RANKS, eval_batch_size=50, num_workers=0, seed=0)


def of_sounds(cache: Path) -> dict[str, Any]:
    """A training on stretches of clips, of which each process has its share."""
    noise = UseNoise(Share(NUM_RANKS, [RANK]))
    return outcome(*fit(cache, *SMALL_WAVENET, data=sounds(), callbacks=(noise,)))


def outcome(module: TrainingModule, rows: Rows) -> dict[str, Any]:
    return {"state": module.state_dict(), "rows": rows.rows, "step": module.step, "examples": module.examples_seen}


def main(folder: Path, cache: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in SAME:
        found[name] = same(name, cache)
    assert num_ranks() == 2
    found["drawn"] = drawn(cache)
    found["codes"] = learnt_codes(revive_below=0.0)
    found["codes with revival"] = learnt_codes(revive_below=0.1)

    cut = folder / "cut.ckpt"
    found["whole"] = outcome(*fit(cache, *SMALL_DCGAN, callbacks=(SaveAfter(CUT, cut),)))
    found["resumed"] = outcome(*fit(cache, *SMALL_DCGAN, resume=cut))

    found["few held out"] = few(cache)
    found["of sounds"] = of_sounds(cache)
    try:
        fit(cache, "model=gan", callbacks=(BreakAfter(3),))
    except NonFiniteLossError as error:
        found["broken"] = str(error)
    try:
        saves = LastAndBest(folder, "val/loss", every_minutes=None)
        fit(cache, "model=gan", callbacks=(SignalAfter(4), saves))
    except SystemExit:
        found["stopped"] = torch.load(folder / "last.ckpt", weights_only=True)["progress"]["step"]
    torch.save(found, folder / f"rank_{RANK}.pt")


if __name__ == "__main__":
    remember_compositions()
    second = os.fork()  # it has imported all that takes seconds, too
    RANK = int(second == 0)
    os.environ["LOCAL_RANK"] = str(RANK)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    if second:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
