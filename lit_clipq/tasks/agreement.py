"""Agreement of quantized with float embeddings on pictures without labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_clipq.contracts import TextData, TowerOutputs
from lit_clipq.errors import ConfigError
from lit_clipq.metrics import EmbeddingAgreement
from lit_clipq.models import encode_image, encode_text
from lit_clipq.tasks.towers import TwoTowerClipTask

TEXT_LAYERS = "clip.[!v]*"
"""Layers of a CLIP outside of its image tower, `visual`."""


class Agreement(TwoTowerClipTask):
    """How far the quantized network searches as the float one does: top-k agreement, rank correlation, cosine.

    Batches are those of `Retrieval`; `pairs` are not looked at. Where the data has no texts, pictures look for other
    pictures, and the text tower stays float. See `lit_clipq.metrics.EmbeddingAgreement`.

    Args:
        name: model name or path of an open_clip config JSON.
        pretrained: open_clip tag, local weights file, `mini`, or None for random weights.
        ks: how many items to look at; `top{k}_*` for each.
        **kwargs: how the CLIP is loaded and pictures are prepared; see `ClipTask`.

    Raises:
        ConfigError: A k below 1, or none.
    """

    uses_reference = True

    def __init__(self, name: str, pretrained: str | None = None, ks: Sequence[int] = (1, 10), **kwargs: Any) -> None:
        super().__init__(name, pretrained, **kwargs)
        self.save_hyperparameters(logger=False)
        if not ks or min(ks) < 1:
            raise ConfigError(f"expected `ks` of at least 1, got {list(ks)}; for example [1, 10].")
        self.metric = EmbeddingAgreement(ks=ks)

    def unused_layers(self) -> tuple[str, ...]:
        """Return the pattern of the text tower where the data has no texts."""
        data: object = None if self._trainer is None else self._trainer.datamodule  # type: ignore[attr-defined]
        return (TEXT_LAYERS,) if isinstance(data, TextData) and not data.has_texts else ()

    def tower_outputs(self, tower: str, batch: Mapping[str, Tensor]) -> TowerOutputs | None:
        """Embed the images or the texts of one batch."""
        if tower == "vision" and "images" in batch:
            return {"embeddings": encode_image(self.clip, batch["images"]), "ids": batch["image_ids"]}
        if tower == "text" and "texts" in batch:
            return {"embeddings": encode_text(self.clip, batch["texts"]), "ids": batch["text_ids"]}
        return None

    def score_outputs(self, tower: str, outputs: TowerOutputs) -> None:
        """Leave all to the end, when float and quantized embeddings are in."""

    def complete_scores(self) -> None:
        """Give the metric all embeddings; a float network agrees with itself."""
        for tower, kind in (("vision", "image"), ("text", "text")):
            made = self.made_outputs[tower]
            floats = made if self.reference is None else self.reference[tower]
            for outputs, float_outputs in zip(made, floats, strict=True):
                rows = {
                    f"{kind}s": outputs["embeddings"],
                    f"float_{kind}s": float_outputs["embeddings"],
                    f"{kind}_ids": outputs["ids"],
                }
                self.metric.update(**rows)
