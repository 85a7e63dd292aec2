"""What the framework costs beside a bare PyTorch loop, measured in turns in one process: `make bench`.

    step cost    the same model and optimizer, stepped by the framework (logging and progress bar on) and by a bare loop,
                 some steps each in turn; the bare loops of wgan_gp, r3gan and flow_matching_unet are written out, with
                 losses and penalties of their own
    text cost    nanoGPT's configuration for a CPU, stepped by the framework and by a loop written as nanoGPT's train.py is,
                 on the same network
    epoch cost   one epoch of MNIST by the framework, and by the plain loop over torchvision's MNIST and a DataLoader

The bounds stand beside the figures; the exit code says whether all of them hold.
"""

import io
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from src.build import build, build_model
from src.core.batch import Batch
from src.core.protocols import Adversarial
from src.core.rng import StreamNoise
from src.core.spec import DISCRETE, DataSpec, Values
from src.data.arrays import Arrays, Split, image_values
from src.data.loading import ArrayData
from src.data.token_windows import TokenWindows
from src.training.fit import make_trainer, make_training_module
from tests.configs import compose_config, small

Judge = Callable[[nn.Module, Tensor, Tensor], Tensor]
Fool = Callable[[nn.Module, Tensor, Tensor], Tensor]

STEP_BOUNDS = {"vae": 1.20, "dcgan": 1.05, "wgan_gp": 1.10, "r3gan": 1.10, "flow_matching_unet": 1.10}
EPOCH_BOUND = 0.65
TEXT_BOUND = 1.02  # 1 but for the noise of measuring
TURN = {"vae": 100, "dcgan": 10, "wgan_gp": 10, "r3gan": 2, "flow_matching_unet": 2}  # steps
BATCH_SIZE = {"r3gan": 32, "flow_matching_unet": 32}
NARROW = ("r3gan", "flow_matching_unet")  # seconds a step otherwise, on two cores


def main() -> None:
    logging.disable(logging.WARNING)
    figures = [(f"{name}: step", bound, _step_ratio(name, num_turns=12)) for name, bound in STEP_BOUNDS.items()]
    figures.append(("nanogpt: step", TEXT_BOUND, _text_ratio(num_turns=12)))
    root = Path(os.environ.get("DATA_ROOT", "data"))
    if (root / "MNIST" / "raw").is_dir():
        figures.append(("vae: MNIST epoch", EPOCH_BOUND, _epoch_ratio(root, num_turns=3)))
    else:
        print(f"no MNIST under {root} (set DATA_ROOT): the epoch is not measured")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for what, bound, (ours, theirs, ratio) in figures:
        verdict = "ok" if ratio <= bound else "TOO SLOW"
        print(
            f"{what:25s} framework {ours:9.2f} ms   bare {theirs:9.2f} ms   ratio {ratio:.3f} (at most {bound})  {verdict}"
        )
    sys.exit(any(ratio > bound for _, bound, (_, _, ratio) in figures))


def _step_ratio(name: str, num_turns: int) -> tuple[float, float, float]:
    """Milliseconds of a step by the framework and by the bare loop, and the median of the ratios turn by turn."""
    narrow = small(name) if name in NARROW else ()
    config = compose_config(f"model={name}", "data=mnist", f"loader.batch_size={BATCH_SIZE.get(name, 128)}", *narrow)
    data = ArrayData(_random_images(6400), seed=0, **build(config.loader))
    if name in BARE:
        bare_step = _bare_game(config, data, *BARE[name])
    else:
        bare_step = (_bare_matching if name == "flow_matching_unet" else _bare_step)(config, data)
    turns = _Turns(TURN[name], bare_step, num_turns)
    _fit(config, data, [turns])
    ours, theirs = turns.ours[1:], turns.theirs[1:]  # the first turn warms up
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return 1000 * statistics.median(ours), 1000 * statistics.median(theirs), ratio


def _text_ratio(num_turns: int) -> tuple[float, float, float]:
    """As `_step_ratio`, of nanoGPT's configuration for a CPU, on random characters."""
    config = compose_config("experiment=shakespeare_nanogpt", "data.root=none")
    data = ArrayData(_random_text(context=config.data.context), seed=0, **build(config.loader))
    turns = _Turns(10, _bare_gpt(config, data), num_turns)
    _fit(config, data, [turns])
    ours, theirs = turns.ours[1:], turns.theirs[1:]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return 1000 * statistics.median(ours), 1000 * statistics.median(theirs), ratio


def _bare_gpt(config: DictConfig, data: ArrayData) -> Callable[[], None]:
    """One step of nanoGPT's train.py on a CPU: batch, learning rate, loss, clipped gradient, AdamW of two groups."""
    torch.manual_seed(0)
    network = build_model(config.model, data.spec, "bare").network
    stream, context, batch_size = data.arrays.streams["train"], config.data.context, config.loader.batch_size
    matrices = [weight for weight in network.parameters() if weight.ndim >= 2]
    others = [weight for weight in network.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    num_steps = 0

    def batch() -> tuple[Tensor, Tensor]:
        places = torch.randint(len(stream) - context, (batch_size,))
        x, y = (
            torch.stack([torch.from_numpy(stream[i + k : i + k + context].astype(np.int64)) for i in places])
            for k in (0, 1)
        )
        return x, y

    def step() -> None:
        nonlocal num_steps
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (num_steps + 1) / 101)
        num_steps += 1
        x, y = batch()
        logits = network(x)
        F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class _Turns(L.Callback):
    """Stops the framework's clock every so many steps, and lets the bare loop have as many."""

    def __init__(self, num_steps: int, bare_step: Callable[[], None], num_turns: int) -> None:
        self._num_steps, self._bare_step, self._num_turns = num_steps, bare_step, num_turns
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._start = None

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if module.step % self._num_steps:
            return
        now = time.perf_counter()
        if self._start is not None:
            self.ours.append((now - self._start) / self._num_steps)
            begin = time.perf_counter()
            for _ in range(self._num_steps):
                self._bare_step()
            self.theirs.append((time.perf_counter() - begin) / self._num_steps)
            trainer.should_stop = len(self.ours) >= self._num_turns
        self._start = time.perf_counter()


def _bare_step(config: DictConfig, data: ArrayData) -> Callable[[], None]:
    """One step as a script would write it: index a tensor in memory, loss, backward, optimizer."""
    torch.manual_seed(0)
    model = build_model(config.model, data.spec, "bare")
    images = torch.from_numpy(np.array(data.arrays.splits["train"].x))
    noise, batch_size = StreamNoise(0), config.loader.batch_size

    def batch() -> Batch:
        index = torch.randint(len(images), (batch_size,))
        return Batch(images[index].float().div_(127.5).sub_(1))

    def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if not isinstance(model, Adversarial):
        optimizer = build(config.optim)(model.parameters())
        return lambda: descend(optimizer, model.loss(batch(), generator=noise)["loss"].mean())

    make = build(config.optim)
    generator, discriminator = model.players()
    generator_optimizer = make["generator"](generator.parameters())
    discriminator_optimizer = make["discriminator"](discriminator.parameters())

    def step() -> None:
        some = batch()
        descend(discriminator_optimizer, model.discriminator_loss(some, generator=noise)["loss"].mean())
        discriminator.requires_grad_(False)
        descend(generator_optimizer, model.generator_loss(some, generator=noise)["loss"].mean())
        discriminator.requires_grad_(True)

    return step


def _bare_game(config: DictConfig, data: ArrayData, judge: Judge, fool: Fool) -> Callable[[], None]:
    """One step of a game with a penalty as a script would write it: nothing of ours but the networks."""
    torch.manual_seed(0)
    model = build_model(config.model, data.spec, "bare")
    generator, discriminator = model.generator, model.discriminator.network
    make = build(config.optim)
    generator_optimizer = make["generator"](generator.parameters())
    discriminator_optimizer = make["discriminator"](discriminator.parameters())
    images = torch.from_numpy(np.array(data.arrays.splits["train"].x))
    batch_size, n_critic = config.loader.batch_size, config.training.n_critic
    num_steps = 0

    def drawn() -> Tensor:
        return torch.tanh(generator(torch.randn(batch_size, config.model.latent_dim)))

    def step() -> None:
        nonlocal num_steps
        num_steps += 1
        real = images[torch.randint(len(images), (batch_size,))].float().div_(127.5).sub_(1)
        with torch.no_grad():
            fake = drawn()
        discriminator_optimizer.zero_grad()
        judge(discriminator, real, fake).backward()
        discriminator_optimizer.step()
        if num_steps % n_critic == 0:
            discriminator.requires_grad_(False)
            generator_optimizer.zero_grad()
            fool(discriminator, real.detach(), drawn()).backward()
            generator_optimizer.step()
            discriminator.requires_grad_(True)

    return step


def _bare_matching(config: DictConfig, data: ArrayData) -> Callable[[], None]:
    """One step of flow matching as a script would write it: nothing of ours but the network."""
    torch.manual_seed(0)
    network = build_model(config.model, data.spec, "bare").network
    optimizer = build(config.optim)(network.parameters())
    images = torch.from_numpy(np.array(data.arrays.splits["train"].x))
    batch_size, clip_norm = config.loader.batch_size, config.training.gradient_clip_norm
    mean, std = images.float().mean(), images.float().std()

    def step() -> None:
        levels = images[torch.randint(len(images), (batch_size,))].float()
        x1 = (levels + torch.rand_like(levels) - 0.5 - mean) / std
        x0, t = torch.randn_like(x1), torch.rand(batch_size)
        each = t[:, None, None, None]
        optimizer.zero_grad()
        (network(each * x1 + (1 - each) * x0, t) - (x1 - x0)).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()

    return step


def _judge_wgan_gp(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    u = torch.rand(len(real), 1, 1, 1)
    between = (u * real + (1 - u) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return discriminator(fake).mean() - discriminator(real).mean() + 10 * penalty


def _fool_wgan_gp(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return -discriminator(fake).mean()


def _judge_r3gan(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    real.requires_grad_()
    fake.requires_grad_()
    on_real, on_fake = discriminator(real), discriminator(fake)
    loss = F.softplus(on_fake - on_real).mean()
    for x, logit in ((real, on_real), (fake, on_fake)):
        (slope,) = torch.autograd.grad(logit.sum(), x, create_graph=True)
        loss = loss + 0.5 * slope.square().sum((1, 2, 3)).mean()
    return loss


def _fool_r3gan(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    with torch.no_grad():
        on_real = discriminator(real)
    return F.softplus(on_real - discriminator(fake)).mean()


BARE: dict[str, tuple[Judge, Fool]] = {
    "wgan_gp": (_judge_wgan_gp, _fool_wgan_gp),
    "r3gan": (_judge_r3gan, _fool_r3gan),
}


def _epoch_ratio(root: Path, num_turns: int) -> tuple[float, float, float]:
    """Milliseconds of an MNIST epoch by the framework and by the plain loop, and the median ratio, per batch seen."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    config = compose_config("model=vae", "data=mnist", f"data.root={root}", "trainer.limit_val_batches=0")
    data = ArrayData(build(config.data), seed=0, **build(config.loader))
    loader = DataLoader(MNIST(str(root), train=True, transform=ToTensor()), batch_size=128, shuffle=True)
    ours, theirs = [], []
    for _ in range(num_turns):
        epoch = _EpochClock()
        _fit(config, data, [epoch], max_epochs=1)
        ours.append(epoch.seconds / epoch.num_steps)
        theirs.append(_plain_epoch(config, data.spec, loader) / len(loader))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return 1000 * statistics.median(ours) * len(loader), 1000 * statistics.median(theirs) * len(loader), ratio


class _EpochClock(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._start
        self.num_steps = module.step


def _plain_epoch(config: DictConfig, spec: DataSpec, loader: DataLoader) -> float:
    """Seconds of one epoch of the loop that tutorials show."""
    model: nn.Module = build_model(config.model, spec, "plain")
    optimizer = build(config.optim)(model.parameters())
    noise = StreamNoise(0)
    start = time.perf_counter()
    for x, _ in loader:
        optimizer.zero_grad()
        loss = model.loss(Batch(2 * x - 1), generator=noise)["loss"].mean()
        loss.backward()
        optimizer.step()
        loss.item()
    return time.perf_counter() - start


def _fit(config: DictConfig, data: ArrayData, callbacks: list[L.Callback], max_epochs: int = 10**6) -> None:
    model = build_model(config.model, data.spec, "framework")
    module = make_training_module(model, build(config.optim), build(config.training), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        bar = build(config.callback.progress)(console=Console(force_terminal=True, file=io.StringIO()))
        logger = TensorBoardLogger(folder)
        trainer_config = build(config.trainer) | {"accelerator": "cpu", "max_epochs": max_epochs, "limit_val_batches": 0}
        trainer = make_trainer(Path(folder), [bar, *callbacks], [logger], **trainer_config)
        trainer.fit(module, datamodule=data)


def _random_images(count: int) -> Arrays:
    x = np.random.default_rng(0).integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)
    split = Split(x, None)
    spec = DataSpec("random", "image", (1, 28, 28), image_values("discrete", 256))
    return Arrays(spec, 256, {"train": split, "val": split, "test": split}, "random")


def _random_text(context: int) -> Arrays:
    stream = np.random.default_rng(0).integers(0, 65, 1_000_000, dtype=np.uint16)
    split = Split(TokenWindows(stream, context), None)
    spec = DataSpec("random", "tokens", (context + 1,), Values(DISCRETE, low=0, high=64, levels=65))
    return Arrays(spec, 65, {"train": split, "val": split, "test": split}, "random")


if __name__ == "__main__":
    main()
