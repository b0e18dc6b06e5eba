"""Ranges and outliers of what linear layers read: which channels, which tokens, how much attention the first takes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.passes import Observer
from lit_clipq.calibration.session import Session
from lit_clipq.nn.layout import ROWS

_NAMED = 5


@dataclass
class _Seen:
    """Magnitudes of one layer's input."""

    low: float = float("inf")
    high: float = float("-inf")
    channels: Tensor | None = None
    """Largest magnitude of each channel (C,)."""
    tokens: Tensor | None = None
    """Largest magnitude at each position (L,)."""
    first_largest: int = 0
    """Samples whose largest magnitude lies at the first position."""
    samples: int = 0


@dataclass
class OutlierObserver(Observer):
    """Looks at what linear layers read, (B, L, channels) or (B, channels), and at attention weights (B, H, L, L).

    Attributes:
        session: Its layers.
        seen: Magnitudes by layer.
        attention: By product of attention weights and values the attention on the first position, and of how many rows.
    """

    session: Session
    seen: dict[str, _Seen] = field(default_factory=dict)
    attention: dict[str, tuple[float, int]] = field(default_factory=dict)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook linear layers and averages of values."""
        averages = self.session.sources.averages
        for layer in self.session.layers:
            if layer.kind.has_weight and not layer.kind.is_table and layer.kind.layout(layer.module) is ROWS:
                yield layer.module.register_forward_pre_hook(self._input(layer.name))
            elif layer.name in averages:
                yield layer.module.register_forward_pre_hook(self._weights(layer.name))

    def _input(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if not x.numel():
                return
            mask = self.rows.mask(text=name in self.session.text_layers)
            magnitude = x.abs()
            by_sample = x.dim() == 3 and len(x) == len(self.rows.samples)
            if mask is not None and mask.applies(x):
                valid = mask.valid(x)
                magnitude = magnitude * valid[..., None]
                x = x[valid]
            seen = self.seen.setdefault(name, _Seen())
            seen.low, seen.high = min(seen.low, x.min().item()), max(seen.high, x.max().item())
            seen.channels = _largest(seen.channels, magnitude.flatten(0, -2).amax(0))
            if by_sample:
                positions = magnitude.amax(2)  # (B, L)
                seen.tokens = _largest(seen.tokens, positions.amax(0))
                seen.first_largest += int((positions.argmax(1) == 0).sum())
                seen.samples += len(positions)

        return hook

    def _weights(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            a = inputs[0].detach()
            mass, count = self.attention.get(name, (0.0, 0))
            first = a[..., 0].sum(dtype=torch.float64).item()
            self.attention[name] = mass + first, count + a[..., 0].numel()

        return hook

    def found(self) -> list[dict[str, Any]]:
        """Return one entry a layer, in order of the network, as plain values."""
        return [
            _told(layer.name, layer.tower, self.seen[layer.name])
            for layer in self.session.layers
            if layer.name in self.seen
        ]

    def sinks(self) -> list[dict[str, Any]]:
        """Return the mean attention on the first token of each attention, in order of the network."""
        return [
            {"layer": layer.name, "tower": layer.tower, "on_first": mass / count}
            for layer in self.session.layers
            if layer.name in self.attention
            for mass, count in [self.attention[layer.name]]
        ]


def _largest(known: Tensor | None, new: Tensor) -> Tensor:
    """Return elementwise maxima of vectors, the shorter one filled up with nothing."""
    new = new.float().cpu()
    if known is None:
        return new
    size = max(len(known), len(new))
    return torch.maximum(*(nn.functional.pad(x, (0, size - len(x))) for x in (known, new)))


def _told(name: str, tower: str, seen: _Seen) -> dict[str, Any]:
    assert seen.channels is not None  # noqa: S101 - set with the entry
    channel_ratio, channels = _outliers(seen.channels, "channel")
    token_ratio, tokens = (None, []) if seen.tokens is None else _outliers(seen.tokens, "token")
    return {
        "layer": name,
        "tower": tower,
        "low": seen.low,
        "high": seen.high,
        "channel_ratio": channel_ratio,
        "channels": channels,
        "token_ratio": token_ratio,
        "tokens": tokens,
        "first_largest": seen.first_largest / seen.samples if seen.samples else None,
    }


def _outliers(values: Tensor, word: str) -> tuple[float, list[dict[str, Any]]]:
    """Return the largest over the median magnitude, and the largest ones by place."""
    used = values[values > 0]
    median = used.median().item() if len(used) else 1.0
    best = values.topk(min(_NAMED, len(values)))
    rows = [
        {word: place, "max": value} for place, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return (rows[0]["max"] / median if len(used) else 1.0), rows
