"""The recipes of the two tasks that come with the package. No torch is needed to read one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from detection.config.registry import register_recipe
from detection.config.schema import Classifier, Data, Evaluation, ImageData, Model, Recipe

DEFAULT_TASK = "detection"  # of files that name none


@register_recipe
class DetectionRecipe(Recipe):
    """A training recipe. Every key can be overridden: --model.backbone.activation relu"""

    task: Literal["detection"] = Field("detection", description="what is trained")
    model: Model = Model()
    data: Data
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _teachable(self) -> DetectionRecipe:
        if self.distillation.teacher is not None and self.model.detector not in ("retinanet", "fcos"):
            raise ValueError(
                f"distillation.teacher: retinanet and fcos learn from a teacher; {self.model.detector} predicts in "
                "several stages and does not"
            )
        return self


@register_recipe
class ClassificationRecipe(Recipe):
    """A recipe of classification, such as the pretraining of a backbone."""

    task: Literal["classification"] = Field("classification", description="what is trained")
    model: Classifier = Classifier()
    data: ImageData
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
