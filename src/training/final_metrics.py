"""The final metrics in TensorBoard: as scalars, as a table, and in an entry of the HPARAMS page."""

from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

__all__ = ["log_final_metrics", "log_hyper_parameters"]


def log_final_metrics(
    loggers: list[Logger], metrics: dict[str, float], table: str, step: int, pictures: dict[str, Tensor] | None = None
) -> None:
    """Write `final/<metric>` curves of one point, all results as a Markdown table, and pictures of some.

    Args:
        metrics: final values by name.
        table: shown on TensorBoard's TEXT page.
        step: the step they belong to.
        pictures: `(3, height, width)` uint8, by name.
    """
    for logger in loggers:
        logger.log_metrics(_named(metrics), step=step)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("results", table, step)
            for name, picture in (pictures or {}).items():
                logger.experiment.add_image(f"final/{name}", picture, step)
        logger.finalize("success")


def log_hyper_parameters(loggers: list[Logger], hyper_parameters: dict[str, Any], metrics: dict[str, float]) -> None:
    """Write the HPARAMS entry of a run: what it was made with beside what came out.

    What the columns are is left to TensorBoard, which shows first what differs between the runs that it is given. (A
    summary of the experiment in one run would make its settings and metrics the columns of all.)

    Args:
        hyper_parameters: nested plain types; flattened to `a.b.c`. What is no number, text or truth value, and how
            things are built (`_partial_`), is left out.
        metrics: final values by name.
    """
    flat = dict(_flatten(hyper_parameters, ""))
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            _, start, end = hparams(flat, _named(metrics))
            for summary in (start, end):
                logger.experiment._get_file_writer().add_summary(summary)


def _named(metrics: dict[str, float]) -> dict[str, float]:
    return {f"final/{name}": value for name, value in metrics.items()}


def _flatten(node: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in _flatten(value, f"{path}.{key}" if path else str(key))]
    if isinstance(node, list):
        return [(path, str(node))]
    is_shown = isinstance(node, (int, float, str, bool)) and not path.endswith("._partial_")
    return [(path, node)] if is_shown else []
