"""Which of a run's processes this is, read from the environment that its launcher made; nothing heavy is imported."""

import os

__all__ = ["global_rank", "launched_processes"]


def global_rank() -> int:
    """0 in the process that claims, writes and speaks for a run; 1, 2, ... in the others.

    Sources, in turn: RANK of torchrun; SLURM_PROCID, if srun started several tasks that are not those of an interactive
    shell; NODE_RANK and LOCAL_RANK of Lightning's launcher, which starts the other processes of each machine. It does not
    say how many each machine has, so behind the first machine the number tells the first process from the others, but not
    these from each other.
    """
    environment = os.environ
    if _is_torchrun():
        return int(environment["RANK"])
    if _is_srun():
        return int(environment["SLURM_PROCID"])
    node_rank = environment.get("NODE_RANK", environment.get("GROUP_RANK", 0))
    return int(environment.get("LOCAL_RANK", 0)) + int(node_rank)


def launched_processes() -> int:
    """Processes that torchrun or srun started for this run; 1 if neither did."""
    if _is_torchrun():
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ["SLURM_NTASKS"]) if _is_srun() else 1


def _is_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE"} <= set(os.environ)


def _is_srun() -> bool:
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ and not is_interactive
