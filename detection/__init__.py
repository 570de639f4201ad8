"""Object detection with one-time-step spiking networks, on torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from detection.checkpoint import Weights
    from detection.predict import Predictor


def load(run: str | Path, weights: Weights = "last", device: str | torch.device | None = None) -> Predictor:
    """A saved run, ready to be asked: `detection.load("runs/demo").predict("image.jpg")`.

    Args:
        run: run folder of a detector or a classifier (which gives a `ClassPredictor`), or "zoo:NAME" for a network
            that comes with the package (`backbones.zoo.names()`).
        weights: "last", "best" or "ema".
        device: such as "cpu" or "cuda:0"; None: the first GPU, if there is one.

    Raises:
        FileNotFoundError: no such run or weights.
        ValueError: the weights are damaged or do not fit, or there is no such device or entry of the zoo.
    """
    # Here and not above: `import detection` alone loads neither torch nor matplotlib.
    from detection.checkpoint import Run
    from detection.predict import make_predictor

    return make_predictor(Run.open(run), weights, device)
