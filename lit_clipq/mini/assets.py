"""Configurations and trained weights that travel with the package."""

import hashlib
import os
from pathlib import Path

from lit_clipq.errors import ModelError
from lit_clipq.paths import cache_dir

CONFIG_DIR = Path(__file__).parent / "configs"
"""open_clip configurations and the tokenizer's merges."""
WEIGHTS_DIR = Path(__file__).parent / "weights"
LANGUAGE_MODEL_DIR = WEIGHTS_DIR / "mini-gpt2"
"""Configuration, tokenizer and weights of the mini language model, as transformers reads them."""
LANGUAGE_MODEL = "mini-gpt2"
LANGUAGE_MODEL_HASH = "4c5ea73192a2974c191a151a1f857677c71ae2b472d7f652482e171584df8377"
"""SHA-256 of its shipped weights."""
MINI_MODELS: tuple[str, ...] = ("mini-vit", "mini-resnet", "mini-vit-outlier", "mini-resnet-outlier")
WEIGHT_HASHES: dict[str, str] = {
    "mini-vit": "4bb2efc27f9f21abbd7bda095cf399f22cd86087e7afe17f8649abf055357210",
    "mini-resnet": "c2adf10b426101e6aef3dff9571d5e87d8583983dff746b10270c0d6e8bfd835",
    "mini-vit-vqa": "5cd3d87d79dbb16cc220a483d57117e9fd70612ca062e571394590af9e8ddf61",
}
"""SHA-256 of the shipped weight files: they are frozen, as the world is."""

_OUTLIER = "-outlier"


def config_path(name: str) -> Path:
    """Return the open_clip config JSON of a mini model; an outlier model has the config of its original.

    Raises:
        ModelError: no mini model of that name.
    """
    _check(name)
    return CONFIG_DIR / f"{name.removesuffix(_OUTLIER)}.json"


def weights_path(name: str) -> Path:
    """Return the weights of a mini model.

    The trained models ship as fp16 safetensors. An outlier model is its original with planted outliers, in float32 so
    that the factors stay exact; its file is written to the cache folder on first use.

    Raises:
        ModelError: no mini model of that name, or its weights are not in this installation.
    """
    _check(name)
    base = name.removesuffix(_OUTLIER)
    path = WEIGHTS_DIR / f"{base}.safetensors"
    if not path.is_file():
        raise ModelError(
            f"expected the weights of '{base}' in {path}, which is absent; install the package again, "
            f"or train them with `lightning fit --config configs/mini/pretrain_{base.split('-')[1]}.yaml`."
        )
    return path if name == base else _planted(name, path)


def language_model_path() -> Path:
    """Return the folder of the mini language model, for `transformers.AutoModelForCausalLM.from_pretrained`.

    Raises:
        ModelError: its weights are not in this installation.
    """
    if not (LANGUAGE_MODEL_DIR / "model.safetensors").is_file():
        raise ModelError(
            f"expected the weights of '{LANGUAGE_MODEL}' in {LANGUAGE_MODEL_DIR}, which are absent; install the "
            "package again, or train them with `lightning fit --config configs/mini/pretrain_gpt2.yaml`."
        )
    return LANGUAGE_MODEL_DIR


def head_path(name: str) -> Path:
    """Return the question-answering head that was trained on a mini model; an outlier model has that of its original.

    Raises:
        ModelError: no mini model of that name, or no head for it in this installation.
    """
    _check(name)
    path = WEIGHTS_DIR / f"{name.removesuffix(_OUTLIER)}-vqa.safetensors"
    if not path.is_file():
        raise ModelError(
            f"expected a question-answering head of '{name}' in {path}, which is absent; train one with "
            f"`lightning fit --config configs/mini/vqa.yaml --model.name {name}`."
        )
    return path


def _planted(name: str, original: Path) -> Path:
    """Return the file of an outlier model in the cache folder, written whole or not at all."""
    from safetensors.torch import load_file, save_file

    from lit_clipq.mini.outliers import OutlierOptions, plant_outliers

    options = OutlierOptions()
    key = hashlib.sha256(original.read_bytes() + repr(options).encode()).hexdigest()
    path = cache_dir() / "mini" / "weights" / f"{name}-{key[:16]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(plant_outliers(load_file(original), options), temporary)
        temporary.replace(path)
    return path


def _check(name: str) -> None:
    if name not in MINI_MODELS:
        raise ModelError(f"expected a mini model out of {', '.join(MINI_MODELS)}, got '{name}'.")
