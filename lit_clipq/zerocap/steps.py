"""What both engines of ZeroCap compute in a step: the language model's next token, guidance, and the search."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clipq.errors import ModelError
from lit_clipq.zerocap.language import LoadedLanguageModel
from lit_clipq.zerocap.options import ZeroCapOptions, forbidden_tokens
from lit_clipq.zerocap.prefix_cache import filled_up

Cache = list[Tensor]
"""Keys and values of a text: those of the first layer, then of the second, and so on; each (R, H, T, d)."""


class CaptionModel:
    """A language model and what its captions are made of.

    Args:
        loaded: The language model.
        options: How captions are generated.

    Raises:
        ModelError: For an end token that is not one token of the language model, or captions longer than its context.
    """

    def __init__(self, loaded: LoadedLanguageModel, options: ZeroCapOptions) -> None:
        self.model: Any = loaded.model
        self.tokenizer = loaded.tokenizer
        # transformers 5.24 renamed `past_key_values`
        self._cache_name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        ends = loaded.tokenizer(options.end_token, add_special_tokens=False).input_ids
        if len(ends) != 1:
            raise ModelError(
                f"the end token {options.end_token!r} is {len(ends)} tokens of language model {loaded.name!r}; give a "
                "single token (--model.options.end_token)"
            )
        self.end_id: int = ends[0]
        prefix = loaded.tokenizer(options.prefix, add_special_tokens=False).input_ids if options.prefix else []
        self.start = [loaded.start_id, *prefix]
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and len(self.start) + options.max_tokens > longest:
            raise ModelError(
                f"the language model {loaded.name!r} reads {longest} tokens, but prefix and caption may have "
                f"{len(self.start) + options.max_tokens}; lower --model.max_tokens"
            )
        config: Any = self.model.config
        self.vocabulary: int = config.vocab_size
        if options.beams > self.vocabulary:
            raise ModelError(
                f"{options.beams} beams cannot begin with different tokens of the {self.vocabulary} that the language "
                f"model {loaded.name!r} has; lower --model.beams"
            )
        forbidden = forbidden_tokens(options, loaded.tokenizer, self.end_id)
        self.forbidden = torch.tensor(forbidden, dtype=torch.int64, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return next(self.model.parameters()).device

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def next_logits(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Run tokens behind a cache.

        Small batches are filled up (`prefix_cache.MIN_ROWS`), so that a text's result does not depend on its batch.

        Args:
            tokens: int64 (R, T).
            cache: Keys and values in front of them, or None.

        Returns:
            Logits (R, V) of the token that follows, and keys and values with those of `tokens` added.
        """
        from transformers import DynamicCache

        rows = len(tokens)
        pairs = None
        if cache is not None and cache[0].shape[2]:
            filled = [filled_up(x) for x in cache]
            pairs = list(zip(filled[::2], filled[1::2], strict=True))
        past: Any = DynamicCache(pairs)
        logits = self.model(input_ids=filled_up(tokens), use_cache=True, **{self._cache_name: past}).logits
        kept = [x[:rows] for layer in past.layers for x in (layer.keys, layer.values)]
        return logits[:rows, -1], kept


def guidance_loss(log_p: Tensor, log_p0: Tensor, candidates: Tensor, target: Tensor, options: ZeroCapOptions) -> Tensor:
    """Return what the shifted cache minimises, summed over texts (arXiv 2111.14447, equations 4 and 5).

    sum over texts of clip_scale CE(target, p) + ce_scale KL(p || p0).

    Args:
        log_p: Log-probabilities (R, V) with the shifted cache.
        log_p0: Those with the cache as it was.
        candidates: int64 (R, C), the tokens that CLIP scored.
        target: Their probabilities (R, C) by CLIP.
        options: The weights.
    """
    clip = -(target * log_p.gather(1, candidates)).sum()
    fluency = (log_p.exp() * (log_p - log_p0)).sum()
    return options.clip_scale * clip + options.ce_scale * fluency


def moved(delta: Tensor, gradient: Tensor, options: ZeroCapOptions) -> Tensor:
    """Take one step: delta - step_size g / ||g||^gradient_power, with the norm of each text's own gradient.

    Args:
        delta: Shift so far (R, H, T, d).
        gradient: The same shape.
        options: Size and power.
    """
    norm = gradient.flatten(1).norm(dim=1) + 1e-15
    scale = options.step_size / norm.pow(options.gradient_power)
    return delta - scale[:, None, None, None] * gradient


def next_log_probabilities(
    logits: Tensor, log_p0: Tensor, step: int, end_id: int, forbidden: Tensor, options: ZeroCapOptions
) -> Tensor:
    """Return log-probabilities (R, V) of the next token, end and forbidden tokens reweighted, mixed with the unguided.

    A logit is favoured by a factor if it is multiplied by it where positive and divided by it elsewhere.

    Args:
        logits: (R, V), with the shifted cache.
        log_p0: (R, V), unguided.
        step: 0 for the first token of the caption.
        end_id: The token that ends a caption.
        forbidden: int64 (n,).
        options: The factors.
    """
    weighed = logits.clone()
    end_factor = options.end_factor if step else 1 / options.first_end_factor
    weighed[:, end_id] = _favoured(logits[:, end_id], end_factor)
    weighed[:, forbidden] = _favoured(logits[:, forbidden], 1 / options.forbidden_factor)
    log_p = F.log_softmax(weighed, dim=-1)
    return F.log_softmax(options.fusion * log_p + (1 - options.fusion) * log_p0, dim=-1)


def _favoured(logits: Tensor, factor: float) -> Tensor:
    return torch.where(logits > 0, logits * factor, logits / factor)


@dataclass
class Beams:
    """The texts of N searches of K beams.

    Attributes:
        tokens: Generated tokens int64 (N, K, t); behind the end of a text they mean nothing.
        scores: Sum of log-probabilities (N, K).
        lengths: Tokens of each text up to its end, (N, K).
        stopped: Whether a text has ended, (N, K).
    """

    tokens: Tensor
    scores: Tensor
    lengths: Tensor
    stopped: Tensor

    @classmethod
    def begin(cls, log_p: Tensor, width: int, end_id: int) -> "Beams":
        """Take the best first tokens from log-probabilities (N, V)."""
        scores, tokens = log_p.topk(width, dim=-1)
        return cls(tokens[..., None], scores, torch.ones_like(tokens), tokens == end_id)

    def extend(self, log_p: Tensor, end_id: int) -> tuple["Beams", Tensor]:
        """Continue by one token; texts compete by log-probability averaged over their tokens.

        Args:
            log_p: (N, K, V); rows of stopped beams are not looked at.
            end_id: The token that ends a caption.

        Returns:
            The new beams, and the beam (N, K) each came from.
        """
        width, vocabulary = log_p.shape[1:]
        log_p = log_p.masked_fill(self.stopped[..., None], float("-inf"))
        log_p[..., 0].masked_fill_(self.stopped, 0.0)  # a stopped beam goes on as it is
        lengths = self.lengths + (~self.stopped).to(self.lengths.dtype)
        average = (self.scores[..., None] + log_p) / lengths[..., None]
        best, places = average.flatten(1).topk(width, dim=-1)
        source, token = places // vocabulary, places % vocabulary
        lengths, stopped = lengths.gather(1, source), self.stopped.gather(1, source)
        history = self.tokens.gather(1, source[..., None].expand_as(self.tokens))
        tokens = torch.cat([history, token[..., None]], dim=-1)
        return Beams(tokens, best * lengths, lengths, stopped | (token == end_id)), source

    def texts(self, search: int, decode: Callable[[Sequence[int]], str]) -> list[str]:
        """Return the texts of one search, those of the highest average first."""
        order = (self.scores[search] / self.lengths[search]).argsort(descending=True)
        rows = self.tokens[search].tolist()
        return [decode(rows[k][: int(self.lengths[search, k])]) for k in order.tolist()]
