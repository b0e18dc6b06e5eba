"""CLIP's embeddings of candidate texts: "context + next token" for many next tokens.

`WholeTexts` encodes every candidate anew, as the method is published. `SharedPrefixes` gives the same embeddings from
less work: a text is computed once however often it is asked for, and only from where it differs from its context.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.models.encode import encode_text, text_lengths
from lit_clipq.zerocap.prefix_cache import KeysValues, PrefixTextEncoder, filled_up

Context = tuple[int, ...]
"""Token ids of the language model."""
CHUNK = 512
"""Texts that run through the text tower at a time."""


class CandidateTexts(Protocol):
    """Source of the text embeddings that guide the language model."""

    @property
    def positions(self) -> int:
        """Token positions that the text tower has run so far."""

    def begin(self, contexts: Sequence[Context]) -> None:
        """Name the contexts of the next calls."""

    def features(self, candidates: Tensor) -> Tensor:
        """Embed each context with each of its candidates.

        Args:
            candidates: int64 (R, C), next tokens of the language model for each of the R contexts.

        Returns:
            (R, C, D), of length 1.
        """

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed whole texts, (n, D) of length 1."""


class _Tower:
    """Runs whole texts and counts their positions."""

    def __init__(self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self.clip = clip
        self.tokenizer = tokenizer
        self.device = next(clip.parameters()).device
        self.positions = 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, (n, D) of length 1."""
        with torch.no_grad():
            tokens = self.tokenizer(list(texts)).to(self.device)
            return torch.cat([self._embed(part) for part in tokens.split(CHUNK)])

    def _embed(self, tokens: Tensor) -> Tensor:
        filled = filled_up(tokens)
        self.positions += len(filled) * int(text_lengths(self.clip, filled).max())
        return F.normalize(encode_text(self.clip, filled)[: len(tokens)], dim=-1)


class WholeTexts:
    """Every candidate text encoded whole, again in each call.

    Args:
        clip: A CLIP.
        tokenizer: Its tokenizer.
        decode: Text of token ids of the language model.
    """

    def __init__(
        self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._tower = _Tower(clip, tokenizer)
        self._decode = decode
        self._prefixes: list[str] = []

    @property
    def positions(self) -> int:
        """Token positions that the text tower has run so far."""
        return self._tower.positions

    def begin(self, contexts: Sequence[Context]) -> None:
        """Name the contexts of the next calls."""
        self._prefixes = [self._decode(context) for context in contexts]

    def features(self, candidates: Tensor) -> Tensor:
        """Embed candidates (R, C); (R, C, D)."""
        rows = zip(self._prefixes, candidates.tolist(), strict=True)
        texts = [prefix + self._decode([token]) for prefix, tokens in rows for token in tokens]
        return self._encode(texts).unflatten(0, candidates.shape)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed whole texts, (n, D)."""
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        return self._tower(texts)


class RememberedTexts(WholeTexts):
    """As `WholeTexts`, but a text that was encoded is remembered; for any text tower.

    Args:
        clip: A CLIP.
        tokenizer: Its tokenizer.
        decode: Text of token ids of the language model.
        limit: Texts that are remembered at most; one more, and all are forgotten.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        decode: Callable[[Sequence[int]], str],
        limit: int = 100_000,
    ) -> None:
        super().__init__(clip, tokenizer, decode)
        self._limit = limit
        self._known: dict[str, Tensor] = {}

    def _encode(self, texts: Sequence[str]) -> Tensor:
        wanted = dict.fromkeys(texts)
        if len(self._known) + len(wanted) > self._limit:
            self._known = {}
        new = [text for text in wanted if text not in self._known]
        if new:
            self._known.update(zip(new, self._tower(new), strict=True))
        return torch.stack([self._known[text] for text in texts])


@dataclass
class _Seen:
    """A context and what is known of its candidates.

    Attributes:
        text: The context as text.
        tokens: CLIP's tokens of it, the start token first, no end token.
        kept: Keys and values of these tokens.
        slots: For each token of the language model its row in `features`, or -1; int64 (V,).
        features: Embeddings (n, D) of the candidates so far.
    """

    text: str
    tokens: list[int]
    kept: KeysValues
    slots: Tensor
    features: Tensor
    nbytes: int = field(default=0)

    def measure(self) -> int:
        self.nbytes = self.kept.nbytes + sum(x.numel() * x.element_size() for x in (self.slots, self.features))
        return self.nbytes


class SharedPrefixes:
    """Candidate texts computed once and only behind their context.

    An embedding depends on context and candidate alone, not on what else was asked for: texts run in groups of equal
    shape, and small groups are filled up (`prefix_cache.MIN_ROWS`).

    Args:
        clip: A CLIP for which `prefix_cache.why_not` returns an empty text.
        tokenizer: Its tokenizer.
        decode: Text of token ids of the language model.
        vocabulary: Size of the language model's vocabulary.
        limit_bytes: Bound on what is remembered of contexts that are not in use.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        decode: Callable[[Sequence[int]], str],
        vocabulary: int,
        limit_bytes: int,
    ) -> None:
        self._tower = _Tower(clip, tokenizer)
        self._encoder = PrefixTextEncoder(clip)
        self._words = WordTokens(clip, tokenizer)
        self._decode = decode
        self._pieces: dict[int, str] = {}
        self._vocabulary = vocabulary
        self._limit_bytes = limit_bytes
        self._held = 0
        self._known: OrderedDict[Context, _Seen] = OrderedDict()
        self._whole: dict[str, Tensor] = {}
        self._current: list[_Seen] = []

    @property
    def positions(self) -> int:
        """Token positions that the text tower has run so far."""
        return self._tower.positions + self._encoder.positions

    def begin(self, contexts: Sequence[Context]) -> None:
        """Name the contexts of the next calls; new ones run through the text tower, old ones may be forgotten."""
        new = {context: self._decode(context) for context in contexts if context not in self._known}
        groups: dict[int, list[tuple[Context, str, list[int]]]] = {}
        for context, text in new.items():
            tokens = self._words(text)[:-1]
            groups.setdefault(len(tokens), []).append((context, text, tokens))
        for group in groups.values():
            with torch.no_grad():
                kept = self._encoder.keys_values(torch.tensor([t for _, _, t in group], device=self._tower.device))
            for row, (context, text, tokens) in enumerate(group):
                slots = torch.full((self._vocabulary,), -1, dtype=torch.int64)
                seen = _Seen(text, tokens, kept.row(row), slots, torch.empty(0, device=self._tower.device))
                self._known[context] = seen
                self._held += seen.measure()
        for context in contexts:
            self._known.move_to_end(context)
        self._current = [self._known[context] for context in contexts]
        in_use = len(set(contexts))
        while self._held > self._limit_bytes and len(self._known) > in_use:
            self._held -= self._known.popitem(last=False)[1].nbytes

    def features(self, candidates: Tensor) -> Tensor:
        """Embed candidates (R, C); (R, C, D)."""
        asked = candidates.cpu()
        self._complete(asked)
        rows = zip(self._current, asked, strict=True)
        return torch.stack([seen.features[seen.slots[tokens].to(seen.features.device)] for seen, tokens in rows])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed whole texts, (n, D)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._whole]
        if len(self._whole) + len(new) > CHUNK:
            self._whole, new = {}, list(dict.fromkeys(texts))
        by_length: dict[int, list[str]] = {}
        for text in new:
            by_length.setdefault(len(self._words(text)), []).append(text)
        for group in by_length.values():
            self._whole.update(zip(group, self._tower(group), strict=True))
        return torch.stack([self._whole[text] for text in texts])

    def _complete(self, asked: Tensor) -> None:
        """Compute what is not known yet of the candidates (R, C) of the current contexts."""
        groups: dict[tuple[int, int], list[tuple[_Seen, int, list[int]]]] = {}
        for seen, tokens in zip(self._current, asked, strict=True):
            missing = tokens[seen.slots[tokens] == -1]
            seen.slots[missing] = -2  # asked for now; another row with this context need not ask again
            for token, ids in zip(missing.tolist(), self._tokens_of(seen, missing.tolist()), strict=True):
                shared = _common(seen.tokens, ids)
                groups.setdefault((shared, len(ids) - shared), []).append((seen, token, ids[shared:]))
        for (shared, _), group in groups.items():
            for start in range(0, len(group), CHUNK):
                self._compute(group[start : start + CHUNK], shared)

    def _compute(self, group: list[tuple[_Seen, int, list[int]]], shared: int) -> None:
        """Embed candidates whose texts share `shared` positions with their contexts and end equally long."""
        contexts = {id(seen): seen for seen, _, _ in group}
        place = {key: row for row, key in enumerate(contexts)}
        device = self._tower.device
        rows = torch.tensor([place[id(seen)] for seen, _, _ in group], device=device)
        endings = torch.tensor([ids for _, _, ids in group], device=device)
        with torch.no_grad():
            embedded = self._encoder.encode(endings, [seen.kept for seen in contexts.values()], rows, shared)
            embedded = F.normalize(embedded, dim=-1)
        for key, seen in contexts.items():
            own = (rows == place[key]).nonzero()[:, 0]
            tokens = torch.tensor([token for s, token, _ in group if s is seen])
            first = len(seen.features)
            seen.slots[tokens] = torch.arange(first, first + len(tokens))
            seen.features = torch.cat([seen.features.reshape(first, embedded.shape[1]), embedded[own]])
            self._held -= seen.nbytes
            self._held += seen.measure()

    def _tokens_of(self, seen: _Seen, tokens: Sequence[int]) -> Iterable[list[int]]:
        for token in tokens:
            if token not in self._pieces:
                self._pieces[token] = self._decode([token])
        return self._words.continuations(seen.text, [self._pieces[token] for token in tokens])


class WordTokens:
    """CLIP's tokens of many texts that begin alike, word by word where its tokenizer works word by word.

    open_clip's own byte-pair tokenizer never joins what white space separates, so that the tokens of a text are those
    of its words, each looked up once. Texts that its cleaning might change as a whole (anything but printable ASCII
    without HTML entities) and other tokenizers are tokenized whole.

    Args:
        clip: A CLIP whose text tower is pooled at the end token.
        tokenizer: Its tokenizer.
    """

    def __init__(self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        from open_clip.tokenizer import SimpleTokenizer, _clean_lower

        self._clip = clip
        self._tokenizer = tokenizer
        self._by_word = (
            isinstance(tokenizer, SimpleTokenizer)
            and tokenizer.clean_fn is _clean_lower
            and tokenizer.reduction_fn is None
        )
        self._memo: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text, from the start token to the end token."""
        return next(iter(self.continuations(text, [""])))

    def continuations(self, text: str, pieces: Sequence[str]) -> Iterable[list[int]]:
        """Return the tokens of `text + piece` for each piece."""
        if not (self._by_word and _plain(text)):
            return self._whole([text + piece for piece in pieces])
        head, last = _split_last_word(text)
        known = self._of_words(head)
        return [
            self._framed(known + self._of_words(last + piece)) if _plain(piece) else self._whole([text + piece])[0]
            for piece in pieces
        ]

    def _of_words(self, text: str) -> list[int]:
        tokens: list[int] = []
        for word in text.lower().split():
            if word not in self._memo:
                self._memo[word] = self._tokenizer.encode(word)  # type: ignore[attr-defined]
            tokens += self._memo[word]
        return tokens

    def _framed(self, tokens: list[int]) -> list[int]:
        """Add start and end token, and cut to the context length, as the tokenizer does."""
        tokenizer: Any = self._tokenizer
        kept = tokens[: tokenizer.context_length - 2]
        return [tokenizer.sot_token_id, *kept, tokenizer.eot_token_id]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        tokens = self._tokenizer(texts)
        lengths = text_lengths(self._clip, tokens).tolist()
        return [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]


def _plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and "&" not in text and "<" not in text


def _split_last_word(text: str) -> tuple[str, str]:
    space = text.rfind(" ") + 1
    return text[:space], text[space:]


def _common(context: list[int], text: list[int]) -> int:
    """Count the tokens that both begin with; the end token of the text always runs."""
    count = 0
    for a, b in zip(context, text[:-1], strict=False):
        if a != b:
            break
        count += 1
    return count
