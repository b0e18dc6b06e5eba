import gzip
import json
import pickle
import socket

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lit_clipq.errors import ModelError
from lit_clipq.models import load_clip, weights
from lit_clipq.models.preprocessing import HubTokenizer
from tests.models.conftest import CONFIGS, build


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Any connection fails the test at once."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test of loading tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def state():
    return build(CONFIGS["vit"]).state_dict()


def assert_loaded(loaded, state):
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.slow
def test_random_weights_need_no_network_and_prepare_pictures_and_texts():
    loaded = load_clip("ViT-B-32")
    assert (loaded.name, loaded.pretrained) == ("ViT-B-32", None)
    assert not loaded.model.training
    preprocessing = loaded.preprocessing
    assert preprocessing.image(Image.new("L", (300, 200))).shape == (3, 224, 224)
    tokens = preprocessing.tokenizer(["a cat", "dog"])
    assert tokens.shape == (2, preprocessing.context_length) == (2, 77)
    assert tokens.dtype == torch.int64


def test_a_slash_in_the_name_is_a_dash():
    from lit_clipq.models.configs import resolve_config

    assert resolve_config("ViT-B/32").model == resolve_config("ViT-B-32").model


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("ViT-B32", "ViT-B-32"), ("vit-b-32-quickgel", "ViT-B-32-quickgelu"), ("mini-vitt", "mini-vit")],
)
def test_unknown_name_lists_close_matches(name, suggestion):
    with pytest.raises(ModelError, match=f"close matches: .*{suggestion}"):
        load_clip(name)


def test_unknown_tag_lists_what_exists():
    with pytest.raises(ModelError, match=r"laion2b_s34b_b79k.*close matches: laion2b_s34b_b79k"):
        load_clip("ViT-B-32", "laion2b_s34b_b79")


@pytest.mark.parametrize("tag", ["openai", "metaclip_400m"])
def test_weights_trained_with_quickgelu_are_refused_on_gelu(tag):
    with pytest.raises(ModelError, match="'ViT-B-32-quickgelu'"):
        load_clip("ViT-B-32", tag)


def test_forcing_quickgelu_on_weights_trained_with_gelu_is_refused():
    with pytest.raises(ModelError, match="trained with GELU"):
        load_clip("ViT-B-32", "laion2b_s34b_b79k", quick_gelu=True)


def test_unreachable_hub_names_the_file_and_the_way_out(monkeypatch):
    def unreachable(cfg):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(ModelError) as caught:
        load_clip("ViT-B-32-quickgelu", "openai")
    for part in ("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors", "--model.pretrained FILE"):
        assert part in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_local_state_dicts_load(tmp_path, config_file, state, prefix, wrapped, suffix):
    path = tmp_path / f"weights{suffix}"
    content = {prefix + name: tensor for name, tensor in state.items()}
    if suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save({"state_dict": content, "epoch": 3} if wrapped else content, path)
    assert_loaded(load_clip(str(config_file()), str(path)), state)


def test_root_level_text_weights_load_into_a_custom_text_model(tmp_path, config_file, state):
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    loaded = load_clip(str(config_file("custom_text_argmax")), str(path))
    assert torch.equal(loaded.model.text.positional_embedding, state["positional_embedding"])


def openai_archive(path, state):
    """Write a TorchScript archive laid out as OpenAI's: half-precision weights and three scalars."""
    root = torch.nn.Module()
    for name, tensor in {**state, "input_resolution": torch.tensor(32), "context_length": torch.tensor(16)}.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, torch.nn.Module())
            module = module._modules[parent]
        module.register_buffer(leaf, tensor.half() if tensor.is_floating_point() else tensor)
    root.register_buffer("vocab_size", torch.tensor(60))
    torch.jit.save(torch.jit.script(root), path)


def test_openai_torchscript_archive_loads_with_quickgelu_only(tmp_path, config_file, state):
    path = tmp_path / "ViT.pt"
    openai_archive(path, state)
    loaded = load_clip(str(config_file("quickgelu")), str(path))
    assert_loaded(loaded, {name: tensor.half().float() for name, tensor in state.items()})
    with pytest.raises(ModelError, match="trained with QuickGELU"):
        load_clip(str(config_file("vit")), str(path))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_file_is_named(tmp_path, config_file, state, suffix):
    path = tmp_path / f"cut{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=rf"cut\{suffix} is damaged"):
        load_clip(str(config_file()), str(path))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x00" * 40])
def test_a_file_that_is_no_weights_file_is_named(tmp_path, config_file, content):
    path = tmp_path / "page.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"page\.pt is damaged or no safetensors"):
        load_clip(str(config_file()), str(path))


def test_a_pickle_is_never_executed(tmp_path, config_file):
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    plain, zipped = tmp_path / "plain.pt", tmp_path / "zipped.pt"
    plain.write_bytes(pickle.dumps(Attack(), protocol=2))
    torch.save({"state_dict": Attack()}, zipped)
    for path in (plain, zipped):
        with pytest.raises(ModelError, match=r"no tensors \(io\.open\).*never does"):
            load_clip(str(config_file()), str(path))
    assert not marker.exists()


@pytest.mark.parametrize("content", [{}, [1, 2], {"a": 3}, torch.zeros(3)])
def test_a_file_without_a_state_dict_is_named(tmp_path, config_file, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ModelError, match="holds no state dict"):
        load_clip(str(config_file()), str(path))


def test_weights_that_do_not_fit_say_what_differs(tmp_path, config_file, state):
    path = tmp_path / "weights.pt"
    state["extra"] = state.pop("ln_final.weight")
    state["text_projection"] = torch.zeros(32, 5)
    torch.save(state, path)
    with pytest.raises(ModelError) as caught:
        load_clip(str(config_file()), str(path))
    for part in ("1 missing (first: ln_final.weight)", "1 unexpected (first: extra)", "text_projection (32, 5)"):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(tmp_path, config_file, state, value):
    state["visual.conv1.weight"][0, 0, 0, 0] = value
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(ModelError, match=r"'visual\.conv1\.weight' holds 1 non-finite"):
        load_clip(str(config_file()), str(path))


@pytest.mark.parametrize("name", ["absent.pt", "folder/absent", "absent.safetensors"])
def test_a_missing_file_is_not_taken_for_a_tag(name):
    with pytest.raises(ModelError, match="does not exist"):
        load_clip("ViT-B-32", name)


def test_mini_weights_belong_to_mini_models():
    with pytest.raises(ModelError, match="mini-vit"):
        load_clip("ViT-B-32", "mini")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable JSON"),
        ("[1]", "lacks embed_dim"),
        ('{"embed_dim": 3, "vision_cfg": {}}', "lacks text_cfg"),
        ('{"embed_dim": 3, "vision_cfg": {}, "text_cfg": []}', "lacks text_cfg"),
        ('{"model_cfg": 3}', "lacks embed_dim"),
    ],
)
def test_bad_configuration_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=rf"bad\.json.*{message}"):
        load_clip(str(path))
    with pytest.raises(ModelError, match="does not exist"):
        load_clip(str(tmp_path / "absent.json"))


def test_a_configuration_that_cannot_be_built_says_why(config_file):
    path = config_file("vit", vision_cfg={"no_such_option": 1})
    with pytest.raises(ModelError, match="no_such_option"):
        load_clip(str(path))


def test_unknown_precision_lists_what_exists(config_file):
    with pytest.raises(ModelError, match="fp32, fp16, bf16"):
        load_clip(str(config_file()), precision="int3")


@pytest.mark.parametrize(
    ("precision", "conv", "norm"),
    [
        ("bf16", torch.bfloat16, torch.float32),
        ("pure_fp16", torch.float16, torch.float16),
        ("fp32",) + (torch.float32,) * 2,
    ],
)
def test_precision_decides_the_types(config_file, precision, conv, norm):
    model = load_clip(str(config_file()), precision=precision).model
    assert model.visual.conv1.weight.dtype == conv
    assert model.ln_final.weight.dtype == norm


def test_vocabulary_is_relative_to_the_configuration(tmp_path, config_file):
    with gzip.open(tmp_path / "words.txt.gz", "wt") as file:
        file.write("#version\nc a\nca t</w>")
    text_cfg = {**CONFIGS["vit"]["text_cfg"], "vocab_size": 516, "tokenizer_kwargs": {"bpe_path": "words.txt.gz"}}
    loaded = load_clip(str(config_file("vit", text_cfg=text_cfg)))
    tokens = loaded.preprocessing.tokenizer(["cat"])
    assert tokens.tolist() == [[514, 513, 515] + [0] * 13]
    default = load_clip(str(config_file("quickgelu"))).preprocessing
    assert loaded.preprocessing.fingerprint != default.fingerprint
    text_cfg["tokenizer_kwargs"]["bpe_path"] = "absent.txt.gz"
    with pytest.raises(ModelError, match=r"absent\.txt\.gz, which does not exist"):
        load_clip(str(config_file("vit", text_cfg=text_cfg)))
    (tmp_path / "plain.txt").write_text("no gzip")
    text_cfg["tokenizer_kwargs"]["bpe_path"] = "plain.txt"
    with pytest.raises(ModelError, match=r"plain\.txt could not be read"):
        load_clip(str(config_file("vit", text_cfg=text_cfg)))


def test_fingerprint_follows_the_preprocessing_not_the_process(config_file):
    first, again = (load_clip(str(config_file())).preprocessing.fingerprint for _ in range(2))
    other = load_clip(str(config_file("resnet"))).preprocessing.fingerprint  # 64 instead of 32 pixels
    assert first == again != other


def test_hub_form_of_a_configuration_sets_the_preprocessing(tmp_path):
    path = tmp_path / "open_clip_config.json"
    mean = [0.1, 0.2, 0.3]
    path.write_text(json.dumps({"model_cfg": CONFIGS["vit"], "preprocess_cfg": {"mean": mean, "std": [1, 1, 1]}}))
    image = load_clip(str(path)).preprocessing.image(Image.new("RGB", (40, 40)))
    torch.testing.assert_close(image[:, 0, 0], -torch.tensor(mean))


def test_siglip_is_prepared_as_its_published_weights_even_without_them():
    from lit_clipq.models.configs import resolve_config

    assert resolve_config("ViT-B-16-SigLIP").preprocess["mean"] == (0.5, 0.5, 0.5)
    assert resolve_config("ViT-H-14").preprocess == {}  # its weights differ among themselves


def test_tokenizer_on_the_hub_is_asked_for_at_the_first_text_only():
    tokenizer = HubTokenizer("nobody/absent", 64, None, {}, download=False)
    with pytest.raises(ModelError, match="hf download nobody/absent"):
        tokenizer(["a cat"])


def test_hub_text_tower_without_a_local_copy_says_what_is_missing():
    with pytest.raises(ModelError, match=r"config\.json of the hub repository xlm-roberta-base"):
        load_clip("xlm-roberta-base-ViT-B-32")


def test_finite_check_passes_integers_and_masks():
    weights.check_finite({"count": torch.tensor(3), "weight": torch.ones(2)}, "here")
