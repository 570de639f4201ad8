#!/usr/bin/env python3
"""Draw results/full_width.png from the logs: what the networks of full width reach, beside their analogue twins."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from detection.runs import Run

VGG16 = {"Hoyer": "c5_cifar10_vgg16/hoyer_150_epochs", "analogue twin": "c5_cifar10_vgg16/relu_150_epochs"}
VOC = {
    "analogue": "relu",
    "the same, pretrained for longer": "relu_imagenette",
    "spikes in the backbone,\npotentials into the pyramid": "membrane",
    "spikes in the backbone": "spikes",
    "these, pretrained for longer": "spikes_imagenette",
    "with three thresholds besides": "thresholds3_imagenette",
    "spikes to the last layer,\nwith a teacher": "spiking_taught",
}
FIRST = 60  # epoch: averages are far behind before


def main() -> None:
    """Draw both parts beside each other."""
    folder = Path(__file__).parent
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(3, 2), layout="constrained")
    for (name, run), colour in zip(VGG16.items(), ("tab:blue", "tab:gray"), strict=True):
        lines = [line for line in Run.open(folder / run).history() if "top1" in line.metrics and line.epoch >= FIRST]
        epochs = [line.epoch for line in lines]
        left.plot(epochs, [line.ema.metrics["top1"] for line in lines], ".-", color=colour, label=f"{name}, averaged")
        left.plot(epochs, [line.metrics["top1"] for line in lines], ".--", color=colour, label=f"{name}, last", lw=1)
    left.set(xlabel="epoch", ylabel="top-1", title="VGG16, CIFAR-10 (JPEG)")
    left.legend(frameon=False)
    values = [
        Run.open(folder / "c6_voc_retinanet_resnet18" / run).history()[-1].metrics["AP50"] for run in VOC.values()
    ]
    bars = right.barh(list(VOC), values, color=["tab:gray"] * 2 + ["tab:blue"] * (len(VOC) - 2))
    right.bar_label(bars, [f"{value:.3f}" for value in values], padding=3)
    right.invert_yaxis()
    right.set(xlabel="AP50", xlim=(0, 0.55), title="RetinaNet on ResNet18, VOC07-320")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "full_width.png", dpi=110)


if __name__ == "__main__":
    main()
