import copy

import numpy as np
import pytest
import torch
from PIL import Image

from detection.plots import plot_curves, plot_predictions


def make_log(num_epochs: int, *, spiking: bool = True) -> list[dict]:
    log = []
    for epoch in range(1, num_epochs + 1):
        line = {
            "epoch": epoch,
            "loss": 2 / epoch,
            "loss/classification": 1 / epoch,
            "AP": 0.1,
            "AP50": 0.2,
            "AP75": 0.1,
        }
        if spiking:
            layers = {f"layer{index}": 0.1 * index for index in range(1, 6)}
            line |= {"activity": 0.2, "activity_per_layer": layers, "v_th": layers, "extremum": layers}
        log.append(line)
    return log


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("num_epochs", [1, 40])
def test_curves_are_1200_pixels_wide_and_a_twin_has_fewer_panels(tmp_path, num_epochs):
    plot_curves(make_log(num_epochs), tmp_path / "spiking.png")
    plot_curves(make_log(num_epochs, spiking=False), tmp_path / "twin.png")
    spiking, twin = pixels(tmp_path / "spiking.png"), pixels(tmp_path / "twin.png")
    assert spiking.shape[1] == twin.shape[1] == 1200
    assert twin.shape[0] < spiking.shape[0]


def test_an_empty_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to plot in 0 epochs"):
        plot_curves([], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_boxes_change_the_picture_and_the_inputs_stay(tmp_path):
    images = [torch.full((3, 60, 80), 0.5), torch.full((3, 40, 40), 0.2)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}, no_boxes()]
    predictions = [{**targets[0], "scores": torch.tensor([0.9])}, {**no_boxes(), "scores": torch.zeros(0)}]
    before = copy.deepcopy((images, predictions, targets))
    plot_predictions(images, predictions, targets, ["cell"], tmp_path / "boxes.png")
    empty = [{**no_boxes(), "scores": torch.zeros(0)} for _ in images]
    plot_predictions(images, empty, [no_boxes(), no_boxes()], ["cell"], tmp_path / "none.png")
    with_boxes, without = pixels(tmp_path / "boxes.png"), pixels(tmp_path / "none.png")
    assert with_boxes.shape == without.shape
    assert (with_boxes != without).any(axis=2).sum() > 200
    for now, then in zip((*predictions, *targets), (*before[1], *before[2]), strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)
    assert all(torch.equal(now, then) for now, then in zip(images, before[0], strict=True))


def test_a_prediction_below_the_threshold_is_not_drawn(tmp_path):
    image, box = (
        [torch.full((3, 60, 80), 0.5)],
        {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])},
    )
    for score in (0.1, 0.2):
        plot_predictions(
            image, [{**box, "scores": torch.tensor([score])}], [no_boxes()], ["cell"], tmp_path / f"{score}.png"
        )
    plot_predictions(image, [{**box, "scores": torch.tensor([0.9])}], [no_boxes()], ["cell"], tmp_path / "high.png")
    assert (pixels(tmp_path / "0.1.png") == pixels(tmp_path / "0.2.png")).all()
    assert (pixels(tmp_path / "0.1.png") != pixels(tmp_path / "high.png")).any()


def no_boxes() -> dict[str, torch.Tensor]:
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
