"""MCAN: deep modular co-attention over question tokens and image patches (arXiv 1906.10770)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.errors import ConfigError
from lit_clipq.nn.attention import ExplicitAttention, QKVLinear, as_additive_mask
from lit_clipq.nn.matmul import MatMul


@dataclass(frozen=True)
class MCANOptions:
    """Size of the head; the defaults are MCAN-small."""

    layers: int = 6
    """Self-attention layers over the question, and as many self- and guided-attention layers over the picture."""
    hidden: int = 512
    """Features of a token inside the head."""
    heads: int = 8
    """Heads of each attention."""
    feed_forward: int = 2048
    """Hidden units of the feed-forward part of a layer."""
    dropout: float = 0.1
    """Probability of every dropout."""
    flat_hidden: int = 512
    """Hidden units of the network that weighs tokens when a stream is flattened."""
    flat_glimpses: int = 1
    """Weighted averages taken of a stream."""
    flat_out: int = 1024
    """Features of a flattened stream."""

    def __post_init__(self) -> None:
        sizes = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "dropout"}
        wrong = [f"{name}={value}" for name, value in sizes.items() if not isinstance(value, int) or value < 1]
        if wrong:
            raise ConfigError(f"sizes of an MCAN head must be whole numbers of at least 1, got {', '.join(wrong)}.")
        if self.hidden % self.heads:
            raise ConfigError(f"hidden={self.hidden} must be divisible by heads={self.heads}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}.")


MCAN_PRESETS: dict[str, MCANOptions] = {
    "small": MCANOptions(),
    "large": MCANOptions(hidden=1024, feed_forward=4096, flat_out=2048),
    "mini": MCANOptions(layers=2, hidden=128, heads=4, feed_forward=256, flat_hidden=64, flat_out=128),
}
"""`small` and `large` are the paper's; `mini` serves the embedded picture world."""


def mcan_options(preset: str, changes: Mapping[str, Any] | None = None) -> MCANOptions:
    """Take a preset and replace some of its options.

    Args:
        preset: A name in `MCAN_PRESETS`.
        changes: Options by name.

    Raises:
        ConfigError: For an unknown preset or option, or a size that cannot be.

    Example:
        >>> mcan_options("small", {"dropout": 0.0}).hidden
        512
    """
    if preset not in MCAN_PRESETS:
        raise ConfigError(f"unknown head {preset!r}, expected one of {', '.join(MCAN_PRESETS)}.")
    known = [field.name for field in fields(MCANOptions)]
    unknown = sorted(set(changes or {}) - set(known))
    if unknown:
        raise ConfigError(f"a head has no option {', '.join(unknown)}; expected some of {', '.join(known)}.")
    return replace(MCAN_PRESETS[preset], **dict(changes or {}))


class MCAN(nn.Module):
    """Answer questions about pictures from token features of both.

    The question passes self-attention layers; the picture passes layers of self-attention and of attention to the
    encoded question (encoder-decoder stacking). Each stream is flattened by learned weights, both are added, normalised
    and mapped to the answers. Against the paper, a linear layer on CLIP's text tokens stands where an LSTM was, padding
    has a mask of its own (a CLIP feature is never zero, so zero rows cannot mark it), and LayerNorm is torch's (the
    paper's divides by the unbiased deviation; the gain absorbs the constant factor).

    Every product is a linear layer or a `MatMul`, so that the head can be quantized like the towers.

    Args:
        options: Sizes.
        image_width: Features of a patch.
        text_width: Features of a question token.
        answers: Size of the answer vocabulary.
    """

    def __init__(self, options: MCANOptions, image_width: int, text_width: int, answers: int) -> None:
        super().__init__()
        self.options = options
        self.image_proj = nn.Linear(image_width, options.hidden)
        self.text_proj = nn.Linear(text_width, options.hidden)
        self.encoder = nn.ModuleList([EncoderLayer(options) for _ in range(options.layers)])
        self.decoder = nn.ModuleList([DecoderLayer(options) for _ in range(options.layers)])
        self.image_flat = WeightedFlatten(options)
        self.text_flat = WeightedFlatten(options)
        self.norm = nn.LayerNorm(options.flat_out, eps=1e-6)
        self.answer = nn.Linear(options.flat_out, answers)

    def forward(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """Score every answer.

        Args:
            image: Patch features (B, T, image_width).
            text: Question token features (B, L, text_width).
            image_mask: Boolean (B, T), True where a patch counts; None counts all. Each row has at least one.
            text_mask: Boolean (B, L), likewise.

        Returns:
            Logits (B, answers) of independent binary decisions.
        """
        image_hidden, text_hidden = _additive(image_mask, image), _additive(text_mask, text)
        x, y = self.text_proj(text), self.image_proj(image)
        for layer in self.encoder:
            x = layer(x, text_hidden)
        for layer in self.decoder:
            y = layer(y, x, image_hidden, text_hidden)
        flat = self.text_flat(x, text_hidden) + self.image_flat(y, image_hidden)
        return self.answer(self.norm(flat))  # type: ignore[no-any-return]

    def description(self) -> dict[str, Any]:
        """Return what two heads must share to share weights, as plain values."""
        return {
            **asdict(self.options),
            "image_width": self.image_proj.in_features,
            "text_width": self.text_proj.in_features,
            "answers": self.answer.out_features,
        }


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with residual and LayerNorm behind it."""

    def __init__(self, options: MCANOptions) -> None:
        super().__init__()
        self.attn = SelfAttention(options)
        self.attn_norm = nn.LayerNorm(options.hidden, eps=1e-6)
        self.mlp = _feed_forward(options)
        self.mlp_norm = nn.LayerNorm(options.hidden, eps=1e-6)
        self.dropout = Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Encode x (B, L, hidden); `mask` is added to the scores."""
        x = self.attn_norm(x + self.dropout(self.attn(x, mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Self-attention, attention guided by the question, and feed-forward."""

    def __init__(self, options: MCANOptions) -> None:
        super().__init__()
        self.attn = SelfAttention(options)
        self.attn_norm = nn.LayerNorm(options.hidden, eps=1e-6)
        self.guided_attn = GuidedAttention(options)
        self.guided_norm = nn.LayerNorm(options.hidden, eps=1e-6)
        self.mlp = _feed_forward(options)
        self.mlp_norm = nn.LayerNorm(options.hidden, eps=1e-6)
        self.dropout = Dropout(options.dropout)

    def forward(self, y: Tensor, x: Tensor, y_mask: Tensor | None, x_mask: Tensor | None) -> Tensor:
        """Decode y (B, T, hidden) under the guidance of x (B, L, hidden); masks are added to the scores."""
        y = self.attn_norm(y + self.dropout(self.attn(y, y_mask)))
        y = self.guided_norm(y + self.dropout(self.guided_attn(y, x, x_mask)))
        return self.mlp_norm(y + self.dropout(self.mlp(y)))  # type: ignore[no-any-return]


class SelfAttention(ExplicitAttention):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, options: MCANOptions) -> None:
        width = options.hidden
        super().__init__(
            projections={"qkv_proj": QKVLinear(width, (width,) * 3)},
            out_proj=nn.Linear(width, width),
            num_heads=options.heads,
        )
        self.attn_drop = Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within x (B, L, hidden); `mask` is broadcastable to (B, heads, L, L) and added."""
        q, k, v = self.project(x, x, x)
        return self.out_proj(self.merge(self.weights(q, k, mask), v))  # type: ignore[no-any-return]


class GuidedAttention(ExplicitAttention):
    """Multi-head attention of one sequence to another."""

    def __init__(self, options: MCANOptions) -> None:
        width = options.hidden
        super().__init__(
            projections={"q_proj": nn.Linear(width, width), "kv_proj": QKVLinear(width, (width,) * 2)},
            out_proj=nn.Linear(width, width),
            num_heads=options.heads,
        )
        self.attn_drop = Dropout(options.dropout)

    def forward(self, y: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from y (B, T, hidden) to x (B, L, hidden); `mask` is broadcastable to (B, heads, T, L) and added."""
        q, k, v = self.project(y, x, x)
        return self.out_proj(self.merge(self.weights(q, k, mask), v))  # type: ignore[no-any-return]


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws its masks in a third of the time on a CPU, where they took an eighth of a training step.

    torch draws 53 bits for each element and converts them to a float; 32 bits compared as integers do as well (p is
    then exact to 2^-32).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Zero elements with probability p and divide the others by 1 - p, in training."""
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        count = input.numel()
        words = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int32)[:count].view(input.shape)
        keep = bits >= round(self.p * 2**32) - 2**31
        return input * keep.to(input.dtype).mul_(1 / (1 - self.p))


class WeightedFlatten(nn.Module):
    """Weighted averages of a sequence, one a glimpse, mapped to one vector."""

    def __init__(self, options: MCANOptions) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(options.hidden, options.flat_hidden),
            nn.ReLU(),
            Dropout(options.dropout),
            nn.Linear(options.flat_hidden, options.flat_glimpses),
        )
        self.av = MatMul()
        self.merge = nn.Linear(options.hidden * options.flat_glimpses, options.flat_out)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Flatten x (B, L, hidden) to (B, flat_out); `mask` (B, 1, 1, L) is added to the scores."""
        scores = self.mlp(x).transpose(1, 2)  # (B, glimpses, L)
        if mask is not None:
            scores = scores + mask[:, 0]
        return self.merge(self.av(scores.softmax(dim=-1), x).flatten(1))  # type: ignore[no-any-return]


def _feed_forward(options: MCANOptions) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(options.hidden, options.feed_forward),
        nn.ReLU(),
        Dropout(options.dropout),
        nn.Linear(options.feed_forward, options.hidden),
    )


def _additive(mask: Tensor | None, features: Tensor) -> Tensor | None:
    """Turn a mask (B, L) of what counts into one of shape (B, 1, 1, L) that is added to scores."""
    if mask is None:
        return None
    return as_additive_mask(mask, torch.promote_types(features.dtype, torch.float32), true_means_masked=False)[
        :, None, None
    ]
