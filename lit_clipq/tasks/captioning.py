"""Captions without training: CLIP guides a language model, and CIDEr says how well."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.contracts import CalibrationBatch, CaptioningTask
from lit_clipq.errors import ConfigError
from lit_clipq.metrics import CIDEr
from lit_clipq.models import encode_image
from lit_clipq.tasks.caption_log import CaptionLog
from lit_clipq.tasks.task import ClipTask
from lit_clipq.zerocap.engine import Captioner, make_captioner
from lit_clipq.zerocap.language import load_language_model
from lit_clipq.zerocap.options import zerocap_options
from lit_clipq.zerocap.prefix_cache import MIN_ROWS


@dataclass(frozen=True)
class CaptionedPicture:
    """One picture of a pass."""

    caption: str
    references: tuple[str, ...]
    file_name: str


class Captioning(ClipTask):
    """CIDEr-D of captions that ZeroCap (arXiv 2111.14447) generates with this CLIP and a language model.

    Batches are `{"images": (B, 3, H, W), "image_ids": int64 (B,), "references": list of lists of texts, "file_names":
    list of paths}`. A caption depends on its picture alone, not on those beside it. The language model stays float
    unless a pattern of `quantize.include` mentions `lm`.

    Args:
        name: model name or path of an open_clip config JSON.
        pretrained: open_clip tag, local weights file, `mini`, or None for random weights.
        preset: `zerocap` (gpt2-medium, 5 beams), `magic` (a GPT-2 fine-tuned on COCO captions, 1 beam) or `mini`. The
            other arguments replace what the preset says where they are not null.
        lm: language model: `mini-gpt2`, a local folder, or a name on the hub.
        beams: width of the beam search.
        max_tokens: tokens of a caption at most.
        candidates: next tokens that CLIP scores in each step.
        iterations: gradient steps for each token.
        prefix: what every text begins with; no part of the caption.
        guided: whether CLIP takes part; else the captions are the language model's own.
        engine: `fast`, or `plain` for the method as published; the captions are the same.
        forbidden_tokens: `.npy` file of the ids of tokens that captions should not have.
        options: further fields of `lit_clipq.zerocap.options.ZeroCapOptions` by name.
        **kwargs: how the CLIP is loaded and pictures are prepared; see `ClipTask`.

    Raises:
        ConfigError: An unknown preset or option, or one outside its range.
        ModelError: A language model that cannot be loaded, or has no usable tokenizer.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        preset: Literal["zerocap", "magic", "mini"] = "zerocap",
        lm: str | None = None,
        beams: int | None = None,
        max_tokens: int | None = None,
        candidates: int | None = None,
        iterations: int | None = None,
        prefix: str | None = None,
        guided: bool | None = None,
        engine: Literal["fast", "plain"] | None = None,
        forbidden_tokens: str | None = None,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        chosen = {
            "lm": lm,
            "beams": beams,
            "max_tokens": max_tokens,
            "candidates": candidates,
            "iterations": iterations,
            "prefix": prefix,
            "guided": guided,
            "engine": engine,
            "forbidden_tokens": forbidden_tokens,
        }
        twice = sorted(set(options or {}) & {key for key, value in chosen.items() if value is not None})
        if twice:
            raise ConfigError(f"--model.{twice[0]} and --model.options.{twice[0]} are the same option; give one")
        self_options = zerocap_options(preset, **{**chosen, **(options or {})})
        super().__init__(name, pretrained, **kwargs)
        self.save_hyperparameters(logger=False)
        self.options = self_options
        self.language = load_language_model(self.options.lm, start_token=self.options.start_token)
        self.lm = self.language.model.requires_grad_(False)
        self.metric = CIDEr()
        self._captioner: Captioner | None = None
        self._log: CaptionLog | None = None
        self._known: Mapping[int, str] = {}
        self._captioned: dict[int, CaptionedPicture] = {}
        self._offers_lm = False

    def roots(self) -> dict[str, nn.Module]:
        """Networks that may be quantized: `clip`, and `lm` where the run asks for it."""
        return {**super().roots(), **({"lm": self.lm} if self._offers_lm else {})}

    def offer_roots(self, include: Sequence[str]) -> None:
        """Offer the language model where a pattern of layer names mentions it; without patterns CLIP alone."""
        self._offers_lm = any(fnmatchcase("lm", pattern.partition(".")[0]) for pattern in include)

    def calibration_forward(self, batch: CalibrationBatch) -> dict[str, Tensor]:
        """Embeddings of the batch; with a language model to quantize also `lm`, what it makes of the texts.

        `lm` is 2 sqrt(p) of the next-token probabilities, (B, L, V): the Gauss-Newton diagonal of that is the Fisher
        information of the language model's distribution.
        """
        outputs = super().calibration_forward(batch)
        if self._offers_lm and batch[1] is not None:
            logits = self.lm(input_ids=self._language_tokens(batch[1]), use_cache=False).logits
            outputs["lm"] = 2 * logits.float().softmax(dim=-1).clamp(min=1e-12).sqrt()
        return outputs

    def _language_tokens(self, tokens: Tensor) -> Tensor:
        """Return the language model's tokens (B, L) of texts given in CLIP's.

        L is that of the longest caption with its prefix; a shorter text is repeated. A row does not depend on the
        texts beside it, so that any number of processes calibrates on the same tokens.
        """
        decode = getattr(self.preprocessing.tokenizer, "decode", None)
        if decode is None:
            raise ConfigError(
                "quantizing the language model needs calibration texts, which this CLIP's tokenizer cannot give back; "
                "leave lm out of --quantize.include"
            )
        special = set(getattr(self.preprocessing.tokenizer, "all_special_ids", ()))
        texts = [decode([t for t in row if t and t not in special]).strip() + "." for row in tokens.tolist()]
        tokenize = partial(self.language.tokenizer, add_special_tokens=False)
        *rows, prefix = (tokenize(text).input_ids for text in (*texts, self.options.prefix))
        length = len(prefix) + self.options.max_tokens
        return torch.tensor([[self.language.start_id, *(row * length)[:length]] for row in rows], device=self.device)

    def begin_pass(self, path: Path, run: str, *, resume: bool) -> None:
        """Keep the captions of the next evaluation in a file.

        Args:
            path: Where, in COCO results format.
            run: Hash of everything they depend on.
            resume: Whether to take captions that an interrupted run with the same hash left there.
        """
        self._log = CaptionLog(path, run, resume=resume)

    def captioned(self) -> dict[int, CaptionedPicture]:
        """Pictures of the last evaluation by id, the same on every rank."""
        self._last_evaluation()
        return dict(self._captioned)

    def prepare_evaluation(self) -> None:
        """Take the networks as they are now, and the captions that are there already."""
        self._captioned = {}
        self._known = {}
        self._captioner = make_captioner(self.clip, self.preprocessing.tokenizer, self.language, self.options)
        if self._log is not None:
            self._log.rank = self.global_rank
            if self.global_rank == 0:
                self._log.prepare()
            self.trainer.strategy.barrier("captions prepared")
            self._known = self._log.open()

    def evaluation_step(self, batch: Mapping[str, Any]) -> None:
        """Caption what has no caption yet, and score all."""
        ids = batch["image_ids"].tolist()
        captions = {key: self._known[key] for key in ids if key in self._known}
        rows = [row for row, key in enumerate(ids) if key not in captions]
        if rows:
            made = self.caption_images(batch["images"][rows])
            captions |= {ids[row]: caption for row, caption in zip(rows, made, strict=True)}
        if self._log is not None:
            self._log.add(captions)
        texts = [captions[key] for key in ids]
        self.metric.update(texts, batch["references"], batch["image_ids"])
        rest = zip(ids, texts, batch["references"], batch["file_names"], strict=True)
        self._captioned.update({key: CaptionedPicture(text, tuple(refs), file) for key, text, refs, file in rest})

    def caption_images(self, images: Tensor) -> list[str]:
        """Return a caption for each picture (B, 3, H, W).

        Raises:
            ConfigError: Where memory is not enough.
        """
        if self._captioner is None:
            self._captioner = make_captioner(self.clip, self.preprocessing.tokenizer, self.language, self.options)
        try:
            # The guidance needs gradients of the language model's cache.
            with torch.inference_mode(False), torch.no_grad():
                captions = self._captioner.captions(self._embedded(images.clone()))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            o = self.options
            raise ConfigError(
                f"out of memory with {len(images)} pictures x {o.beams} beams x {o.candidates} candidates; lower "
                "--data.batch_size, --model.beams or --model.candidates"
            ) from error
        return [caption or self.options.end_token for caption in captions]

    def _embedded(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) that do not depend on how many pictures there are; see `MIN_ROWS`."""
        missing = max(0, MIN_ROWS - len(images))
        filled = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
        return F.normalize(encode_image(self.clip, filled)[: len(images)].float(), dim=-1)

    def on_validation_epoch_end(self) -> None:
        """Gather the captions, score and log."""
        parts: list[dict[int, CaptionedPicture]] = [self._captioned]
        if self.trainer.world_size > 1:
            parts = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self._captioned)
        self._captioned = {key: picture for part in parts for key, picture in part.items()}
        super().on_validation_epoch_end()
        if self._log is not None and self.global_rank == 0:
            self._log.close({key: picture.caption for key, picture in self._captioned.items()})
        self._captioner = None
        self._log = None


if TYPE_CHECKING:

    def _fulfils(task: Captioning) -> CaptioningTask:
        """Let the type checker hold the class against its contract."""
        return task


def _out_of_memory(error: Exception) -> bool:
    """Tell whether memory was not enough; only some of torch's allocators have an error class for that."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in told for words in ("out of memory", "allocate memory", "alloc_failed")
    )
