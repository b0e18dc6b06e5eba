"""Causal language models of transformers: loading by name or folder, with errors that say what is wrong."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.mini.assets import LANGUAGE_MODEL, LANGUAGE_MODEL_DIR, language_model_path

logger = logging.getLogger(__name__)

INSTALL = "pip install 'lit-clipq[captioning]'"


@dataclass(frozen=True)
class LoadedLanguageModel:
    """A causal language model and its tokenizer.

    Attributes:
        model: transformers' model in eval mode; its attention is the eager one.
        tokenizer: transformers' tokenizer.
        name: The name it was loaded by.
        start_id: Token that begins a text.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    start_id: int


def load_language_model(
    name: str,
    *,
    random_weights: bool = False,
    start_token: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> LoadedLanguageModel:
    """Load a causal language model in eval mode.

    Args:
        name: `mini-gpt2`, a local folder as transformers writes it, or a name on the hub, which is fetched where it is
            not in the local cache.
        random_weights: Take the configuration and tokenizer only, and random weights from torch's global generator.
        start_token: Token that begins a text; by default the tokenizer's beginning of text, else its end of text.
        dtype: Type of the weights.
        device: Where the model is put.

    Returns:
        Model, tokenizer and names.

    Raises:
        ConfigError: Where transformers is not installed.
        ModelError: For an unknown name or folder, a tokenizer that is absent or does not fit the model, and weights
            that are not finite.
    """
    transformers = _transformers()
    source = name
    if name == LANGUAGE_MODEL:
        source = str(LANGUAGE_MODEL_DIR if random_weights else language_model_path())
    try:
        with _without_progress_bars(transformers):
            model: Any = _make(transformers, source, random_weights, dtype)
    except (OSError, ValueError, KeyError) as error:
        there = Path(name).exists()
        kind = "holds no usable causal language model" if there else "is neither a folder nor could it be fetched"
        raise ModelError(
            f"language model {name!r} {kind} ({_first_line(error)}); give a folder with config.json and "
            "model.safetensors, or a hub name such as gpt2-medium"
        ) from error
    for weight_name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(f"expected finite weights, got NaN or Inf in {weight_name} of language model {name!r}")
    tokenizer = _load_tokenizer(transformers, source, name)
    start_id = _check_tokenizer(tokenizer, name, model.config.vocab_size, start_token)
    return LoadedLanguageModel(model.eval().to(device), tokenizer, name, start_id)


def _make(transformers: Any, source: str, random_weights: bool, dtype: torch.dtype) -> nn.Module:
    """Make the model with eager attention, whose products can be made explicit."""
    factory = transformers.AutoModelForCausalLM
    if random_weights:
        config = transformers.AutoConfig.from_pretrained(source)
        return factory.from_config(config, dtype=dtype, attn_implementation="eager")  # type: ignore[no-any-return]
    return factory.from_pretrained(source, dtype=dtype, attn_implementation="eager")  # type: ignore[no-any-return]


@contextmanager
def _without_progress_bars(transformers: Any) -> Iterator[None]:
    """Keep transformers from drawing progress bars for files that are read at once."""
    settings = transformers.utils.logging
    shown = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            settings.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"captioning needs the package transformers, which is not installed: {INSTALL}") from error
    return transformers


def _load_tokenizer(transformers: Any, source: str, name: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizer libraries, protobuf and the hub share no base class
        raise ModelError(
            f"language model {name!r} has no usable tokenizer ({_first_line(error)}); put its tokenizer.json beside "
            "the weights"
        ) from error


def _check_tokenizer(tokenizer: Any, name: str, vocabulary: int, start_token: str | None) -> int:
    """Return the id that begins a text.

    Raises:
        ModelError: If words do not survive the tokenizer, ids are not in the model, or no token can begin a text.
    """
    ids = tokenizer("a dog on the grass.", add_special_tokens=False).input_ids
    if "dog" not in tokenizer.decode(ids).lower():
        raise ModelError(
            f"the tokenizer of language model {name!r} does not give back the words it was given; put the "
            "tokenizer.json it was trained with beside the weights"
        )
    if len(tokenizer) > vocabulary or max(ids) >= vocabulary:
        raise ModelError(
            f"the tokenizer of language model {name!r} has {len(tokenizer)} tokens, the model {vocabulary}; put the "
            "tokenizer.json it was trained with beside the weights"
        )
    if start_token is not None:
        start_id = tokenizer.get_vocab().get(start_token)
        if start_id is None:
            raise ModelError(f"the tokenizer of language model {name!r} has no token {start_token!r} to begin a text")
        return int(start_id)
    for start_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start_id is not None:
            return int(start_id)
    raise ModelError(
        f"the tokenizer of language model {name!r} names no token that begins or ends a text; give --model.start_token"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
