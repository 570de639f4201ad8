"""The sections of a recipe that say how it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from detection.config.base import Fraction, Positive, Section

Precision = Literal["no", "bf16", "fp16", "auto"]


class Hoyer(Section):
    """The Hoyer regulariser: weight * sum over spike layers of H.

    `weight` and `warmup_epochs` are numbers once a recipe is read; those that it leaves open, which are not among
    `model_fields_set`, follow from the reduction.
    """

    weight: float | None = Field(
        None,
        ge=0,
        description="weight of the term, 0: none; None: the one that belongs to the reduction, 0.03 for network, 0.01 "
        "for mean, 1e-8 for sum",
    )
    reduction: Literal["sum", "mean", "network"] = Field(
        "network",
        description="network: H of all layers / neurons of all layers, in (0, 1], carries over between sizes and pulls "
        "every neuron alike; sum: H as in the paper, grows with resolution and with the batch of each process (1e-8 "
        "belongs to 128 images of 32x32); mean: H of each layer / its own neurons, pulls those of small layers harder",
    )
    warmup_epochs: float | None = Field(
        None,
        ge=0,
        description="epochs over which the weight rises from 0, linearly; None: 4 if the weight is left open, too, 0 "
        "if it is given",
    )
    sync: bool = Field(
        False,
        description="several processes: extremum and H over the images of all of them, as if one process had them; "
        "false: over those of each",
    )

    @model_validator(mode="after")
    def _fill_in(self) -> Hoyer:
        weight = {"network": 0.03, "mean": 0.01, "sum": 1e-8}[self.reduction]
        warmup_epochs = 4.0 if "weight" in self.open_keys() else 0.0
        for key, value in {"weight": weight, "warmup_epochs": warmup_epochs}.items():
            if key in self.open_keys():
                self.model_fields_set.discard(key)
                self.__dict__[key] = value  # an assignment would be validated, and so come here again
        return self

    def open_keys(self) -> set[str]:
        """Return those of `weight` and `warmup_epochs` that a recipe leaves open."""
        keys = ("weight", "warmup_epochs")
        return {key for key in keys if key not in self.model_fields_set or getattr(self, key) is None}


class Optimizer(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd", "muon"] = Field(
        "adamw",
        description="adamw; adam with AMSGrad and the decay in its gradient; sgd with momentum 0.9; or muon for the "
        "hidden convolutions and adamw for the rest",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    muon_lr: float = Field(0.02, gt=0, description="muon: peak learning rate of the hidden convolutions")
    muon_decay: float = Field(0.0, ge=0, description="muon: weight decay of the hidden convolutions, times muon_lr")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="muon: share of the momentum that stays in a step")
    muon_newton_steps: int = Field(3, gt=0, le=10, description="muon: Newton-Schulz steps of an orthogonalisation")
    muon_interval: int = Field(
        1,
        gt=0,
        le=10**4,
        description="muon: optimiser steps between two orthogonalisations of a weight; more: less time",
    )
    weight_decay: float = Field(1e-4, ge=0, description="only on tensors of two or more dimensions, so not on v_th")
    schedule: Literal["cosine", "step"] = Field("cosine", description="cosine to zero, or steps at `milestones`")
    milestones: list[Fraction] = Field([0.6, 0.8, 0.9], description="step: fractions of the run where lr falls")
    gamma: float = Field(0.2, gt=0, le=1, description="step: factor at each milestone")
    warmup_steps: int = Field(100, ge=0, le=10**8, description="optimiser steps of linear warm-up")
    clip_norm: float = Field(0.0, ge=0, description="gradients are scaled down to this norm; 0: never")
    lr_factors: dict[str, Positive] = Field(
        {},
        description="factors on lr and muon_lr in parts of the network, named as in train.freeze: {backbone: 0.1}; the "
        "longest name counts",
    )


class Distillation(Section):
    """Learning from a trained network, such as the analogue twin."""

    teacher: Path | None = Field(
        None, description="run folder, or zoo:NAME, of a network of the same classes; None: no teacher"
    )
    logits: float = Field(1.0, ge=0, description="weight of the distance to the teacher's predictions")
    temperature: float = Field(4.0, gt=0, description="softens both predictions (classification)")
    features: float = Field(0.0, ge=0, description="weight of the distance to what the teacher's head sees")

    @model_validator(mode="after")
    def _teaches_something(self) -> Distillation:
        if self.teacher is not None and not self.logits and not self.features:
            raise ValueError("logits and features are both 0: the teacher would teach nothing")
        return self


class Train(Section):
    """Length and size of a run."""

    epochs: int = Field(12, gt=0, le=10**6, description="passes over the training data")
    batch_size: int = Field(8, gt=0, le=10**6, description="images per batch and process")
    accumulate: int = Field(1, gt=0, le=10**6, description="batches whose mean gradient makes one optimiser step")
    eval_every: int = Field(
        1, gt=0, le=10**6, description="epochs between evaluations; the last epoch is always evaluated"
    )
    patience: int = Field(
        0, ge=0, le=10**6, description="end after so many evaluations none of which makes new best weights; 0: never"
    )
    freeze: list[str] = Field(
        [],
        description="parts of the network that stay as they are, running averages included: backbone, neck, head, or a "
        "module such as backbone.stem",
    )
    precision: Precision = Field(
        "no", description="mixed precision; no: float32; auto: bf16 where the processor or GPU multiplies it natively"
    )
    compile: bool = Field(False, description="torch.compile the backbone")
    low_memory: bool = Field(
        False,
        description="not compiled: keep what convolutions give and compute the rest again for the gradient: less "
        "memory, more time",
    )
    channels_last: bool = Field(
        False, description="keep feature maps in the order N, H, W, C, which is faster as a rule"
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="weights and buffers averaged over about 1 / (1 - decay) steps, evaluated and saved beside the raw "
        "ones; 0: none",
    )
    sync_batchnorm: bool = Field(
        False, description="several processes: BatchNorm over the images of all of them; false: over those of each"
    )
    loggers: list[Literal["tensorboard", "csv", "wandb", "mlflow"]] = Field(
        [],
        description="further logs of each epoch: TensorBoard's, log.csv, Weights & Biases, MLflow (pip install "
        "hoyer-det[tensorboard], [wandb], [mlflow])",
    )
    tensorboard: bool = Field(False, description="the logger tensorboard, too")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of weights, data order and augmentation")
    deterministic: bool = Field(
        False, description="only algorithms that give the same bits every time: slower on a GPU, an error where none is"
    )
    save_minutes: float = Field(2.0, ge=0, description="minutes between saved states, see --resume; 0: not by time")
    save_steps: int = Field(0, ge=0, le=10**9, description="optimiser steps between saved states; 0: not by steps")
    timeout_minutes: float = Field(
        10.0,
        gt=0,
        le=10**5,
        description="several processes: how long one waits for the others before the training ends",
    )
