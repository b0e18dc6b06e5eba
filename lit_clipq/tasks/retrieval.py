"""Image-text retrieval in both directions."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lit_clipq.contracts import EmbeddedSamples, EmbeddingTask, TowerOutputs
from lit_clipq.errors import ConfigError
from lit_clipq.metrics import Evaluation, RetrievalRecall
from lit_clipq.metrics.functional import exact_mean
from lit_clipq.models import encode_image, encode_text
from lit_clipq.tasks.towers import TOWERS, TwoTowerClipTask


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
        asymmetric: also report `recall@k_*_quantized_queries`, of queries of this network in an index of float
            embeddings, and `recall@k_*_quantized_index`, of float queries in an index of this network. The float
            network is then evaluated in every run.
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
        asymmetric: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, pretrained, **kwargs)
        self.save_hyperparameters(logger=False)
        if not ks or min(ks) < 1:
            raise ConfigError(f"expected `ks` of at least 1, got {list(ks)}; for example [1, 5, 10].")
        self.keep_embeddings = False  # they are kept anyway
        self.metric = RetrievalRecall(ks=ks, any_identical=any_identical)
        self.uses_reference = asymmetric

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

    def finish_evaluation(self) -> None:
        """Score what is in; where that is asked for also one side quantized at a time."""
        super().finish_evaluation()
        if not self.uses_reference or self._evaluation is None:
            return
        scores = dict(self._evaluation.scores)
        for quantized, of_images, of_texts in (
            ("vision", "quantized_queries", "quantized_index"),
            ("text", "quantized_index", "quantized_queries"),
        ):
            for name, values in self._one_side(quantized).scores.items():
                direction = of_images if "_i2t" in name else of_texts
                scores[f"{name}_{direction}"] = values
        self._evaluation = replace(self._evaluation, scores=scores)
        self._results |= {name: exact_mean(one.values) for name, one in scores.items()}

    def _one_side(self, quantized: str) -> Evaluation:
        """Score what one tower made now beside what the other one made as float; a float network is both."""
        metric = copy.deepcopy(self.metric)
        for tower in TOWERS:
            both = self.made_outputs if tower == quantized or self.reference is None else self.reference
            for outputs in both[tower]:
                metric.update(**outputs)
        return metric.evaluation()


if TYPE_CHECKING:

    def _fulfils(task: Retrieval) -> EmbeddingTask:
        """Let the type checker hold the class against its contract."""
        return task
