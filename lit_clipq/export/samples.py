"""Pictures and texts to compare with, made on the spot: scenes of the mini world, captions, other sentences."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lit_clipq.mini.world import picture, picture_captions
from lit_clipq.models import Preprocessing

PICTURES = 12
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
