"""Which of a run's processes this is, read from the environment that its launcher made; nothing heavy is imported."""

import os

__all__ = ["global_rank"]


def global_rank() -> int:
    """0 in the process that claims, writes and speaks for a run; 1, 2, ... in the others.

    Sources, in turn: RANK (torchrun); SLURM_PROCID, if srun started several tasks that are not those of an interactive
    shell; NODE_RANK and LOCAL_RANK (Lightning's launcher starts one process per device with it, on each machine; the first
    of the first machine has none or 0). Lightning knows how many devices a machine has only later, so behind the first
    machine the number counts processes of this kind as if there were one device a machine: it says which process is the
    first, not which one of the others this is.
    """
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["RANK"])
    is_interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment and not is_interactive:
        return int(environment["SLURM_PROCID"])
    node_rank = environment.get("NODE_RANK", environment.get("GROUP_RANK", 0))
    return int(environment.get("LOCAL_RANK", 0)) + int(node_rank)
