"""Annotations, images and batches."""

from detection.data.batches import AspectRatioBatches, SeededItems, TrainingBatches, evaluation_batches
from detection.data.coco import read_coco
from detection.data.dataset import DetectionDataset
from detection.data.formats import read_split, register_format
from detection.data.image_files import load_image
from detection.data.loaders import Loader, LoaderError, TrainingLoader, build_loader, loader_options, start_worker
from detection.data.records import Annotations, RawObject, Record, build_annotations, build_record
from detection.data.synthetic import draw_scene, draw_scenes
from detection.data.voc import read_voc

__all__ = [
    "Annotations",
    "AspectRatioBatches",
    "DetectionDataset",
    "Loader",
    "LoaderError",
    "RawObject",
    "Record",
    "SeededItems",
    "TrainingBatches",
    "TrainingLoader",
    "build_annotations",
    "build_loader",
    "build_record",
    "draw_scene",
    "draw_scenes",
    "evaluation_batches",
    "load_image",
    "loader_options",
    "read_coco",
    "read_split",
    "read_voc",
    "register_format",
    "start_worker",
]
