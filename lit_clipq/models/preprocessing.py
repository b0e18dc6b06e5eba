"""What turns pictures and texts into a model's input: image transform and tokenizer."""

import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from lit_clipq import contracts
from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.models.configs import ModelConfig

DEFAULT_CONTEXT_LENGTH = 77
_SPECIAL_TOKENS = 8
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass(frozen=True)
class Preprocessing:
    """How to prepare a model's input.

    Attributes:
        image: Turns a picture into a float32 tensor (3, H, W).
        tokenizer: Turns n texts into int64 token ids (n, context_length); with `context_length` as a second argument
            to that many.
        context_length: Tokens of a text, padding included.
        fingerprint: Hash of the image transform and of the tokenizer with its vocabulary; equal fingerprints prepare
            equal inputs.
    """

    image: Callable[[Image.Image], Tensor]
    tokenizer: Callable[..., Tensor]
    context_length: int
    fingerprint: str


@dataclass(frozen=True)
class PreprocessingOptions:
    """How pictures are prepared, where the user says so; None leaves it to the weights.

    Raises:
        ConfigError: A value that no picture can be prepared with.
    """

    mean: Sequence[float] | float | None = None
    """Subtracted from red, green and blue in [0, 1]; one number for all three."""
    std: Sequence[float] | float | None = None
    """What these are divided by; one number for all three."""
    interpolation: str | None = None
    """`bicubic` or `bilinear`."""
    resize_mode: str | None = None
    """`shortest`: the shorter side fits and the middle is cut out; `longest`: the longer side fits and the rest is
    filled; `squash`: both sides fit, whatever the shape."""

    def __post_init__(self) -> None:
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            value = getattr(self, name)
            if value is None:
                continue
            numbers = tuple(float(v) for v in ([value] * 3 if isinstance(value, int | float) else value))
            if len(numbers) != 3 or not all(math.isfinite(v) and v > least for v in numbers):
                sign = " above 0" if name == "std" else ""
                raise ConfigError(f"--model.{name} must be one number{sign}, or three, got {value}.")
            object.__setattr__(self, name, numbers)
        for name, choices in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES)):
            if getattr(self, name) not in (None, *choices):
                raise ConfigError(f"--model.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")

    def chosen(self) -> dict[str, Any]:
        """Return what is given, by open_clip's names."""
        return {name: value for name, value in vars(self).items() if value is not None}


def count_cut_texts(preprocessing: contracts.Preprocessing, texts: Sequence[str]) -> int:
    """Count texts that have more tokens than the model reads.

    A text is cut where one more place shows another token in it, or changes those before it (a token that ends every
    text moves).

    Args:
        preprocessing: Of the model.
        texts: The texts; equal ones count each.

    Returns:
        How many of them are cut.
    """
    length = preprocessing.context_length
    # A token stands for a byte or more, after normalisation, and a text gets a few of its own.
    long = Counter(t for t in texts if len(unicodedata.normalize("NFKC", t).encode()) + _SPECIAL_TOKENS > length)
    if not long:
        return 0
    names = list(long)
    kept, longer = preprocessing.tokenizer(names), preprocessing.tokenizer(names, context_length=length + 1)
    padding = preprocessing.tokenizer([""], context_length=length + 1)[0, -1]
    cut = (longer[:, :-1] != kept).any(dim=1) | (longer[:, -1] != padding)
    return sum(long[name] for name, is_cut in zip(names, cut.tolist(), strict=True) if is_cut)


class HubTokenizer:
    """Tokenizer whose files are on the Hugging Face hub; they are looked for at the first call.

    Args:
        source: Repository or local folder.
        context_length: Tokens of a text.
        mode: open_clip's `tokenizer_mode`.
        options: Keyword arguments of `open_clip.tokenizer.HFTokenizer`.
        download: Whether files that are not in the local cache may be fetched.
    """

    def __init__(
        self, source: str, context_length: int, mode: str | None, options: dict[str, Any], *, download: bool
    ) -> None:
        self.source = source
        self.context_length = context_length
        self.mode = mode
        self.options = options
        self.download = download
        self._tokenizer: Callable[[list[str], int | None], Tensor] | None = None

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        """Tokenize n texts to int64 (n, context_length).

        Args:
            texts: The texts.
            context_length: Another number of tokens than the model's.

        Raises:
            ModelError: Where the tokenizer's files are neither cached nor allowed to be fetched, or cannot be read.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load()
        return self._tokenizer(texts, context_length)

    def _load(self) -> Callable[[list[str], int | None], Tensor]:
        from open_clip.tokenizer import HFTokenizer

        source = local_snapshot(self.source, ("tokenizer.json", "tokenizer_config.json"))
        if source is None and not self.download:
            raise ModelError(
                f"the tokenizer needs tokenizer.json of the hub repository {self.source}, which is not in the local "
                f"cache; run `hf download {self.source}` where the hub can be reached"
            )
        try:
            return HFTokenizer(
                source or self.source, context_length=self.context_length, tokenizer_mode=self.mode, **self.options
            )
        except Exception as error:  # hub, HTTP and tokenizer libraries share no base class
            raise ModelError(f"the tokenizer {self.source} could not be loaded: {error}") from error


def local_snapshot(repository: str, filenames: tuple[str, ...]) -> str | None:
    """Return the local folder that holds a hub repository's file, without touching the network.

    Args:
        repository: Repository, or already a local folder.
        filenames: Files of which one must be there.

    Returns:
        The folder, or None where nothing is cached.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(repository).is_dir():
        return repository
    for filename in filenames:
        found = try_to_load_from_cache(repository, filename)
        if isinstance(found, str):
            return str(Path(found).parent)
    return None


def make_preprocessing(config: ModelConfig, image_size: int | tuple[int, int], *, download: bool) -> Preprocessing:
    """Make the image transform and the tokenizer of a model.

    Args:
        config: Its configuration.
        image_size: Side, or height and width, of the image tower's input in pixels.
        download: Whether tokenizer files may be fetched.

    Returns:
        Inference preprocessing; the transform has no random part.

    Raises:
        ModelError: For an unreadable vocabulary.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    image_cfg = PreprocessCfg(
        **merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), config.preprocess), {"size": image_size})
    )
    text_cfg = config.model["text_cfg"]
    context_length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    tokenizer, description = _make_tokenizer(text_cfg, context_length, download=download)
    parts = [asdict(image_cfg), context_length, description]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return Preprocessing(image_transform_v2(image_cfg, is_train=False), tokenizer, context_length, fingerprint)


def _make_tokenizer(
    text_cfg: dict[str, Any], context_length: int, *, download: bool
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Return a tokenizer, and plain values that distinguish it from any other."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    source = text_cfg.get("hf_tokenizer_name")
    if source:
        mode = text_cfg.get("tokenizer_mode")
        description = {"kind": "hub", "source": source, "mode": mode, "options": options}
        return HubTokenizer(source, context_length, mode, options, download=download), description
    vocabulary = options.pop("bpe_path", None) or default_bpe()
    try:
        digest = hashlib.sha256(Path(vocabulary).read_bytes()).hexdigest()
        tokenizer = SimpleTokenizer(bpe_path=vocabulary, context_length=context_length, **options)
    except (OSError, EOFError, UnicodeDecodeError, TypeError) as error:
        raise ModelError(
            f"the vocabulary {vocabulary} could not be read as a gzipped list of merges: {error}"
        ) from error
    return tokenizer, {"kind": "bpe", "vocabulary": digest, "options": options}
