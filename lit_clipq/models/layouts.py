"""Names of weights as others write them, brought to open_clip's: wrappers, older layouts and those of transformers."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_clipq.errors import ModelError

logger = logging.getLogger(__name__)

# Parts of a name that wrappers of a module add, wherever it is wrapped.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# First parts of a CLIP's names, of which one is in every layout that is known here.
_IMAGE_TOWERS = frozenset({"visual", "vision_model", "image_encoder"})
# What the rest of a CLIP is called there, at the same level.
_CLIP_PARTS = _IMAGE_TOWERS | {
    "transformer",
    "text",
    "text_decoder",
    "text_model",
    "text_encoder",
    "token_embedding",
    "positional_embedding",
    "ln_final",
    "text_projection",
    "visual_projection",
    "logit_scale",
    "logit_bias",
    "attn_mask",
}


def unwrapped(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Find the CLIP among named tensors and take off what wraps it: `module.`, `_orig_mod.`, `clip.`, `model.` ...

    A wrapper is recognised by what it holds, not by its name. Tensors beside the CLIP are left out with a warning.

    Args:
        state: Tensors by name.
        where: What to call their origin.

    Returns:
        The tensors of the CLIP by its own names; all of them where no CLIP is recognised.

    Raises:
        ModelError: There are several CLIPs, or two names become one.
    """
    plain = _without_wrappers(state, where)
    return _below(plain, _clip_prefixes(plain), "CLIP", where)


def unwrapped_as(state: Mapping[str, Tensor], names: Collection[str], where: str) -> dict[str, Tensor]:
    """Find the network with known names among named tensors and take off what wraps it; as `unwrapped`.

    Args:
        state: Tensors by name.
        names: Those of the network, at least one.
        where: What to call the tensors' origin.

    Returns:
        The network's tensors by its own names; all tensors where not all of its names are there.

    Raises:
        ModelError: The network is there several times, or two names become one.
    """
    plain = _without_wrappers(state, where)
    some = min(names)
    found = [name.removesuffix(some) for name in plain if name == some or name.endswith(f".{some}")]
    whole = [prefix for prefix in found if all(f"{prefix}{name}" in plain for name in names)]
    return _below(plain, whole, "network", where)


def _without_wrappers(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if bare in plain:
            raise ModelError(f"{where} names the tensor {bare!r} twice, with and without a wrapper; keep one of them")
        plain[bare] = tensor
    return plain


def _below(plain: dict[str, Tensor], prefixes: Sequence[str], what: str, where: str) -> dict[str, Tensor]:
    """Tensors under the only prefix, without it; all where there is no prefix."""
    if len(prefixes) > 1:
        told = ", ".join(prefix or "(no prefix)" for prefix in prefixes)
        raise ModelError(f"{where} holds several {what}s, named {told}; save the one you want in a file of its own")
    if not prefixes:
        return plain
    prefix = prefixes[0]
    inside = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    outside = [name for name in plain if not name.startswith(prefix)]
    if outside:
        logger.warning(
            "%s: %d tensors beside the %s are left out: %s",
            *(where, len(outside), what, ", ".join(_first_parts(outside))),
        )
    return inside


def _clip_prefixes(names: Iterable[str]) -> list[str]:
    """Prefixes, each "" or with a final dot, under which an image tower and another part of a CLIP lie side by side."""
    below: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            below.setdefault("".join(f"{p}." for p in parts[:depth]), set()).add(part)
    return [p for p, parts in below.items() if parts & _IMAGE_TOWERS and len(parts & _CLIP_PARTS) > 1]


def _first_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))[:4]


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Tell whether names are those of transformers' CLIP or SigLIP."""
    return any(name.startswith("vision_model.embeddings.") for name in state) and any(
        name.startswith("text_model.embeddings.") for name in state
    )


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the layout of transformers' `CLIPModel` or `SiglipModel` to open_clip's.

    Query, key and value projections are stacked in this order; projections that open_clip keeps as matrices to multiply
    from the right are transposed.

    Args:
        state: Tensors under transformers' names.

    Returns:
        Tensors under open_clip's names: of `CLIP`, or for SigLIP of `CustomTextCLIP` with a timm image tower. What has
        no counterpart keeps its name.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}
    siglip = any(name.startswith("vision_model.head.") for name in state)
    return _renamed(_stacked(state), _SIGLIP if siglip else _CLIP)


_BLOCK = (
    (r"self_attn\.in_proj\.", "attn.in_proj_"),
    (r"self_attn\.out_proj\.", "attn.out_proj."),
    (r"layer_norm", "ln_"),
    (r"mlp\.fc1\.", "mlp.c_fc."),
    (r"mlp\.fc2\.", "mlp.c_proj."),
)
_TIMM_BLOCK = (
    (r"self_attn\.in_proj\.", "attn.qkv."),
    (r"self_attn\.out_proj\.", "attn.proj."),
    (r"layer_norm", "norm"),
    (r"mlp\.", "mlp."),
)


def _blocks(layers: str, target: str, block: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [(rf"{layers}\.(\d+)\.{source}", rf"{target}.\1.{to}") for source, to in block]


_CLIP = [
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    *_blocks(r"text_model\.encoder\.layers", "transformer.resblocks", _BLOCK),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    *_blocks(r"vision_model\.encoder\.layers", "visual.transformer.resblocks", _BLOCK),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"visual_projection\.weight", "visual.proj"),
    (r"text_projection\.weight", "text_projection"),
]
_SIGLIP = [
    (r"text_model\.embeddings\.token_embedding\.", "text.token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "text.positional_embedding"),
    *_blocks(r"text_model\.encoder\.layers", "text.transformer.resblocks", _BLOCK),
    (r"text_model\.final_layer_norm\.", "text.ln_final."),
    (r"text_model\.head\.", "text.text_projection."),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.trunk.pos_embed"),
    *_blocks(r"vision_model\.encoder\.layers", "visual.trunk.blocks", _TIMM_BLOCK),
    (r"vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"vision_model\.head\.probe", "visual.trunk.attn_pool.latent"),
    (r"vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"vision_model\.head\.mlp\.", "visual.trunk.attn_pool.mlp."),
]
_TRANSPOSED = frozenset({"visual.proj", "text_projection"})


def _stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack each attention's query, key and value along the first axis, under the name `in_proj`."""
    stacked: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not re.search(r"\.[qkv]_proj\.", name):
            stacked[name] = tensor
            continue
        parts = [state.get(re.sub(r"\.[qkv]_proj\.", f".{part}_proj.", name)) for part in "qkv"]
        if any(part is None for part in parts):
            stacked[name] = tensor  # shows as unexpected
        else:
            stacked[re.sub(r"\.[qkv]_proj\.", ".in_proj.", name)] = torch.cat([p for p in parts if p is not None])
    return stacked


def _renamed(state: Mapping[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = next((re.sub(f"^{old}", to, name) for old, to in rules if re.match(old, name)), name)
        if new == "visual.trunk.pos_embed":
            tensor = tensor[None]  # (N, D) -> (1, N, D)
        pool = re.fullmatch(r"vision_model\.head\.attention\.in_proj_(weight|bias)", name)
        if pool:  # timm keeps the query apart from key and value
            width = len(tensor) // 3
            found[f"visual.trunk.attn_pool.q.{pool[1]}"] = tensor[:width]
            found[f"visual.trunk.attn_pool.kv.{pool[1]}"] = tensor[width:]
        else:
            found[new] = tensor.T.contiguous() if new in _TRANSPOSED else tensor
    return found


def adapted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring third-party and older layouts to a model's own, as open_clip does.

    Args:
        model: The open_clip model.
        state: Tensors by name, without wrappers.

    Returns:
        Tensors under the names that the model may have; position embeddings are interpolated to its sizes.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    if is_transformers(state):
        state = from_transformers(state)
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if name in state and own is not None and own.numel() == state[name].numel():
            state[name] = state[name].reshape(own.shape)
    state.pop("text.transformer.embeddings.position_ids", None)  # no longer a buffer in transformers >= 4.31
    resize_pos_embed(state, model)
    if "positional_embedding" in state or "text.positional_embedding" in state:
        resize_text_pos_embed(state, model)
    return state
