"""Our launchers and sweepers under the name that Hydra looks for plugins by: it takes none from another package."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from src.launchers.local import LocalJobs
from src.launchers.ray import RayJobs
from src.launchers.slurm import SlurmJobs
from src.search import Search

__all__ = ["GridSweeper", "LocalLauncher", "OptunaSweeper", "RayLauncher", "SlurmLauncher"]


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper; our launchers compose every job before they start one, so it need not do so, too.

    Args:
        params: further overrides, as in `{seed: "0,1,2"}`.
    """

    def __init__(self, params: dict[str, str] | None) -> None:
        super().__init__(max_batch_size=None, params=params)

    def validate_batch_is_legal(self, batch: object) -> None: ...


class LocalLauncher(LocalJobs): ...


class RayLauncher(RayJobs): ...


class SlurmLauncher(SlurmJobs): ...


class OptunaSweeper(Search): ...
