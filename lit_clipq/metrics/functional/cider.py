"""CIDEr-D: agreement of captions with references, weighted by how informative their n-grams are."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NGRAM = tuple[str, ...]
LONGEST = 4
SIGMA = 6.0


class _Caption(NamedTuple):
    """A caption as vectors of tf-idf, one for each length of n-gram."""

    weights: tuple[dict[NGRAM, float], ...]
    norms: tuple[float, ...]
    bigrams: int


def count_ngrams(tokens: Sequence[str], longest: int = LONGEST) -> Counter[NGRAM]:
    """Count the n-grams of 1 to `longest` tokens.

    Example:
        >>> count_ngrams(["a", "a", "cat"], 2)[("a",)]
        2
    """
    return Counter(tuple(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    r"""CIDEr-D of each caption (Vedantam et al. 2015, arXiv 1411.5726, section 7), as the official COCO scorer has it.

    With counts h_k(x) of an n-gram k, N images, and d_k the number of images whose references contain k, the weights
    are g_k(x) = h_k(x) (log N - log max(1, d_k)), and

        CIDEr-D_n(c, r) = exp(-(l_c - l_r)^2 / (2 * 6^2)) sum_k min(g_k(c), g_k(r)) g_k(r) / (|g(c)| |g(r)|)

    with l the number of bigrams. The score is 10 times its mean over the references, then over n = 1 .. 4: 0 and more,
    10 at most; papers print it times 100.

    The weights come from the evaluated images, so the scores of an image depend on which others are evaluated, and the
    same captions score lower on fewer images: say N with every result. With one image all weights are zero.

    Args:
        captions: N captions as tokens joined by spaces, see `ptb_tokens`.
        references: for each at least one reference, likewise.

    Returns:
        float64 (N,).

    Example:
        >>> cider_d(["a cat sits", "the dog runs"], [["a cat sits"], ["the dog runs"]]).tolist()
        [7.5, 7.5]
    """
    counted = [[count_ngrams(text.split()) for text in texts] for texts in references]
    images_with = Counter(ngram for counts in counted for ngram in set().union(*counts))
    log_images = math.log(len(captions)) if captions else 0.0
    idf = {ngram: log_images - math.log(images) for ngram, images in images_with.items()}
    scores = []
    for caption, counts in zip(captions, counted, strict=True):
        candidate = _weigh(count_ngrams(caption.split()), idf, log_images)
        total = sum(_similarity(candidate, _weigh(reference, idf, log_images)) for reference in counts)
        scores.append(10.0 * total / len(counts))
    return torch.tensor(scores, dtype=torch.float64)


def _weigh(counts: Counter[NGRAM], idf: dict[NGRAM, float], unseen: float) -> _Caption:
    weights: tuple[dict[NGRAM, float], ...] = tuple({} for _ in range(LONGEST))
    bigrams = 0
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen)
        bigrams += count if len(ngram) == 2 else 0
    norms = tuple(math.sqrt(sum(value * value for value in vector.values())) for vector in weights)
    return _Caption(weights, norms, bigrams)


def _similarity(candidate: _Caption, reference: _Caption) -> float:
    """Mean of CIDEr-D_n / 10 over n."""
    penalty = math.exp(-((candidate.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for n in range(LONGEST):
        other = reference.weights[n]
        product = sum(
            min(value, other[ngram]) * other[ngram] for ngram, value in candidate.weights[n].items() if ngram in other
        )
        if product:
            total += product / (candidate.norms[n] * reference.norms[n])
    return penalty * total / LONGEST
