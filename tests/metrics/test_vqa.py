"""VQA accuracy: the official scorer's output, golden cases from its rules, and what is refused."""

import gzip
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_clipq.errors import DataError
from lit_clipq.metrics import VQAAccuracy
from lit_clipq.metrics.functional import AnswerVocabulary, count_matches, process_answer, vqa_scores
from lit_clipq.metrics.functional.vqa import CONTRACTIONS
from tests.metrics import oracles

SETS = ("consensus", "first_annotator_raw", "always_yes", "mangled", "random_annotator")


def accuracy(preds, target, answer_type=None, ids=None, image_ids=None):
    metric = VQAAccuracy()
    metric.update(preds, target, answer_type, ids, image_ids)
    return metric


@pytest.mark.parametrize("name", SETS)
def test_equals_the_official_scorer(real_data, name):
    content = json.loads(gzip.decompress((real_data / "vqa/official_half_a.json.gz").read_bytes()))
    annotations = {row["question_id"]: row for row in content["annotations"]}
    official = content["results"][name]
    rows = official["predictions"]
    assert len(rows) == 1481
    metric = VQAAccuracy()
    for start in range(0, len(rows), 100):
        batch = rows[start : start + 100]
        truth = [annotations[row["question_id"]] for row in batch]
        metric.update(
            [row["answer"] for row in batch],
            [[said["answer"] for said in row["answers"]] for row in truth],
            [row["answer_type"] for row in truth],
            torch.tensor([row["question_id"] for row in batch]),
            torch.tensor([row["image_id"] for row in truth]),
        )
    percent = {key: 100 * value for key, value in metric.compute().items()}
    expected = {
        f"vqa_accuracy_{key.replace('/', '_')}": value for key, value in official["per_answer_type"].items()
    } | {"vqa_accuracy": official["overall"]}
    assert percent == pytest.approx(expected, abs=1e-6)
    scores = metric.evaluation().scores["vqa_accuracy"]
    by_id = dict(zip(sorted(annotations), (100 * scores.values).tolist(), strict=True))
    assert by_id == pytest.approx({int(key): value for key, value in official["per_question"].items()}, abs=1e-6)
    assert scores.clusters.tolist() == [annotations[key]["image_id"] for key in sorted(annotations)]


# Worked out by hand from the rules.
GOLDEN = {
    "the": "",
    "A Cat": "cat",
    "an  apple\tpie": "apple pie",
    "none": "0",
    "Ten": "10",
    "twenty one": "twenty 1",
    "t-shirt": "t shirt",  # no space beside the hyphen: it becomes one
    "t- shirt": "t shirt",
    "black - white-ish": "black whiteish",  # a space beside one hyphen: all hyphens disappear
    "red,white": "red white",
    "red, white,blue": "red whiteblue",
    "1,000": "1000",
    "1,000-2,000": "10002000",  # a comma between digits: every mark disappears
    "a/b/c": "b c",
    "what?!": "what",
    "50%": "50%",
    "it's: me": "it's: me",  # neither colon nor apostrophe is in the list
    "4.5": "4.5",
    "4.5.": "4.5",
    "3.": "3",
    ".5": ".5",
    "p.m.": "pm",
    "a.b": "ab",
    "." * 40: "." * 8,  # no more than 32 points are removed
    "dont": "don't",
    "don't": "don't",
    "shouldntve": "shouldntve",
    "shouldnt've": "shouldn't've",
    "Id've": "id've",
    "somebody'd": "somebodyd",
    "lets": "lets",
    "ows'at": "ows'at",
    "'ows'at": "'ow's'at",
    "y'alld've": "y'all'd've",
    "": "",
}


@pytest.mark.parametrize("text", GOLDEN)
def test_answers_are_processed_as_the_rules_say(text):
    assert process_answer(text) == GOLDEN[text]


@given(st.text(" ,.-/?'1a0ThEonx\n", max_size=24))
def test_processing_agrees_with_the_rules_character_by_character(text):
    assert process_answer(text) == oracles.processed_answer(text)


@given(st.text(" ,.;:'1290aT-", max_size=24))
def test_no_comma_is_left_for_mcan_to_delete(text):
    assert "," not in process_answer(text)


def test_contractions_lack_one_apostrophe():
    odd = {spelled for spelled, meant in CONTRACTIONS.items() if spelled.count("'") != meant.count("'") - 1}
    assert odd == {"somebody'd"}
    assert all(re.sub("'", "", spelled) == re.sub("'", "", meant) for spelled, meant in CONTRACTIONS.items())
    assert len(CONTRACTIONS) == 114


@pytest.mark.parametrize(
    ("prediction", "answers", "matches"),
    [
        ("cat", ["cat"] * 10, 10),
        (" cat\n", ["cat"] * 9 + ["\tcat"], 10),  # the ends do not make them disagree
        ("A cat", ["cat"] * 10, 0),  # all agree: nothing is processed
        ("Cat", ["cat"] * 10, 0),
        ("two.", ["two."] * 10, 10),
        ("2", ["two"] * 10, 0),
        ("A cat.", ["cat"] * 9 + ["dog"], 9),  # one disagrees: everything is
        ("2", ["two"] * 5 + ["2"] * 5, 10),
        ("nothing", ["yes"] * 9 + ["no"], 0),
        ("", ["the"] * 3 + ["a dog"] * 7, 3),
    ],
)
def test_answers_are_processed_only_where_annotators_disagree(prediction, answers, matches):
    assert count_matches(prediction, answers) == matches


@pytest.mark.parametrize("annotators", [2, 3, 10, 12])
def test_score_is_the_mean_over_annotators_left_out(annotators):
    matches = torch.arange(annotators + 1)
    scores = vqa_scores(matches, torch.full_like(matches, annotators))
    looped = [oracles.leave_one_out("yes", ["yes"] * m + ["no"] * (annotators - m)) for m in matches.tolist()]
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx(looped, abs=1e-15)


def test_ten_answers_give_the_published_steps():
    assert vqa_scores(torch.arange(11), torch.full((11,), 10)).tolist() == [0.0, 0.3, 0.6, 0.9] + [1.0] * 7


@pytest.mark.parametrize("answers", [[], ["yes"], "yes"])
def test_a_question_needs_two_annotators(answers):
    with pytest.raises(DataError, match="at least 2 annotators"):
        accuracy(["yes"], [answers])


@pytest.mark.parametrize(
    "arguments",
    [
        {"preds": ["yes"], "target": []},
        {"preds": [], "target": [["yes"] * 10]},
        {"preds": "y", "target": [["yes"] * 10]},
        {"preds": ["yes"], "target": [["yes"] * 10], "answer_type": []},
        {"preds": ["yes"], "target": [["yes"] * 10], "answer_type": ["yes/no"] * 2},
        {"preds": ["yes"], "target": [["yes"] * 10], "ids": torch.arange(2)},
        {"preds": ["yes"], "target": [["yes"] * 10], "ids": torch.zeros(1)},
        {"preds": ["yes"], "target": [["yes"] * 10], "ids": torch.tensor([-1])},
        {"preds": ["yes"], "target": [["yes"] * 10], "image_ids": torch.arange(1)},
    ],
)
def test_what_does_not_belong_together_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        VQAAccuracy().update(**arguments)


def test_answer_types_name_their_scores():
    target = [["yes"] * 10] * 4
    metric = accuracy(["yes", "no", "yes", "no"], target, ["zebra crossing?", "other", "yes/no", "other"])
    result = metric.compute()
    assert list(result) == ["vqa_accuracy", "vqa_accuracy_yes_no", "vqa_accuracy_other", "vqa_accuracy_zebra_crossing_"]
    assert list(result.values()) == [0.5, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["", "x" * 33])
def test_answer_types_without_a_name_or_with_a_long_one_are_refused(name):
    with pytest.raises(DataError, match="answer types of 1 to 32 characters"):
        accuracy(["yes"], [["yes"] * 10], [name])


def test_without_ids_every_sample_counts():
    metric = accuracy(["yes", "no"], [["yes"] * 10] * 2)
    metric.update(["yes", "no"], [["yes"] * 10] * 2)
    assert metric.compute() == {"vqa_accuracy": 0.5}
    assert metric.evaluation().counts == {"questions": 4}
    assert metric.evaluation().scores["vqa_accuracy"].clusters.tolist() == [0, 1, 2, 3]
    assert metric.evaluation().scores["vqa_accuracy"].values.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_ids_for_some_questions_only_are_refused():
    metric = accuracy(["yes"], [["yes"] * 10], ids=torch.tensor([3]))
    metric.update(["yes"], [["yes"] * 10])
    with pytest.raises(DataError, match="1 of 2 have none"):
        metric.compute()


@pytest.mark.parametrize(
    "other",
    [
        {"preds": ["no"]},
        {"answer_type": ["other"]},
        {"image_ids": torch.tensor([9])},
    ],
    ids=lambda other: next(iter(other)),
)
def test_one_id_for_two_samples_is_refused(other):
    sample = {
        "preds": ["yes"],
        "target": [["yes"] * 10],
        "answer_type": ["yes/no"],
        "ids": torch.tensor([5]),
        "image_ids": torch.tensor([4]),
    }
    metric = accuracy(**sample)
    metric.update(**{**sample, **other})
    with pytest.raises(DataError, match=r"1 repeated ids have another score.*example id 5"):
        metric.compute()


def test_the_metric_keeps_numbers_only():
    metric = accuracy(["yes"] * 3, [["yes"] * 10] * 3, ["yes/no"] * 3, torch.arange(3))
    states = {name: torch.cat(getattr(metric, name)) for name in metric._defaults}
    assert sum(state.element_size() * state.numel() for state in states.values()) == 3 * 64


# The vocabulary


def test_words_are_ordered_by_frequency_then_alphabet():
    common = ["dog"] * 3 + ["A dog."] + ["cat"] * 4 + ["two"] * 3 + ["2"] * 3 + ["ant"] * 2
    vocabulary = AnswerVocabulary.from_common_answers(common, min_count=3)
    assert vocabulary.words == ("2", "cat", "dog")
    assert vocabulary.counts == (6, 4, 4)
    assert (vocabulary.questions, len(vocabulary)) == (16, 3)


def test_the_papers_rule_is_more_than_eight():
    vocabulary = AnswerVocabulary.from_common_answers(["eight"] * 8 + ["nine"] * 9)
    assert vocabulary.words == ("9",)


@pytest.mark.parametrize("votes", range(11))
def test_soft_targets_are_those_of_the_paper(votes):
    vocabulary = AnswerVocabulary(("no", "yes"), (2, 1), 3)
    target = vocabulary.encode(["Yes!"] * votes + ["maybe"] * (10 - votes))
    assert target.dtype == torch.float32
    assert target.tolist() == pytest.approx([0.0, [0, 0.3, 0.6, 0.9, 1][min(votes, 4)]], abs=1e-7)


def test_batches_and_sparse_targets_are_the_single_ones():
    vocabulary = AnswerVocabulary(("a", "b", "c"), (3, 2, 1), 6)
    asked = [["b"] * 3 + ["x"] * 7, ["x"] * 10, ["a b", "c", "c", "b"], ["b", "c"]]
    single = torch.stack([vocabulary.encode(said) for said in asked])
    assert torch.equal(vocabulary.encode_batch(asked), single)
    sparse = vocabulary.sparse(asked)
    rows = torch.tensor([3, 0, 1, 3])
    assert torch.equal(sparse.dense(rows, 3), single[rows])
    assert (sparse.offsets.diff() == (single > 0).sum(1)).all()


def test_what_the_vocabulary_does_not_reach_is_counted():
    vocabulary = AnswerVocabulary(("yes", "no"), (2, 1), 3)
    reached = vocabulary.coverage([["yes"] * 9 + ["maybe"], ["maybe"] * 10, ["Yes."] * 10])
    assert reached == (3, 1, 30, 11)


def test_a_saved_vocabulary_is_the_same(tmp_path):
    vocabulary = AnswerVocabulary.from_common_answers(["café", "café", "", ""], min_count=2)
    vocabulary.save(tmp_path / "answers.json")
    assert AnswerVocabulary.load(tmp_path / "answers.json") == vocabulary


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"format": 2, "questions": 1, "words": ["a"], "counts": [1]}',
        '{"format": 1, "questions": 1, "words": [1], "counts": [1]}',
        '{"format": 1, "questions": 1, "words": ["a"], "counts": ["x"]}',
    ],
)
def test_what_is_no_vocabulary_is_named(tmp_path, content):
    path = tmp_path / "answers.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"expected an answer vocabulary in .*answers\.json"):
        AnswerVocabulary.load(path)


@pytest.mark.parametrize(("words", "counts"), [((), ()), (("a", "a"), (1, 1)), (("a",), (1, 2))])
def test_a_vocabulary_that_is_empty_or_ambiguous_is_refused(words, counts):
    with pytest.raises(DataError, match="at least one answer, each once"):
        AnswerVocabulary(words, counts, 3)
