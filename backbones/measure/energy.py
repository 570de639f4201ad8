"""Energy of a measured network, and of its analogue, quantised and binary twins, in picojoules per image.

The twins have the topology of the measured network and see the same images, so one measurement serves for all:

    network        a layer whose inputs were 0/1             any other layer        numbers
    spiking        synaptic operations, each an AC           exact MACs             float32
    spiking_int8   the same                                  the same               8 bits
    twin           exact MACs                                exact MACs             float32
    twin_int8      exact MACs                                exact MACs             8 bits
    binary         exact MACs, each an AC                    exact MACs             float32

"twin" has ReLU in place of the spike layers and ordinary convolutions, "binary" has 1-bit activations and does not skip
zeros. A network with convolutions of another arithmetic, see `backbones.arithmetic`, has a row of this name, in which
they add as they do: a binary one an AC for each exact MAC, as XNOR and bit count, its weights 1 bit each, an adder one
two, a subtraction and the sum of absolute values, both priced as an add (Horowitz: 0.9 pJ in float32, where the
multiply that they save is 3.7). Conventions:

- Operations are counted exactly at the borders: nothing falls into the padding. A MAC or AC with a zero input is paid
  in "twin", "twin_int8" and "binary"; the "spiking" networks skip it where inputs are 0/1, and pay it elsewhere.
- A neuron of a spike layer costs a comparison, in "binary" too, and so does a sign; a ReLU costs nothing. BatchNorm
  costs nothing: it folds into the threshold, in the twins into the weights. Nor do pooling, residual sums, or what
  follows the last layer.
- Memory: every weight is read once per image, also where several calls share it; every input of a layer is read once
  and every output written once. Inputs of 0/1, or of -1 and 1, are 1 bit, graded spikes of n levels log2 n, rounded up.
  An output leaves as such bits for each neuron that takes it straight, or as a real value where something else needs it
  too (a residual sum). In the twins all of them are real values. A real value has 32 bits, with 8-bit numbers 8; a
  weight likewise, but a bias has always 32.
- In T time steps all steps of the spiking networks count: operations, comparisons and activations. From the second
  step on, each neuron of a spike layer reads and writes its carried-over potential, a real value, and multiplies it by
  the leak, a MAC; the reset costs nothing. Weights are read once for all steps. All others take one step. The cost of
  a step is what a network that stops after it costs more than one that stops before it, `energy_after_steps`: weights,
  and the layers in front of the first spikes, are the first step's.
- Of several neurons for each potential, see `backbones.activations.SeveralThresholds`, the twins and "binary" have one:
  a layer over spikes has in them as many times fewer inputs, weights and operations. Where one of them fires, so do
  those of all lower thresholds. So a convolution of the "spiking" networks makes one AC for all of them, with the sum
  of their weights, added up beforehand (`backbones.deploy.highest`); each is compared, written and read.
- Memory traffic is priced as if all of it went to SRAM, and as if all of it went to DRAM; caches are left aside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .operations import Measurement, WeightedLayer

SKIPPING = ("spiking", "spiking_int8")  # zeros; the only ones of several steps
TWINS = ("twin", "twin_int8")
NETWORKS = ("spiking", "spiking_int8", "twin", "twin_int8", "binary")
RATIOS = (("spiking", "twin"), ("spiking", "twin_int8"), ("spiking_int8", "twin_int8"), ("spiking", "binary"))
WORD_BITS = 32
BIAS_BITS = 32
PIXEL_BITS = 8  # of a channel of the raw image


@dataclass(frozen=True)
class CostTable:
    """Energy of operations and memory accesses, in picojoules.

    Attributes:
        name: of the table, for the report.
        mac_pj, ac_pj, comparison_pj: multiply-accumulate, accumulate, comparison with a threshold; 32-bit float.
        int8_mac_pj, int8_ac_pj, int8_comparison_pj: the same of 8-bit integers, whose accumulators are wider.
        sram_pj, dram_pj: access to on-chip and to off-chip memory, per 32-bit word.
    """

    name: str
    mac_pj: float
    ac_pj: float
    comparison_pj: float
    int8_mac_pj: float
    int8_ac_pj: float
    int8_comparison_pj: float
    sram_pj: float
    dram_pj: float

    def __post_init__(self) -> None:
        for key in _COSTS:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{key} {value!r}: a cost is a number of picojoules, 0 or more")


_COSTS = tuple(field.name for field in fields(CostTable) if field.name != "name")

HOROWITZ_45NM = CostTable(
    name="45 nm (Horowitz, ISSCC 2014)",
    mac_pj=4.6,
    ac_pj=0.9,
    comparison_pj=0.9,
    int8_mac_pj=0.3,
    int8_ac_pj=0.1,
    int8_comparison_pj=0.1,
    sram_pj=5.0,
    dram_pj=640.0,
)
"""45 nm at 0.9 V: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014.

32-bit float: multiply 3.7 and add 0.9, so a MAC is 4.6; a comparison is priced like an add. 8-bit integers: a multiply
is 0.2 and the sum of many products needs a 32-bit integer add, 0.1, so a MAC is 0.3 and an AC or a comparison 0.1 (an
8-bit add would be 0.03). SRAM 5 and DRAM 640 per 32-bit word.
"""


def read_costs(path: str | Path) -> CostTable:
    """The cost table in a YAML or JSON file: every key of `CostTable` in picojoules; `name` may be left out.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a YAML file, and PyYAML is not installed.
        ValueError: the file is neither, or a key is unknown, missing or no cost; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such cost file")
    values = _read_values(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected the keys {', '.join(_COSTS)}, got {type(values).__name__}")
    allowed = ("name", *_COSTS)
    unknown = [str(key) for key in values if key not in allowed]
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r} (allowed: {', '.join(allowed)})")
    missing = [key for key in _COSTS if key not in values]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}, in picojoules")
    try:
        return CostTable(**{"name": path.stem} | values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_values(path: Path) -> Any:
    content, kind = path.read_bytes(), "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = content.decode()
        if kind == "JSON":
            return json.loads(text)
        import yaml  # the one thing that needs more than torch

        return yaml.safe_load(text)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    except ImportError:
        raise ImportError(f"reading {path} needs PyYAML: pip install pyyaml (or give a .json file)") from None
    except Exception as error:  # those of the two readers share no class but this one
        raise ValueError(f"{path}: not a {kind} file: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class NetworkEnergy:
    """Operations, memory traffic and energy of a layer or a whole network, per image.

    Attributes:
        macs, acs, comparisons: operations.
        compute_pj, comparison_pj: of MACs and ACs, and of comparisons.
        weight_bits: weights and biases read.
        read_bits, write_bits, activation_bits: activations read, written, and both.
        memory_sram_pj, memory_dram_pj: of all traffic, if all of it is SRAM, or DRAM.
        total_pj: of the operations, memory left aside.
        total_sram_pj, total_dram_pj: of the operations and the traffic.
    """

    macs: float
    acs: float
    comparisons: float
    compute_pj: float
    comparison_pj: float
    weight_bits: float
    read_bits: float
    write_bits: float
    memory_sram_pj: float
    memory_dram_pj: float
    activation_bits: float
    total_pj: float
    total_sram_pj: float
    total_dram_pj: float


@dataclass(frozen=True)
class FirstLayer:
    """Bits per image that leave a first layer which is computed in the sensor, against those of the raw image.

    Attributes:
        spike_layer: the first spike layer that ran.
        num_neurons, firing_rate: of it, per image.
        spike_bits: 1 per neuron, of graded spikes more.
        entropy_bits: a bound for any code that knows the firing rate alone: neurons times the binary entropy of it.
        image_bits: 8 for each channel of each pixel that the network sees, so after resizing and padding.
        spikes_suffice: whether these spikes are all that the rest of the network needs. Where they are not, as with a
            residual stream that starts in front of the spike layer, real values would have to leave the sensor too.
        reduction, entropy_reduction: how many times fewer bits the spikes and their bound are than the image; None
            where these are 0.
    """

    spike_layer: str
    num_neurons: float
    firing_rate: float
    spike_bits: float
    entropy_bits: float
    image_bits: float
    spikes_suffice: bool
    reduction: float | None
    entropy_reduction: float | None


@dataclass(frozen=True)
class EnergyReport:
    """Networks side by side, per image.

    Attributes:
        costs: the table that was used.
        layers: by layer and network. The comparisons of a spike layer stand with the layer that its spikes enter
            first; where they enter none, they are in `networks` only.
        networks: of all layers together, by network, the measured one first; without spike layers it is a row of its
            arithmetic, or "twin".
        ratios: "spiking/twin" and so on, or of the measured one and the twins: the quotient of "operations" (memory
            left aside), "with_sram" and "with_dram"; None where the divisor is 0.
        first_layer: None without spike layers.
    """

    costs: CostTable
    layers: dict[str, dict[str, NetworkEnergy]]
    networks: dict[str, NetworkEnergy]
    ratios: dict[str, dict[str, float | None]]
    first_layer: FirstLayer | None


def energy(measured: Measurement, costs: CostTable = HOROWITZ_45NM) -> EnergyReport:
    """The energy of a measured network and of its twins; this module's text has the conventions.

    Args:
        measured: of `measure_activity` or `record_layers`.
        costs: picojoules by operation.

    Raises:
        RuntimeError: nothing was measured.
    """
    if not measured.num_images:
        raise RuntimeError("nothing was measured: pass images through the model first")
    own = sorted({layer.arithmetic for layer in measured.layers.values() if layer.accumulates})
    names = [*NETWORKS, *(name for name in own if name not in NETWORKS)] if measured.spikes else [*own, *TWINS]
    pairs = RATIOS if measured.spikes else [(name, twin) for name in own for twin in TWINS]
    layers = {
        layer.name: {name: _layer_energy(name, layer, measured, costs) for name in names}
        for layer in measured.layers.values()
    }
    taken = {name for layer in measured.layers.values() for name in layer.spikes_from}
    others = [name for name in measured.spikes if name not in taken]  # whose spikes enter no layer
    signs = sum(layer.own_signs for layer in measured.layers.values())
    networks = {}
    for name in names:
        counts = dict.fromkeys(("macs", "acs", "weight_bits", "read_bits", "write_bits"), 0.0)
        for key, count in _of_neurons(name, others, measured).items():
            counts[key] = count / measured.num_images
        for layer in layers.values():
            for key in ("macs", "acs", "weight_bits", "read_bits", "write_bits"):
                counts[key] += getattr(layer[name], key)
        comparisons = _of_neurons(name, measured.spikes, measured)["comparisons"] + (0 if name in TWINS else signs)
        networks[name] = _price(name, costs, counts | {"comparisons": comparisons / measured.num_images})
    totals = {"operations": "total_pj", "with_sram": "total_sram_pj", "with_dram": "total_dram_pj"}
    ratios = {
        f"{one}/{other}": {
            key: _quotient(getattr(networks[one], total), getattr(networks[other], total))
            for key, total in totals.items()
        }
        for one, other in pairs
    }
    return EnergyReport(costs, layers, networks, ratios, _first_layer(measured))


def energy_after_steps(measured: Measurement, costs: CostTable = HOROWITZ_45NM) -> list[EnergyReport]:
    """Return the energy of the network stopped after 1, ..., T time steps; the last report is that of `energy`."""
    return [energy(measured.stopped(steps), costs) for steps in range(1, measured.time_steps + 1)]


def _layer_energy(network: str, layer: WeightedLayer, measured: Measurement, costs: CostTable) -> NetworkEnergy:
    own, real_bits = network not in TWINS, _real_bits(network)
    steps = 1 if network in SKIPPING else layer.time_steps
    taken = 1 if layer.name == measured.stem else steps  # a stem of several steps sees another frame in each
    one_bit = own and (layer.is_binary or layer.is_sign)
    behind_spikes = layer.is_binary and layer.name != measured.stem
    fewer = layer.thresholds if behind_spikes and network in (*TWINS, "binary") else 1
    adds = one_bit or (own and layer.accumulates > 0)
    weight_bits = min(real_bits, layer.weight_bits) if own else real_bits
    leaving = float(real_bits)
    if own and layer.output_bits is not None:
        share = 1 if network in SKIPPING else layer.time_steps / measured.time_steps
        several = max((measured.spikes[name].thresholds for name in layer.spikes_to), default=1)
        leaving = min(layer.output_bits * share / (several if network == "binary" else 1), real_bits)
    weights = layer.num_weights * steps / taken / fewer  # a twin's stem has weights for all frames
    counts = {
        "macs": 0 if adds else layer.num_exact_macs / taken / fewer,
        "acs": 0,
        "comparisons": layer.own_signs if own else 0,
        # Once per image in which the layer ran, however many levels of a pyramid share it.
        "weight_bits": (weights * weight_bits + layer.num_biases * BIAS_BITS) * layer.num_images,
        "read_bits": layer.num_inputs / taken / fewer * ((own and measured.input_bits(layer)) or real_bits),
        "write_bits": layer.num_outputs / steps * leaving,
    }
    for key, count in _of_neurons(network, layer.spikes_from, measured).items():
        counts[key] += count
    if one_bit and network in SKIPPING:  # |x - w| is |w| + x (|1 - w| - |w|) for x of 0 or 1: one addition per spike
        counts["acs"] = layer.num_synops
    elif adds:
        each = 1 if one_bit and network != layer.arithmetic else layer.accumulates
        counts["acs"] = layer.num_exact_macs / taken / fewer * each
    return _price(network, costs, {key: count / measured.num_images for key, count in counts.items()})


def _of_neurons(network: str, names: Iterable[str], measured: Measurement) -> dict[str, int]:
    """Return counts of the neurons of some spike layers: comparisons, and what it takes to carry their potentials."""
    counts = dict.fromkeys(("comparisons", "macs", "read_bits", "write_bits"), 0)
    for spikes in (measured.spikes[name] for name in names if network not in TWINS):
        neurons = spikes.num_neurons // spikes.time_steps // (spikes.thresholds if network == "binary" else 1)
        carried = spikes.num_neurons - neurons if network in SKIPPING else 0
        counts["comparisons"] += neurons + carried
        counts["macs"] += carried
        counts["read_bits"] += carried * _real_bits(network)
        counts["write_bits"] += carried * _real_bits(network)
    return counts


def _real_bits(network: str) -> int:
    return 8 if network.endswith("_int8") else 32


def _price(network: str, costs: CostTable, counts: dict[str, float]) -> NetworkEnergy:
    """The energy of operations and bits per image by their names in `NetworkEnergy`."""
    kind = "int8_" if network.endswith("_int8") else ""
    mac_pj, ac_pj, comparison_pj = (getattr(costs, f"{kind}{name}_pj") for name in ("mac", "ac", "comparison"))
    compute_pj = counts["macs"] * mac_pj + counts["acs"] * ac_pj
    comparison_pj = counts["comparisons"] * comparison_pj
    words = (counts["weight_bits"] + counts["read_bits"] + counts["write_bits"]) / WORD_BITS
    total_pj, sram_pj, dram_pj = compute_pj + comparison_pj, words * costs.sram_pj, words * costs.dram_pj
    return NetworkEnergy(
        **counts,
        compute_pj=compute_pj,
        comparison_pj=comparison_pj,
        memory_sram_pj=sram_pj,
        memory_dram_pj=dram_pj,
        activation_bits=counts["read_bits"] + counts["write_bits"],
        total_pj=total_pj,
        total_sram_pj=total_pj + sram_pj,
        total_dram_pj=total_pj + dram_pj,
    )


def _first_layer(measured: Measurement) -> FirstLayer | None:
    stem = measured.stem
    first = next((name for name in measured.ran if name in measured.spikes), None)
    if stem is None or first is None:
        return None
    layer, rate = measured.layers[stem], measured.spikes[first].firing_rate
    num_neurons = measured.spikes[first].num_neurons / measured.num_images
    spike_bits = num_neurons * measured.spikes[first].bits
    entropy = -sum(share * math.log2(share) for share in (rate, 1 - rate) if share > 0)  # bits per neuron
    image_bits = PIXEL_BITS * layer.num_inputs / measured.num_images
    return FirstLayer(
        spike_layer=first,
        num_neurons=num_neurons,
        firing_rate=rate,
        spike_bits=spike_bits,
        entropy_bits=num_neurons * entropy,
        image_bits=image_bits,
        spikes_suffice=layer.output_bits is not None and layer.spikes_to == [first],
        reduction=_quotient(image_bits, spike_bits),
        entropy_reduction=_quotient(image_bits, num_neurons * entropy),
    )


def _quotient(one: float, other: float) -> float | None:
    return one / other if other else None
