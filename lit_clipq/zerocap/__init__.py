"""Captions without training: CLIP guides a language model (ZeroCap, arXiv 2111.14447)."""
