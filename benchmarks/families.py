"""The architecture families of open_clip: which name belongs to which, and a small member of each.

A small member has the classes, options and pooling of its family and a fraction of its width and depth, so that all
of them can be built, rewritten, quantized and saved in seconds. Text towers whose configuration is on the hub are built
from local files.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.maxxvit import MaxxVit, model_cfgs
from timm.models.vitamin import VitCfg, VitConvCfg

SMALL_TEXT = {"context_length": 12, "vocab_size": 300, "width": 32, "heads": 2, "layers": 2}
SMALL_VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
SMALL_RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}


@dataclass(frozen=True)
class Family:
    """Models of one architecture."""

    title: str
    """How the table calls it."""
    pattern: str
    """Regular expression of the open_clip names; empty for towers that only a configuration file asks for."""
    example: str
    """An open_clip name of the family, or a timm name where the pattern is empty."""
    vision: Mapping[str, Any] = field(default_factory=lambda: SMALL_VIT)
    """Changes to the vision configuration that make it small; of timm towers the arguments of their constructor."""
    image_size: int = 64
    """Side of the small member's pictures, where the changes do not say."""

    @property
    def published(self) -> bool:
        """Whether open_clip has names for it."""
        return bool(self.pattern)


_SQUARE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
_STAGES = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}
_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 2)}
_FASTVIT = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64), "mlp_ratios": (2, 2, 2, 2)}
_FASTVIT_5 = {"layers": (1,) * 5, "embed_dims": (16, 32, 64, 64, 64), "mlp_ratios": (2,) * 5}


def _small_vitamin() -> dict[str, Any]:
    conv = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stages = VitCfg(embed_dim=(16, 24, 64), depths=(1, 1, 1), stem_width=16, conv_cfg=conv, head_type="1d")
    return {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "embed_cfg": stages}


def _small_maxvit(name: str, block: str) -> dict[str, Any]:
    small: dict[str, Any] = {"embed_dim": (64, 64), "depths": (1, 1), "block_type": ("C", block), "stem_width": 16}
    if model_cfgs[name].head_hidden_size:
        small["head_hidden_size"] = 64
    return {"img_size": 64, "model_cfg": replace(model_cfgs[name], **small)}


FAMILIES: tuple[Family, ...] = (
    Family("ResNet", r"RN\d.*", "RN50", SMALL_RESNET),
    Family("CoCa", r"coca_ViT.*", "coca_ViT-B-32", {**SMALL_VIT, "attn_pooler_heads": 2, "attn_pooler_queries": 4}),
    Family("CoCa without a pooler", r"coca_base", "coca_base"),
    Family("CoCa with RoBERTa", r"coca_roberta.*", "coca_roberta-ViT-B-32"),
    Family("NLLB-SigLIP", r"nllb-clip-.*-siglip", "nllb-clip-base-siglip", _SQUARE),
    Family("NLLB", r"nllb-clip-.*", "nllb-clip-base"),
    Family("mT5", r"mt5-.*", "mt5-base-ViT-B-32"),
    Family("RoBERTa", r"roberta-.*", "roberta-ViT-B-32"),
    Family("XLM-RoBERTa", r"xlm-roberta-.*", "xlm-roberta-base-ViT-B-32"),
    Family("CLIPA", r"ViT-.*CLIPA.*", "ViT-L-14-CLIPA"),
    Family("MetaCLIP worldwide", r"ViT-.*worldwide.*", "ViT-L-14-worldwide"),
    Family("SigLIP 2", r"ViT-.*SigLIP2.*", "ViT-B-16-SigLIP2", _SQUARE),
    Family("SigLIP", r"ViT-.*SigLIP.*", "ViT-B-16-SigLIP", _SQUARE),
    Family("ViT", r"ViT-.*", "ViT-B-32"),
    Family("EVA01", r"EVA01.*", "EVA01-g-14", _SQUARE),
    Family("EVA02", r"EVA02.*", "EVA02-B-16", _SQUARE),
    Family("PE-Core", r"PE-Core.*", "PE-Core-T-16-384", {**_SQUARE, "attn_pool_num_heads": 2}),
    Family("ViTamin", r"ViTamin.*", "ViTamin-S", _small_vitamin()),
    Family("MobileCLIP-S0 to S2", r"MobileCLIP2?-S[012]", "MobileCLIP-S1", _FASTVIT, 96),
    Family("MobileCLIP2-S3, S4", r"MobileCLIP2-S[34]", "MobileCLIP2-S3", _FASTVIT_5, 96),
    Family("MobileCLIP-B", r"MobileCLIP2?-B", "MobileCLIP-B", {"img_size": 64, "depth": 1}),
    Family("MobileCLIP2-L", r"MobileCLIP2-L.*", "MobileCLIP2-L-14", _SQUARE),
    Family("ConvNeXt", r"convnext_.*", "convnext_base", _STAGES),
    Family("Swin", r"swin_.*", "swin_base_patch4_window7_224", _SWIN),
    Family("Relative-position ViT", r"vit_relpos_.*", "vit_relpos_medium_patch16_cls_224", _SQUARE),
    Family("GAP ViT", r"vit_medium_patch16_gap_.*", "vit_medium_patch16_gap_256", _SQUARE),
    Family("BEiT", "", "beit_base_patch16_224", _SQUARE),
    Family("Swin V2", "", "swinv2_tiny_window8_256", _SWIN),
    Family("MaxViT", "", "maxvit_tiny_tf_224", _small_maxvit("maxvit_tiny_tf", "M")),
    Family("CoAtNet", "", "coatnet_rmlp_1_rw_224", _small_maxvit("coatnet_rmlp_1_rw", "T")),
)

HUB_TEXT: dict[str, dict[str, Any]] = {
    "roberta-base": {
        **{"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    },
    "xlm-roberta-base": {
        **{"model_type": "xlm-roberta", "vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1},
        **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    },
    "xlm-roberta-large": {
        **{"model_type": "xlm-roberta", "vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1},
        **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    },
    "google/mt5-base": {
        **{"model_type": "mt5", "vocab_size": 250112, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12},
        **{"num_heads": 12, "feed_forward_proj": "gated-gelu"},
    },
    "google/mt5-xl": {
        **{"model_type": "mt5", "vocab_size": 250112, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24},
        **{"num_heads": 32, "feed_forward_proj": "gated-gelu"},
    },
    "facebook/nllb-200-distilled-600M": {
        **{"model_type": "m2m_100", "vocab_size": 256206, "d_model": 1024, "max_position_embeddings": 1024},
        **{"encoder_layers": 12, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096},
        **{"decoder_layers": 12, "decoder_attention_heads": 16, "decoder_ffn_dim": 4096},
    },
    "facebook/nllb-200-distilled-1.3B": {
        **{"model_type": "m2m_100", "vocab_size": 256206, "d_model": 1024, "max_position_embeddings": 1024},
        **{"encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 8192},
        **{"decoder_layers": 24, "decoder_attention_heads": 16, "decoder_ffn_dim": 8192},
    },
}
"""Configurations of the text towers on the hub, as published, without what no layer depends on."""
_SMALL_HUB_TEXT = {
    **{"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    **{"max_position_embeddings": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    **{"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48},
    **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48},
}


def family_of(name: str) -> Family:
    """Return the family of an open_clip name.

    Raises:
        LookupError: If none fits, which is a gap in the table.
    """
    for family in FAMILIES:
        if family.published and re.fullmatch(family.pattern, name):
            return family
    raise LookupError(f"open_clip's {name} belongs to no family of {__name__}; add one")


def small_config(family: Family, folder: Path) -> Path:
    """Write the open_clip configuration of a family's small member and the text configurations it needs.

    Args:
        family: The family.
        folder: Where the files go.

    Returns:
        Path of the JSON, as `load_clip` takes it.
    """
    config = _config_of(family)
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_name"] = _small_timm(vision["timm_model_name"], family.vision)
        vision["image_size"] = family.vision.get("img_size", family.image_size)
    else:
        vision.update(family.vision)
    config["embed_dim"] = 32
    text = config["text_cfg"]
    if "hf_model_name" in text:
        full = HUB_TEXT[text["hf_model_name"]]
        text["hf_model_name"] = _write_text(folder, {k: _SMALL_HUB_TEXT.get(k, v) for k, v in full.items()})
    else:
        text.update(SMALL_TEXT)
        text.pop("mlp_ratio", None)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(SMALL_TEXT)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', family.title.lower())}.json"
    path.write_text(json.dumps(config))
    return path


def full_config(family: Family, folder: Path) -> dict[str, Any]:
    """Return the configuration of a family's example at its full size.

    Args:
        family: The family.
        folder: Where the configuration of a text tower that is on the hub is written.
    """
    config = _config_of(family)
    if not family.published:
        config["text_cfg"] = _config_of(family_of("ViT-B-32"))["text_cfg"]
    source = config["text_cfg"].get("hf_model_name")
    if source:
        config["text_cfg"]["hf_model_name"] = _write_text(folder, HUB_TEXT[source])
    return config


def enliven(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter and running statistic random values at which inputs and positions make a difference.

    Constructors leave some at zero, or so small that the outputs hardly depend on the pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.data.add_(noise, alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def sample(model: Any, count: int, *, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Make pictures and texts of different lengths, as any tokenizer of the families could have made them.

    Args:
        model: An open_clip model.
        count: How many of each.
        seed: Of their content.
        device: "cpu", or "meta" for shapes alone.

    Returns:
        Float (count, 3, H, W), int64 (count, context length).
    """
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    text = getattr(model, "text", model)
    vocabulary = text.vocab_size
    length = min(text.context_length or 77, 77)
    if device == "meta":
        images, tokens = torch.empty(count, 3, height, width), torch.ones(count, length, dtype=torch.int64)
        return images.to("meta"), tokens.to("meta")
    generator = torch.Generator().manual_seed(seed)
    padding = getattr(getattr(text, "config", None), "pad_token_id", None) or 0
    end = getattr(text, "text_eos_id", getattr(text, "eos_id", None)) or vocabulary - 1
    tokens = torch.full((count, length), padding)
    for row in range(count):
        words = 3 + row % (length - 4)
        tokens[row, :words] = torch.randint(3, vocabulary - 2, (words,), generator=generator)
        tokens[row, 0], tokens[row, words] = 4, end  # every tokenizer begins all texts alike
    return torch.randn(count, 3, height, width, generator=generator), tokens


def _config_of(family: Family) -> dict[str, Any]:
    import open_clip

    if family.published:
        return open_clip.get_model_config(family.example)
    size = timm.get_pretrained_cfg(family.example).input_size[-1]
    vision = {"timm_model_name": family.example, "timm_pool": "avg", "timm_proj": "linear", "image_size": size}
    return {"embed_dim": 512, "vision_cfg": vision, "text_cfg": dict(SMALL_TEXT)}


def _write_text(folder: Path, config: Mapping[str, Any]) -> str:
    name = json.dumps(config, sort_keys=True)
    target = folder / f"{config['model_type']}-{abs(hash(name)) % 10**8}"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(name)
    return str(target)


def _small_timm(name: str, options: Mapping[str, Any]) -> str:
    """Register a timm architecture with other sizes and return its name; open_clip passes none on."""
    small = f"small_{name}"
    if not timm.is_model(small):

        def build(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:  # noqa: ARG001 - timm's signature
            given = {key: value for key, value in kwargs.items() if not key.startswith("pretrained_cfg")}
            given = {**options, **given}
            if "model_cfg" in given:  # timm's MaxViT functions take no configuration
                return build_model_with_cfg(MaxxVit, name, False, feature_cfg={"flatten_sequential": True}, **given)
            return timm.create_model(name, **given)

        build.__name__ = small
        build.__module__ = __name__
        register_model(build)
    return small
