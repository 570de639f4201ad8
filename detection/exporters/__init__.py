"""Networks as files: ONNX in floating point or integers, torch.export, NIR, events; each checked against PyTorch.

All start from the folded network (`backbones.fold`), in which BatchNorm and spike layer are one comparison per channel.
A network takes images (N, 3, H, W), RGB in [0, 1], and normalises them itself. A classifier gives "logits" (N, K). A
dense detector gives what its head predicts for every anchor, on images that were resized and padded before;
`OnnxDetector` does that, and makes boxes of what comes out by torchvision's own code; or the file gives boxes itself.
"""

from detection.exporters.benchmark import Benchmark, benchmark_file
from detection.exporters.common import ParityError, import_extra
from detection.exporters.inference import EventsFile, OnnxClassifier, OnnxDetector, OnnxFile, evaluate_file, open_file
from detection.exporters.nir import run_nir, to_nir
from detection.exporters.onnx import to_onnx
from detection.exporters.parity import check_nir, check_onnx
from detection.exporters.run import SUFFIXES, ExportOptions, export_run

__all__ = [
    "SUFFIXES",
    "Benchmark",
    "EventsFile",
    "ExportOptions",
    "OnnxClassifier",
    "OnnxDetector",
    "OnnxFile",
    "ParityError",
    "benchmark_file",
    "check_nir",
    "check_onnx",
    "evaluate_file",
    "export_run",
    "import_extra",
    "open_file",
    "run_nir",
    "to_nir",
    "to_onnx",
]
