"""A causal text tower that runs only the new tokens of texts whose beginning it has seen.

In a causal tower the keys and values of a position do not depend on what follows. Candidate texts "prefix + word"
therefore share those of the prefix: they are computed once a layer and kept, and only the tokens in which a candidate
differs run, up to and including its end token. Every product goes through the tower's own layers, so that a quantized
tower with static grids rounds exactly as it does on whole texts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.models.attention.explicit import explicit_counterpart
from lit_clipq.models.attention.parts import qualified_name
from lit_clipq.models.encode import end_token_root
from lit_clipq.nn.attention import ExplicitAttention

MIN_ROWS = 16
"""Rows that a matrix product has at least; fewer are filled up. Products of fewer rows take other kernels, which sum in
another order, and then an embedding would depend on how much was computed beside it."""


@dataclass
class KeysValues:
    """Keys and values of the first positions of some texts.

    Attributes:
        layers: For each layer keys and values, both (B, H, L, d).
    """

    layers: list[tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for pair in self.layers for x in pair)

    def row(self, index: int) -> "KeysValues":
        """Return those of one text, (1, H, L, d) each, copied into memory of their own."""
        return KeysValues([(k[index : index + 1].clone(), v[index : index + 1].clone()) for k, v in self.layers])


class PrefixTextEncoder:
    """The text tower of a CLIP, as it is now, from kept keys and values.

    Make a new one after the network has changed. The attentions of a float tower are fused; the encoder then works with
    explicit copies of them.

    Args:
        model: A CLIP for which `why_not` returns an empty text.

    Raises:
        ValueError: Where `why_not` gives a reason.

    Attributes:
        positions: Token positions that were run so far, filled-up rows included.
    """

    def __init__(self, model: nn.Module) -> None:
        objection = why_not(model)
        if objection:
            raise ValueError(f"expected a causal text tower pooled at its end token: {objection}")
        root: Any = end_token_root(model)
        self.root = root
        self.blocks: list[Any] = list(root.transformer.resblocks)
        self.attentions = [_explicit(block) for block in self.blocks]
        self.positions = 0

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Run the beginnings of texts.

        Args:
            tokens: int64 (B, L), the start token first, no end token.

        Returns:
            Keys and values of all their positions.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        self._run(filled_up(tokens, tokens.shape[1]), None, None, kept)
        return KeysValues([(k[: len(tokens)], v[: len(tokens)]) for k, v in kept])

    def encode(self, endings: Tensor, prefixes: list[KeysValues], rows: Tensor, length: int) -> Tensor:
        """Embed texts from the kept part of their beginning on.

        Args:
            endings: int64 (R, S), the tokens behind the kept positions; the end token is the last.
            prefixes: Kept beginnings, one text each.
            rows: int64 (R,), the beginning of each text.
            length: How many positions of the beginning the texts share with it.

        Returns:
            Embeddings (R, D), not normalised.
        """
        count = len(endings)
        endings, rows = filled_up(endings, endings.shape[1]), filled_up(rows, endings.shape[1])
        layers = [
            tuple(torch.cat([p.layers[i][j][:, :, :length] for p in prefixes]) for j in (0, 1))
            for i in range(len(self.blocks))
        ]
        x = self._run(endings, layers, rows, None)[:, -1]
        x = self.root.ln_final(filled_up(x))
        projection = self.root.text_projection
        if projection is not None:
            x = projection(x) if isinstance(projection, nn.Module) else x @ projection
        return x[:count]

    def _run(
        self,
        tokens: Tensor,
        layers: list[tuple[Tensor, ...]] | None,
        rows: Tensor | None,
        kept: list[tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        """Return the last hidden states (R, S, W) of tokens (R, S) behind the prefixes of their rows."""
        root, size = self.root, tokens.shape[1]
        offset = 0 if layers is None else layers[0][0].shape[2]
        dtype = root.transformer.get_cast_dtype()
        positions = root.positional_embedding[offset : offset + size].to(dtype)
        x = root.token_embedding(tokens).to(dtype) + positions
        mask = root.attn_mask[offset : offset + size, : offset + size].to(dtype)
        self.positions += tokens.numel()
        for i, (block, attention) in enumerate(zip(self.blocks, self.attentions, strict=True)):
            h = block.ln_1(x)
            q, k, v = attention.project(h, h, h)
            if kept is not None:
                kept.append((k, v))
            if layers is not None:
                k, v = (torch.cat([old[rows], new], dim=2) for old, new in zip(layers[i], (k, v), strict=True))
            h = attention.out_proj(attention.merge(attention.weights(q, k, mask), v))
            x = x + block.ls_1(h)
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        return x


_AT_RUN_TIME = ("PerToken", "PerSample")  # granularities of grids that depend on the input


def why_not(model: nn.Module) -> str:
    """Say why the text tower of a CLIP cannot run from kept keys and values; empty where it can."""
    root: Any = end_token_root(model)
    if root is None:
        return "its text tower is not causal and pooled at the end token"
    for block in root.transformer.resblocks:
        if qualified_name(block) != "open_clip.transformer.ResidualAttentionBlock":
            return f"blocks of type {qualified_name(block)} are not known"
        if not isinstance(block.attn, ExplicitAttention) and explicit_counterpart(block.attn, block) is None:
            return f"its attention {qualified_name(block.attn)} has no explicit counterpart"
        break  # all blocks of a tower are alike
    if any(type(getattr(module, "granularity", None)).__name__ in _AT_RUN_TIME for module in root.modules()):
        return "its activation grids depend on the input"
    return ""


def _explicit(block: Any) -> Any:
    attention = block.attn
    return attention if isinstance(attention, ExplicitAttention) else explicit_counterpart(attention, block)


def filled_up(x: Tensor, positions: int = 1) -> Tensor:
    """Repeat the first row until rows times positions reach `MIN_ROWS`."""
    missing = -(-MIN_ROWS // positions) - len(x)
    return x if missing <= 0 else torch.cat([x, x[:1].expand(missing, *x.shape[1:])])
