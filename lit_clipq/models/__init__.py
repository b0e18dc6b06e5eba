"""CLIP models: loading, explicit attention, BatchNorm folding and encoding."""

from lit_clipq.models.attention import ExplicitAttentionRecord, make_explicit
from lit_clipq.models.bn import fold_batchnorm
from lit_clipq.models.encode import encode_image, encode_text, has_end_token_rule, text_lengths
from lit_clipq.models.loading import LoadedCLIP, load_clip
from lit_clipq.models.preprocessing import Preprocessing

__all__ = [
    "ExplicitAttentionRecord",
    "LoadedCLIP",
    "Preprocessing",
    "encode_image",
    "encode_text",
    "fold_batchnorm",
    "has_end_token_rule",
    "load_clip",
    "make_explicit",
    "text_lengths",
]
