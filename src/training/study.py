"""The study of a search: where it lies, and when it gives a training up. Optuna is imported when it is needed.

Both the search and each of its trainings open the study, so a study lies where all of them reach it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from src.core.errors import UserError

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import BaseStorage

__all__ = ["PRUNERS", "is_url", "make_pruner", "open_storage", "shown_storage"]

PRUNERS = ("none", "median", "halving")


def is_url(storage: str) -> bool:
    """Whether a storage is a data base; otherwise it is the path of a journal file."""
    return "://" in storage


def open_storage(storage: str, may_write: bool = True) -> "BaseStorage":
    """The storage, made if it is not there. Raises `UserError` for a file that is something else.

    Args:
        storage: URL of a data base, as "sqlite:////home/me/study.db", or path of a journal file, which many processes may
            write to, on file systems of several machines, too.
        may_write: take away half a line that a killed process has left in a journal.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if is_url(storage):
            return optuna.storages.get_storage(storage)
        _require_journal(Path(storage))
        if may_write:
            _drop_half_a_line(Path(storage))
        return optuna.storages.JournalStorage(JournalFileBackend(storage))
    except UserError:
        raise
    except Exception as error:  # drivers of data bases raise many kinds
        raise UserError(f"the study's storage {shown_storage(storage)} cannot be opened ({error})") from error


def shown_storage(storage: str) -> str:
    """A storage as it may be printed: without its password."""
    if not is_url(storage):
        return storage
    try:
        from sqlalchemy.engine import make_url

        return make_url(storage).render_as_string(hide_password=True)
    except Exception:  # noqa: BLE001 - it is no URL, or there is no SQLAlchemy: its opening says so
        return storage.partition("://")[0] + "://..."


def _require_journal(file: Path) -> None:
    """Raise `UserError` if a file holds something else than the records of a study."""
    if not file.exists() or file.stat().st_size == 0:
        return
    with open(file, "rb") as content:
        first = content.readline(1_000_000)
    try:
        is_journal = "op_code" in json.loads(first)
    except (ValueError, TypeError):
        is_journal = False
    if not is_journal:
        raise UserError(f"{file} is no journal of a study, and is left as it is; a data base is named as sqlite:///FILE")


def _drop_half_a_line(journal: Path) -> None:
    """Take away what a process had begun to write when it was killed; what follows it could not be read."""
    from optuna.storages.journal import JournalFileSymlinkLock

    if not journal.exists() or _ends_with_a_line(journal):
        return
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()  # nobody writes now
    try:
        if not _ends_with_a_line(journal):
            content = journal.read_bytes()
            with open(journal, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _ends_with_a_line(journal: Path) -> bool:
    with open(journal, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def make_pruner(name: str, n_startup_trials: int, n_warmup_epochs: int) -> "BasePruner":
    """What compares a training with others at the same epoch.

    Args:
        name: "median" gives up what is worse than the median of the finished trials (Golovin et al. 2017, "Google Vizier");
            "halving" all but the best quarter at epochs that grow fourfold (Li et al. 2018, arXiv:1810.05934).
        n_startup_trials: trials that must have finished; of "median" only.
        n_warmup_epochs: before which none is given up; 0: for "halving" Optuna chooses.
    """
    import optuna

    match name:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials, n_warmup_epochs)
        case "halving":
            return optuna.pruners.SuccessiveHalvingPruner(n_warmup_epochs or "auto")
        case "none":
            return optuna.pruners.NopPruner()
    raise UserError(f"hydra.sweeper.pruner={name} is not known; allowed: {', '.join(PRUNERS)}")
