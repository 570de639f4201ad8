"""Evaluate runs whose weights are kept, in float32 and in bf16: `python results/precision.py` in the project's root.

Writes evaluations.json and README.md into results/precision; what the first has already is not measured again.
"""

from __future__ import annotations

import json
from pathlib import Path

import detection
from detection.runs import Run
from detection.training.precision import choose_precision

HERE = Path(__file__).parent / "precision"
RUNS = {  # where its data lie
    "zoo:voc_retinanet_resnet18_spiking": "data/VOCdevkit",
    "zoo:bccd_retinanet_resnet18_spiking": "data/bccd",
    "zoo:bccd_retinanet_resnet18": "data/bccd",
    "zoo:scenes_retinanet_resnet18": "runs/scenes",
    "zoo:cifar10_vgg16": "data/cifar10",
    "zoo:cifar10_vgg11": "data/cifar10",
    "zoo:imagenette_resnet18": "data/imagenette112",
    "results/widths_cifar10/hoyer_w025_seed0": "data/cifar10",
    "results/widths_cifar10/hoyer_w0125_seed0": "data/cifar10",
    "results/widths_cifar10/hoyer_w0125_t3_seed0": "data/cifar10",
    "results/widths_cifar10/relu_w025_seed0": "data/cifar10",
    "results/widths_cifar10/relu_w0125_seed0": "data/cifar10",
}
ABOUT = """# What the precision of an evaluation is worth

Made by `python results/precision.py`: the same weights, evaluated in float32 and in bf16 on a CPU
(`hoyer-det evaluate RUN --precision no`, or `bf16`); a detector's AP50 and AP, a classifier's top-1. Where bf16 rounds
a potential to the other side of its threshold, a spike is another.

| run | trained in | metric | float32 | bf16 | bf16 minus float32, points |
|---|---|---|---|---|---|
"""


def main() -> None:
    path = HERE / "evaluations.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for run, root in RUNS.items():
        for precision in ("no", "bf16"):
            if precision not in found.setdefault(run, {}):
                metrics = detection.evaluate(run, data_root=root, precision=precision).metrics
                found[run][precision] = {key: metrics[key] for key in ("AP50", "AP", "top1") if key in metrics}
                path.write_text(json.dumps(found, indent=2) + "\n")
    rows = []
    for run, by_precision in found.items():
        opened = Run.open(run)
        trained = opened.info().precision or choose_precision(opened.config.train.precision)
        for key, value in by_precision["no"].items():
            other = by_precision["bf16"][key]
            name = "float32" if trained == "no" else trained
            numbers = f"{value:.4f} | {other:.4f} | {100 * (other - value):+.2f}"
            rows.append(f"| `{run}` | {name} | {key} | {numbers} |\n")
    (HERE / "README.md").write_text(ABOUT + "".join(rows))


if __name__ == "__main__":
    main()
