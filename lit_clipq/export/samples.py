"""Pictures and texts to compare with, made on the spot: scenes of the mini world, captions, other sentences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clipq.export.towers import towers_of
from lit_clipq.mini.world import picture, picture_captions
from lit_clipq.models import LoadedCLIP, Preprocessing

PICTURES = 12
Reference = Mapping[str, np.ndarray[Any, Any]]
"""Embeddings of `Samples` by tower."""
_SENTENCES = (
    "cat",
    "a photo of a dog.",
    "two people are riding bicycles along the beach at sunset",
    "an old wooden boat lies on the sand while children play football behind it and a woman takes pictures of them",
)


@dataclass(frozen=True)
class Samples:
    """Input of both towers."""

    images: Tensor
    """float32 (N, 3, H, W)."""
    tokens: Tensor
    """int64 (M, L)."""

    @classmethod
    def make(cls, preprocessing: Preprocessing) -> "Samples":
        """Prepare scenes and sentences for a model; the same ones every time."""
        scenes = [Image.fromarray(picture("validation", index)) for index in range(PICTURES)]
        captions = [picture_captions("validation", index)[0] for index in range(PICTURES)]
        images = torch.stack([preprocessing.image(scene) for scene in scenes])
        return cls(images, preprocessing.tokenizer([*captions, *_SENTENCES]))

    def of(self, tower: str) -> Tensor:
        """Return the input of a tower, `image` or `text`."""
        return self.images if tower == "image" else self.tokens


def embeddings(loaded: LoadedCLIP, samples: Samples) -> Reference:
    """Return the embeddings of samples by tower, as the network computes them now."""
    with torch.no_grad():
        return {name: tower(samples.of(name)).float().numpy() for name, tower in towers_of(loaded).items()}
