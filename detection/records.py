"""The typed records of a run folder, the only place that names their keys: a line of the log, run.json."""

from __future__ import annotations

import itertools
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

LOSS = "loss/"
Weights = Literal["best", "last", "ema"]
Values = dict[str, float]


class Record(BaseModel):
    """Base of all records: numbers and texts stay what they are, nothing is converted, facts of others are kept."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True, ser_json_inf_nan="constants", extra="allow")

    @classmethod
    def parse(cls, value: Any, source: str) -> Self:
        """Return the record of a parsed JSON object.

        Raises:
            ValueError: a key is missing or its value of another type; names `source` and the key.
        """
        try:
            return cls.model_validate(cls.fields_of(value) if isinstance(value, dict) else value)
        except ValidationError as error:
            item = error.errors()[0]
            key = ".".join(str(part) for part in item["loc"]) or "the whole"
            raise ValueError(f"{source}: damaged, {key}: {item['msg']}") from None

    @classmethod
    def fields_of(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of the object of a file, which may be flatter than the record."""
        return value


class Evaluation(Record):
    """The findings of one evaluation of a network.

    Attributes:
        metrics: the task's numbers, such as "AP50" or "top1".
        tables: further numbers of the task by name and row, such as "per_class" and "voc".
        activity: share of all spiking neurons that fire per image, in [0, 1]; None without spike layers.
        activity_per_layer: the same by spike layer.
        potentials: `backbones.record_potentials` of the first batch, by spike layer; not in every line of a log.
    """

    metrics: Values
    tables: dict[str, dict[str, Any]] = {}
    activity: float | None = None
    activity_per_layer: Values = {}
    potentials: dict[str, list[float]] = {}

    @property
    def numbers(self) -> Values:
        """The metrics, and "activity" where there are spike layers."""
        return self.metrics | ({} if self.activity is None else {"activity": self.activity})

    def after_steps(self, metric: str) -> list[float]:
        """Return a metric of the network stopped after 1, 2, ... time steps, as far as known; the last is its own."""
        early = self.tables.get("anytime", {})
        return [*(early[name] for name in early if name.startswith(f"{metric} after ")), self.metrics[metric]]

    def to_json(self) -> dict[str, Any]:
        """Return everything in one flat object, as the log has it."""
        flat: dict[str, Any] = {**self.metrics, **self.tables}
        if self.activity is not None:
            flat |= {"activity": self.activity, "activity_per_layer": self.activity_per_layer}
        return flat | ({"potentials": self.potentials} if self.potentials else {})

    @classmethod
    def fields_of(cls, value: dict[str, Any]) -> dict[str, Any]:
        own = {key: value[key] for key in ("activity", "activity_per_layer", "potentials") if key in value}
        rest = {key: entry for key, entry in value.items() if key not in own}
        tables = {key: entry for key, entry in rest.items() if isinstance(entry, dict)}
        return own | {"metrics": {key: rest[key] for key in rest if key not in tables}, "tables": tables}


CLOCK = ("seconds", "images_per_second", "memory_mib", "eval_seconds")  # of an epoch: they differ from run to run


class EpochLog(Record):
    """One epoch of a training: a line of metrics.jsonl.

    Attributes:
        epoch: from 1.
        step: optimiser steps done at its end.
        lr: learning rate at its beginning.
        loss: sum of all terms, mean over the steps and processes, as are `losses` and "hoyer_per_layer".
        losses: each term, weighted, by name; "loss/NAME" in the file.
        seconds: spent on the steps; an entry of the zoo has none, as it is one epoch of many.
        images_per_second: of all processes together.
        memory_mib: the most from the beginning of the training, or since it went on, to the end of the epoch's steps,
            in MiB: resident memory of the process that writes the log, libraries and data among it; on a GPU that of
            its tensors there. None in older logs.
        layers: {quantity: {spike layer: value}}: "hoyer_per_layer" (H as it enters the loss), and what the layers
            themselves log at the end of the epoch, such as "v_th" and "extremum"; "hoyer_share_of_potential" and
            "hoyer_share_of_threshold" are the regulariser's shares in the gradients of the epoch's last step.
        evaluation: None where the epoch was not evaluated.
        ema: the evaluation of the averaged weights, where there are any.
        eval_seconds: spent on both.
        silent: spike layers that did not fire.
        warnings: what the trainer warned of after the epoch, by kind, see `detection.training.collapse`.
    """

    epoch: int = Field(ge=1)
    step: int = Field(0, ge=0)
    lr: float = 0.0
    loss: float
    losses: Values = {}
    seconds: float | None = None
    images_per_second: float | None = None
    memory_mib: float | None = None
    layers: dict[str, Values] = {}
    evaluation: Evaluation | None = None
    ema: Evaluation | None = None
    eval_seconds: float | None = None
    silent: list[str] = []
    warnings: dict[str, str] = {}

    @classmethod
    def fields_of(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a line; its tables in front of the first metric are the layers'."""
        own = cls.model_fields.keys() - {"losses", "layers", "evaluation"}
        found: dict[str, Any] = {key: value[key] for key in own if key in value}
        rest = {key: entry for key, entry in value.items() if key not in own}
        found["losses"] = {key.removeprefix(LOSS): rest.pop(key) for key in list(rest) if key.startswith(LOSS)}
        layers = list(itertools.takewhile(lambda key: isinstance(rest[key], dict), rest))
        found["layers"] = {key: rest.pop(key) for key in layers}
        if isinstance(found.get("ema"), dict):
            found["ema"] = Evaluation.fields_of(found["ema"])
        if rest:
            found["evaluation"] = Evaluation.fields_of(rest)
        return found

    @property
    def metrics(self) -> Values:
        """The numbers of the evaluation, "activity" among them; none where the epoch was not evaluated."""
        return {} if self.evaluation is None else self.evaluation.numbers

    @property
    def total_seconds(self) -> float | None:
        """Seconds of the steps and the evaluations together; None where `seconds` is."""
        return None if self.seconds is None else self.seconds + (self.eval_seconds or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the line of the file."""
        line: dict[str, Any] = {"epoch": self.epoch, "step": self.step, "lr": self.lr, "loss": self.loss}
        line |= {f"{LOSS}{name}": value for name, value in self.losses.items()}
        cost = {key: getattr(self, key) for key in ("seconds", "images_per_second", "memory_mib")}
        line |= {key: value for key, value in cost.items() if value is not None} | self.layers
        if self.evaluation is not None:
            line |= self.evaluation.to_json()
        if self.ema is not None:
            line["ema"] = self.ema.to_json()
        if self.eval_seconds is not None:
            line["eval_seconds"] = self.eval_seconds
        said = {"silent": self.silent, "warnings": self.warnings}
        return line | {key: value for key, value in said.items() if value}


class Machine(Record):
    """The machine that a run was made on.

    Attributes:
        system: operating system and architecture.
        cpu: its name.
        cores: of the CPU.
        threads: that torch used.
        gpu: its name; None without one.
    """

    system: str = ""
    cpu: str = "unknown CPU"
    cores: int | None = None
    threads: int = 0
    gpu: str | None = None


class DataFingerprint(Record):
    """A split as it was read.

    Attributes:
        images: usable ones.
        fingerprint: SHA-256 of names, sizes, boxes and labels, or of pixels and labels.
    """

    images: int
    fingerprint: str


class Start(Record):
    """The network that a training started from, `model.weights`, by the names of its tensors.

    Attributes:
        source: as the recipe names it.
        classes: those whose outputs were taken over.
        taken: tensors that were taken over whole.
        partly: tensors of which the outputs of `classes` were, and of the background where there is one.
        new: tensors of the network that are new.
        left_out: tensors of the source that were not taken over.
    """

    source: str
    classes: list[str] = []
    taken: list[str] = []
    partly: list[str] = []
    new: list[str] = []
    left_out: list[str] = []


class Extension(Record):
    """A further cycle of the schedule behind the epochs of a finished run.

    Attributes:
        after: epochs that were done before.
        epochs: of the cycle.
        lr_factor: its learning rates, in those of the recipe.
    """

    after: int
    epochs: int
    lr_factor: float


class RunInfo(Record):
    """run.json: where a run comes from.

    Attributes:
        command: that started it.
        trained_in: folder of the repository that has the training's log, of an entry of the zoo.
        trained_weights, trained_sha256: which weights the entry was made of.
        versions: of python and the packages.
        machine: that it ran on.
        precision: of the training, "no" for float32; what `train.precision: auto` stood for.
        data: by split, number of images and a fingerprint of what was read.
        backbone: arguments of `backbones.create`; of an entry of the zoo or a run of a newer version.
        normalisation: "mean" and "std" per channel of images in [0, 1], likewise.
        category_ids: COCO's category of label 1, 2, ..., K, a detector's.
        start: the network that it started from.
        resumed: commands that went on with it.
        trackers: its id at Weights & Biases and MLflow.
        extended: the cycles that were added to it.
        sha256: of each weights file by name; there once the training has ended.
    """

    command: str = "unknown"
    trained_in: str | None = None
    trained_weights: str | None = None
    trained_sha256: str | None = None
    versions: dict[str, str] = {}
    machine: Machine = Machine()
    precision: str | None = None
    data: dict[str, DataFingerprint] = {}
    backbone: dict[str, Any] | None = None
    normalisation: dict[str, list[float]] | None = None
    category_ids: list[int] | None = None
    start: Start | None = None
    resumed: list[str] = []
    trackers: dict[str, str] = {}
    extended: list[Extension] = []
    sha256: dict[str, str] = {}

    def to_json(self) -> dict[str, Any]:
        """Return what the file has: values that are none or empty are left out."""
        return {key: value for key, value in self.model_dump().items() if value not in (None, [], {})}
