"""From prepared arrays to batches: whole batches gathered by index, drawn values, and the Lightning data module.

A sampler hands out `Draw`s, one a batch. What is random about an example (binarization, dequantization, the place of a
window of text) is a function of (seed, epoch, example), so it does not depend on the batch size, the number of workers or
what was drawn before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from src.core.batch import Batch
from src.core.errors import UserError, require_at_least
from src.core.rng import derive_seed, hash_bits
from src.core.spec import BINARY_DYNAMIC, CONTINUOUS, DISCRETE
from src.data.arrays import Arrays
from src.data.token_windows import TokenWindows

__all__ = ["ArrayData"]

_HELD_OUT_EPOCH = -1  # held-out data is drawn once, whatever the epoch
_DRAWN_ONCE_SEED = 0  # and the same in every run, so that all runs are measured on the same data
_SPLITS = ("train", "val", "test")
_RAW = (torch.uint8, torch.int16)  # levels, or samples of sound; what is drawn is in data units already


class ArrayData(L.LightningDataModule):
    """Loaders over prepared arrays.

    Args:
        arrays: the prepared data set.
        batch_size: examples in a training batch, on each device.
        eval_batch_size: examples in a batch without gradients.
        num_workers: processes that gather batches beside the training process; 0 gathers in it, which is fastest for
            arrays in memory.
        seed: seed of the shuffling and of drawn values.
    """

    def __init__(self, arrays: Arrays, batch_size: int, eval_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        require_at_least("loader.batch_size", batch_size, 1)
        require_at_least("loader.eval_batch_size", eval_batch_size, 1)
        require_at_least("loader.num_workers", num_workers, 0)
        self.arrays = arrays
        self.spec = arrays.spec
        self.batch_size = batch_size
        self._eval_batch_size = eval_batch_size
        self._num_workers = num_workers
        self._seed = seed
        self._train_sampler: _ShuffledDraws | None = None
        self._place: dict[str, int] | None = None  # where the training goes on

    def train_dataloader(self) -> DataLoader:
        """Batches of this rank; an epoch has a whole number of them for every update of the weights."""
        rank, world_size = self._rank_of_all()
        module = getattr(self.trainer, "lightning_module", None)
        per_update = getattr(module, "accumulate_batches", 1)  # a module that accumulates gradients has it
        num_examples = len(self.arrays.splits["train"])
        batch_size = self.training_batch_size(world_size, per_update)
        if batch_size == 0:
            raise UserError(
                f"data={self.spec.name} has {num_examples} training examples, fewer than one for each of {world_size} "
                f"devices and training.accumulate_batches={per_update} batches"
            )
        sampler = _ShuffledDraws(num_examples, batch_size, derive_seed(self._seed, 1), rank, world_size, per_update)
        if self._place is not None:
            sampler.go_on(**self._place)
            self._place = None
        self._train_sampler = sampler
        return self._loader("train", sampler)

    def training_batch_size(self, world_size: int, per_update: int) -> int:
        """Examples in a training batch of each device: `batch_size`, or fewer where the data are too few for that."""
        return min(self.batch_size, len(self.arrays.splits["train"]) // (world_size * per_update))

    def state_dict(self) -> dict[str, int]:
        """The place in the training data, for a checkpoint: what was trained on, whatever workers have gathered ahead."""
        if self.trainer is None or self._train_sampler is None:
            return {}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done >= self.trainer.num_training_batches:  # trainer.limit_train_batches= ends an epoch early
            return {"epoch": self._train_sampler.epoch + 1, "batches_done": 0}
        return {"epoch": self._train_sampler.epoch, "batches_done": done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._place = state_dict or None

    def val_dataloader(self) -> DataLoader:
        """This rank's share of the validation examples: none is in two shares, and none is missing."""
        return self.held_out_loader("val", torch.arange(*self._val_share()))

    def first_val_example(self, batch_idx: int) -> int:
        """The place in the validation split where a batch of this rank's share begins."""
        return self._val_share()[0] + batch_idx * self._eval_batch_size

    def _val_share(self) -> tuple[int, int]:
        rank, world_size = self._rank_of_all()
        num_examples = len(self.arrays.splits["val"])
        return rank * num_examples // world_size, (rank + 1) * num_examples // world_size

    def _rank_of_all(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def held_out_loader(self, split: str, index: Tensor | None = None) -> DataLoader:
        """Batches of a split ("train", "val" or "test"), each value drawn once: in order, or those of an index `(N,)`."""
        index = torch.arange(len(self.arrays.splits[split])) if index is None else index
        return self._loader(split, _OrderedDraws(index, self._eval_batch_size))

    def held_out_points(self) -> Tensor:
        """All validation examples at once `(N, *event)`, in data units, where they are vectors."""
        assert self.spec.modality == "vector"
        return torch.from_numpy(np.array(self.arrays.splits["val"].x))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.to_units(batch)

    def to_units(self, batch: Batch) -> Batch:
        """A batch straight from a loader, in data units."""
        return batch.with_x(self.spec.to_units(batch.x)) if batch.x.dtype in _RAW else batch

    def _loader(self, split: str, sampler: Sampler) -> DataLoader:
        return DataLoader(
            _Gather(self.arrays, split, self._seed),
            batch_size=None,  # the sampler hands out whole batches
            sampler=sampler,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # or every pass would draw a number from the global one
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


@dataclass(frozen=True)
class Draw:
    """The examples of one batch, and the epoch they are drawn in."""

    epoch: int
    index: Tensor  # (B,) int64


class _Gather(Dataset):
    """Batches of one split, by `Draw`."""

    def __init__(self, arrays: Arrays, split: str, seed: int) -> None:
        self._values = arrays.spec.values
        self._is_of_tokens = arrays.spec.modality == "tokens" and arrays.spec.sound is None  # not of sounds in 16 bits
        self._source_levels = None if self._is_of_tokens else arrays.source_levels
        self._split = arrays.splits[split]
        self._seed, self._once_seed = (derive_seed(s, 2, _SPLITS.index(split)) for s in (seed, _DRAWN_ONCE_SEED))

    def __getitem__(self, draw: Draw) -> Batch:
        index = draw.index.numpy()
        x = self._tokens(draw) if self._is_of_tokens else torch.from_numpy(self._split.x[index])
        condition = None if self._split.y is None else torch.from_numpy(self._split.y[index])
        if self._source_levels is not None:
            x = self._draw_values(x, self._source_levels, draw)
        return Batch(x, condition)

    def _tokens(self, draw: Draw) -> Tensor:
        """Tokens `(B, T)` int64; in training, windows of a stream begin anywhere in it."""
        x, index = self._split.x, draw.index
        if isinstance(x, TokenWindows) and draw.epoch != _HELD_OUT_EPOCH:
            words = hash_bits(derive_seed(self._seed, draw.epoch), index, 1)[:, 0]
            return torch.from_numpy(x.beginning_at((words % x.num_places).numpy()))
        return torch.from_numpy(x[index.numpy()].astype(np.int64))

    def _draw_values(self, levels: Tensor, num_levels: int, draw: Draw) -> Tensor:
        kind = self._values.kind
        if kind == DISCRETE:
            return levels
        is_fresh = kind in (BINARY_DYNAMIC, CONTINUOUS) and draw.epoch != _HELD_OUT_EPOCH
        seed, epoch = (self._seed, draw.epoch) if is_fresh else (self._once_seed, _HELD_OUT_EPOCH)
        u = _uniform16(seed, epoch, draw.index, levels[0].numel())
        u = u.view(levels.shape)
        if levels.dtype == torch.int16:  # of sound; 9 bits for the place in the bin, since float32 is exact to 24
            return ((levels + (u // 256 + 0.5) / 256) / 32768)[:, None]
        if kind == CONTINUOUS:  # uniform dequantization: a level becomes a value anywhere in its bin
            # with 15 bits the sum is exact in float32, so that none rounds into the next bin
            unit = (levels + (u // 2 + 0.5) / 32768) / num_levels
            return self._values.low + (self._values.high - self._values.low) * unit
        # P(1) = level / (levels - 1), to within 2^-16
        return (u * (num_levels - 1) < levels.long() * 65536).to(torch.uint8)


def _uniform16(seed: int, epoch: int, index: Tensor, count: int) -> Tensor:
    """Integers uniform on 0 .. 65535, `(B, count)` int64, a function of (seed, epoch, index)."""
    words = hash_bits(derive_seed(seed, epoch), index, (count + 3) // 4)
    quarters = words.numpy().view(np.uint16)
    return torch.from_numpy(quarters[:, :count].astype(np.int64))


class _ShuffledDraws(Sampler):
    """One epoch of full batches in an order that is a function of (seed, epoch); ranks take turns.

    With per_update batches for every update of the weights an epoch is a multiple of them, as long as one of batches of
    their joint size.
    """

    def __init__(
        self, num_examples: int, batch_size: int, seed: int, rank: int, world_size: int, per_update: int = 1
    ) -> None:
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._per_update = per_update
        self.epoch = 0
        self._first_batch = 0  # of the next pass; later ones start at 0

    def go_on(self, epoch: int, batches_done: int) -> None:
        """Begin the next pass behind so many batches of an epoch; behind all of them is at the start of the next one."""
        epochs, self._first_batch = divmod(batches_done, len(self))
        self.epoch = epoch + epochs

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch; for a resumed one with workers too late, they have gathered by then."""
        self.epoch = epoch

    def __len__(self) -> int:
        num_updates = self._num_examples // (self._batch_size * self._world_size * self._per_update)
        return num_updates * self._per_update

    def __iter__(self) -> Iterator[Draw]:
        shuffle = torch.Generator().manual_seed(derive_seed(self._seed, self.epoch))
        order = torch.randperm(self._num_examples, generator=shuffle)
        first_batch, self._first_batch = self._first_batch, 0
        for i in range(first_batch, len(self)):
            first = (i * self._world_size + self._rank) * self._batch_size
            yield Draw(self.epoch, order[first : first + self._batch_size])


class _OrderedDraws(Sampler):
    """Every example of an index once, in order; the last batch may be smaller. An empty index is one empty batch."""

    def __init__(self, index: Tensor, batch_size: int) -> None:
        self._index = index
        self._batch_size = batch_size

    def __len__(self) -> int:
        return max(1, -(-len(self._index) // self._batch_size))

    def __iter__(self) -> Iterator[Draw]:
        for index in self._index.split(self._batch_size):
            yield Draw(_HELD_OUT_EPOCH, index)


def _as_it_is(batch: Any) -> Any:
    return batch
