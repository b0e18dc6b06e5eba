"""Image-text retrieval in both directions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lit_clipq.contracts import EmbeddedSamples, EmbeddingTask, TowerOutputs
from lit_clipq.errors import ConfigError
from lit_clipq.metrics import RetrievalRecall
from lit_clipq.models import encode_image, encode_text
from lit_clipq.tasks.towers import TwoTowerClipTask


class Retrieval(TwoTowerClipTask):
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
        self.keep_embeddings = False  # they are kept anyway
        self.metric = RetrievalRecall(ks=ks, any_identical=any_identical)

    def embeddings(self) -> EmbeddedSamples:
        """Embeddings of the evaluation at hand, of all ranks, before its metric is computed; a collective call."""
        metric = cast(RetrievalRecall, self.metric)
        with metric.sync_context():
            return metric.embedded()

    def tower_outputs(self, tower: str, batch: Mapping[str, Tensor]) -> TowerOutputs | None:
        """Embed the images or the texts of one batch."""
        if tower == "vision" and "images" in batch:
            return {"images": encode_image(self.clip, batch["images"]), "image_ids": batch["image_ids"]}
        if tower == "text" and "texts" in batch:
            texts = encode_text(self.clip, batch["texts"])
            return {"texts": texts, "text_ids": batch["text_ids"], "pairs": batch["pairs"]}
        return None

    def score_outputs(self, tower: str, outputs: TowerOutputs) -> None:  # noqa: ARG002 - the metric takes either
        """Give the metric the embeddings of one batch."""
        self.metric.update(**outputs)


if TYPE_CHECKING:

    def _fulfils(task: Retrieval) -> EmbeddingTask:
        """Let the type checker hold the class against its contract."""
        return task
