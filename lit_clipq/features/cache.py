"""Compute the token features of a frozen CLIP for all questions of a split, or find them on disk."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_clipq.contracts import FeatureData, Split
from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.features.key import FeatureKey, items_hash
from lit_clipq.features.questions import FeatureBatch
from lit_clipq.features.store import FeatureStore, check_space, gather
from lit_clipq.models import (
    Preprocessing,
    encode_image_tokens,
    encode_text_tokens,
    text_token_mask,
    token_sizes,
)
from lit_clipq.models.hashing import network_hash
from lit_clipq.paths import cache_dir

logger = logging.getLogger(__name__)

_TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class CacheOptions:
    """Where and how features are kept."""

    folder: str | None = None
    """Folder of the cache; by default one for each model, recipe and picture set in the cache folder."""
    dtype: Literal["float16", "int8"] = "float16"
    """Half precision, or bytes with a scale for each token (half the size)."""
    shared: bool = True
    """Whether all machines of a run see the same folder; otherwise each of them fills its own."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "int8"):
            raise ConfigError(f"--model.cache.dtype must be float16 or int8, got {self.dtype!r}.")


@dataclass(frozen=True)
class _Plan:
    """The stores of a split, and the distinct texts in the order of theirs."""

    images: FeatureStore
    words: FeatureStore
    texts: list[str]
    tokens: Tensor


@dataclass(frozen=True)
class FeatureCache:
    """The features of one frozen network."""

    clip: nn.Module
    preprocessing: Preprocessing
    model: str
    """The model, in words."""
    variant: str
    """What was done to it, in words."""
    options: CacheOptions
    group: int = 0
    """Processes with the same group number see the same folder."""

    @cached_property
    def network(self) -> str:
        """Hash of the network, the same on all processes.

        Raises:
            ModelError: If processes hold different networks.
        """
        hashes = gather(network_hash(self.clip))
        if len(set(hashes)) > 1:
            raise ModelError(
                f"{len(set(hashes))} different networks are on the {len(hashes)} processes of this run, expected one; "
                "quantize once with --quantize.save and train with --quantize.load."
            )
        return hashes[0]

    def batches(
        self, data: FeatureData, splits: Sequence[Split], progress: Callable[[str, float], None] = lambda *_: None
    ) -> dict[Split, FeatureBatch]:
        """Return what collates each split's questions, after computing the features that are not on disk.

        A collective call. The global random state is left as it was, whatever had to be computed. That there is space
        for the features of all splits is checked before any is computed.

        Args:
            data: The data module, set up.
            splits: Which of "train" and "val".
            progress: Told what is being computed, and the share of this process's work on it that is done.

        Raises:
            ConfigError: The folder holds another cache.
            DataError: The cache cannot be written; see `FeatureStore.fill`.
        """
        device = next(self.clip.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            planned = {split: self._plan(data, split) for split in splits}
            check_space([store for plan in planned.values() for store in (plan.images, plan.words)], self.group)
            for split, plan in planned.items():
                self._fill(data, split, plan, progress)
        return {
            split: FeatureBatch(
                plan.images,
                {image_id: row for row, image_id in enumerate(data.image_ids_of(split))},
                plan.words,
                {text: row for row, text in enumerate(plan.texts)},
                data.answers.encode_batch,
            )
            for split, plan in planned.items()
        }

    def _plan(self, data: FeatureData, split: Split) -> "_Plan":
        texts = list(dict.fromkeys(question.text for question in data.questions_of(split)))
        tokens = self.preprocessing.tokenizer(texts)
        lengths = text_token_mask(self.clip, tokens).sum(1)
        order = torch.argsort(lengths, stable=True)  # texts of a length together, so that batches can be trimmed
        texts, tokens = [texts[row] for row in order.tolist()], tokens[order].to(torch.int32)
        sizes = token_sizes(self.clip, tokens[:1].long())
        pictures = data.picture_items(split)
        return _Plan(
            self._store(split, "images", pictures, [sizes.image_tokens] * len(pictures), sizes.image_width),
            self._store(split, "texts", texts, lengths[order].tolist(), sizes.text_width),
            texts,
            tokens,
        )

    def _fill(self, data: FeatureData, split: Split, plan: "_Plan", progress: Callable[[str, float], None]) -> None:
        plan.images.fill(
            lambda numbers: self._image_features(data.picture_batches(split, numbers)),
            self.group,
            lambda share: progress(f"features of {len(plan.images):,} {split} pictures", share),
        )
        plan.words.fill(
            lambda numbers: self._text_features(plan.tokens, numbers),
            self.group,
            lambda share: progress(f"features of {len(plan.words):,} {split} questions", share),
        )

    def _store(
        self, split: str, kind: Literal["images", "texts"], items: Sequence[Any], lengths: list[int], width: int
    ) -> FeatureStore:
        key = FeatureKey(
            model=self.model,
            network=self.network,
            variant=self.variant,
            preprocessing=self.preprocessing.fingerprint,
            kind=kind,
            items=items_hash(items),
            count=len(items),
            dtype=self.options.dtype,
        )
        if self.options.folder is None:
            folder = cache_dir() / "features" / key.digest()
        else:
            folder = Path(self.options.folder).expanduser() / f"{split}-{kind}"
        return FeatureStore(folder, key, lengths, width)

    def _image_features(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        device = next(self.clip.parameters()).device
        for images in batches:
            yield from encode_image_tokens(self.clip, images.to(device)).float()

    def _text_features(self, tokens: Tensor, numbers: list[int]) -> Iterator[Tensor]:
        device = next(self.clip.parameters()).device
        for rows in torch.tensor(numbers).split(_TEXTS_AT_ONCE):
            features, mask = encode_text_tokens(self.clip, tokens[rows].long().to(device))
            yield from (feature[valid].float() for feature, valid in zip(features, mask, strict=True))
