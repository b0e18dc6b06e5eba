"""The mini models: their files, the planted outliers, and what the trained ones can do."""

import hashlib
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lit_clipq.cli import main
from lit_clipq.errors import ModelError
from lit_clipq.mini import CONFIG_DIR, MINI_MODELS, config_path, ensure_world, head_path, weights_path
from lit_clipq.mini.assets import WEIGHT_HASHES
from lit_clipq.mini.outliers import OutlierOptions, plant_outliers
from lit_clipq.models import encode_image, encode_text, load_clip, make_explicit

BASES = ("mini-vit", "mini-resnet")
TEXTS = ["a photo of a star", "two red cups to the left of a big striped umbrella on the lawn", "quixotic zebra 42!"]


@pytest.mark.parametrize("name", BASES)
def test_shipped_weights_are_the_recorded_ones_and_small(name):
    path = weights_path(name)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == WEIGHT_HASHES[name]
    assert path.stat().st_size <= 5_000_000
    state = load_file(path)
    assert {t.dtype for t in state.values()} <= {torch.float16, torch.int64}


@pytest.mark.parametrize("name", BASES)
def test_configuration_fits_the_tokenizer(name):
    text = json.loads(config_path(name).read_text())["text_cfg"]
    tokenizer = load_clip(name).preprocessing.tokenizer
    tokens = tokenizer(TEXTS)
    assert tokens.shape == (3, text["context_length"])
    assert int(tokens.max()) == text["vocab_size"] - 1  # the end token
    assert (CONFIG_DIR / text["tokenizer_kwargs"]["bpe_path"]).is_file()


def test_unknown_names_and_absent_weights_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="mini-vit, mini-resnet"):
        config_path("mini-vgg")
    monkeypatch.setattr("lit_clipq.mini.assets.WEIGHTS_DIR", tmp_path)
    with pytest.raises(ModelError, match="pretrain_vit"):
        weights_path("mini-vit-outlier")


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_outlier_model_computes_the_same_to_the_bit(name, explicit):
    plain, planted = load_clip(name, "mini"), load_clip(f"{name}-outlier", "mini")
    if explicit:
        make_explicit(plain.model)
        make_explicit(planted.model)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = plain.preprocessing.tokenizer(TEXTS)
    with torch.no_grad():
        assert torch.equal(encode_image(plain.model, images), encode_image(planted.model, images))
        assert torch.equal(encode_text(plain.model, tokens), encode_text(planted.model, tokens))


@pytest.mark.parametrize("name", BASES)
def test_outlier_model_has_outlier_channels(name):
    plain, planted = load_clip(name, "mini").model, load_clip(f"{name}-outlier", "mini").model
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    spread = {}
    for label, model in (("plain", plain), ("planted", planted)):
        ratios = []

        def record(module, inputs, output, ratios=ratios):
            channels = output.flatten(0, 1).abs() if output.ndim == 3 else output.transpose(0, 1).flatten(1).T.abs()
            per_channel = channels.amax(dim=0)
            ratios.append((per_channel.max() / per_channel.median()).item())

        watched = [m for n, m in model.visual.named_modules() if n.endswith(("ln_1", "ln_2", ".0.bn1", ".0.bn2"))]
        handles = [m.register_forward_hook(record) for m in watched]
        with torch.no_grad():
            encode_image(model, images)
        for handle in handles:
            handle.remove()
        spread[label] = ratios
    assert len(spread["plain"]) >= 8
    assert all(b > 4 * a for a, b in zip(spread["plain"], spread["planted"], strict=True))


def test_outliers_are_powers_of_two_on_a_few_channels():
    state = load_file(weights_path("mini-vit"))
    planted = plant_outliers(state, OutlierOptions(exponents=(5,), channels=3))
    gain = "visual.transformer.resblocks.0.ln_2.weight"
    ratio = planted[gain] / state[gain].float()
    assert sorted(ratio.unique().tolist()) == [1.0, 32.0]
    assert int((ratio == 32).sum()) == 3
    assert state[gain].dtype != planted[gain].dtype  # the original is untouched, the copy is float32


def test_outlier_models_are_the_listed_ones():
    assert set(MINI_MODELS) == {*BASES, *(f"{name}-outlier" for name in BASES)}


@pytest.mark.parametrize("name", BASES)
def test_trained_model_finds_captions_far_above_chance_and_below_perfection(name):
    world = ensure_world(None, "small")
    content = json.loads((world / "annotations" / "captions_val.json").read_text())
    entries = content["images"][:200]
    owner = {entry["id"]: row for row, entry in enumerate(entries)}
    rows = [a for a in content["annotations"] if a["image_id"] in owner]
    loaded = load_clip(name, "mini")
    with torch.no_grad():
        pixels = torch.stack(
            [loaded.preprocessing.image(Image.open(world / "images" / e["file_name"])) for e in entries]
        )
        image = torch.nn.functional.normalize(encode_image(loaded.model, pixels), dim=-1)
        tokens = loaded.preprocessing.tokenizer([a["caption"] for a in rows])
        text = torch.nn.functional.normalize(encode_text(loaded.model, tokens), dim=-1)
    owners = torch.tensor([owner[a["image_id"]] for a in rows])
    recall = ((text @ image.T).argmax(dim=1) == owners).double().mean().item()
    assert 0.4 < recall < 0.95


@pytest.mark.slow
def test_the_shipped_head_is_the_recorded_one_and_sees(tmp_path):
    path = head_path("mini-vit")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == WEIGHT_HASHES["mini-vit-vqa"]
    assert path.stat().st_size < 2e6
    assert head_path("mini-vit-outlier") == path
    results = tmp_path / "results.json"
    run = ["validate", "--config", "configs/mini/vqa.yaml", "--trainer.accelerator", "cpu", "--results", str(results)]
    assert main([*run, "--trainer.enable_progress_bar", "false"]) == 0
    metrics = json.loads(results.read_text())["metrics"]["float"]
    assert metrics["vqa_accuracy"] == pytest.approx(0.541, abs=0.003)  # other kernels round ties otherwise
    assert metrics["vqa_accuracy_other"] > 0.4  # 0.16 without pictures
    with pytest.raises(ModelError, match="mini-resnet-vqa"):
        head_path("mini-resnet")
