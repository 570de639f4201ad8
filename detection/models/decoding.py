"""The way from a dense detector's outputs to its boxes, in plain numbers, for programs without torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.ssd import SSD

STEPS = (
    "resize the image as `resize` says; pad it at the right and below with `pad_colour` to multiples of `pad_to`: to "
    "H x W pixels",
    "a level has ceil(H / stride) rows and ceil(W / stride) columns, or `cells` where that is given; the centre of the "
    "cell in row r is (r + anchor_offset) * step, step = H // rows with anchor_step 'integer', H / rows with 'real'; "
    "its anchors are the level's `anchors` (x1, y1, x2, y2) moved there; rows of the outputs: level by level, in each "
    "row by row, column by column, anchor by anchor",
    "scores of a row by `activation` of its cls_logits, the column `background_column` left out (softmax takes it in); "
    "label k, from 1, is classes[k - 1] and column k",
    "box by `box_coder` from a row of bbox_regression and its anchor of the centre c and the size s (of x, of y). "
    "centre_size: centre c + s * offset[0:2] / weights[0:2], size s * exp(min(offset[2:4] / weights[2:4], "
    "max_log_scale)); distances: from c - s * offset[0:2] to c + s * offset[2:4]",
    "boxes are cut off at the borders of the resized image; scores above `score_threshold` count, of each level (or "
    "class, see `candidates_per`) the best `candidates`; of two boxes of a class with an IoU above `nms_threshold` the "
    "weaker one goes; the best `max_detections` stay; boxes are scaled back to the image",
)


def describe_decoding(detector: nn.Module) -> dict[str, Any]:
    """Return all that makes boxes of the outputs of `DensePredictions`, as plain values; "steps" says how.

    Args:
        detector: a RetinaNet, FCOS or SSD of this project; its thresholds are those of the result.
    """
    transform, coder = detector.transform, detector.box_coder
    of_regions = {"kind": "centre_size", "weights": list(getattr(coder, "weights", ()))}
    of_regions["max_log_scale"] = getattr(coder, "bbox_xform_clip", None)
    is_ssd, is_fcos = isinstance(detector, SSD), isinstance(detector, FCOS)
    sides = {"shorter_side": transform.min_size[-1], "longer_side_at_most": transform.max_size}
    return {
        "steps": list(STEPS),
        "resize": {"height_and_width": list(transform.fixed_size)} if is_ssd else sides,
        "pad_to": transform.size_divisible,
        "pad_colour": list(transform.image_mean),
        "levels": _levels_of_ssd(detector) if is_ssd else _levels(detector),
        "anchor_offset": 0.5 if is_ssd else 0.0,
        "anchor_step": "real" if is_ssd else "integer",
        "activation": "softmax" if is_ssd else "sqrt(sigmoid * sigmoid(bbox_ctrness))" if is_fcos else "sigmoid",
        "background_column": 0,
        "box_coder": {"kind": "distances"} if is_fcos else of_regions,
        "score_threshold": detector.score_thresh,
        "candidates": detector.topk_candidates,
        "candidates_per": "class" if is_ssd else "level",
        "nms_threshold": detector.nms_thresh,
        "max_detections": detector.detections_per_img,
    }


def _levels(detector: nn.Module) -> list[dict[str, Any]]:
    pairs = zip(detector.backbone.strides, detector.anchor_generator.cell_anchors, strict=True)
    return [{"stride": stride, "anchors": anchors.tolist()} for stride, anchors in pairs]


@torch.no_grad()
def _levels_of_ssd(detector: nn.Module) -> list[dict[str, Any]]:
    """Return levels with their cells, since every image has the same size, which need not be a multiple of strides."""
    height, width = detector.transform.fixed_size
    generator, channels = detector.anchor_generator, len(detector.transform.image_mean)
    maps = detector.backbone(next(detector.parameters()).new_zeros(1, channels, height, width)).values()
    side = torch.tensor([width, height])
    halves = [pairs.clamp(0, 1) * side / 2 for pairs in generator._wh_pairs]
    levels = zip(detector.backbone.strides, maps, halves, strict=True)
    return [
        {"stride": stride, "cells": list(x.shape[2:]), "anchors": torch.cat([-half, half], 1).tolist()}
        for stride, x, half in levels
    ]
