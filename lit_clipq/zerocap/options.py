"""Options of ZeroCap, its presets, and the tokens that captions should not have."""

import math
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_origin

import numpy as np

from lit_clipq.errors import ConfigError

PICTURE_WORDS = frozenset(
    (
        *("image", "images", "img", "photo", "photos", "photograph", "photographs", "photographer", "photography"),
        *("pic", "pics", "picture", "pictures", "picturing", "pictured", "screenshot", "screenshots", "thumbnail"),
        *("video", "videos", "caption", "captions", "copyright", "getty", "stock"),
    )
)
"""Words about the picture itself; a caption that says "image of an image" scores well and tells nothing."""


@dataclass(frozen=True)
class ZeroCapOptions:
    """How captions are generated (ZeroCap, arXiv 2111.14447)."""

    lm: str = "gpt2-medium"
    """Language model: `mini-gpt2`, a local folder, or a name on the hub."""
    start_token: str | None = None
    """Token that begins a text; null takes the tokenizer's own."""
    prefix: str = "Image of a"
    """What every text begins with; no part of the caption."""
    beams: int = 5
    """Width of the beam search."""
    max_tokens: int = 15
    """Largest number of tokens in a caption."""
    candidates: int = 512
    """Next tokens that CLIP scores in each step."""
    iterations: int = 5
    """Gradient steps on the cache for each token; 0 leaves only the choice among the beams to CLIP."""
    step_size: float = 0.3
    """Size of a gradient step; see `gradient_power`."""
    gradient_power: float = 0.9
    """A cache tensor with the gradient g moves by -step_size g / ||g||^gradient_power."""
    temperature: float = 0.01
    """Temperature of the softmax over the candidates' similarities."""
    clip_scale: float = 1.0
    """Weight of CLIP's cross entropy."""
    ce_scale: float = 0.2
    """Weight of the divergence from the unguided language model."""
    fusion: float = 0.99
    """Share f of the guided probabilities in p^f p0^(1 - f)."""
    end_token: str = "."  # noqa: S105 - a token of a text
    """Token that ends a caption."""
    end_factor: float = 1.01
    """Factor that favours the end token from the second step on."""
    first_end_factor: float = 1.6
    """Factor that disfavours the end token in the first step."""
    forbidden_factor: float = 20.0
    """Factor that disfavours forbidden tokens; 1 allows them."""
    forbidden_tokens: str | None = None
    """`.npy` file of forbidden token ids; null takes the rule of `forbidden_by_rule`."""
    guided: bool = True
    """Whether CLIP takes part at all; else the captions are the language model's own."""
    engine: Literal["fast", "plain"] = "fast"
    """`plain` computes everything anew as published; `fast` gives the same captions."""
    memo_megabytes: int = 512
    """Bound on the text embeddings that the fast engine remembers."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if not _is_of(option.type, value):
                kind = _IN_WORDS.get(option.type, option.type)
                raise ConfigError(f"captioning's option {option.name} must be {kind}, got {value!r}")
        for name, least in (
            ("beams", 1), ("max_tokens", 1), ("candidates", 1), ("iterations", 0), ("memo_megabytes", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"--model.{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("temperature", "end_factor", "first_end_factor", "forbidden_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--model.options.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.fusion <= 1:
            raise ConfigError(f"--model.options.fusion must be between 0 and 1, got {self.fusion}")
        if self.engine not in ("fast", "plain"):
            raise ConfigError(f"--model.engine must be 'fast' or 'plain', got {self.engine!r}")


_IN_WORDS: dict[Any, str] = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def _is_of(expected: Any, value: Any) -> bool:
    if expected in (int, float):
        return isinstance(value, (int, expected)) and not isinstance(value, bool) and math.isfinite(value)
    return get_origin(expected) is Literal or isinstance(value, expected)


PRESETS: dict[str, ZeroCapOptions] = {
    "zerocap": ZeroCapOptions(),
    "magic": ZeroCapOptions(
        lm="cambridgeltl/magic_mscoco",
        start_token="<-start_of_text->",  # noqa: S106 - a token of a text
        prefix="",
        beams=1,
        max_tokens=16,
    ),
    "mini": ZeroCapOptions(
        lm="mini-gpt2", prefix="there is", max_tokens=16, candidates=12, step_size=1.0, ce_scale=2.0, fusion=0.8
    ),
}


def zerocap_options(preset: str, **chosen: Any) -> ZeroCapOptions:
    """Return the options of a preset, with those replaced that are not None.

    Raises:
        ConfigError: For an unknown preset or option, or a value outside its range.

    Example:
        >>> zerocap_options("magic", candidates=100).candidates
        100
    """
    if preset not in PRESETS:
        raise ConfigError(f"--model.preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    known = [option.name for option in fields(ZeroCapOptions)]
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"
        raise ConfigError(f"captioning has no option {unknown[0]!r}{hint}")
    return replace(PRESETS[preset], **{name: value for name, value in chosen.items() if value is not None})


def forbidden_tokens(options: ZeroCapOptions, tokenizer: Any, end_id: int) -> list[int]:
    """Return the ids of the tokens that are disfavoured: those of the file, or those of the rule.

    Raises:
        ConfigError: For a file that is no list of token ids of this tokenizer.
    """
    size = len(tokenizer)
    if options.forbidden_tokens is None:
        texts = (tokenizer.decode([token]) for token in range(size))
        special = set(tokenizer.all_special_ids)
        return [i for i, text in enumerate(texts) if i != end_id and (i in special or forbidden_by_rule(text))]
    path = Path(options.forbidden_tokens).expanduser()
    try:
        ids = np.load(path, allow_pickle=False).reshape(-1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"forbidden tokens cannot be read from {path} ({error}); give a .npy of token ids") from error
    if len(ids) and not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(f"forbidden tokens are integers, but {path} holds {ids.dtype}; give a .npy of token ids")
    if len(ids) and not 0 <= ids.min() <= ids.max() < size:
        raise ConfigError(f"{path} names tokens {ids.min()} to {ids.max()}, but the tokenizer has {size}")
    return sorted({int(i) for i in ids} - {end_id})


def forbidden_by_rule(text: str) -> bool:
    """Tell whether a caption should not contain a token.

    Allowed are words of ASCII letters of which at most the first is a capital, with or without a space in front, and
    the single marks , ' and -. Everything else is forbidden: digits, other marks, line ends, letters of other scripts,
    words in capitals, and words about the picture itself (`PICTURE_WORDS`).

    Example:
        >>> [forbidden_by_rule(text) for text in (" dog", "s", ",", " Image", "2", "USA")]
        [False, False, False, True, True, True]
    """
    if text.strip().lower() in PICTURE_WORDS:
        return True
    return re.fullmatch(r" ?(?:[A-Za-z][a-z]*|[,'-])", text) is None
