import pytest
import torch
from torch.nn import functional as F

from lit_clipq.models import encode_image, encode_text, load_clip, make_explicit, text_lengths
from tests.models.conftest import CONFIGS, build

TRIMMED = ["vit", "quickgelu", "custom_text_argmax", "custom_text_eos", "qk_norm", "head_scale"]
FULL = ["bidirectional", "causal_last", "coca"]


def texts(model, lengths, end):
    """Random texts of the given lengths, end token included, padded with zeros."""
    tokens = torch.zeros(len(lengths), getattr(model, "text", model).context_length, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = torch.randint(8, 59, (length - 1,))
        tokens[row, length - 1] = end
    return tokens


def positions_computed(model, call):
    """Return the number of positions that each block of the text tower saw."""
    seen = []
    blocks = getattr(model, "text", model).transformer.resblocks
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for block in blocks]
    call()
    for handle in handles:
        handle.remove()
    return set(seen)


@torch.no_grad()
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", TRIMMED)
def test_trimmed_text_equals_the_full_one(kind, explicit):
    model = build(CONFIGS[kind])
    end = 7 if kind == "custom_text_eos" else 59
    tokens = texts(model, [5, 9, 3], end)
    expected = model.encode_text(tokens, normalize=False)
    if explicit:
        make_explicit(model)
    assert text_lengths(model, tokens).tolist() == [5, 9, 3]
    torch.testing.assert_close(encode_text(model, tokens), expected, rtol=1e-5, atol=1e-5)
    assert positions_computed(model, lambda: encode_text(model, tokens)) == {9}


@torch.no_grad()
@pytest.mark.parametrize("kind", FULL)
def test_towers_without_the_end_token_rule_run_at_full_length(kind):
    model = build(CONFIGS[kind])
    tokens = texts(model, [5, 9, 3], 59)
    length = tokens.shape[1]
    assert text_lengths(model, tokens).tolist() == [length] * 3
    assert torch.equal(encode_text(model, tokens), model.encode_text(tokens, normalize=False))
    assert positions_computed(model, lambda: encode_text(model, tokens)) == {length + (kind == "coca")}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "custom_text_eos"])
def test_first_end_token_counts_and_a_missing_one_pools_where_open_clip_does(kind):
    model = build(CONFIGS[kind])
    end = 7 if kind == "custom_text_eos" else 59
    tokens = texts(model, [4, 16], end)
    tokens[0, 8] = end  # a second end token after the first
    tokens[1, -1] = 58 if end == 7 else 0  # no end token at all
    expected = model.encode_text(tokens, normalize=False)
    torch.testing.assert_close(encode_text(model, tokens), expected, rtol=1e-5, atol=1e-5)
    assert text_lengths(model, tokens)[0] == 4


@torch.no_grad()
def test_length_of_a_full_text_is_the_context_length():
    model = build(CONFIGS["vit"])
    tokens = texts(model, [16, 2], 59)
    assert text_lengths(model, tokens).tolist() == [16, 2]
    torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_empty_batch_gives_no_embeddings():
    model = build(CONFIGS["vit"])
    tokens = torch.zeros(0, 16, dtype=torch.int64)
    assert encode_text(model, tokens).shape == (0, 24)
    assert text_lengths(model, tokens).shape == (0,)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "coca"])
def test_embeddings_are_not_normalised(kind):
    model = build(CONFIGS[kind])
    images = torch.randn(2, 3, 32, 32)
    found = encode_image(model, images)
    assert not torch.allclose(found.norm(dim=-1), torch.ones(2), atol=0.05)
    torch.testing.assert_close(F.normalize(found, dim=-1), model.encode_image(images, normalize=True))


def test_gradients_reach_the_token_embedding_through_the_trimmed_tower():
    model = build(CONFIGS["vit"])
    encode_text(model, texts(model, [5, 3], 59)).sum().backward()
    assert model.token_embedding.weight.grad[59].abs().max() > 0


@torch.no_grad()
def test_real_tokenizer_lengths_are_those_of_the_captions():
    model = load_clip("ViT-B-32-quickgelu").preprocessing
    tokens = model.tokenizer(["a cat", "two brown dogs on a sofa"])
    tower = build(CONFIGS["vit"])
    assert text_lengths(tower, tokens).tolist() == [4, 8]
