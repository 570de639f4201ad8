"""Networks as files: ONNX in floating point or integers, torch.export, NIR; each checked against PyTorch when written.

All start from the folded network (`backbones.deploy.fold`), in which BatchNorm and spike layer are one comparison per channel.
A network takes images (N, 3, H, W), RGB in [0, 1], and normalises them itself. A classifier gives "logits" (N, K). A
dense detector gives what its head predicts for every anchor, on images that were resized and padded before;
`OnnxDetector` does that, and makes boxes of what comes out by torchvision's own code.
"""

from detection.export.common import ParityError, import_extra
from detection.export.inference import OnnxClassifier, OnnxDetector, evaluate_file
from detection.export.networks import DensePredictions, DetectorOf, Normalised, resize_and_pad
from detection.export.nir import run_nir, to_nir
from detection.export.onnx import to_onnx
from detection.export.parity import check_nir, check_onnx
from detection.export.run import NUM_CALIBRATION, PREDICTIONS, SUFFIXES, export_run

__all__ = [
    "NUM_CALIBRATION",
    "PREDICTIONS",
    "SUFFIXES",
    "DensePredictions",
    "DetectorOf",
    "Normalised",
    "OnnxClassifier",
    "OnnxDetector",
    "ParityError",
    "check_nir",
    "check_onnx",
    "evaluate_file",
    "export_run",
    "import_extra",
    "resize_and_pad",
    "run_nir",
    "to_nir",
    "to_onnx",
]
