"""Networks for inference: comparisons per channel, 8-bit weights."""
