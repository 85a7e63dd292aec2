"""Draw from a run: `python -m src.sample run=outputs/... n=64 seed=0` writes PNG files and a grid."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from src.cli import run_entry_point
from src.core.errors import UserError, require_at_least
from src.runs import Run

log = logging.getLogger(__name__)


def sample(config: DictConfig) -> None:
    """Write n samples; sample i depends on the seed and i alone."""
    import torch
    from torchvision.utils import save_image

    from src.core.protocols import CanSample
    from src.evaluation.protocol import draw_samples, spread_classes
    from src.experiment import load_data, load_trained_model
    from src.training.callbacks.pictures import image_grid

    run = Run.open(Path(config.run))
    of_run = run.config()
    spec = load_data(of_run).spec
    model, about = load_trained_model(run, of_run, spec, config.checkpoint)
    if not isinstance(model, CanSample):
        raise UserError(f"model={of_run.name.model} draws no samples (it has no CanSample); sample a model that does")
    device = next(model.parameters()).device
    condition = spread_classes(spec, config.n, device) if model.is_conditional else None
    batches = draw_samples(model, config.n, config.batch_size, config.seed, condition)
    samples = torch.cat(list(batches))

    folder = Path(config.out) if config.out else run.samples / f"drawn_seed{config.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    width = len(str(config.n - 1))
    for i, image in enumerate(spec.to_bytes(samples).cpu()):
        save_image(image / 255, folder / f"{i:0{width}d}.png")
    per_row = spec.num_classes if condition is not None else 8
    save_image(image_grid(spec, samples, per_row) / 255, folder / "grid.png")
    log.info(f"{config.n} samples of the {about['checkpoint']} checkpoint ({about['weights']} weights) in {folder}")


def _check(config: DictConfig) -> None:
    Run.open(Path(config.run))
    for key in ("n", "batch_size"):
        require_at_least(key, config[key], 1)


def main() -> None:
    run_entry_point("sample", sample, _check)


if __name__ == "__main__":
    main()
