"""The text tower from kept keys and values against whole texts."""

import pytest
import torch
import torch.nn.functional as F

import lit_clipq
from lit_clipq.models import encode_text, load_clip
from lit_clipq.recipes import make_recipe
from lit_clipq.zerocap.candidate_texts import SharedPrefixes, WordTokens
from lit_clipq.zerocap.language import load_language_model
from lit_clipq.zerocap.prefix_cache import PrefixTextEncoder, why_not

TEXTS = ["a picture of a red circle", "a picture of a star", "a picture of two houses, one is blue"] * 3


def tower(recipe=None):
    loaded = load_clip("mini-vit", "mini")
    if recipe is not None:
        tokens = loaded.preprocessing.tokenizer(TEXTS[:8])
        lit_clipq.quantize(loaded.model, [(torch.rand(8, 3, 64, 64), tokens)], recipe)
    return loaded.model.double(), loaded.preprocessing.tokenizer


@pytest.mark.parametrize(
    "recipe",
    [
        None,
        make_recipe("vanilla", attention_products=True),
        pytest.param(make_recipe("ptq4clip"), marks=pytest.mark.slow),
    ],
    ids=["float", "vanilla", "ptq4clip"],
)
@torch.no_grad()
def test_endings_behind_kept_prefixes_give_the_embeddings_of_whole_texts(recipe):
    model, tokenizer = tower(recipe)
    encoder = PrefixTextEncoder(model)
    tokens = tokenizer(["in the sea you can see a red fish", "on the lawn there is a red fish and a cup"])
    lengths = (tokens == tokens.max()).int().argmax(1) + 1
    kept = [encoder.keys_values(tokens[i : i + 1, :7]) for i in range(2)]
    for i in range(2):
        ending = tokens[i : i + 1, 4 : lengths[i]]
        got = encoder.encode(ending, kept, torch.tensor([i]), 4)
        torch.testing.assert_close(got, encode_text(model, tokens[i : i + 1]), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_positions_count_what_was_run():
    model, tokenizer = tower()
    encoder = PrefixTextEncoder(model)
    tokens = tokenizer(["a picture of a red circle"])
    kept = encoder.keys_values(tokens[:, :5].expand(20, -1))
    encoder.encode(tokens[:, 5:8].expand(17, -1), [kept.row(0)], torch.zeros(17, dtype=torch.int64), 5)
    assert encoder.positions == 20 * 5 + 17 * 3
    encoder.encode(tokens[:, 5:8], [kept.row(0)], torch.zeros(1, dtype=torch.int64), 5)
    assert encoder.positions == 20 * 5 + 17 * 3 + 6 * 3  # filled up to 16 rows of a product


def test_towers_that_are_not_causal_or_not_known_are_refused_with_the_reason():
    model, _ = tower()
    assert why_not(model) == ""
    model.attn_mask = None
    assert "not causal" in why_not(model)
    with pytest.raises(ValueError, match="not causal"):
        PrefixTextEncoder(model)


@pytest.mark.parametrize("model", ["mini-vit", "ViT-B-32"])
def test_tokens_word_by_word_are_those_of_the_tokenizer(model):
    if model == "mini-vit":
        clip, tokenizer = tower()
    else:
        from open_clip.tokenizer import SimpleTokenizer

        clip, tokenizer = tower()[0], SimpleTokenizer()
    words = WordTokens(clip, tokenizer)
    prefixes = [
        "",
        "Image of a",
        "a picture of a bl",
        "it's ",
        "a &amp; b",
        "caf\u00e9 in",
        "two  spaces",
        "a" * 40 + " b" * 40,
    ]
    pieces = [
        "",
        " dog",
        "ue",
        "'s",
        ".",
        "...",
        "\n",
        " 12",
        "!x",
        "\u00e9",
        " &lt;",
        "<end_of_text>",
        "  ",
        " UPPER case",
    ]
    for prefix in prefixes:
        for piece, got in zip(pieces, words.continuations(prefix, pieces), strict=True):
            row = tokenizer([prefix + piece])[0].tolist()
            assert got == row[: row.index(tokenizer.eot_token_id) + 1], (prefix, piece)


def test_candidates_are_embedded_as_their_texts_whoever_asked_before():
    model, tokenizer = tower()
    lm = load_language_model("mini-gpt2")
    decode = lm.tokenizer.decode
    texts = SharedPrefixes(model, tokenizer, decode, len(lm.tokenizer), 10**9)
    contexts = [tuple(lm.tokenizer(text).input_ids) for text in ("there is a", "there is a red umb", "there is a")]
    texts.begin(contexts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        candidates = torch.stack([torch.randperm(len(lm.tokenizer), generator=generator)[:40] for _ in contexts])
        got = texts.features(candidates)
        for row, context in enumerate(contexts):
            whole = [decode(list(context)) + decode([token]) for token in candidates[row].tolist()]
            with torch.no_grad():
                want = F.normalize(encode_text(model, tokenizer(whole)), dim=-1)
            torch.testing.assert_close(got[row], want, rtol=1e-9, atol=1e-9)
    before = texts.positions
    texts.features(candidates)
    assert texts.positions == before
