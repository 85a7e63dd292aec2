"""The reference store: what was computed of known images, kept on disk, and found again by what it depends on.

A file's name is a hash of its key: the images (by the hash of their bytes and how they were turned into bytes), the
extractor (by the hash of its weights), and the settings. Changed data or weights give another key, so nothing stale is
ever served. What is computed of a model's samples stays in memory.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from src.metrics.features import Extractor, Features, ImageSet
from src.metrics.tensor_files import read_tensors, write_tensors

__all__ = ["Store"]

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

_VERSION = 1  # raise it when a kept quantity is computed differently: what was kept before is then never found


class Store:
    """Quantities of sets of images, each computed once.

    Args:
        folder: where they are kept; None keeps them in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, Tensors] = {}
        self._held: list[ImageSet] = []  # so that no other set gets the identity of one that is gone
        self.num_computed = 0

    def features(self, images: ImageSet, extractor: Extractor) -> Features:
        """What an extractor says of all images."""

        def make() -> Tensors:
            features = images.features(extractor)
            tensors = {"features": features.features, "logits": features.logits}
            return tensors | ({} if features.labels is None else {"labels": features.labels})

        found = self.get("features", images, extractor, {}, make, keep=extractor.is_worth_keeping)
        return Features(found["features"], found["logits"], found.get("labels"))

    def get(
        self,
        what: str,
        images: ImageSet,
        extractor: Extractor | None,
        settings: dict[str, Any],
        make: Callable[[], Tensors],
        keep: bool = True,
    ) -> Tensors:
        """A quantity of a set of images, computed by `make` unless it is known.

        Args:
            what: its name.
            images: the set; what is computed of a set without an identity is not kept on disk.
            extractor: what it is seen through, if anything.
            settings: what else the quantity depends on, as plain JSON types.
            make: computes it, as tensors by name.
            keep: False keeps it in memory only.
        """
        depends: dict[str, Any] = {"version": _VERSION, "what": what, "settings": settings}
        depends["images"] = self._identity(images)
        if extractor is not None:
            depends["extractor"] = {"name": extractor.name, "sha256": extractor.sha256}
        return self._get(what, depends, make, keep and images.identity is not None)

    def of(self, what: str, identity: dict[str, Any], make: Callable[[], Tensors]) -> Tensors:
        """A quantity of data other than images, computed by `make` unless it is known.

        Args:
            what: its name.
            identity: all that it depends on, as plain JSON types, as the hash of the data.
            make: computes it, as tensors by name.
        """
        return self._get(what, {"version": _VERSION, "what": what, "identity": identity}, make, keep=True)

    def _get(self, what: str, depends: dict[str, Any], make: Callable[[], Tensors], keep: bool) -> Tensors:
        key = json.dumps(depends, sort_keys=True)
        if key not in self._memory:
            is_kept = keep and self._folder is not None
            self._memory[key] = self._on_disk(what, key, make) if is_kept else self._computed(make)
        return self._memory[key]

    def _identity(self, images: ImageSet) -> Any:
        if images.identity is not None:
            return images.identity
        if not any(images is held for held in self._held):
            self._held.append(images)
        return id(images)

    def _computed(self, make: Callable[[], Tensors]) -> Tensors:
        self.num_computed += 1
        return make()

    def _on_disk(self, what: str, key: str, make: Callable[[], Tensors]) -> Tensors:
        assert self._folder is not None
        file = self._folder / f"{what}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.safetensors"
        if file.is_file():
            try:
                return _read(file, key)
            except (OSError, ValueError) as error:
                log.warning(f"{file} is damaged ({error}); it is computed anew")
        tensors = self._computed(make)
        try:
            write_tensors(file, tensors, key)
        except OSError as error:
            log.warning(f"{file} cannot be written ({error}); it will be computed again")
        return tensors


def _read(file: Path, key: str) -> Tensors:
    tensors, found_key = read_tensors(file)
    if found_key != key:
        raise ValueError("it is of something else")
    return tensors
