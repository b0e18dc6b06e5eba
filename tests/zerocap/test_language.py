"""Language models: loading and what is refused."""

import inspect
import json
import shutil

import pytest
import torch
from torch import nn

from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.mini.assets import language_model_path
from lit_clipq.models import make_explicit
from lit_clipq.nn.attention import ExplicitAttention
from lit_clipq.zerocap.language import load_language_model
from lit_clipq.zerocap.options import forbidden_tokens, zerocap_options


@pytest.fixture
def folder(tmp_path):
    copied = tmp_path / "lm"
    shutil.copytree(language_model_path(), copied)
    return copied


def test_the_mini_language_model_loads_by_name_and_by_folder(folder):
    by_name, by_folder = load_language_model("mini-gpt2"), load_language_model(str(folder))
    for (name, a), (_, b) in zip(by_name.model.state_dict().items(), by_folder.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert by_name.start_id == by_name.tokenizer.bos_token_id
    assert not by_name.model.training


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no usable causal language model"):
        load_language_model(str(tmp_path))


def test_a_model_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"has no usable tokenizer|does not give back the words"):
        load_language_model(str(folder))


def test_a_tokenizer_of_another_model_is_refused(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary.update({f"more{i}": len(vocabulary) + i for i in range(5)})
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"has 707 tokens, the model 702"):
        load_language_model(str(folder))


def test_a_start_token_that_is_not_there_is_refused():
    with pytest.raises(ModelError, match=r"has no token '<begin>'"):
        load_language_model("mini-gpt2", start_token="<begin>")  # noqa: S106


def test_weights_that_are_not_finite_are_refused(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["transformer.wpe.weight"][0, 0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"NaN or Inf in transformer\.wpe\.weight"):
        load_language_model(str(folder))


def test_without_transformers_the_pip_line_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'lit-clipq\[captioning\]'"):
        load_language_model("mini-gpt2")


@torch.no_grad()
def test_explicit_gpt2_computes_the_same_with_and_without_a_cache():
    from transformers import DynamicCache

    original, explicit = (load_language_model("mini-gpt2", dtype=torch.float64).model for _ in range(2))
    records = make_explicit(explicit)
    assert [record.explicit for record in records] == [True, True]
    assert sum(isinstance(module, ExplicitAttention) for module in explicit.modules()) == 2
    assert isinstance(explicit.transformer.h[0].mlp.c_fc, nn.Linear)
    ids = torch.randint(0, 702, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = original(input_ids=ids).logits
    torch.testing.assert_close(explicit(input_ids=ids).logits, expected)
    cache = DynamicCache()
    name = "cache" if "cache" in inspect.signature(explicit.forward).parameters else "past_key_values"
    explicit(input_ids=ids[:, :6], **{name: cache})
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(explicit(input_ids=ids[:, 6:], **{name: cache}).logits, expected[:, 6:])
    assert make_explicit(explicit) == records


def test_variants_of_gpt2_that_are_not_known_stay_fused_with_the_reason():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2, vocab_size=20, reorder_and_upcast_attn=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    (record,) = make_explicit(model)
    assert not record.explicit
    assert "reorder_and_upcast_attn" in record.reason
    model(input_ids=torch.tensor([[1, 2, 3]]))


def test_forbidden_tokens_follow_the_rule_or_the_file(tmp_path):
    import numpy as np

    tokenizer = load_language_model("mini-gpt2").tokenizer
    vocabulary = tokenizer.get_vocab()
    end = vocabulary["."]
    by_rule = forbidden_tokens(zerocap_options("mini"), tokenizer, end)
    for token, forbidden in (("\u0120picture", True), ("\u0120red", False), (".", False), ("5", True), (":", True)):
        assert (vocabulary[token] in by_rule) == forbidden, token
    assert tokenizer.bos_token_id in by_rule
    path = tmp_path / "forbidden.npy"
    np.save(path, np.array([3, 700, end]))
    assert forbidden_tokens(zerocap_options("mini", forbidden_tokens=str(path)), tokenizer, end) == [3, 700]
    np.save(path, np.array([3.5]))
    with pytest.raises(ConfigError, match=r"are integers, but .* holds float64"):
        forbidden_tokens(zerocap_options("mini", forbidden_tokens=str(path)), tokenizer, end)
    np.save(path, np.array([702]))
    with pytest.raises(ConfigError, match="the tokenizer has 702"):
        forbidden_tokens(zerocap_options("mini", forbidden_tokens=str(path)), tokenizer, end)
