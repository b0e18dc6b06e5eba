"""Texts to token ids, as open_clip's byte-pair tokenizer gives them, without torch."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_clipq.errors import DataError
from lit_clipq.runtime.packages import need

Array = np.ndarray[Any, Any]
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What open_clip's pattern takes for words, beside the special tokens."""


def build_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: Sequence[str]) -> Any:
    """Build the byte-pair tokenizer of a vocabulary with the `tokenizers` package.

    Args:
        vocabulary: Token -> id; bytes as printable signs, `</w>` at the end of a word.
        merges: Pairs in order of priority.
        special: Start, end, and further tokens that are never split.
    """
    tokenizers = need("tokenizers", "tokenizers")
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    pattern = tokenizers.Regex("(?i:" + "|".join([*special, _WORDS]) + ")")
    before = tokenizers.pre_tokenizers
    built.pre_tokenizer = before.Sequence(
        [before.Split(pattern, "removed", invert=True), before.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return built


class Tokenizer:
    """Token ids of texts, equal to those of open_clip's `SimpleTokenizer`.

    Args:
        file: `tokenizer.json`.
        context_length: Tokens of a text, padding included.
        special: Start, end, and further tokens that are never split.
        clean: `lower` or `whitespace`.
    """

    def __init__(self, file: Path, context_length: int, special: Sequence[str], clean: str = "lower") -> None:
        self._tokenizer = need("tokenizers", "tokenizers").Tokenizer.from_file(str(file))
        self._ftfy = need("ftfy", "ftfy")
        self.context_length = context_length
        self.clean = clean
        self._special = {token: int(self._tokenizer.token_to_id(token)) for token in special}
        self.start, self.end = (self._special[token] for token in special[:2])

    def __call__(self, texts: Sequence[str]) -> Array:
        """Return int64 (n, context_length): start, tokens, end, zeros; what is too long is cut in front of the end.

        Raises:
            DataError: For something else than texts.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise DataError("expected a list of texts; put a single one into a list")
        cleaned = [self._cleaned(text) for text in texts]
        ids = np.zeros((len(cleaned), self.context_length), dtype=np.int64)
        encoded = self._tokenizer.encode_batch(cleaned, add_special_tokens=False) if cleaned else []
        for row, text, found in zip(ids, cleaned, encoded, strict=True):
            spells = any(token in text for token in self._special)
            tokens = (self._with_special(text) if spells else found.ids)[: self.context_length - 2]
            row[: len(tokens) + 2] = [self.start, *tokens, self.end]
        return ids

    def _cleaned(self, text: str) -> str:
        fixed = html.unescape(html.unescape(self._ftfy.fix_text(text)))
        plain = " ".join(fixed.split())
        return plain.lower() if self.clean == "lower" else plain

    def _with_special(self, text: str) -> list[int]:
        """Encode word by word a text that spells out a special token."""
        ids: list[int] = []
        for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
            known = self._special.get(word)
            ids += [known] if known is not None else [token.id for token in self._tokenizer.model.tokenize(word)]
        return ids
