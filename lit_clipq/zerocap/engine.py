"""ZeroCap: CLIP guides a causal language model to captions without training (arXiv 2111.14447).

For every new token the keys and values of the text so far are moved a few gradient steps, so that the language model
prefers words with which the text is nearer to the picture in CLIP's space, and a beam search takes what it then says.
`ZeroCap` computes many pictures at once; `zerocap_plain` is the method as published, one picture at a time.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.zerocap.candidate_texts import CandidateTexts, RememberedTexts, SharedPrefixes, WholeTexts
from lit_clipq.zerocap.language import LoadedLanguageModel
from lit_clipq.zerocap.options import ZeroCapOptions
from lit_clipq.zerocap.prefix_cache import why_not
from lit_clipq.zerocap.reference import PlainZeroCap
from lit_clipq.zerocap.steps import (
    Beams,
    Cache,
    CaptionModel,
    guidance_loss,
    moved,
    next_log_probabilities,
)

logger = logging.getLogger(__name__)


class Captioner(Protocol):
    """Generates captions for pictures."""

    candidates: CandidateTexts

    def captions(self, images: Tensor) -> list[str]:
        """Return a caption for each picture, given as CLIP's embeddings (N, D) of length 1."""


def make_captioner(
    clip: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    lm: LoadedLanguageModel,
    options: ZeroCapOptions,
) -> Captioner:
    """Make a captioner of the networks as they are now; after CLIP was quantized make another one.

    Args:
        clip: A CLIP.
        tokenizer: Its tokenizer.
        lm: The language model.
        options: How captions are generated, and by which engine.

    Raises:
        ModelError: For a language model that cannot write such captions.
    """
    model = CaptionModel(lm, options)
    if options.engine == "plain":
        return PlainZeroCap(WholeTexts(clip, tokenizer, model.decode), model, options)
    objection = why_not(clip)
    if objection:
        logger.warning("candidate texts run whole through the text tower, which takes longer: %s", objection)
        return ZeroCap(RememberedTexts(clip, tokenizer, model.decode), model, options)
    limit = options.memo_megabytes * 10**6
    return ZeroCap(SharedPrefixes(clip, tokenizer, model.decode, model.vocabulary, limit), model, options)


class ZeroCap:
    """Captions for many pictures at once.

    All texts begin alike and grow by one token a step, so that the beams of all pictures are one batch. What the
    language model knows of a text is kept from step to step; beams that have ended are left out.

    Args:
        candidates: Where embeddings of texts come from.
        model: The language model.
        options: How captions are generated.
    """

    def __init__(self, candidates: CandidateTexts, model: CaptionModel, options: ZeroCapOptions) -> None:
        self.candidates = candidates
        self.model = model
        self.options = options

    @torch.no_grad()
    def captions(self, images: Tensor) -> list[str]:
        """Return a caption for each picture, given as CLIP's embeddings (N, D) of length 1."""
        count, model, options = len(images), self.model, self.options
        if not count:
            return []
        start = torch.tensor([model.start], device=model.device)
        logits, extended = model.next_logits(start)
        # rows are the texts that still grow; here one a picture, all the same
        owner = torch.arange(count, device=model.device)
        last = start[:, -1:].expand(count, 1)
        logits = logits.expand(count, -1)
        cache = [x[:, :, :-1].expand(count, -1, -1, -1) for x in extended]
        extended = [x.expand(count, -1, -1, -1) for x in extended]
        beams: Beams | None = None
        slot = torch.zeros_like(owner)  # the beam of each row
        for step in range(options.max_tokens):
            if beams is not None:
                logits, extended = model.next_logits(last, cache)
            contexts = self._contexts(beams, owner, slot)
            log_p = self._log_probabilities(images[owner], contexts, last, cache, logits, step)
            if beams is None:
                beams = Beams.begin(log_p, options.beams, model.end_id)
                came_from = owner[:, None].expand(-1, options.beams)  # (N, K): row of `extended`
            else:
                spread = log_p.new_zeros(count, options.beams, log_p.shape[-1])
                spread[owner, slot] = log_p
                rows = torch.zeros_like(beams.lengths)
                rows[owner, slot] = torch.arange(len(owner), device=owner.device)
                beams, source = beams.extend(spread, model.end_id)
                came_from = rows.gather(1, source)
            owner, slot = (~beams.stopped).nonzero(as_tuple=True)
            if not len(owner):
                break
            last = beams.tokens[owner, slot, -1:]
            cache = [x[came_from[owner, slot]] for x in extended]
        assert beams is not None  # noqa: S101 - max_tokens is at least 1
        return self._chosen(images, beams)

    def _contexts(self, beams: Beams | None, owner: Tensor, slot: Tensor) -> list[tuple[int, ...]]:
        prefix = tuple(self.model.start[1:])
        if beams is None:
            return [prefix] * len(owner)
        return [prefix + tuple(tokens) for tokens in beams.tokens[owner, slot].tolist()]

    def _log_probabilities(
        self,
        images: Tensor,
        contexts: Sequence[tuple[int, ...]],
        last: Tensor,
        cache: Cache,
        logits: Tensor,
        step: int,
    ) -> Tensor:
        """Return the guided log-probabilities (R, V) of the next token."""
        log_p0 = F.log_softmax(logits, dim=-1)
        options = self.options
        if options.guided and options.iterations and cache[0].shape[2]:
            self.candidates.begin(contexts)
            logits = self._guided_logits(images, last, cache, log_p0)
        return next_log_probabilities(logits, log_p0, step, self.model.end_id, self.model.forbidden, options)

    def _guided_logits(self, images: Tensor, last: Tensor, cache: Cache, log_p0: Tensor) -> Tensor:
        """Return logits (R, V) of the next token with the cache moved towards the pictures (R, D)."""
        shifts = [torch.zeros_like(x) for x in cache]
        for _ in range(self.options.iterations):
            leaves = [shift.requires_grad_() for shift in shifts]
            with torch.enable_grad():
                logits, _ = self.model.next_logits(last, [x + y for x, y in zip(cache, leaves, strict=True)])
                log_p = F.log_softmax(logits, dim=-1)
                likely = log_p.detach().topk(min(self.options.candidates, log_p.shape[-1]), dim=-1).indices
                target = self._target(images, likely).to(log_p.dtype)
                loss = guidance_loss(log_p, log_p0, likely, target, self.options)
                gradients = torch.autograd.grad(loss, leaves)
            shifts = [moved(x.detach(), g, self.options) for x, g in zip(leaves, gradients, strict=True)]
        return self.model.next_logits(last, [x + y for x, y in zip(cache, shifts, strict=True)])[0]

    def _target(self, images: Tensor, likely: Tensor) -> Tensor:
        """Return CLIP's probabilities (R, C) of the candidates."""
        with torch.no_grad():
            features = self.candidates.features(likely)  # (R, C, D)
            similarity = (features @ images.to(features)[:, :, None]).squeeze(-1)
            return F.softmax(similarity / self.options.temperature, dim=-1)

    def _chosen(self, images: Tensor, beams: Beams) -> list[str]:
        """Return of each picture's texts the one nearest to it; the prefix is not counted."""
        texts = [beams.texts(search, self.model.decode) for search in range(len(images))]
        if not self.options.guided:
            return [found[0].strip() for found in texts]
        flat = [text for found in texts for text in found]
        features = self.candidates.texts(flat).unflatten(0, (len(images), -1))  # (N, K, D)
        nearest = (features @ images.to(features)[:, :, None]).squeeze(-1).argmax(dim=1)
        return [found[k].strip() for found, k in zip(texts, nearest.tolist(), strict=True)]
