"""Average precision of a detector's boxes: COCO's 12 numbers, and that of PASCAL VOC."""

from detection.evaluation.coco import METRICS, Backend, CocoEvaluator, Detections, import_backend
from detection.evaluation.voc import (
    Interpolation,
    PrecisionRecall,
    average_precision,
    mean_average_precision,
    precision_recall,
)

__all__ = [
    "METRICS",
    "Backend",
    "CocoEvaluator",
    "Detections",
    "Interpolation",
    "PrecisionRecall",
    "average_precision",
    "import_backend",
    "mean_average_precision",
    "precision_recall",
]
