"""Question and annotation files of VQA v2."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.captions import read_json, some
from lit_clipq.errors import DataError


@dataclass(frozen=True)
class Question:
    """A question about a picture, with the annotators' answers."""

    question_id: int
    """Unique in its split."""
    image_id: int
    """Picture; unique in its split."""
    text: str
    """The question, stripped."""
    answers: tuple[str, ...]
    """What each annotator said (ten in VQA v2), not processed."""
    answer_type: str
    """`yes/no`, `number` or `other`."""
    question_type: str
    """First words of the question, as VQA v2 groups them."""
    common_answer: str = ""
    """The most common answer, as the file states it (`multiple_choice_answer`)."""


def read_questions(questions: Path, annotations: Path, gaps: Counter[str] | None = None) -> list[Question]:
    """Read a question file and the annotation file that belongs to it.

    Args:
        questions: JSON with `questions` (question_id, image_id, question), bare, as .gz, or in a .zip.
        annotations: JSON with `annotations` (question_id, image_id, answers, answer_type, question_type,
            multiple_choice_answer), likewise.
        gaps: Where given, questions without text are left out and counted under `blank_questions`.

    Returns:
        Questions in the order of the question file.

    Raises:
        DataError: Malformed or truncated files, ids that are there twice, questions without annotations, annotations
            without a question, or the two naming different pictures; without `gaps` also a question without text.
    """
    asked = _rows(questions, "questions")
    answered = _by_id(annotations, _rows(annotations, "annotations"))
    ids = _by_id(questions, asked)
    _check_pairs(questions, annotations, ids, answered)
    try:
        found = [_question(row, answered[row["question_id"]]) for row in asked]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{questions} and {annotations} are not in VQA v2 format ({error!r} in `questions` or `annotations`)."
        ) from error
    kept = [question for question in found if question.text]
    blank = [question.question_id for question in found if not question.text]
    if gaps is not None:
        gaps["blank_questions"] += len(blank)
    elif blank:
        raise DataError(
            f"{questions} has {len(blank):,} questions without text (question_id {_some_ids(blank)}); correct them, or "
            "leave them out with --data.on_error skip."
        )
    if not kept:
        raise DataError(f"{questions} lists no questions; expected at least one.")
    return kept


def _question(asked: Mapping[str, Any], answered: Mapping[str, Any]) -> Question:
    # The same few words come back millions of times: each is kept once.
    answers = tuple(map(sys.intern, answered["answers"]))
    if len(answers) < 2:
        raise ValueError(f"question {asked['question_id']} has {len(answers)} answers, expected at least 2")
    return Question(
        int(asked["question_id"]),
        int(asked["image_id"]),
        asked["question"].strip(),
        answers,
        sys.intern(answered["answer_type"]),
        sys.intern(answered["question_type"]),
        sys.intern(answered["multiple_choice_answer"]),
    )


def _bare_answer(row: dict[str, Any]) -> Any:
    """Reduce what one annotator said to the text, which spares a few gigabytes on the whole of VQA v2."""
    return row["answer"] if "answer" in row and "question_id" not in row else row


def _rows(path: Path, name: str) -> list[dict[str, Any]]:
    content = read_json(path, _bare_answer)
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is not in VQA v2 format: expected a list of {name} under `{name}`.")
    return rows


def _by_id(path: Path, rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    try:
        found = {row["question_id"]: row for row in rows}
        if len(found) != len(rows):
            twice = [key for key, count in Counter(row["question_id"] for row in rows).items() if count > 1]
            raise DataError(f"{path} has {len(twice):,} question ids twice ({some(twice)}); ids must be unique.")
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not in VQA v2 format ({error!r}): every row needs its question_id.") from error
    return found


def _check_pairs(
    questions: Path, annotations: Path, asked: Mapping[int, Mapping], answered: Mapping[int, Mapping]
) -> None:
    for missing, file, what, other in (
        (asked.keys() - answered.keys(), questions, "questions without annotations", annotations),
        (answered.keys() - asked.keys(), annotations, "annotations without questions", questions),
    ):
        if missing:
            raise DataError(
                f"{file} has {len(missing):,} {what} in {other} (question_id {_some_ids(missing)}); expected the two "
                "files of one split, whole: fetch both again."
            )
    apart = [key for key, row in asked.items() if row.get("image_id") != answered[key].get("image_id")]
    if apart:
        raise DataError(
            f"{questions} and {annotations} name different pictures for {len(apart):,} questions "
            f"(question_id {_some_ids(apart)}); expected the two files of one split."
        )


def _some_ids(ids: Iterable[Any]) -> str:
    return some(sorted(ids, key=str))
