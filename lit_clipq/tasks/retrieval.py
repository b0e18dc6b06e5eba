"""Image-text retrieval in both directions."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_clipq.errors import ConfigError
from lit_clipq.metrics import RetrievalRecall
from lit_clipq.models import encode_image, encode_text
from lit_clipq.tasks.task import EncodingClipTask


class Retrieval(EncodingClipTask):
    """Recall@k of image to text and text to image by cosine similarity.

    One loader yields `{"images": (B, 3, H, W), "image_ids": int64 (B,)}`, another the distinct captions,
    `{"texts": int64 (B, L), "text_ids": int64 (B,), "pairs": int64 (P, 2)}` with one row (text id, image id) for every
    caption that has one of these texts. Their order does not matter. What counts as a hit:
    `lit_clipq.metrics.functional.retrieval_hits`.

    Args:
        name: model name or path of an open_clip config JSON.
        pretrained: open_clip tag, local weights file, `mini`, or None for random weights.
        ks: how many items to look at; `recall@k_i2t` and `recall@k_t2i` for each.
        any_identical: also report `recall@k_t2i_any_identical`, where any picture with an identical caption is a hit.
        **kwargs: how the CLIP is loaded and pictures are prepared; see `ClipTask`.

    Raises:
        ConfigError: A k below 1, or none.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        ks: Sequence[int] = (1, 5, 10),
        any_identical: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, pretrained, **kwargs)
        self.save_hyperparameters(logger=False)
        if not ks or min(ks) < 1:
            raise ConfigError(f"expected `ks` of at least 1, got {list(ks)}; for example [1, 5, 10].")
        self.metric = RetrievalRecall(ks=ks, any_identical=any_identical)

    def evaluation_step(self, batch: Mapping[str, Tensor]) -> None:
        """Embed the images or the texts of one batch."""
        if "images" in batch:
            self.metric.update(images=encode_image(self.clip, batch["images"]), image_ids=batch["image_ids"])
        if "texts" in batch:
            texts = encode_text(self.clip, batch["texts"])
            self.metric.update(texts=texts, text_ids=batch["text_ids"], pairs=batch["pairs"])
