"""Residual streams of transformers: what writes into one, what reads it, and where it begins and ends."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lit_clipq.models.attention.parts import qualified_name
from lit_clipq.nn.attention import ExplicitAttention

_OPEN_CLIP_BLOCKS = (
    "open_clip.transformer.ResidualAttentionBlock",
    "open_clip.transformer.CustomResidualAttentionBlock",
)
_TIMM_TOWERS = ("timm.models.vision_transformer.VisionTransformer", "timm.models.eva.Eva")
_TIMM_BLOCKS = ("timm.models.vision_transformer.Block", "timm.models.eva.EvaBlock")
_HF_TEXT = "open_clip.hf_model.HFTextEncoder"


@dataclass(frozen=True)
class Writer:
    """A layer that adds to the stream."""

    layer: nn.Linear
    scale: tuple[nn.Module, str] | None = None
    """(module, parameter) by which each channel of what it adds is multiplied on the way, if any."""


@dataclass
class ResidualStream:
    """One residual stream.

    Attributes:
        tower: Name of the module that holds it, below the network's root; empty for the root itself.
        width: Its channels.
        embeddings: What it starts from, where no normalisation stands in between: (module, parameter) whose last axis
            are channels.
        patches: Convolutions whose output channels it starts from.
        writers: Layers that add to it.
        readers: LayerNorms within blocks, each with the linear layers that alone read it.
        first: (module, name) of the normalisation that it starts from, if there is one.
        last: (module, name) of the normalisations that it ends in, which others than the tower read.
    """

    tower: str
    width: int
    embeddings: list[tuple[nn.Module, str]] = field(default_factory=list)
    patches: list[nn.Module] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    readers: list[tuple[nn.LayerNorm, list[nn.Linear]]] = field(default_factory=list)
    first: tuple[nn.Module, str] | None = None
    last: list[tuple[nn.Module, str]] = field(default_factory=list)


class NoStreamError(Exception):
    """A tower whose residual stream cannot be rotated; the message names the module and says why."""


def residual_streams(clip: nn.Module) -> Iterator[tuple[str, ResidualStream | str]]:
    """Yield each tower of an explicit CLIP by name, with its stream, or why it has none that can be rotated.

    Args:
        clip: With explicit attentions.
    """
    visual: Any = getattr(clip, "visual", None)
    text_path, text = ("text", clip.text) if hasattr(clip, "text") else ("", clip)
    for tower, path, module, find in (
        ("vision", "visual", visual, _vision),
        ("text", text_path, text, _text),
    ):
        if module is not None:
            try:
                yield tower, find(path, module)
            except NoStreamError as error:
                yield tower, str(error)


def _vision(path: str, visual: Any) -> ResidualStream:
    kind = qualified_name(visual)
    if kind == "open_clip.transformer.VisionTransformer":
        if visual.attn_pool is not None:
            raise NoStreamError(f"{path}.attn_pool reads the residual stream, which others read there, too")
        stream = ResidualStream(path, visual.conv1.out_channels)
        _open_clip_blocks(stream, f"{path}.transformer", visual.transformer)
        if isinstance(visual.ln_pre, nn.LayerNorm):
            stream.first = visual, "ln_pre"
        else:
            stream.patches = [visual.conv1]
            stream.embeddings = [(visual, "class_embedding"), (visual, "positional_embedding")]
        stream.last = [(visual, "ln_post")]
        return stream
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and qualified_name(trunk) in _TIMM_TOWERS:
        return _timm(f"{path}.trunk", trunk)
    raise NoStreamError(f"{path} ({kind.rpartition('.')[2]}) has no residual stream between LayerNorms")


def _text(path: str, text: Any) -> ResidualStream:
    name = path or "text tower"
    if qualified_name(text) == _HF_TEXT:
        raise NoStreamError(f"{name}.transformer normalises the residual stream itself (post-norm)")
    if not isinstance(getattr(text, "ln_final", None), nn.LayerNorm):
        raise NoStreamError(f"{name} ({type(text).__name__}) has no residual stream between LayerNorms")
    if getattr(text, "cls_emb", None) is not None:
        raise NoStreamError(f"{name}.ln_final sees the class token only, others read the residual stream itself")
    stream = ResidualStream(path, text.token_embedding.embedding_dim)
    _open_clip_blocks(stream, f"{path}.transformer".removeprefix("."), text.transformer)
    stream.embeddings = [(text.token_embedding, "weight"), (text, "positional_embedding")]
    stream.last = [(text, "ln_final")]
    return stream


def _open_clip_blocks(stream: ResidualStream, path: str, transformer: Any) -> None:
    for number, block in enumerate(transformer.resblocks):
        name = f"{path}.resblocks.{number}"
        if qualified_name(block) not in _OPEN_CLIP_BLOCKS or hasattr(block, "ln_1_kv"):
            raise NoStreamError(f"{name} ({type(block).__name__}) is a block of an unknown form")
        if not isinstance(getattr(block, "ln_attn", nn.Identity()), nn.Identity):
            raise NoStreamError(f"{name}.ln_attn normalises what is added to the residual stream")
        _attention(stream, name, block.ln_1, block.attn, _scale(block.ls_1, "gamma"))
        _add(stream, name, block.ln_2, [block.mlp.c_fc], block.mlp.c_proj, _scale(block.ls_2, "gamma"))


def _timm(path: str, trunk: Any) -> ResidualStream:
    patches = trunk.patch_embed
    if not isinstance(getattr(patches, "norm", None) or nn.Identity(), nn.Identity):
        raise NoStreamError(f"{path}.patch_embed.norm stands between the patches and the residual stream")
    if not isinstance(patches.proj, nn.Conv2d):
        raise NoStreamError(f"{path}.patch_embed.proj is no convolution")
    stream = ResidualStream(path, patches.proj.out_channels)
    for number, block in enumerate(trunk.blocks):
        name = f"{path}.blocks.{number}"
        if qualified_name(block) not in _TIMM_BLOCKS:
            raise NoStreamError(f"{name} ({type(block).__name__}) is a block of an unknown form")
        ls1, ls2 = (_scale(block, f"gamma_{i}") or _scale(getattr(block, f"ls{i}", None), "gamma") for i in (1, 2))
        _attention(stream, name, block.norm1, block.attn, ls1)
        mlp: Any = block.mlp
        first = [mlp.fc1_g, mlp.fc1_x] if hasattr(mlp, "fc1_g") else [mlp.fc1]
        _add(stream, name, block.norm2, first, mlp.fc2, ls2)
    if isinstance(trunk.norm_pre, nn.LayerNorm):
        stream.first = trunk, "norm_pre"
    else:
        stream.patches = [patches.proj]
        for part in ("cls_token", "reg_token", "pos_embed"):
            if getattr(trunk, part, None) is not None:
                if part not in trunk._parameters:
                    raise NoStreamError(f"{path}.{part} is no parameter")
                stream.embeddings.append((trunk, part))
    stream.last = [(trunk, "norm")]
    return stream


def _scale(owner: Any, parameter: str) -> tuple[nn.Module, str] | None:
    return (owner, parameter) if getattr(owner, parameter, None) is not None else None


def _attention(
    stream: ResidualStream, name: str, norm: nn.Module, attention: nn.Module, scale: tuple[nn.Module, str] | None
) -> None:
    parts: Any = attention._modules
    if not isinstance(attention, ExplicitAttention) or not isinstance(parts.get("qkv_proj"), nn.Linear):
        raise NoStreamError(f"{name}.attn ({type(attention).__name__}) does not project q, k and v from one input")
    gate = parts.get("gate")
    _add(stream, name, norm, [parts["qkv_proj"], *([] if gate is None else [gate])], parts["out_proj"], scale)


def _add(
    stream: ResidualStream,
    name: str,
    norm: nn.Module,
    readers: list[nn.Module],
    writer: nn.Module,
    scale: tuple[nn.Module, str] | None,
) -> None:
    if not isinstance(norm, nn.LayerNorm):
        raise NoStreamError(f"{name} normalises by {type(norm).__name__}, which is no LayerNorm")
    linear = [reader for reader in readers if isinstance(reader, nn.Linear)]
    if len(linear) < len(readers) or not isinstance(writer, nn.Linear):
        raise NoStreamError(f"{name} reads or writes the residual stream by another layer than a linear one")
    stream.readers.append((norm, linear))
    stream.writers.append(Writer(writer, scale))
