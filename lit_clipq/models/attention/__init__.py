"""Attention written out, one file a family."""

from lit_clipq.models.attention.explicit import ExplicitAttentionRecord, make_explicit

__all__ = ["ExplicitAttentionRecord", "make_explicit"]
