"""Rewrite a CLIP so that every product in it is a named module.

`make_explicit` replaces fused attentions by `ExplicitAttention` and bare projection Parameters by `Projection`. What
it does not know how to rewrite it lists, so that nothing stays in float unnoticed.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_clipq.models.attention.bert import ExplicitBert
from lit_clipq.models.attention.fastvit import ExplicitFastVit
from lit_clipq.models.attention.gpt2 import CONV1D, ExplicitGPT2, linear_from_conv1d
from lit_clipq.models.attention.m2m100 import ExplicitM2M100
from lit_clipq.models.attention.maxvit import ExplicitGridFirst, ExplicitGridLast
from lit_clipq.models.attention.openclip import ExplicitMultihead, ExplicitOpenClip, ExplicitPool2d
from lit_clipq.models.attention.parts import qualified_name
from lit_clipq.models.attention.positions import (
    RELATIVE_MLP,
    RELATIVE_TENSORFLOW,
    table_from_mlp,
    table_from_tensorflow,
)
from lit_clipq.models.attention.relative import ExplicitBeit, ExplicitRelative
from lit_clipq.models.attention.swin import ExplicitWindow, ExplicitWindowV2
from lit_clipq.models.attention.t5 import ExplicitT5
from lit_clipq.models.attention.timm import ExplicitPoolLatent, ExplicitTimm, ExplicitTimmPlain
from lit_clipq.models.layers import make_plain
from lit_clipq.models.ordinary import leave_inference_mode
from lit_clipq.nn.attention import ExplicitAttention, Projection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExplicitAttentionRecord:
    """What became of one attention module.

    Attributes:
        name: Path of the module in the model.
        original: Qualified name of the class that stood there.
        explicit: Whether it is now an `ExplicitAttention`.
        reason: Why it was left fused; empty for an explicit one.
    """

    name: str
    original: str
    explicit: bool
    reason: str = ""


class _LeftFusedError(Exception):
    """An attention of a known class in a variant that cannot be rewritten; the message says which."""


def make_explicit(model: nn.Module) -> list[ExplicitAttentionRecord]:
    """Rewrite attentions and bare projections in place; outputs stay equal within 1e-5 in float32.

    Every known attention becomes an `ExplicitAttention` with the children `qkv_proj` (or `q_proj` and `kv_proj`, or
    three), `qk`, `av` and `out_proj`. `visual.proj` and `text_projection` Parameters become `Projection` layers, whose
    weight is the transpose; GPT-2's `Conv1D` layers become `nn.Linear`; biases by relative position that are computed
    in every forward pass become tables; known subclasses of torch's layers become torch's own; tensors made in
    inference mode become ordinary ones. A second call changes nothing and returns the same records.

    Args:
        model: Any module tree; afterwards its state dict has other names.

    Returns:
        One record for each attention in module order, those left fused included.

    Example:
        >>> block = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
        >>> [(record.name, record.explicit) for record in make_explicit(block)]
        [('attn', True)]
    """
    leave_inference_mode(model)
    records = []
    for name, parent, child in list(_attentions(model)):
        original = child.original if isinstance(child, ExplicitAttention) else qualified_name(child)
        try:
            if not isinstance(child, ExplicitAttention):
                setattr(parent, name.rpartition(".")[2], _convert(child, parent).train(child.training))
            records.append(ExplicitAttentionRecord(name, original, explicit=True))
        except _LeftFusedError as error:
            logger.warning("%s (%s) stays fused: %s", name, original, error)
            records.append(ExplicitAttentionRecord(name, original, explicit=False, reason=str(error)))
    for module in list(model.modules()):
        make_plain(module)
        _name_projections(module)
        _turn_conv1d(module)
        _tabulate_positions(module)
        _call_layers(module)
    return records


def explicit_counterpart(module: nn.Module, parent: nn.Module) -> ExplicitAttention | None:
    """Return an explicit attention that computes what `module` inside `parent` does; `None` where none is known.

    Its projections are copies of the weights; nothing is changed in place.
    """
    try:
        return _convert(module, parent).train(module.training)
    except _LeftFusedError:
        return None


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield path, parent and module of the innermost modules that are or look like an attention."""
    for path, parent in model.named_modules():
        for name, child in parent.named_children():
            full_name = f"{path}.{name}" if path else name
            inside_explicit = any(isinstance(part, ExplicitAttention) for part in _ancestors(model, path))
            innermost = _is_known(child) or (_looks_like_attention(child) and not _contains_attention(child))
            if innermost and not inside_explicit:
                yield full_name, parent, child


def _ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    module = model
    yield module
    for name in path.split(".") if path else ():
        module = getattr(module, name)
        yield module


def _is_known(module: nn.Module) -> bool:
    return isinstance(module, ExplicitAttention) or qualified_name(module) in _CONVERTERS


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _contains_attention(module: nn.Module) -> bool:
    return any(_is_known(part) or _looks_like_attention(part) for part in module.modules() if part is not module)


def _convert(module: nn.Module, parent: nn.Module) -> ExplicitAttention:
    converter = _CONVERTERS.get(qualified_name(module))
    if converter is None:
        raise _LeftFusedError("no explicit counterpart of this class is known")
    return converter(module, parent)


def _convert_multihead(module: nn.Module, parent: nn.Module) -> ExplicitAttention:
    if not isinstance(module, nn.MultiheadAttention):
        raise TypeError(f"expected nn.MultiheadAttention, got {type(module).__name__}")
    if module.bias_k is not None or module.add_zero_attn:
        raise _LeftFusedError("add_bias_kv and add_zero_attn are not supported")
    if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        raise _LeftFusedError("torch's Transformer layers read the parameters of their attention")
    return ExplicitMultihead.convert(module, _multihead_inputs(parent))


def _multihead_inputs(parent: nn.Module) -> str:
    """Say which inputs of an attention its parent makes one tensor: "self" all, "cross" key and value, "any" none."""
    kind = qualified_name(parent)
    if kind == "open_clip.transformer.AttentionalPooler":
        return "cross"
    # a cross-attention block normalises its keys and its values apart, so that they are two tensors
    is_self_attention = kind == "open_clip.transformer.ResidualAttentionBlock" and not hasattr(parent, "ln_1_kv")
    return "self" if is_self_attention else "any"


def _convert_timm(module: Any, parent: nn.Module) -> ExplicitAttention:  # noqa: ARG001
    if getattr(module, "num_kv_groups", 1) > 1:
        raise _LeftFusedError("grouped-query attention is not supported")
    return ExplicitTimm.convert(module)


def _convert_bert(module: Any, parent: nn.Module) -> ExplicitAttention:  # noqa: ARG001
    if module.is_decoder or not hasattr(module, "scaling"):
        raise _LeftFusedError("only encoders of transformers >= 5 are supported")
    return ExplicitBert.convert(module)


def _convert_gpt2(module: Any, parent: nn.Module) -> ExplicitAttention:  # noqa: ARG001
    if module.is_cross_attention:
        raise _LeftFusedError("cross-attention with a cache is not supported")
    if module.reorder_and_upcast_attn:
        raise _LeftFusedError("reorder_and_upcast_attn is not supported")
    return ExplicitGPT2.convert(module)


def _convert_encoder(convert: Callable[[Any], ExplicitAttention]) -> Callable[[Any, nn.Module], ExplicitAttention]:
    def converter(module: Any, parent: nn.Module) -> ExplicitAttention:  # noqa: ARG001
        if module.is_decoder or not hasattr(module, "scaling"):
            raise _LeftFusedError("only encoders of transformers >= 5.24 are supported")
        return convert(module)

    return converter


def _convert_pool_latent(module: Any, parent: nn.Module) -> ExplicitAttention:  # noqa: ARG001
    if not isinstance(module.q, nn.Linear):
        raise _LeftFusedError("a latent without a query projection is not supported")
    return ExplicitPoolLatent.convert(module)


_CONVERTERS: dict[str, Callable[[Any, nn.Module], ExplicitAttention]] = {
    "torch.nn.modules.activation.MultiheadAttention": _convert_multihead,
    "open_clip.transformer.Attention": lambda module, _: ExplicitOpenClip.convert(module),
    "open_clip.modified_resnet.AttentionPool2d": lambda module, _: ExplicitPool2d.convert(module),
    "timm.layers.attention.Attention": lambda module, _: ExplicitTimmPlain.convert(module),
    "timm.models.vision_transformer.Attention": lambda module, _: ExplicitTimmPlain.convert(module),
    "timm.layers.attention.AttentionRope": _convert_timm,
    "timm.models.eva.EvaAttention": _convert_timm,
    "timm.layers.attention_pool.AttentionPoolLatent": _convert_pool_latent,
    "timm.models.vision_transformer_relpos.RelPosAttention": lambda module, _: ExplicitRelative.convert(module),
    "timm.models.beit.Attention": lambda module, _: ExplicitBeit.convert(module),
    "timm.models.swin_transformer.WindowAttention": lambda module, _: ExplicitWindow.convert(module),
    "timm.models.swin_transformer_v2.WindowAttention": lambda module, _: ExplicitWindowV2.convert(module),
    "timm.models.maxxvit.AttentionCl": lambda module, _: ExplicitGridLast.convert(module),
    "timm.models.maxxvit.Attention2d": lambda module, _: ExplicitGridFirst.convert(module),
    "timm.models.fastvit.Attention": lambda module, _: ExplicitFastVit.convert(module),
    "transformers.models.bert.modeling_bert.BertSelfAttention": _convert_bert,
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": _convert_gpt2,
    "transformers.models.m2m_100.modeling_m2m_100.M2M100Attention": _convert_encoder(ExplicitM2M100.convert),
    "transformers.models.mt5.modeling_mt5.MT5Attention": _convert_encoder(ExplicitT5.convert),
    "transformers.models.t5.modeling_t5.T5Attention": _convert_encoder(ExplicitT5.convert),
    "transformers.models.roberta.modeling_roberta.RobertaSelfAttention": _convert_bert,
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaSelfAttention": _convert_bert,
}


def _name_projections(module: nn.Module) -> None:
    """Turn the bare projection Parameter of one open_clip tower into a `Projection`."""
    if not type(module).__module__.startswith("open_clip."):
        return
    for name in ("proj", "text_projection"):
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.dim() == 2:
            delattr(module, name)
            setattr(module, name, Projection.from_parameter(parameter))


def _turn_conv1d(module: nn.Module) -> None:
    """Turn the `Conv1D` children of a module of transformers into linear layers; fused attentions keep theirs."""
    if qualified_name(module) in _CONVERTERS:
        return
    for name, child in list(module.named_children()):
        if qualified_name(child) == CONV1D:
            setattr(module, name, linear_from_conv1d(child).train(child.training))


def _tabulate_positions(module: nn.Module) -> None:
    """Turn biases by position that are computed anew in every forward pass into tables."""
    makers = {RELATIVE_MLP: table_from_mlp, RELATIVE_TENSORFLOW: table_from_tensorflow}
    for name, child in list(module.named_children()):
        make = makers.get(qualified_name(child))
        if make is not None:
            setattr(module, name, make(child).train(child.training))


def _call_layers(module: nn.Module) -> None:
    """Make torch's Transformer layers call their linear layers; a fast path of theirs reads the weights only."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    if isinstance(module, nn.TransformerEncoder):
        module.enable_nested_tensor = False
