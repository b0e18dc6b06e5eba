"""ZeroCap as published: one picture at a time, everything computed anew in every step.

It is the oracle of the fast engine, and what the benchmark compares with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clipq.zerocap.candidate_texts import CandidateTexts
from lit_clipq.zerocap.options import ZeroCapOptions
from lit_clipq.zerocap.steps import CaptionModel


class PlainZeroCap:
    """Captions for pictures, one after the other.

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
        return [self._caption(image) for image in images]

    def _caption(self, image: Tensor) -> str:
        options, end_id = self.options, self.model.end_id
        contexts = torch.tensor([self.model.start], device=self.model.device)  # (K, T)
        scores = lengths = stopped = torch.empty(0)
        for step in range(options.max_tokens):
            log_p = self._next(image, contexts, step)  # (K, V)
            if step == 0:
                scores, chosen = log_p[0].topk(options.beams)
                source = torch.zeros_like(chosen)
                lengths = torch.ones_like(scores)
                stopped = torch.zeros_like(chosen, dtype=torch.bool)
            else:
                log_p[stopped] = float("-inf")
                log_p[stopped, 0] = 0.0
                total = scores[:, None] + log_p
                lengths[~stopped] += 1
                average, place = (total / lengths[:, None]).reshape(-1).topk(options.beams)
                source, chosen = place // log_p.shape[1], place % log_p.shape[1]
                lengths, stopped = lengths[source], stopped[source]
                scores = average * lengths
            contexts = torch.cat([contexts[source], chosen[:, None]], dim=1)
            stopped = stopped | (chosen == end_id)
            if bool(stopped.all()):
                break
        order = (scores / lengths).argsort(descending=True).tolist()
        generated = contexts[:, len(self.model.start) :].tolist()
        texts = [self.model.decode(generated[k][: int(lengths[k])]) for k in order]
        if not options.guided:
            return texts[0].strip()
        features = self.candidates.texts(texts)
        return texts[int((features @ image.to(features)).argmax())].strip()

    def _next(self, image: Tensor, contexts: Tensor, step: int) -> Tensor:
        """Return log-probabilities (K, V) of the next token of each context."""
        model, options = self.model, self.options
        logits, _ = model.next_logits(contexts)
        log_p0 = F.log_softmax(logits, dim=-1)
        if options.guided and options.iterations and contexts.shape[1] > 1:
            _, cache = model.next_logits(contexts[:, :-1])
            self.candidates.begin([tuple(context[1:]) for context in contexts.tolist()])
            cache = self._shift(image, contexts[:, -1:], cache, log_p0)
            logits, _ = model.next_logits(contexts[:, -1:], cache)
        logits = logits.clone()
        for row in logits:
            _multiply(row, [model.end_id], options.end_factor if step else 1 / options.first_end_factor)
            _multiply(row, model.forbidden.tolist(), 1 / options.forbidden_factor)
        p = logits.softmax(-1) ** options.fusion * log_p0.exp() ** (1 - options.fusion)
        return (p / p.sum(-1, keepdim=True)).log()

    def _shift(self, image: Tensor, last: Tensor, cache: list[Tensor], log_p0: Tensor) -> list[Tensor]:
        """Return the cache moved towards the picture."""
        options = self.options
        deltas = [torch.zeros_like(x) for x in cache]
        for _ in range(options.iterations):
            with torch.enable_grad():
                leaves = [delta.detach().requires_grad_() for delta in deltas]
                logits, _ = self.model.next_logits(last, [x + y for x, y in zip(cache, leaves, strict=True)])
                log_p = F.log_softmax(logits, dim=-1)
                top = log_p.detach().topk(min(options.candidates, log_p.shape[1]), dim=-1).indices
                similarity = self.candidates.features(top) @ image.to(next(iter(cache)).dtype)
                target = (similarity / options.temperature).softmax(-1).to(log_p.dtype)
                loss = torch.zeros((), dtype=log_p.dtype, device=log_p.device)
                for beam in range(len(last)):
                    loss = loss - options.clip_scale * (target[beam] * log_p[beam, top[beam]]).sum()
                    divergence = log_p[beam].exp() * (log_p[beam] - log_p0[beam])
                    loss = loss + options.ce_scale * divergence.sum()
                loss.backward()
            for delta, leaf in zip(deltas, leaves, strict=True):
                gradient = leaf.grad
                assert gradient is not None  # noqa: S101 - every cache tensor is read
                for beam in range(len(last)):
                    norm = gradient[beam].norm() + 1e-15
                    delta[beam] -= options.step_size * gradient[beam] / norm**options.gradient_power
        return [x + y for x, y in zip(cache, deltas, strict=True)]


def _multiply(row: Tensor, tokens: list[int], factor: float) -> None:
    """Favour tokens in place: positive logits times the factor, others divided by it."""
    row[tokens] = torch.where(row[tokens] > 0, row[tokens] * factor, row[tokens] / factor)
