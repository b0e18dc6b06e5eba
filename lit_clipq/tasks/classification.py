"""Zero-shot classification: the text tower makes the classifier."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clipq.contracts import ClassData, EmbeddedSamples, EmbeddingTask, TowerOutputs, require
from lit_clipq.errors import ConfigError, DataError
from lit_clipq.metrics import TopKAccuracy
from lit_clipq.metrics.embedded import KeptImages
from lit_clipq.metrics.functional import distinct_rows
from lit_clipq.models import text_lengths
from lit_clipq.models.preprocessing import count_cut_texts
from lit_clipq.tasks.task import datamodule_of
from lit_clipq.tasks.towers import TwoTowerClipTask

logger = logging.getLogger(__name__)

Templates = Literal["openai", "simple"] | list[str]


class ZeroShotClassification(TwoTowerClipTask):
    """Top-k accuracy of the classes whose texts are nearest to the picture.

    Before each evaluation the current text tower encodes every prompt; a class is the mean of its prompts' normalised
    embeddings, normalised again, and logits are `scale * image @ classifier` (CLIP, arXiv 2103.00020, section 3.1.4).
    Batches are `{"images": (B, 3, H, W), "labels": int64 (B,), "image_ids": int64 (B,)}`; class names come from
    `trainer.datamodule.class_names`.

    Args:
        name: model name or path of an open_clip config JSON.
        pretrained: open_clip tag, local weights file, `mini`, or None for random weights.
        templates: `openai` (the 80 prompts of the CLIP paper), `simple` ("a photo of a {}."), or prompts of your own
            with {} for the class name.
        ks: how many classes to look at; `top{k}` for each.
        text_batch_size: prompts encoded at a time.
        **kwargs: how the CLIP is loaded and pictures are prepared; see `ClipTask`.

    Raises:
        ConfigError: Unknown or empty templates, one without {}, or a k or a batch size below 1.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        templates: Templates = "openai",
        ks: Sequence[int] = (1, 5),
        text_batch_size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, pretrained, **kwargs)
        self.save_hyperparameters(logger=False)
        if not ks or min(ks) < 1 or text_batch_size < 1:
            raise ConfigError(f"expected `ks` and `text_batch_size` of at least 1, got {list(ks)}, {text_batch_size}.")
        self.templates = prompt_templates(templates)
        self.text_batch_size = text_batch_size
        self.metric = TopKAccuracy(ks=ks)
        self.keep_embeddings = False
        self._images = KeptImages()
        self._classes = torch.empty(0, 0)  # (distinct classes, D)
        self._class_row = torch.empty(0, dtype=torch.int64)  # (classes,): its row of _classes
        self._cut: dict[str, int] = {}

    def shared_outputs(self) -> Sequence[TowerOutputs]:
        """Build the classifier with the text tower as it is now."""
        classifier = self.build_classifier(self._class_names())
        # Classes with the same embedding get their logits from the same column, so that they tie exactly.
        distinct = distinct_rows(classifier)
        return [{"classes": classifier[distinct.first], "class_row": distinct.group}]

    def begin_evaluation(self) -> None:
        """Forget the last evaluation."""
        super().begin_evaluation()
        self._images.reset()

    def sample_counts(self) -> dict[str, int]:
        """Number of pictures in the last evaluation, and of prompts that the text tower cuts where there are any."""
        return {**super().sample_counts(), **self._cut}

    def tower_outputs(self, tower: str, batch: Mapping[str, Tensor]) -> TowerOutputs | None:
        """Embed the pictures of one batch; the texts were embedded before all batches."""
        if tower == "text":
            return None
        return {"embeddings": self.embed_images(batch["images"]), "labels": batch["labels"], "ids": batch["image_ids"]}

    def score_outputs(self, tower: str, outputs: TowerOutputs) -> None:
        """Take the classifier, or classify the pictures of one batch."""
        if tower == "text":
            self._classes, self._class_row = outputs["classes"], outputs["class_row"]
        else:
            if self.keep_embeddings:
                self._images.update(outputs["embeddings"], outputs["labels"], outputs["ids"])
            self.metric.update(self._logits(outputs["embeddings"]), outputs["labels"], outputs["ids"])

    def embeddings(self) -> EmbeddedSamples:
        """Embeddings of the pictures and the classes of the evaluation at hand, of all ranks; a collective call.

        Raises:
            RuntimeError: If `keep_embeddings` was not set before the evaluation.
        """
        if not self.keep_embeddings:
            raise RuntimeError("expected kept embeddings, got none; set `keep_embeddings` before the evaluation")
        return self._images.with_classes(self._classes[self._class_row])

    def logits(self, images: Tensor) -> Tensor:
        """Logits float32 (B, classes) of images (B, 3, H, W)."""
        return self._logits(self.embed_images(images))

    def _logits(self, embeddings: Tensor) -> Tensor:
        scale = self.clip.get_parameter("logit_scale").float().exp()
        return (scale * embeddings @ self._classes.T)[:, self._class_row]

    @torch.no_grad()
    def build_classifier(self, class_names: Sequence[str]) -> Tensor:
        """Encode every prompt of every class; identical prompts once.

        Args:
            class_names: names in the order of the labels.

        Returns:
            float32 (classes, D), rows of length 1, on the task's device.
        """
        prompts = [template.replace("{}", name) for name in class_names for template in self.templates]
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        logger.info("encoding %d prompts of %d classes", len(distinct), len(class_names))
        embeddings = self._embed_prompts(list(distinct))  # (distinct prompts, D)
        cut = count_cut_texts(self.preprocessing, prompts)
        length = self.preprocessing.context_length
        self._cut = {"texts": len(prompts), "texts_cut": cut, "context_length": length} if cut else {}
        rows = torch.tensor([distinct[prompt] for prompt in prompts], device=embeddings.device)
        rows = rows.view(len(class_names), len(self.templates))
        mean = torch.stack([embeddings[prompt_rows].mean(0) for prompt_rows in rows])  # (classes, D)
        return F.normalize(mean, dim=-1)

    def _embed_prompts(self, prompts: list[str]) -> Tensor:
        """Embeddings of prompts, float32 (n, D), encoded from short to long so that batches can be trimmed."""
        tokens = self.preprocessing.tokenizer(prompts).to(self.device)
        order = torch.argsort(text_lengths(self.clip, tokens), stable=True)
        embeddings = torch.cat([self.embed_texts(tokens[rows]) for rows in order.split(self.text_batch_size)])
        return embeddings[torch.argsort(order)]

    def _class_names(self) -> list[str]:
        data = require(datamodule_of(self), ClassData)
        if not data.class_names:
            raise DataError(
                f"expected a datamodule with `class_names`, got {type(data).__name__} without any; "
                "use a classification datamodule, and call its setup()"
            )
        return list(data.class_names)


if TYPE_CHECKING:

    def _fulfils(task: ZeroShotClassification) -> EmbeddingTask:
        """Let the type checker hold the class against its contract."""
        return task


def prompt_templates(templates: Templates) -> list[str]:
    """Prompts with {} for the class name.

    Args:
        templates: name of a preset, or the prompts.

    Raises:
        ConfigError: Unknown preset, no prompt, or a prompt without {}.

    Example:
        >>> prompt_templates("simple")
        ['a photo of a {}.']
    """
    if templates == "openai":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    if templates == "simple":
        return ["a photo of a {}."]
    if isinstance(templates, str) or not templates:
        raise ConfigError(f"expected templates 'openai', 'simple' or a list of prompts, got {templates!r}.")
    without = [template for template in templates if "{}" not in template]
    if without:
        raise ConfigError(f"expected {{}} for the class name in every template, got {without[0]!r}; add it.")
    return list(templates)
