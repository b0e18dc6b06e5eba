"""What decides the values in a feature cache, and the sentence that tells two caches apart."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_clipq.errors import ConfigError


@dataclass(frozen=True)
class FeatureKey:
    """Everything that features depend on; equal keys mean equal features."""

    model: str
    """The model, in words: name and source of its weights."""
    network: str
    """Hash of the network as it computes: weights, or integer codes and scales."""
    variant: str
    """What was done to the network, in words: `float`, or a recipe and its widths."""
    preprocessing: str
    """Fingerprint of image transform and tokenizer."""
    kind: Literal["images", "texts"]
    """What the items are."""
    items: str
    """Hash of the items in their order; see `items_hash`."""
    count: int
    """How many items there are."""
    dtype: Literal["float16", "int8"]
    """How values are stored: half precision, or bytes with a scale for each token."""

    def digest(self) -> str:
        """Return 32 hexadecimal digits that stand for the key."""
        content = json.dumps(asdict(self), sort_keys=True).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def check_serves(self, wanted: "FeatureKey", folder: Any) -> None:
        """Check that a cache with this key can serve a run that wants another.

        Raises:
            ConfigError: If it cannot; says which of the two differs in what.
        """
        if self == wanted:
            return
        advice = "give another --model.cache.folder, or delete that one"
        start = f"the feature cache {folder}"
        if self.model != wanted.model:
            raise ConfigError(f"{start} was made by model {self.model}, but this run has {wanted.model}; {advice}.")
        if self.variant != wanted.variant:
            raise ConfigError(
                f"{start} holds features of {self.model} as '{self.variant}', but this run has it as "
                f"'{wanted.variant}'; {advice}."
            )
        if self.network != wanted.network:
            raise ConfigError(
                f"{start} was made by {self.model} ('{self.variant}') with other weights, codes or scales than this "
                f"run's; {advice}, or load the quantized model it was made with (--quantize.load)."
            )
        if self.preprocessing != wanted.preprocessing:
            raise ConfigError(f"{start} was made with another preprocessing than this run's; {advice}.")
        if (self.kind, self.items) != (wanted.kind, wanted.items):
            raise ConfigError(
                f"{start} holds {self.count} {self.kind}, not the {wanted.count} {wanted.kind} of this run; {advice}."
            )
        raise ConfigError(f"{start} stores {self.dtype}, but this run wants {wanted.dtype}; {advice}.")


def items_hash(items: Iterable[Any]) -> str:
    """Hash items, each a plain value that JSON can hold, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()
