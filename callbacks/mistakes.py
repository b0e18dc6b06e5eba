"""Pictures that the float network gets right and the quantized one wrong, with both answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.observer import EmbeddingObserver
from lit_clipq.contracts import EmbeddedSamples, NamedSamples
from lit_clipq.errors import ConfigError

_BLOCK_BYTES = 64_000_000


@dataclass(frozen=True)
class Answer:
    """The text nearest to one picture."""

    text: str
    cosine: float
    right: bool
    """Whether it is one of the picture's own."""
    own: str
    """A text of the picture's own."""
    file: Path


class Mistakes(EmbeddingObserver[dict[int, Answer]]):
    """Add pictures whose nearest text is their own in float and another one quantized to the results, under `mistakes`.

    Those come first that lose the most: whose wrong text is ahead of the right one by most. The float evaluation is
    measured anew, and not taken from an earlier run.

    Args:
        count: How many pictures are named; how many there are is counted.

    Raises:
        ConfigError: If that is below 1.
    """

    section: ClassVar[str] = "mistakes"

    def __init__(self, count: int = 24) -> None:
        super().__init__()
        if count < 1:
            raise ConfigError(f"count must be at least 1, got {count}")
        self.count = count

    def look(self, samples: EmbeddedSamples, data: object) -> dict[int, Answer]:
        """Find the nearest text of every picture.

        Raises:
            ConfigError: For data that cannot name its pictures and texts.
        """
        if not isinstance(data, NamedSamples):
            raise ConfigError(
                f"callbacks.Mistakes needs data that names its pictures and texts, got {type(data).__name__}; use one "
                "of `datamodules`, or leave the callback out"
            )
        nearest, cosine = _nearest(samples.images, samples.texts)
        known = set(map(tuple, samples.pairs.tolist()))
        own = {image: text for text, image in reversed(samples.pairs.tolist())}
        text_ids = samples.text_ids.tolist()
        return {
            key: Answer(
                data.text_of(text_ids[nearest[i]]),
                cosine[i],
                (nearest[i], i) in known,
                data.text_of(text_ids[own[i]]),
                data.picture_file(key),
            )
            for i, key in enumerate(samples.image_ids.tolist())
        }

    def describe(self, before: dict[int, Answer], after: dict[int, Answer] | None) -> Mapping[str, Any]:
        """Compare them."""
        later = after or {}
        lost = [key for key, answer in before.items() if answer.right and key in later and not later[key].right]
        won = sum(not answer.right and key in later and later[key].right for key, answer in before.items())
        lost.sort(key=lambda key: (before[key].cosine - later[key].cosine, key))
        rows = [
            {
                "image_id": key,
                "file": str(before[key].file),
                "own": before[key].own,
                "float": before[key].text,
                "quantized": later[key].text,
            }
            for key in lost[: self.count]
        ]
        return {"lost": len(lost), "won": won, "pictures": len(before), "rows": rows}


def _nearest(images: Tensor, texts: Tensor) -> tuple[list[int], list[float]]:
    """Return for each picture the position of the nearest text and their cosine; of equal ones the first."""
    image, text = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    rows = max(1, _BLOCK_BYTES // (4 * max(len(text), 1)))
    places, values = [], []
    for part in image.split(rows):
        best = (part @ text.T).max(dim=1)
        places.append(best.indices.cpu())
        values.append(best.values.cpu())
    return torch.cat(places).tolist(), torch.cat(values).tolist()
