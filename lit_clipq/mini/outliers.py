"""Channel outliers planted into a trained CLIP without changing the function it computes, for testing outlier methods.

A channel is multiplied by a power of two where it is made and divided by it where it is read. Both are exact in
floating point, so the output stays the same to the bit, while the channel's range grows by that factor and a min-max
grid over the tensor grows with it. Planted are: LayerNorm gain and bias against the next weight's columns; BatchNorm
gain and bias against the next convolution's input channels (ReLU and average pooling commute with a positive factor);
and the V rows of an attention against the columns of its output projection.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_clipq.mini.rng import Rng

State = dict[str, Tensor]


@dataclass(frozen=True)
class OutlierOptions:
    """Which channels become outliers, and by how much."""

    exponents: tuple[int, ...] = (4, 5, 6)
    """Powers of two to choose from."""
    channels: int = 2
    """Channels of each tensor."""
    seed: int = 20261123
    """Seed of the choice."""


@dataclass(frozen=True)
class _Link:
    """A place where channels are made, and the places where they are read."""

    name: str
    makers: tuple[tuple[str, int], ...]
    """Parameter and offset of channel 0 along axis 0."""
    readers: tuple[tuple[str, int], ...]
    """Parameter and axis of the channels."""
    width: int
    """Number of channels."""


def plant_outliers(state: State, options: OutlierOptions | None = None) -> State:
    """Return the state of a network of the same function with outlier channels.

    Args:
        state: state dict of an open_clip CLIP with nn.MultiheadAttention blocks, or AttentionPool2d and bottlenecks.
        options: which channels and factors.

    Returns:
        A new state dict in float32 (integer buffers and tensors that are not touched included).

    Example:
        >>> state = {"visual.ln_post.weight": torch.ones(4), "visual.ln_post.bias": torch.zeros(4)}
        >>> state["visual.proj"] = torch.ones(4, 2)
        >>> planted = plant_outliers(state)
        >>> int((planted["visual.ln_post.weight"] > 1).sum())
        2
    """
    options = options or OutlierOptions()
    planted = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    for link in _links(planted):
        rng = Rng(options.seed, "outliers", link.name)
        for channel in rng.sample(range(link.width), min(options.channels, link.width)):
            _scale(planted, link, channel, float(2 ** rng.choice(options.exponents)))
    return planted


def _scale(state: State, link: _Link, channel: int, factor: float) -> None:
    for name, offset in link.makers:
        state[name] = _times(state[name], 0, offset + channel, factor)
    for name, axis in link.readers:
        state[name] = _times(state[name], axis, channel, 1 / factor)


def _times(tensor: Tensor, axis: int, index: int, factor: float) -> Tensor:
    scale = torch.ones(tensor.shape[axis], dtype=tensor.dtype)
    scale[index] = factor
    return tensor * scale.view([-1 if i == axis else 1 for i in range(tensor.ndim)])


def _links(state: State) -> Iterator[_Link]:
    """Yield every place for outliers of a state dict."""
    for name in sorted(state):
        block = re.fullmatch(r"(.*resblocks\.\d+)\.ln_1\.weight", name)
        if block:
            yield from _block_links(state, block.group(1))
        bottleneck = re.fullmatch(r"(visual\.layer\d\.\d+)\.bn1\.weight", name)
        if bottleneck:
            prefix = bottleneck.group(1)
            yield _norm_link(state, f"{prefix}.bn1", ((f"{prefix}.conv2.weight", 1),))
            yield _norm_link(state, f"{prefix}.bn2", ((f"{prefix}.conv3.weight", 1),))
    if "visual.ln_post.weight" in state:
        yield _norm_link(state, "visual.ln_post", (("visual.proj", 0),))
    if "ln_final.weight" in state:
        yield _norm_link(state, "ln_final", (("text_projection", 0),))
    if "visual.attnpool.v_proj.weight" in state:
        pool = "visual.attnpool"
        makers = ((f"{pool}.v_proj.weight", 0), (f"{pool}.v_proj.bias", 0))
        yield _Link(f"{pool}.v", makers, ((f"{pool}.c_proj.weight", 1),), len(state[f"{pool}.v_proj.bias"]))


def _block_links(state: State, block: str) -> Iterator[_Link]:
    yield _norm_link(state, f"{block}.ln_1", ((f"{block}.attn.in_proj_weight", 1),))
    yield _norm_link(state, f"{block}.ln_2", ((f"{block}.mlp.c_fc.weight", 1),))
    width = len(state[f"{block}.ln_1.weight"])
    values = ((f"{block}.attn.in_proj_weight", 2 * width), (f"{block}.attn.in_proj_bias", 2 * width))
    yield _Link(f"{block}.attn.v", values, ((f"{block}.attn.out_proj.weight", 1),), width)


def _norm_link(state: State, norm: str, readers: tuple[tuple[str, int], ...]) -> _Link:
    makers = ((f"{norm}.weight", 0), (f"{norm}.bias", 0))
    return _Link(norm, makers, readers, len(state[f"{norm}.weight"]))
