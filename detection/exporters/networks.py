"""Which part of a network NIR can say."""

from __future__ import annotations

from torch import Tensor, nn


class EnteringSpikes(nn.Module):
    """A detector's backbone up to what enters its pyramid."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.body, neck = backbone.body, backbone.neck
        self.entering = neck.leaving[: len(backbone.levels)] if hasattr(neck, "leaving") else neck.laterals
        self.levels = backbone.levels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        return {name: layer(maps[name]) for name, layer in zip(self.levels, self.entering, strict=True)}
