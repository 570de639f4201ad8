"""Accuracy of saved runs under noise: on the membrane potentials, on the thresholds, and on the images.

These are the kinds of noise, their severities and units. Severity 0 is the clean network for all kinds. Noise of
`SPIKE_KINDS` is in units of each layer's threshold, image corruptions (`IMAGE_KINDS`) act on pixels in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping

SPIKE_KINDS = ("membrane", "threshold")
IMAGE_KINDS = ("gaussian_noise", "blur", "contrast", "brightness", "jpeg")
RGB_KINDS = ("contrast", "brightness", "jpeg")  # of three colours alone, not of events
KINDS = (*SPIKE_KINDS, *IMAGE_KINDS)
RANDOM_KINDS = (*SPIKE_KINDS, "gaussian_noise")  # the others have no seed
SEVERITIES: Mapping[str, tuple[float, ...]] = {
    "membrane": (0.1, 0.2, 0.4, 0.8, 1.6),
    "threshold": (0.1, 0.2, 0.4, 0.8, 1.6),
    "gaussian_noise": (0.02, 0.04, 0.08, 0.12, 0.2),
    "blur": (0.5, 0.75, 1.0, 1.5, 2.5),
    "contrast": (0.2, 0.4, 0.6, 0.8, 0.9),
    "brightness": (0.2, 0.4, 0.6, 0.8, 0.9),
    "jpeg": (20.0, 50.0, 70.0, 85.0, 95.0),
}
UNITS: Mapping[str, str] = {
    "membrane": "standard deviation (thresholds of the layer)",
    "threshold": "standard deviation (thresholds of the layer)",
    "gaussian_noise": "standard deviation (1 = white minus black)",
    "blur": "standard deviation of the kernel (pixels)",
    "contrast": "share of the contrast taken away",
    "brightness": "share of the light taken away",
    "jpeg": "100 minus JPEG quality",
}
NEAR = 0.1  # of the threshold, on either side: a potential there is called near
ALL_LAYERS = "all layers"
