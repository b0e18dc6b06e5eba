"""Tokens of captions: those of the official tokenizer."""

import gzip
import json
import time
from pathlib import Path

import pytest

from lit_clipq.metrics.functional import ptb_tokens

# Texts written for these tests with what Stanford's PTBTokenizer (CoreNLP 3.4.1), run by the official scorer, makes of
# them: quotes, brackets, contractions, abbreviations, numbers, dates, fractions, addresses, dashes, smileys, scripts.
GOLDEN = json.loads((Path(__file__).parent / "golden/tokens.json").read_text(encoding="utf-8"))
SCORED = json.loads((Path(__file__).parent / "golden/captions.json").read_text(encoding="utf-8"))["records"]


@pytest.mark.parametrize(("text", "tokens"), GOLDEN, ids=lambda value: value[:30])
def test_golden_texts_have_the_official_tokens(text, tokens):
    assert ptb_tokens(text) == tokens


def test_scored_texts_have_the_official_tokens():
    for record in SCORED:
        assert [ptb_tokens(text) for text in (record["caption"], *record["references"])] == record["tokens"]


def test_published_captions_have_the_official_tokens(real_data):
    content = json.loads(gzip.decompress((real_data / "captions/coco_karpathy_magic.ptb.json.gz").read_bytes()))
    rows = [row for picture in content for row in picture]
    start = time.perf_counter()
    ours = [ptb_tokens(raw) for raw, _ in rows]
    seconds = time.perf_counter() - start
    different = [
        f"{raw!r}: official {tokens!r}, ours {mine!r}"
        for (raw, tokens), mine in zip(rows, ours, strict=True)
        if mine != tokens
    ]
    assert len(rows) == 29_902
    assert not different, "\n".join(different)
    assert seconds < 10


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", ""),
        (" . ", ""),
        ("a\nb\r\n c", "a b c"),
        ("A Wii U.", "a wii u"),  # the last letter of a sentence
        ("N. Astor lives at E. 5th", "n. astor lives at e. 5th"),  # initials
        ("the letter A. The end", "the letter a the end"),
    ],
)
def test_ends_of_sentences_and_lines(text, tokens):
    assert ptb_tokens(text) == tokens


@pytest.mark.parametrize("text", ["a" * 20_000, "a-" * 10_000, "1." * 10_000, "'" * 20_000, "a.b" * 5_000])
def test_long_texts_take_little_time(text):
    start = time.perf_counter()
    ptb_tokens(text)
    assert time.perf_counter() - start < 5
