"""ZeroCap's two engines, and what they compute in a step."""

import math

import pytest
import torch
import torch.nn.functional as F

import lit_clipq
from lit_clipq.mini.world import picture
from lit_clipq.models import encode_image, load_clip
from lit_clipq.recipes import make_recipe
from lit_clipq.zerocap.candidate_texts import RememberedTexts, SharedPrefixes
from lit_clipq.zerocap.engine import make_captioner
from lit_clipq.zerocap.language import load_language_model
from lit_clipq.zerocap.options import zerocap_options
from lit_clipq.zerocap.reference import PlainZeroCap
from lit_clipq.zerocap.steps import Beams, CaptionModel, guidance_loss, moved, next_log_probabilities

FEW = {"prefix": "there is", "beams": 2, "candidates": 24, "iterations": 2, "max_tokens": 5}
FLOAT_AND_QUANTIZED = pytest.mark.parametrize(
    "quantized", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float", "quantized"]
)


def mini_clip(dtype, quantized):
    loaded = load_clip("mini-vit", "mini")
    if quantized:
        texts = loaded.preprocessing.tokenizer([f"a {word} star next to two houses" for word in ("red", "big")] * 4)
        lit_clipq.quantize(loaded.model, [(pictures(8), texts)], make_recipe("ptq4clip"))
    return loaded.model.to(dtype), loaded.preprocessing.tokenizer


def mini_lm(dtype):
    loaded = load_language_model("mini-gpt2", dtype=dtype)
    loaded.model.requires_grad_(False)
    return loaded


def pictures(count):
    pixels = torch.stack([torch.from_numpy(picture("calibration", i)) for i in range(count)])
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def embedded(clip, count):
    images = pictures(max(count, 16)).to(next(clip.parameters()).dtype)
    return F.normalize(encode_image(clip, images), dim=-1)[:count]


@FLOAT_AND_QUANTIZED
def test_both_engines_write_the_same_captions_in_float64(quantized):
    clip, tokenizer = mini_clip(torch.float64, quantized)
    lm, images = mini_lm(torch.float64), embedded(clip, 3)
    engines = {
        engine: make_captioner(clip, tokenizer, lm, zerocap_options("mini", engine=engine, **FEW))
        for engine in ("fast", "plain")
    }
    captions = {engine: captioner.captions(images) for engine, captioner in engines.items()}
    assert isinstance(engines["plain"], PlainZeroCap)
    assert isinstance(engines["fast"].candidates, SharedPrefixes)
    assert captions["fast"] == captions["plain"]
    assert all(captions["fast"])
    assert engines["fast"].candidates.positions * 4 < engines["plain"].candidates.positions


@pytest.mark.parametrize("options", [{"prefix": ""}, {"guided": False}, {"iterations": 0}, {"beams": 1}], ids=str)
def test_both_engines_agree_at_the_edges_of_the_options(options):
    clip, tokenizer = mini_clip(torch.float64, False)
    lm, images = mini_lm(torch.float64), embedded(clip, 2)
    fast, plain = (
        make_captioner(clip, tokenizer, lm, zerocap_options("mini", engine=engine, **{**FEW, **options}))
        for engine in ("fast", "plain")
    )
    assert fast.captions(images) == plain.captions(images)
    assert (fast.candidates.positions == 0) == (options.get("guided") is False)


@FLOAT_AND_QUANTIZED
def test_a_caption_does_not_depend_on_the_pictures_beside_it(quantized):
    clip, tokenizer = mini_clip(torch.float32, quantized)
    lm, images = mini_lm(torch.float32), embedded(clip, 6)
    options = zerocap_options("mini", **FEW)
    together = make_captioner(clip, tokenizer, lm, options).captions(images)
    apart = make_captioner(clip, tokenizer, lm, options)
    assert [apart.captions(images[i : i + 1])[0] for i in (4, 0, 5, 1, 3, 2)] == [
        together[i] for i in (4, 0, 5, 1, 3, 2)
    ]


def test_a_small_memory_forgets_without_changing_captions():
    clip, tokenizer = mini_clip(torch.float64, False)
    lm, images = mini_lm(torch.float64), embedded(clip, 3)
    many = make_captioner(clip, tokenizer, lm, zerocap_options("mini", **FEW))
    few = make_captioner(clip, tokenizer, lm, zerocap_options("mini", memo_megabytes=0, **FEW))
    for captioner in (many, few):
        assert captioner.captions(images) == captioner.captions(images)
    assert few.captions(images) == many.captions(images)
    assert few.candidates.positions > many.candidates.positions


def test_other_text_towers_run_whole_texts_and_say_so(caplog):
    clip, tokenizer = mini_clip(torch.float64, False)
    lm, images = mini_lm(torch.float64), embedded(clip, 2)
    expected = make_captioner(clip, tokenizer, lm, zerocap_options("mini", **FEW)).captions(images)
    clip.transformer.resblocks[0].__class__ = type("OtherBlock", (type(clip.transformer.resblocks[0]),), {})
    captioner = make_captioner(clip, tokenizer, lm, zerocap_options("mini", **FEW))
    assert isinstance(captioner.candidates, RememberedTexts)
    assert "OtherBlock are not known" in caplog.text
    assert captioner.captions(images) == expected


@pytest.mark.slow
def test_guided_captions_are_nearer_to_their_pictures_than_unguided_ones():
    clip, tokenizer = mini_clip(torch.float32, False)
    lm, images = mini_lm(torch.float32), embedded(clip, 6)
    nearness = []
    for guided in (True, False):
        captioner = make_captioner(clip, tokenizer, lm, zerocap_options("mini", guided=guided))
        texts = captioner.captions(images)
        features = make_captioner(clip, tokenizer, lm, zerocap_options("mini")).candidates.texts(texts)
        nearness.append((features * images).sum(1).mean().item())
    assert nearness[0] > nearness[1] + 0.05


def test_no_pictures_no_captions():
    clip, tokenizer = mini_clip(torch.float32, False)
    captioner = make_captioner(clip, tokenizer, mini_lm(torch.float32), zerocap_options("mini", **FEW))
    assert captioner.captions(torch.empty(0, 128)) == []


def test_the_loss_is_cross_entropy_with_clip_and_divergence_from_the_language_model():
    options = zerocap_options("mini")
    log_p = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    log_p0 = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    candidates = torch.tensor([[1, 4], [6, 0]])
    target = torch.tensor([[0.3, 0.7], [1.0, 0.0]], dtype=torch.float64)
    expected = 0.0
    for row in range(2):
        clip = sum(-target[row, c].item() * log_p[row, candidates[row, c]].item() for c in range(2))
        p = [math.exp(v) for v in log_p[row].tolist()]
        divergence = sum(p[v] * (math.log(p[v]) - log_p0[row, v].item()) for v in range(7))
        expected += options.clip_scale * clip + options.ce_scale * divergence
    assert guidance_loss(log_p, log_p0, candidates, target, options).item() == pytest.approx(expected)


def test_a_step_has_the_length_that_its_own_gradient_decides():
    options = zerocap_options("zerocap")
    gradient = torch.randn(3, 2, 4, 5, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 10.0])[:, None, None, None]
    step = moved(torch.zeros_like(gradient), gradient, options)
    for row in range(3):
        norm = gradient[row].norm().item()
        assert step[row].norm().item() == pytest.approx(0.3 * norm**0.1)
        cosine = F.cosine_similarity(step[row].flatten(), gradient[row].flatten(), dim=0)
        assert cosine.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("step", [0, 1])
def test_end_and_forbidden_tokens_are_weighed_by_sign_and_fused_with_the_unguided(step):
    options = zerocap_options("zerocap")
    logits = torch.tensor([[2.0, -3.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
    log_p0 = torch.zeros_like(logits).log_softmax(-1)
    end = {0: [1.25, -4.8], 1: [2.02, -3 / 1.01]}[step]
    for end_id, weighed in ((0, end[0]), (1, end[1])):
        want = logits[0].tolist()
        want[end_id] = weighed
        want[2], want[3] = 1.0 / 20, -1.0 * 20
        p = torch.tensor(want, dtype=torch.float64).softmax(0)
        fused = p**0.99 * 0.2**0.01
        got = next_log_probabilities(logits, log_p0, step, end_id, torch.tensor([2, 3]), options)
        torch.testing.assert_close(got.exp()[0], fused / fused.sum())


def test_beams_are_those_of_a_search_over_all_sums():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    table = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64).log_softmax(-1)  # by last token
    beams = Beams.begin(first, 2, end_id=3)
    log_p = torch.stack([table[n][beams.tokens[n, :, -1]] for n in range(2)])
    extended, source = beams.extend(log_p, end_id=3)
    for n in range(2):
        found = []
        for token in first[n].topk(2).indices.tolist():
            if token == 3:  # ended: its average stays
                found.append((first[n, token].item(), [token]))
            else:
                found += [((first[n, token] + table[n, token, t]).item() / 2, [token, t]) for t in range(4)]
        best = sorted(found, reverse=True)[:2]
        got = [extended.tokens[n, k, : int(extended.lengths[n, k])].tolist() for k in range(2)]
        assert got == [tokens for _, tokens in best]
        averages = (extended.scores / extended.lengths)[n].tolist()
        assert averages == pytest.approx([score for score, _ in best])
        assert [beams.tokens[n, s, 0].item() for s in source[n]] == [tokens[0] for tokens in got]


def test_the_caption_model_refuses_what_its_language_model_cannot_write():
    from lit_clipq.errors import ModelError

    with pytest.raises(ModelError, match=r"reads 48 tokens.*lower --model.max_tokens"):
        CaptionModel(mini_lm(torch.float32), zerocap_options("mini", max_tokens=60))
    with pytest.raises(ModelError, match=r"703 beams .* of the 702 .* lower --model.beams"):
        CaptionModel(mini_lm(torch.float32), zerocap_options("mini", beams=703))
    with pytest.raises(ModelError, match="single token"):
        CaptionModel(mini_lm(torch.float32), zerocap_options("mini", end_token="the end"))  # noqa: S106
