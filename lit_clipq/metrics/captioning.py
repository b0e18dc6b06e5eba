"""Agreement of captions with references: CIDEr-D, BLEU and ROUGE-L as the official COCO scorer computes them."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_clipq.errors import DataError
from lit_clipq.metrics.functional.cider import cider_d
from lit_clipq.metrics.functional.overlap import corpus_bleu, rouge_l
from lit_clipq.metrics.functional.ptb import ptb_tokens
from lit_clipq.metrics.functional.scores import SampleScores
from lit_clipq.metrics.keyed import Evaluation, SampleKeyedMetric

logger = logging.getLogger(__name__)


class CIDEr(SampleKeyedMetric):
    """CIDEr-D with its official tokenization, and BLEU-1 .. BLEU-4 and ROUGE-L beside it.

    `compute` gives `cider`, `rouge_l` and `bleu1` .. `bleu4`, the primary one first. CIDEr-D is stated as a fraction,
    0.4929 where papers print 49.29, and can exceed 1 (up to 10). Its n-gram weights come from the evaluated pictures:
    it depends on their number N, so say N with every result (`evaluation().counts["images"]`). CIDEr-D and ROUGE-L are
    means over pictures and have scores per picture; BLEU exists for the whole set only.

    Samples are keyed by id: an id that arrives again with the same texts is dropped, with others it is an error.
    Equations: `lit_clipq.metrics.functional.cider_d`, `corpus_bleu`, `rouge_l`; tokens: `ptb_tokens`.

    Example:
        >>> metric = CIDEr()
        >>> metric.update(["A cat sits.", "The dog runs!"], [["a cat sits"], ["the dog runs", "a dog"]])
        >>> {name: round(value, 2) for name, value in metric.compute().items()}
        {'cider': 5.98, 'rouge_l': 1.0, 'bleu1': 1.0, 'bleu2': 1.0, 'bleu3': 1.0, 'bleu4': 0.03}
    """

    samples: list[Tensor]  # (n, 3): id, number of texts, whether the id was given
    lengths: list[Tensor]  # bytes of each text: caption, references, next caption ...
    texts: list[Tensor]  # uint8, UTF-8 of all texts one after another

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # As bytes: torchmetrics does not gather states that are lists of strings.
        self.add_rows("samples", 3)
        self.add_rows("lengths")
        self.add_rows("texts", dtype=torch.uint8)

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]], ids: Tensor | None = None) -> None:
        """Add the captions of a batch of pictures.

        Args:
            preds: one caption for each picture, as text.
            target: for each picture its references, at least one, as text.
            ids: int64 (b,), the pictures' ids; without them every caption is a picture of its own. Give them always or
                never.

        Raises:
            ValueError: `preds` or `target` is one string, or `ids` has another dtype or more axes.
            DataError: Captions, references and ids do not match in number; a caption or reference is empty or no
                string; a picture has no reference.
        """
        if isinstance(preds, str) or isinstance(target, str) or any(isinstance(texts, str) for texts in target):
            raise ValueError("expected a list of captions and a list of lists of references, got a string instead.")
        if ids is not None and (ids.dtype != torch.int64 or ids.ndim != 1):
            raise ValueError(f"expected int64 ids (n,), got {ids.dtype} {tuple(ids.shape)}.")
        if not len(preds) == len(target) == (len(preds) if ids is None else len(ids)):
            found = "no" if ids is None else f"{len(ids):,}"
            raise DataError(
                f"expected one caption, one list of references and one id a picture, got {len(preds):,} captions,"
                f" {len(target):,} lists and {found} ids; match the captions to the annotation file by picture id."
            )
        names = [f"number {i} of the batch" for i in range(len(preds))] if ids is None else ids.tolist()
        for name, caption, references in zip(names, preds, target, strict=True):
            _check_texts(name, caption, references)
        texts = [
            text.encode("utf-8", "surrogatepass")
            for caption, references in zip(preds, target, strict=True)
            for text in (caption, *references)
        ]
        counts = torch.tensor([1 + len(references) for references in target], dtype=torch.int64, device=self.device)
        keys = torch.zeros_like(counts) if ids is None else ids.to(self.device)
        given = torch.full_like(counts, ids is not None)
        self.samples.append(torch.stack([keys, counts, given], dim=1))
        self.lengths.append(torch.tensor([len(text) for text in texts], dtype=torch.int64, device=self.device))
        content = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8) if texts else self._no_rows("texts")
        self.texts.append(content.to(self.device))

    def evaluate(self) -> Evaluation:
        """Score every picture, by id."""
        by_id = self._distinct()
        tokens = [[ptb_tokens(text) for text in by_id[key]] for key in by_id]
        captions, references = [texts[0] for texts in tokens], [texts[1:] for texts in tokens]
        if len(by_id) == 1:
            logger.warning(
                "CIDEr-D of a single picture is 0 whatever its caption says: an n-gram weighs log(N / pictures whose "
                "references have it), which is log 1 for N = 1; evaluate more pictures"
            )
        clusters = torch.tensor(list(by_id), dtype=torch.int64)
        scores = {
            "cider": SampleScores(cider_d(captions, references), clusters),
            "rouge_l": SampleScores(rouge_l(captions, references), clusters),
        }
        bleu = {f"bleu{n}": value for n, value in enumerate(corpus_bleu(captions, references), start=1)}
        counts = {"images": len(by_id), "references": sum(len(texts) for texts in references)}
        return Evaluation(scores, counts, bleu)

    def _distinct(self) -> dict[int, tuple[str, ...]]:
        """Caption and references of each distinct id, in ascending order of id."""
        samples = self.rows("samples").cpu()
        if not len(samples):
            raise DataError("expected captions to score, got none; check the data folder and the limits on batches.")
        keys, counts, given = samples.unbind(1)
        if given.unique().numel() > 1:
            raise DataError(
                f"expected ids with all captions or with none, got {int(given.sum()):,} captions with ids of "
                f"{len(given):,}; give `ids` to every update."
            )
        numbers = keys.tolist() if given[0] else range(len(keys))
        content = self.rows("texts").cpu().numpy().tobytes()
        ends = self.rows("lengths").cpu().cumsum(0).tolist()
        texts = [
            content[start:end].decode("utf-8", "surrogatepass")
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        found: dict[int, tuple[str, ...]] = {}
        place = 0
        for key, count in zip(numbers, counts.tolist(), strict=True):
            sample = tuple(texts[place : place + count])
            place += count
            if found.setdefault(key, sample) != sample:
                raise DataError(
                    f"expected one caption and one set of references per id, but picture {key} came twice with "
                    "different texts; give every picture its own id and caption it once."
                )
        return dict(sorted(found.items()))


def _check_texts(name: object, caption: object, references: Sequence[object]) -> None:
    if not references:
        raise DataError(
            f"expected references for every picture, but picture {name} has none; "
            "leave it out or add captions to the annotation file."
        )
    for what, text in [("caption", caption), *(("reference", reference) for reference in references)]:
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"expected a {what} with some text for picture {name}, got {text!r}; "
                "correct it, or leave the picture out."
            )
