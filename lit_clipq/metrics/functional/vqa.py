r"""VQA accuracy: the official answer processing with its quirks, and the score of one question.

The reference is the scorer of GT-Vision-Lab/VQA at commit a013f00 (Antol et al., VQA, arXiv:1505.00468; Goyal et al.,
Making the V in VQA Matter, arXiv:1612.00837). What looks odd below is part of the score:

- a mark of punctuation disappears where the text has it beside a space, or has a comma between digits anywhere, and
  becomes a space everywhere else;
- the expression that was meant to spare the point of a number looks ahead for the literal "<=" and a digit: it
  removes each point that no digit follows, and only the first 32 of them, because a flag is passed as the count;
- contractions with capital letters are in its list but never found, because the text is lower case by then;
- all of it is applied only where the annotators do not agree to the letter.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_clipq.errors import DataError

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

TARGETS = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Soft target of an answer by its votes; more votes count like the last."""

_FORMAT = 1
_CACHED_ANSWERS = 2**18  # VQA v2 has about 200,000 distinct answers
_POINTS_REMOVED = int(re.UNICODE)  # passed where the count of substitutions belongs
_POINT = re.compile(r"\.(?!\d)")
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
# Each is found with one apostrophe missing, whichever it is.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 a table of words
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in the list
"""Spelling in an answer -> spelling that is compared."""


def strip_answer(answer: str) -> str:
    r"""Turn newlines and tabs into spaces and strip the ends.

    Example:
        >>> strip_answer(" a\tb\n")
        'a b'
    """
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(_CACHED_ANSWERS)
def process_answer(answer: str) -> str:
    """Apply the official punctuation, digit word, article and contraction rules, in this order.

    This is also how MCAN (arXiv:1906.10770) processes the answers of its vocabulary; it deletes commas afterwards, of
    which the rules leave none.

    Args:
        answer: Any text.

    Returns:
        Lower-case words, one space between them; empty where nothing is left.

    Example:
        >>> [process_answer(text) for text in ("The two dogs!", "dont know.", "1,000", "t-shirt", "red,white", "4.5")]
        ['2 dogs', "don't know", '1000', 't shirt', 'red white', '4.5']
    """
    # A comma between digits makes all marks disappear, wherever they are.
    number = _NUMBER_WITH_COMMA.search(answer) is not None
    text = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if number or beside_space else " ")
    text = _POINT.sub("", text, count=_POINTS_REMOVED)
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def count_matches(prediction: str, answers: Sequence[str]) -> int:
    """Count the annotators whose answer equals the prediction, both processed where the annotators disagree.

    Args:
        prediction: Answer of a model.
        answers: Answers of at least two annotators.

    Returns:
        Number of equal answers, 0 to `len(answers)`.

    Raises:
        DataError: Fewer than two answers: with one, no annotator is left to compare with.

    Example:
        >>> count_matches("The red one", ["red", "red 1", "red 1."]), count_matches("A cat", ["cat"] * 3)
        (2, 0)
    """
    if isinstance(answers, str) or len(answers) < 2:
        raise DataError(
            f"expected the answers of at least 2 annotators to a question (VQA v2 has 10), got {answers!r}; "
            "leave questions without answers out of the evaluation."
        )
    said, expected = strip_answer(prediction), [strip_answer(answer) for answer in answers]
    if len(set(expected)) > 1:
        said, expected = process_answer(said), [process_answer(answer) for answer in expected]
    return expected.count(said)


def vqa_scores(matches: Tensor, annotators: Tensor) -> Tensor:
    r"""Score of each question, the mean over annotators left out.

    Leaving out one of n annotators, the prediction scores min(1, m' / 3), where m' of the others gave its answer: m - 1
    for each of the m annotators that did, m for each of the n - m that did not. So the score is
    (m min(3, m - 1) + (n - m) min(3, m)) / (3 n); with n = 10 it is 0, .3, .6, .9, 1 for m = 0, 1, 2, 3, 4 and more.

    Args:
        matches: int64 (q,), m of each question.
        annotators: int64 (q,), n of each question, at least 2.

    Returns:
        float64 (q,) on the CPU, fractions, each the exact quotient rounded once.

    Example:
        >>> vqa_scores(torch.arange(5), torch.full((5,), 10)).tolist()
        [0.0, 0.3, 0.6, 0.9, 1.0]
    """
    m, n = matches.cpu(), annotators.cpu()
    thirds = m * (m - 1).clamp(min=0, max=3) + (n - m) * m.clamp(max=3)
    return thirds.double() / (3 * n).double()


class SparseTargets(NamedTuple):
    """Soft targets of several questions; those of question i are at `offsets[i]` to `offsets[i + 1]`."""

    offsets: Tensor
    """int64 (q + 1,)."""
    indices: Tensor
    """int64 (k,): positions in the vocabulary, each once for a question."""
    values: Tensor
    """float32 (k,): the targets there; everywhere else they are 0."""

    def dense(self, rows: Tensor, size: int) -> Tensor:
        """Return the targets of some questions, float32 (len(rows), size).

        Args:
            rows: int64 (b,), which questions.
            size: Number of answers in the vocabulary.
        """
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        row = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        places = torch.repeat_interleave(starts, lengths) + torch.arange(len(row)) - first
        dense = torch.zeros(len(rows), size)
        dense[row, self.indices[places]] = self.values[places]
        return dense


class AnswerCoverage(NamedTuple):
    """How far a vocabulary reaches."""

    questions: int
    """Questions looked at."""
    questions_outside: int
    """Those with no answer in the vocabulary: their soft target is all zeros."""
    answers: int
    """Answers of all annotators."""
    answers_outside: int
    """Those that are not in the vocabulary."""


@dataclass(frozen=True)
class AnswerVocabulary:
    """The answers a classifier chooses from: what VQA heads since Teney et al. (arXiv:1708.02711) and MCAN do.

    Example:
        >>> vocabulary = AnswerVocabulary.from_common_answers(["yes", "Yes.", "no", "2", "two", "yes"], min_count=2)
        >>> vocabulary.words, vocabulary.counts
        (('yes', '2'), (3, 2))
        >>> vocabulary.encode(["yes", "YES", "no", "two"]).tolist()
        [0.6000000238418579, 0.30000001192092896]
    """

    words: tuple[str, ...]
    """Processed answers by index: the most frequent first, equally frequent ones in alphabetical order."""
    counts: tuple[int, ...]
    """For how many questions each is the most common answer."""
    questions: int
    """Number of questions that were counted."""

    def __post_init__(self) -> None:
        if not self.words or len(self.words) != len(self.counts) or len(set(self.words)) != len(self.words):
            raise DataError(
                f"expected a vocabulary of at least one answer, each once and with its count, got {len(self.words)} "
                f"answers, {len(set(self.words))} of them distinct, and {len(self.counts)} counts; count it again, "
                "with a smaller least frequency (min_answer_count) where there are few questions."
            )

    @classmethod
    def from_common_answers(cls, answers: Iterable[str], min_count: int = 9) -> "AnswerVocabulary":
        """Count the most common answer of each question, as processed by `process_answer`.

        Args:
            answers: The most common answer of every question (`multiple_choice_answer`).
            min_count: Keep answers that are the most common one of at least this many questions. MCAN keeps those of
                more than 8, which are 3,129 over train and val of VQA v2.

        Raises:
            DataError: No answer is that frequent.
        """
        counted = Counter(map(process_answer, answers))
        kept = sorted((-count, word) for word, count in counted.items() if count >= min_count)
        return cls(tuple(word for _, word in kept), tuple(-count for count, _ in kept), counted.total())

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def index(self) -> dict[str, int]:
        """Processed answer -> index."""
        return {word: index for index, word in enumerate(self.words)}

    def sparse(self, answers: Iterable[Sequence[str]]) -> SparseTargets:
        """Return the soft targets of many questions: 0, .3, .6, .9, 1 for 0, 1, 2, 3, 4 and more votes for an answer.

        Args:
            answers: The annotators' answers to each question.
        """
        offsets, indices, values = [0], array("q"), array("f")
        for said in answers:
            for word, votes in Counter(map(process_answer, said)).items():
                if word in self.index:
                    indices.append(self.index[word])
                    values.append(TARGETS[min(votes, len(TARGETS) - 1)])
            offsets.append(len(indices))
        return SparseTargets(
            torch.tensor(offsets), torch.tensor(indices, dtype=torch.int64), torch.tensor(values, dtype=torch.float32)
        )

    def encode(self, answers: Sequence[str]) -> Tensor:
        """Return the soft target of one question, float32 (V,); see `sparse`."""
        return self.encode_batch([answers])[0]

    def encode_batch(self, answers: Sequence[Sequence[str]]) -> Tensor:
        """Return the soft targets of several questions, float32 (B, V); see `sparse`."""
        return self.sparse(answers).dense(torch.arange(len(answers)), len(self))

    def coverage(self, answers: Iterable[Sequence[str]]) -> AnswerCoverage:
        """Count the questions and answers that the vocabulary does not reach.

        Args:
            answers: The annotators' answers to each question.
        """
        questions = nowhere = total = outside = 0
        for said in answers:
            missing = sum(process_answer(answer) not in self.index for answer in said)
            questions, nowhere = questions + 1, nowhere + (missing == len(said))
            total, outside = total + len(said), outside + missing
        return AnswerCoverage(questions, nowhere, total, outside)

    def save(self, path: Path | str) -> None:
        """Write the vocabulary as JSON."""
        content = {"format": _FORMAT, "questions": self.questions, "words": self.words, "counts": self.counts}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> "AnswerVocabulary":
        """Read what `save` wrote.

        Raises:
            DataError: The file cannot be read or holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT or not all(isinstance(word, str) for word in content["words"]):
                raise ValueError(f"format {content['format']!r}")
            return cls(tuple(content["words"]), tuple(map(int, content["counts"])), int(content["questions"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"expected an answer vocabulary in {path}, as AnswerVocabulary.save writes it, but it cannot be read "
                f"({error!r}); write it again."
            ) from error
