"""Features of single image patches and text tokens of any CLIP, for heads that read more than one embedding."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.errors import ModelError
from lit_clipq.models.attention.parts import qualified_name
from lit_clipq.models.encode import end_token_tower

HF_TEXT = "open_clip.hf_model.HFTextEncoder"


@dataclass(frozen=True)
class TokenSizes:
    """Shapes of a CLIP's token features."""

    image_tokens: int
    """Patches, or places of the grid, of a picture."""
    image_width: int
    """Features of a patch."""
    text_width: int
    """Features of a text token."""


def encode_image_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """Compute a feature for every patch, or every place of a convolutional tower's last grid.

    Transformers give the tokens behind the last block and `ln_post`, without the class token; a pooling by attention
    comes after them and is not run. CLIP's ResNets give the grid in front of their attention pool, timm towers what
    `forward_features` returns.

    Args:
        model: An open_clip model, explicit or quantized or neither.
        images: Preprocessed pictures (B, 3, H, W) in the model's type and on its device.

    Returns:
        Features (B, T, D), row by row over the picture, not projected into the joint space.

    Raises:
        ModelError: For an image tower of an unknown class, or a timm tower that gives no tokens.
    """
    visual: Any = model.visual
    kind = qualified_name(visual)
    if kind == "open_clip.transformer.VisionTransformer":
        x = visual.transformer(visual._embeds(images))[:, 1:]
        return x if visual.attn_pool is not None else visual.ln_post(x)  # type: ignore[no-any-return]
    if kind == "open_clip.modified_resnet.ModifiedResNet":
        x = visual.stem(images)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = stage(x)
        return x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h * w, C)
    if kind == "open_clip.timm_model.TimmModel":
        return _timm_tokens(visual.trunk, visual.trunk.forward_features(images))
    raise ModelError(
        f"token features can be read from open_clip's VisionTransformer, ModifiedResNet and timm towers, not from the "
        f"image tower {kind}; choose another --model.name"
    )


def text_token_mask(model: nn.Module, tokens: Tensor) -> Tensor:
    """Tell which text tokens have a feature that says something, without running the model.

    In a causal tower that is pooled at its end token these are the tokens up to the end without the first: what follows
    has seen the whole text and padding, and the feature of the start token is the same for every text (quantization
    does not spend precision on it: its keys and values are constants). Elsewhere padding is left out where the tower
    knows it.

    Args:
        model: An open_clip model.
        tokens: int64 token ids (B, L).

    Returns:
        Boolean (B, L).
    """
    tower = end_token_tower(model)
    if tower is not None:
        end = tower.end_positions(tokens)[:, None]
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return (place <= end) & ((place > 0) | (end == 0))
    text: Any = getattr(model, "text", model)
    if qualified_name(text) == HF_TEXT:
        return tokens != text.config.pad_token_id
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return tokens != text.pad_id
    return torch.ones_like(tokens, dtype=torch.bool)


def encode_text_tokens(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a feature for every text token, behind the final LayerNorm and not projected.

    A causal tower that is pooled at its end token runs only to the longest text of the batch.

    Args:
        model: An open_clip model, explicit or quantized or neither.
        tokens: int64 token ids (B, L).

    Returns:
        Features (B, l, D) with l at most L, and the mask (B, l) of `text_token_mask`.

    Raises:
        ModelError: For a text tower of an unknown class.
    """
    mask = text_token_mask(model, tokens)
    tower = end_token_tower(model)
    if tower is not None:
        length = int(tower.end_positions(tokens).max()) + 1 if len(tokens) else 1
        return tower.root.ln_final(tower.hidden(tokens[:, :length])), mask[:, :length]
    text: Any = getattr(model, "text", model)
    kind = qualified_name(text)
    if kind == HF_TEXT:
        return text.transformer(input_ids=tokens, attention_mask=mask.long()).last_hidden_state, mask
    if not hasattr(text, "ln_final"):
        raise ModelError(
            f"token features can be read from open_clip's and Hugging Face's text towers, not from {kind}; choose "
            "another --model.name"
        )
    x, attn_mask = text._embeds(tokens) if hasattr(text, "_embeds") else _embed_at_root(text, tokens)
    x = text.transformer(x, attn_mask=attn_mask)
    if getattr(text, "cls_emb", None) is not None:  # CoCa appends a token that sees all others
        x = x[:, :-1]
    return text.ln_final(x), mask


@torch.no_grad()
def token_sizes(model: nn.Module, tokens: Tensor) -> TokenSizes:
    """Find the shapes of the token features by running the model once on an empty picture.

    Args:
        model: An open_clip model.
        tokens: int64 (1, L): any text.

    Raises:
        ModelError: For a tower whose tokens cannot be read.
    """
    size: Any = model.visual.image_size  # type: ignore[union-attr]
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(model.parameters())
    image = encode_image_tokens(model, parameter.new_zeros(1, 3, height, width))
    text, _ = encode_text_tokens(model, tokens.to(parameter.device))
    return TokenSizes(image.shape[1], image.shape[2], text.shape[2])


def layers_behind_tokens(model: nn.Module) -> tuple[str, ...]:
    """Name what no token feature depends on, as shell patterns of the layers of the explicit model.

    These are projections into the joint space and poolings.

    Args:
        model: An open_clip model, explicit or not.

    Example:
        >>> from lit_clipq.models import load_clip
        >>> layers_behind_tokens(load_clip("mini-vit").model)
        ('visual.proj', 'text_projection')
    """
    visual: Any = model.visual
    text, root = ("text.", model.text) if hasattr(model, "text") else ("", model)
    places = [
        *(("visual.", visual, name) for name in ("proj", "attn_pool", "attn_pool_contrastive", "attnpool", "head")),
        *(("visual.trunk.", getattr(visual, "trunk", None), name) for name in ("attn_pool", "head")),
        *((text, root, name) for name in ("text_projection", "proj")),
    ]
    found = [
        *(pattern for prefix, owner, name in places for pattern in _layers_at(prefix, owner, name)),
        *_layers_at("", model, "text_decoder"),
    ]
    return tuple(found)


def _layers_at(prefix: str, owner: Any, name: str) -> Iterator[str]:
    """Yield the pattern of the layers that `owner.name` is or holds, if any."""
    part = getattr(owner, name, None)
    if isinstance(part, Tensor):
        if part.dim() == 2:
            yield prefix + name
    elif isinstance(part, nn.Module):
        if hasattr(part, "weight_quantizer") or isinstance(part, nn.Linear | nn.Conv2d):
            yield prefix + name
        elif any(True for _ in part.parameters()):
            yield f"{prefix}{name}.*"


def _embed_at_root(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    dtype = model.transformer.get_cast_dtype()
    x = model.token_embedding(tokens).to(dtype) + model.positional_embedding[: tokens.shape[1]].to(dtype)
    return x, model.attn_mask


def _timm_tokens(trunk: Any, features: Any) -> Tensor:
    if isinstance(features, Tensor) and features.dim() == 3:
        return features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    if isinstance(features, Tensor) and features.dim() == 4:
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    raise ModelError(
        f"the timm tower {type(trunk).__name__} gives no tokens (expected (B, N, C) or a grid of them from "
        "`forward_features`); choose another --model.name"
    )
