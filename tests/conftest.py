"""Fixtures that several test files use."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from tests.commands import Trained, train
from tests.composition import remember_compositions
from tests.configs import is_of_another

remember_compositions()
torch.set_num_threads(1)  # the tensors are tiny: threads that wait for each other cost more than they help


@pytest.fixture
def float64() -> Iterator[None]:
    """Inside the test, new tensors and networks are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def same_weights() -> None:
    """Networks built in the test have the same initial weights in every session."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for prepared data and what is computed of it, so that each is made once for all tests."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """`trained("vae")`: a short real training of a model on digits, done once. Look at it, leave it as it is."""

    @lru_cache
    def of(model: str) -> Trained:
        given = (f"autoencoder={of('autoencoder').run.path}",) if is_of_another(model) else ()
        return train(tmp_path_factory.mktemp("runs") / model, cache, f"model={model}", *given)

    return of
