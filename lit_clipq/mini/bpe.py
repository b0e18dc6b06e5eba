"""Byte-pair merges for the mini models' tokenizer, in the file format of open_clip's SimpleTokenizer.

That tokenizer numbers 256 byte symbols, 256 of them at the end of a word, the merges, then start and end of text, so
the end token has the largest id and argmax pooling finds it. `python -m lit_clipq.mini.bpe` writes the shipped file
again.
"""

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from lit_clipq.mini.captions import COLOUR_WORDS, PREFIXES, SHAPE_WORDS, SIZE_WORDS, TEXTURE_WORDS, plural
from lit_clipq.mini.world import CLASS_NAMES, picture_captions, picture_questions

BPE_PATH = Path(__file__).parent / "configs" / "mini_bpe.txt.gz"
MERGES = 510
"""Merges at most; with the 512 symbols and two special tokens the vocabulary has 1,024 entries."""

Symbols = tuple[str, ...]


def corpus() -> list[str]:
    """Return the texts that the merges are learned from: training captions and questions, prompts, and all nouns."""
    texts = [text for i in range(2000) for text in picture_captions("train", i)]
    texts += [question.text for i in range(1000) for question in picture_questions("train", i)]
    for words in (SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS, TEXTURE_WORDS):
        texts += [word for alike in words.values() for word in alike]
    texts += [plural(word) for alike in SHAPE_WORDS.values() for word in alike]
    return texts + [f"{prefix} a {name}." for prefix in PREFIXES for name in CLASS_NAMES]


def learn_merges(texts: Iterable[str], limit: int) -> list[tuple[str, str]]:
    """Learn the merges of lower-case words that end in `</w>`.

    Args:
        texts: ASCII texts; words are runs of letters, as SimpleTokenizer splits them.
        limit: number of merges at most.

    Returns:
        See `merges_of`.
    """
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    return merges_of({(*word[:-1], word[-1] + "</w>"): count for word, count in counts.items()}, limit)


def merges_of(words: Mapping[Symbols, int], limit: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges (Sennrich, Haddow, Birch 2016): join the most frequent neighbours, again and again.

    Args:
        words: how often each word occurs, the words as symbols.
        limit: number of merges at most; fewer where every word is one token before that.

    Returns:
        Pairs in order of learning; equally frequent pairs in alphabetical order.
    """
    words = dict(words)
    merges: list[tuple[str, str]] = []
    known: set[str] = set()
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += count
        candidates = [pair for pair in pairs if "".join(pair) not in known]  # a token must have one id only
        if not candidates:
            break
        best = min(candidates, key=lambda pair: (-pairs[pair], pair))
        known.add("".join(best))
        merges.append(best)
        words = {_merge(symbols, best): count for symbols, count in words.items()}
    return merges


def _merge(symbols: Symbols, pair: tuple[str, str]) -> Symbols:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def write_merges(merges: list[tuple[str, str]], path: Path) -> None:
    """Write merges as SimpleTokenizer reads them: a header line, a pair a line, no line feed at the end."""
    lines = ["#version: lit_clipq mini", *(" ".join(pair) for pair in merges)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))


if __name__ == "__main__":
    write_merges(learn_merges(corpus(), MERGES), BPE_PATH)
