"""One-time-step spiking backbones with the Hoyer regulariser (arXiv:2212.10170). Needs torch, nothing else."""

from __future__ import annotations

from . import activations as _activations  # noqa: F401, they register themselves
from . import zoo
from .arithmetic import ARITHMETICS, Arithmetic, ArithmeticConv2d, arithmetic_layers, find_arithmetic
from .deploy.fold import ChannelThreshold, fold
from .deploy.integer import to_integers
from .hoyer import HoyerSpike, extremum, hoyer_penalties, hoyer_penalty, moments, regulariser, spike
from .measure.certificate import Certificate, Finding, certify
from .measure.energy import (
    HOROWITZ_45NM,
    CostTable,
    EnergyReport,
    FirstLayer,
    NetworkEnergy,
    energy,
    energy_after_steps,
    read_costs,
)
from .measure.gradients import record_gradient_shares
from .measure.operations import Measurement, WeightedLayer, measure_activity, record_layers
from .measure.record import LayerActivity, hook_layers, record_activity, record_potentials, spike_activity, sum_activity
from .multistep import FramesToSteps, MultiStepSpike, RepeatSteps, average_so_far, average_steps, stop_after
from .networks import Backbone, Classifier, FeatureInfo, Normalise, Stem, create, names, register_backbone
from .recompute import recompute_activations
from .spiking import (
    SpikeFactory,
    SpikeLayer,
    find_neuron,
    logged_state,
    neurons,
    register_neuron,
    spike_layers,
    time_steps,
)
from .weights import load_weights, read_tensors, tensors_to_bytes

__all__ = [
    "ARITHMETICS",
    "HOROWITZ_45NM",
    "Arithmetic",
    "ArithmeticConv2d",
    "Backbone",
    "Certificate",
    "ChannelThreshold",
    "Classifier",
    "CostTable",
    "EnergyReport",
    "FeatureInfo",
    "Finding",
    "FirstLayer",
    "FramesToSteps",
    "HoyerSpike",
    "LayerActivity",
    "Measurement",
    "MultiStepSpike",
    "NetworkEnergy",
    "Normalise",
    "RepeatSteps",
    "SpikeFactory",
    "SpikeLayer",
    "Stem",
    "WeightedLayer",
    "arithmetic_layers",
    "average_so_far",
    "average_steps",
    "certify",
    "create",
    "energy",
    "energy_after_steps",
    "extremum",
    "find_arithmetic",
    "find_neuron",
    "fold",
    "hook_layers",
    "hoyer_penalties",
    "hoyer_penalty",
    "load_weights",
    "logged_state",
    "measure_activity",
    "moments",
    "names",
    "neurons",
    "read_costs",
    "read_tensors",
    "recompute_activations",
    "record_activity",
    "record_gradient_shares",
    "record_layers",
    "record_potentials",
    "register_backbone",
    "register_neuron",
    "regulariser",
    "spike",
    "spike_activity",
    "spike_layers",
    "stop_after",
    "sum_activity",
    "tensors_to_bytes",
    "time_steps",
    "to_integers",
    "zoo",
]
