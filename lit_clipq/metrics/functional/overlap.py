"""BLEU and ROUGE-L as the official COCO caption scorer has them."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_clipq.metrics.functional.cider import LONGEST, NGRAM, count_ngrams

_TINY, _SMALL = 1e-15, 1e-9  # the scorer's own guards against division by zero; they show where nothing matches
_BETA = 1.2


def corpus_bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 over a whole corpus (Papineni et al. 2002), with the closest reference length.

    BLEU-n = min(1, exp(1 - r / c)) (p_1 ... p_n)^(1/n), where p_k is the share of the captions' k-grams that a
    reference of the same image has (each counted as often as in the reference that has it most), c the number of tokens
    of all captions, and r that of the references nearest in length, the shorter one of two.

    Args:
        captions: captions as tokens joined by spaces, see `ptb_tokens`.
        references: for each at least one reference, likewise.

    Returns:
        Four fractions.

    Example:
        >>> [round(value, 3) for value in corpus_bleu(["a cat on a mat"], [["a cat is on a mat", "one cat"]])]
        [0.819, 0.709, 0.516, 0.0]
    """
    matched, possible = [0] * LONGEST, [0] * LONGEST
    length = reference_length = 0
    for caption, texts in zip(captions, references, strict=True):
        tokens = caption.split()
        most: Counter[NGRAM] = Counter()
        for text in texts:
            most |= count_ngrams(text.split())
        for ngram, count in count_ngrams(tokens).items():
            matched[len(ngram) - 1] += min(count, most[ngram])
        for n in range(LONGEST):
            possible[n] += max(0, len(tokens) - n)
        lengths = (len(text.split()) for text in texts)
        length += len(tokens)
        reference_length += min(lengths, key=lambda size: (abs(size - len(tokens)), size))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(LONGEST):
        product *= (matched[n] + _TINY) / (possible[n] + _SMALL)
        scores.append(penalty * product ** (1 / (n + 1)))
    return scores


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    """ROUGE-L of each caption (Lin 2004): the F-measure of its longest common subsequence with the references.

    With P and R the highest share of the caption, and of a reference, that such a subsequence covers (each the maximum
    over references by itself), F = (1 + b^2) P R / (R + b^2 P), b = 1.2.

    Args:
        captions: captions as tokens joined by spaces, see `ptb_tokens`.
        references: for each at least one reference, likewise.

    Returns:
        float64 (N,), fractions.

    Example:
        >>> rouge_l(["a cat"], [["a big cat"]]).tolist()
        [0.7721518987341772]
    """
    scores = []
    for caption, texts in zip(captions, references, strict=True):
        tokens = caption.split(" ")
        options = [text.split(" ") for text in texts]
        common = [longest_common_subsequence(tokens, other) if caption else 0 for other in options]
        precision = max(common) / len(tokens)
        recall = max(size / len(other) for size, other in zip(common, options, strict=True))
        both = precision * recall
        scores.append((1 + _BETA**2) * both / (recall + _BETA**2 * precision) if both else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest sequence that both contain in this order, not necessarily without gaps.

    Example:
        >>> longest_common_subsequence("a b c d".split(), "b x d".split())
        2
    """
    row = [0] * (len(second) + 1)  # row[j]: of the tokens so far and the first j of `second`
    for token in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            above = row[j]
            row[j] = diagonal + 1 if token == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
