"""Energy and binarity of a trained run, measured in the same pass over the evaluation images as its accuracy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import backbones
from backbones.measure.energy import SKIPPING
from detection.files import write_csv, write_whole
from detection.records import Evaluation
from detection.runs import Run, Weights
from detection.tasks import task_of
from detection.tasks.evaluate import with_early_metrics
from detection.tasks.run import load_for_evaluation, read_evaluation_data
from detection.text import plural, printable

MILLION = 1e6  # pJ per uJ, and the unit of counts and bits in tables
LAYER_COLUMNS = ("layer", "input", "active in", "active out", "MAC", "synaptic operations", "rate x MAC")
NETWORK_ROWS = {
    "MAC, millions": "macs",
    "AC, millions": "acs",
    "comparisons, millions": "comparisons",
    "compute, uJ": "compute_pj",
    "comparisons, uJ": "comparison_pj",
    "operations, uJ": "total_pj",
    "weights read, Mbit": "weight_bits",
    "activations read, Mbit": "read_bits",
    "activations written, Mbit": "write_bits",
    "memory if SRAM, uJ": "memory_sram_pj",
    "memory if DRAM, uJ": "memory_dram_pj",
    "all with SRAM, uJ": "total_sram_pj",
    "all with DRAM, uJ": "total_dram_pj",
}
RATIO_COLUMNS = {"operations": "operations", "with SRAM": "with_sram", "with DRAM": "with_dram"}
STEP_COLUMNS = ("step", "active", "synaptic operations", "operations uJ", "operations so far", "with SRAM so far")
STEP_KEYS = ("macs", "acs", "comparisons", "activation_bits", "total_pj", "total_sram_pj", "total_dram_pj")
NOT_ALL = "no: real values from in front of this spike layer are needed elsewhere too"


class TextTable(NamedTuple):
    """A table of text, for a terminal or for Markdown."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Analysis:
    """The findings of `analyze_run`.

    Attributes:
        run: the run folder.
        weights: which of its weights.
        sha256: of their file, as the training left it; None for a run that has not ended.
        num_parameters: numbers that were trained.
        metrics: of the evaluation, as in the run's log.
        headline: names of those that stand above its tables.
        measured: counts of every layer over the images.
        report: energy, per image.
        certificate: whether what the layers saw was binary.
    """

    run: str
    weights: Weights
    sha256: str | None
    num_parameters: int
    metrics: dict[str, Any]
    headline: tuple[str, ...]
    measured: backbones.Measurement
    report: backbones.EnergyReport
    certificate: backbones.Certificate

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON; counts, bits and picojoules are per image, layers in the order of their calls."""
        certificate, first_layer = self.certificate, self.report.first_layer
        order = {name: position for position, name in enumerate(self.measured.ran)}
        layers = sorted(self.measured.layers.values(), key=lambda layer: order.get(layer.name, len(order)))
        return {
            "run": self.run,
            "weights": self.weights,
            "sha256": self.sha256,
            "num_parameters": self.num_parameters,
            "num_images": self.measured.num_images,
            "time_steps": certificate.time_steps,
            "levels": certificate.levels,
            "costs": asdict(self.report.costs),
            "metrics": self.metrics,
            "layers": [self._layer(layer) for layer in layers],
            "steps": self._steps(),
            "networks": {name: asdict(network) for name, network in self.report.networks.items()},
            "ratios": self.report.ratios,
            "first_layer": asdict(first_layer) if first_layer else None,
            "unhandled": self.measured.unhandled,
            "certificate": {
                "binary": certificate.is_binary,
                "strict": certificate.strict,
                "num_binary": certificate.num_binary,
                "exceptions": [finding._asdict() for finding in certificate.exceptions],
                "violations": [finding._asdict() for finding in certificate.violations],
                "silent": list(certificate.silent),
                "arithmetics": dict(certificate.arithmetics),
            },
        }

    def _steps(self) -> list[dict[str, Any]]:
        """Return activity, operations and energy of each time step, and of the network stopped after it ("so_far")."""
        number, reports = self.measured.num_images, backbones.energy_after_steps(self.measured, self.report.costs)
        names = [name for name in SKIPPING if name in self.report.networks] or [next(iter(self.report.networks))]
        logged = Evaluation.parse(self.metrics, self.run)
        scores = {key: logged.after_steps(key) for key in self.headline if key in logged.metrics}
        rows: list[dict[str, Any]] = []
        spikes = neurons = synops = 0
        before = {name: dict.fromkeys(STEP_KEYS, 0.0) for name in names}
        for step, report in enumerate(reports, start=1):
            stopped = self.measured.stopped(step)
            spikes, fired = sum(layer.num_spikes for layer in stopped.spikes.values()), spikes
            neurons, others = sum(layer.num_neurons for layer in stopped.spikes.values()), neurons
            synops, done = sum(layer.num_synops for layer in stopped.layers.values()), synops
            so_far = {name: {key: getattr(report.networks[name], key) for key in STEP_KEYS} for name in names}
            alone = {name: {key: so_far[name][key] - before[name][key] for key in STEP_KEYS} for name in names}
            before = so_far
            rows.append(
                {
                    "step": step,
                    "activity": (spikes - fired) / (neurons - others) if neurons > others else None,
                    "num_synops": (synops - done) / number,
                    "networks": alone,
                    "so_far": so_far,
                    "metrics": {key: each[step - 1] for key, each in scores.items() if len(each) == len(reports)},
                }
            )
        return rows

    def _layer(self, layer: backbones.WeightedLayer) -> dict[str, Any]:
        number, energies = self.measured.num_images, self.report.layers[layer.name]
        output = [self.measured.spikes[name] for name in layer.spikes_to]
        neurons = sum(spikes.num_neurons for spikes in output)
        example, inputs = layer.example, "spikes" if layer.is_binary else "signs" if layer.is_sign else "real"
        leave_as = "real" if layer.output_bits is None else "spikes" if layer.spikes_to else "signs"
        return {
            "name": layer.name,
            "kind": f"{layer.arithmetic} {layer.kind}" if layer.accumulates else layer.kind,
            "input": inputs if layer.num_calls else None,
            "input_activity": layer.input_rate,
            # JSON knows no NaN or infinity.
            "input_example": example if example is None or math.isfinite(example) else str(example),
            "output": leave_as,
            "output_activity": sum(spikes.num_spikes for spikes in output) / neurons if neurons else None,
            "output_spike_layers": layer.spikes_to,
            "calls": layer.num_calls,
            "num_inputs": layer.num_inputs / number,
            "num_active": layer.num_active / number,
            "num_outputs": layer.num_outputs / number,
            "num_macs": layer.num_macs / number,
            "exact_macs": layer.num_exact_macs / number,
            "num_synops": layer.num_synops / number,
            "synops_in_steps": self._in_steps(layer),
            "rate_times_macs": layer.rate_times_macs / number,
            "comparisons": self.measured.comparisons(layer) / number,
            "weights": layer.num_weights,
            "biases": layer.num_biases,
            "energy_pj": {name: network.total_pj for name, network in energies.items()},
            "memory_bits": {name: network.weight_bits + network.activation_bits for name, network in energies.items()},
            "memory_sram_pj": {name: network.memory_sram_pj for name, network in energies.items()},
            "memory_dram_pj": {name: network.memory_dram_pj for name, network in energies.items()},
        }

    def _in_steps(self, layer: backbones.WeightedLayer) -> dict[str, float]:
        """Return the synaptic operations of each of several time steps; none for one step."""
        steps, number = self.measured.time_steps, self.measured.num_images
        counts = [*layer.synops_in_steps, *[0] * steps][:steps] if steps > 1 else []
        return {str(step): count / number for step, count in enumerate(counts, start=1)}

    def tables(self) -> list[TextTable]:
        """Return layers, networks side by side, their ratios, the first layer and the certificate, for people."""
        found = self.to_dict()
        networks, first = found["networks"], found["first_layer"]
        shown = list(dict.fromkeys((next(iter(networks)), "twin")))
        layers = [
            (
                layer["name"],
                layer["input"] or "never ran",
                *(_percent(layer[key]) for key in ("input_activity", "output_activity")),
                *(_millions(layer[key]) for key in ("exact_macs", "num_synops", "rate_times_macs")),
                *(_millions(layer["energy_pj"][name]) for name in shown),
            )
            for layer in found["layers"]
        ]
        title = "Layers, per image; MAC and operations in millions, energy without memory in uJ"
        tables = [TextTable(title, (*LAYER_COLUMNS, *(f"{name} uJ" for name in shown)), layers)]
        rows = [(row, *(_millions(network[key]) for network in networks.values())) for row, key in NETWORK_ROWS.items()]
        tables.append(TextTable(f"Networks, per image; {self.report.costs.name}", ("", *networks), rows))
        if self.report.ratios:
            rows = [
                (name, *("-" if ratio[key] is None else f"{ratio[key]:.3f}" for key in RATIO_COLUMNS.values()))
                for name, ratio in self.report.ratios.items()
            ]
            tables.append(TextTable("Energy ratios", ("networks", *RATIO_COLUMNS), rows))
        if first:
            rows = [
                ("spike layer", f"{first['spike_layer']}, {first['firing_rate']:.1%} active"),
                ("raw image", f"{first['image_bits']:,.0f} bits"),
                ("spikes, 1 bit per neuron", f"{first['spike_bits']:,.0f} bits, {_times(first['reduction'])} fewer"),
                ("their entropy", f"{first['entropy_bits']:,.0f} bits, {_times(first['entropy_reduction'])} fewer"),
                ("is that all that has to leave?", "yes" if first["spikes_suffice"] else NOT_ALL),
            ]
            tables.append(TextTable("A first layer in the sensor: what leaves it, per image", ("", ""), rows))
        return [*tables, *self._steps_table(found["steps"]), self._certificate_table()]

    def _steps_table(self, steps: list[dict[str, Any]]) -> Iterator[TextTable]:
        if len(steps) == 1:
            return
        shown = [key for key in self.headline if key in steps[0]["metrics"]]
        rows = []
        for row in steps:
            alone, so_far = (next(iter(row[key].values())) for key in ("networks", "so_far"))
            energies = (alone["total_pj"], so_far["total_pj"], so_far["total_sram_pj"])
            counts = (_percent(row["activity"]), *map(_millions, (row["num_synops"], *energies)))
            rows.append((str(row["step"]), *counts, *(f"{row['metrics'][key]:.4f}" for key in shown)))
        title = "Time steps, per image; operations in millions, energy in uJ"
        yield TextTable(title, (*STEP_COLUMNS, *(f"{key} so far" for key in shown)), rows)

    def _certificate_table(self) -> TextTable:
        certificate = self.certificate
        rows = [("exception", *finding) for finding in certificate.exceptions]
        rows += [("VIOLATION", *finding) for finding in certificate.violations]
        rows += [("silent", name, "its input was 0 in every image") for name in certificate.silent]
        title = (
            f"{'Binary' if certificate.is_binary else 'NOT binary'}{', strict' if certificate.strict else ''}: "
            f"{certificate.num_binary} of {len(self.measured.layers)} layers with weights saw 0/1 only, "
            f"over {certificate.num_images} images; time steps {certificate.time_steps}, "
            f"levels {certificate.levels}{' (0 and 1)' if certificate.levels == 2 else ''}"
            + "".join(f"; {plural(number, f'{name} convolution')}" for name, number in certificate.arithmetics)
        )
        return TextTable(title, ("", "layer", "reason"), rows)

    def summary(self) -> str:
        """Return the most important metrics and the activity in a line."""
        keys = [key for key in self.metrics if key in (*self.headline, "activity")]
        return ", ".join(f"{key} {self.metrics[key]:.4f}" for key in keys)

    def save(self, folder: str | Path) -> None:
        """Write analysis.json, layers.csv and analysis.md into `folder`, which is made if need be."""
        folder, found = Path(folder), self.to_dict()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "analysis.json", (json.dumps(found, indent=2) + "\n").encode())
        rows = [_flat(layer) for layer in found["layers"]]
        write_csv(folder / "layers.csv", list(rows[0]) if rows else [], [row.values() for row in rows])
        parts = [f"# {printable(self.run)}, {self.weights} weights, {self.measured.num_images} images", self.summary()]
        for table in self.tables():
            lines = [table.header, tuple("---" for _ in table.header), *table.rows]
            parts += [f"## {table.title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        write_whole(folder / "analysis.md", printable("\n\n".join(parts) + "\n", keep="\n").encode())


def analyze_run(
    folder: str | Path,
    weights: Weights = "last",
    *,
    data_root: str | Path | None = None,
    num_images: int | None = None,
    costs: backbones.CostTable = backbones.HOROWITZ_45NM,
    strict: bool = False,
) -> Analysis:
    """Return metrics, activity, energy and binarity of a saved run, from one pass over its evaluation images.

    Args:
        folder: the run, of any task, as `Run.open` takes it.
        weights: which of its weights.
        data_root: where its data lie now; None: where they lay when it was trained.
        num_images: see `read_evaluation_data`; the metrics are then those of these.
        costs: picojoules by operation.
        strict: allow no layer but the stem to see real values, see `certify`.

    Raises:
        FileNotFoundError: no such run, weights, or data.
        ValueError: the weights are damaged or do not fit, or `num_images` is not positive.
    """
    if num_images is not None and num_images < 1:
        raise ValueError(f"--images {num_images}: at least one image is needed")
    run = Run.open(folder, data_root)
    task = task_of(run.config)
    model, accelerator = load_for_evaluation(run, weights)
    dataset = read_evaluation_data(run, num_images)
    batches = task.evaluation_batches(dataset, accelerator)
    with backbones.record_layers(model) as measured:
        evaluation = task.evaluate(model, batches, dataset, accelerator)
    evaluation = with_early_metrics(evaluation, task, model, dataset, accelerator)
    # The histograms of the potentials are in the log already.
    metrics = evaluation.model_copy(update={"potentials": {}}).to_json()
    return analysis_of(run, weights, model, measured, metrics, costs=costs, strict=strict)


def analysis_of(
    run: Run,
    weights: Weights,
    model: nn.Module,
    measured: backbones.Measurement,
    metrics: Mapping[str, Any],
    *,
    costs: backbones.CostTable = backbones.HOROWITZ_45NM,
    strict: bool = False,
) -> Analysis:
    """Return the analysis of what was measured on a run's network; `metrics` are those of the same images, if any."""
    task = task_of(run.config)
    return Analysis(
        run.address,
        weights,
        run.info().sha256.get(f"{weights}.safetensors") if (run.folder / "run.json").is_file() else None,
        sum(parameter.numel() for parameter in model.parameters()),
        dict(metrics),
        task.headline,
        measured,
        backbones.energy(measured, costs),
        backbones.certify(measured, task.analogue_parts(model), strict=strict),
    )


def _flat(layer: dict[str, Any]) -> dict[str, Any]:
    """Return a layer as a row of a table: values by network get columns of their own, lists become texts."""
    row = {}
    for key, value in layer.items():
        if isinstance(value, dict):
            row |= {f"{key}.{name}": number for name, number in value.items()}
        else:
            row[key] = " ".join(value) if isinstance(value, list) else value
    return row


def _millions(value: float) -> str:
    return f"{value / MILLION:,.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} times"
