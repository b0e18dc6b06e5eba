"""The mini language model: its files, its vocabulary, and what it knows."""

import hashlib
import json

import pytest
import torch

from lit_clipq.errors import ModelError
from lit_clipq.mini.assets import LANGUAGE_MODEL_DIR, LANGUAGE_MODEL_HASH, language_model_path
from lit_clipq.mini.gpt2 import training_text, write_files
from lit_clipq.mini.world import picture_captions
from lit_clipq.tasks.language import next_token_loss
from lit_clipq.zerocap.language import load_language_model


def test_shipped_weights_are_the_recorded_ones_and_small():
    weights = language_model_path() / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == LANGUAGE_MODEL_HASH
    assert json.loads((LANGUAGE_MODEL_DIR / "log.json").read_text())["sha256"] == LANGUAGE_MODEL_HASH
    assert sum(path.stat().st_size for path in LANGUAGE_MODEL_DIR.iterdir()) <= 3_000_000


def test_shipped_tokenizer_and_configuration_are_what_the_module_writes(tmp_path):
    write_files(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (LANGUAGE_MODEL_DIR / path.name).read_text(), path.name


def test_every_text_survives_and_a_word_of_a_caption_is_one_token():
    tokenizer = load_language_model("mini-gpt2").tokenizer
    for text in ("A quixotic zebra, 42!\n", "na\u00efve \u4e2d", *picture_captions("val", 3)):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for caption in picture_captions("val", 7):
        words = caption.replace(",", " ,").replace(":", " :").split()
        assert len(tokenizer(caption).input_ids) == len(words) + 2 * caption.count("-")


@torch.no_grad()
def test_captions_of_other_pictures_are_likely_and_other_orders_of_their_words_are_not():
    loaded = load_language_model("mini-gpt2")

    def loss(text):
        ids = torch.tensor([loaded.tokenizer(text).input_ids])
        return next_token_loss(loaded.model(input_ids=ids).logits, ids, torch.ones_like(ids)).item()

    captions = [text for i in range(10) for text in picture_captions("val", i)]
    ordered = sum(loss(training_text(text)) for text in captions) / len(captions)
    reversed_ = sum(loss(training_text(" ".join(reversed(text.split())))) for text in captions) / len(captions)
    assert ordered < 2.0
    assert reversed_ > ordered + 2.0


def test_absent_weights_are_told_with_the_command_that_makes_them(monkeypatch, tmp_path):
    monkeypatch.setattr("lit_clipq.mini.assets.LANGUAGE_MODEL_DIR", tmp_path)
    with pytest.raises(ModelError, match="pretrain_gpt2"):
        language_model_path()
