"""CLIP models: loading, explicit attention, BatchNorm folding, encoding, and the head that answers questions."""

from lit_clipq.models.attention.explicit import ExplicitAttentionRecord, make_explicit
from lit_clipq.models.bn import fold_batchnorm
from lit_clipq.models.classifier import load_classifier
from lit_clipq.models.encode import encode_image, encode_text, has_end_token_rule, text_lengths
from lit_clipq.models.loading import LoadedCLIP, load_clip
from lit_clipq.models.mcan import MCAN, MCAN_PRESETS, MCANOptions, mcan_options
from lit_clipq.models.preprocessing import Preprocessing, PreprocessingOptions
from lit_clipq.models.tokens import (
    TokenSizes,
    encode_image_tokens,
    encode_text_tokens,
    layers_behind_tokens,
    text_token_mask,
    token_sizes,
)

__all__ = [
    "MCAN",
    "MCAN_PRESETS",
    "ExplicitAttentionRecord",
    "LoadedCLIP",
    "MCANOptions",
    "Preprocessing",
    "PreprocessingOptions",
    "TokenSizes",
    "encode_image",
    "encode_image_tokens",
    "encode_text",
    "encode_text_tokens",
    "fold_batchnorm",
    "has_end_token_rule",
    "layers_behind_tokens",
    "load_classifier",
    "load_clip",
    "make_explicit",
    "mcan_options",
    "text_lengths",
    "text_token_mask",
    "token_sizes",
]
