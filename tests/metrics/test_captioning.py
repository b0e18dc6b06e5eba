"""CIDEr, BLEU and ROUGE-L: the official scorer's values, what reaches the states, and what is refused."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.text import bleu_score

from lit_clipq.errors import DataError
from lit_clipq.metrics import CIDEr, paired_bootstrap
from lit_clipq.metrics.functional import cider_d, corpus_bleu, match_captions, read_captions, rouge_l, write_captions
from lit_clipq.metrics.functional.overlap import longest_common_subsequence
from tests.ddp.processes import run_processes

GOLDEN = json.loads((Path(__file__).parent / "golden/captions.json").read_text(encoding="utf-8"))
REFERENCES = [["a cat on a mat", "one cat"], ["a dog runs"], ["the red boat"]]
CAPTIONS = ["a cat", "a dog runs fast", "the boat"]


def metric_of(records, ids=None):
    metric = CIDEr()
    for start in range(0, len(records), 3):
        batch = records[start : start + 3]
        numbers = None if ids is None else torch.tensor(ids[start : start + 3])
        metric.update([r.get("caption", r.get("prediction")) for r in batch], [r["references"] for r in batch], numbers)
    return metric


def test_golden_cases_have_the_official_values():
    records = GOLDEN["records"]
    ids = [record["image_id"] for record in records]
    metric = metric_of(records, ids)
    bleu = {f"bleu{n}": value for n, value in enumerate(GOLDEN["bleu"], start=1)}
    expected = {"cider": GOLDEN["cider"], "rouge_l": GOLDEN["rouge_l"], **bleu}
    assert metric.compute() == pytest.approx(expected, abs=1e-12)
    assert next(iter(metric.compute())) == "cider"
    evaluation = metric.evaluation()
    by_id = sorted(records, key=lambda record: record["image_id"])
    for name in ("cider", "rouge_l"):
        scores = evaluation.scores[name]
        assert scores.clusters.tolist() == sorted(ids)
        assert scores.values.tolist() == pytest.approx([record[name] for record in by_id], abs=1e-12)
    assert evaluation.counts == {"images": 8, "references": sum(len(record["references"]) for record in records)}


@pytest.mark.parametrize(
    ("name", "cider"), [("coco_karpathy_magic", 0.492887), ("coco_karpathy_zerocap_first100", 0.337614)]
)
def test_official_scores_of_published_captions(real_data, name, cider):
    content = json.loads(gzip.decompress((real_data / f"captions/{name}.json.gz").read_bytes()))
    metric = metric_of(content["records"])
    result = metric.compute()
    official = content["official"]
    assert result["cider"] == pytest.approx(cider, abs=1e-6)
    assert result["cider"] == pytest.approx(official["CIDEr"], abs=1e-12)
    assert [result[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx(official["Bleu"], abs=1e-12)
    assert result["rouge_l"] == pytest.approx(official["ROUGE_L"], abs=1e-12)
    each = metric.evaluation().scores["cider"].values.tolist()
    assert each == pytest.approx(content["official_cider_per_image"], abs=1e-6)  # stated with six digits


def test_bleu_agrees_with_torchmetrics_where_every_length_has_a_match():
    rng = random.Random(3)  # noqa: S311 - test data
    captions = [" ".join(rng.choices("abcd", k=rng.randint(4, 9))) for _ in range(40)]
    references = [[" ".join(rng.choices("abcd", k=rng.randint(4, 9))) for _ in range(5)] for _ in range(40)]
    ours = corpus_bleu(captions, references)
    shortest_first = [sorted(texts, key=lambda text: len(text.split())) for texts in references]  # of two as near
    for n in (1, 2, 3, 4):
        assert ours[n - 1] == pytest.approx(bleu_score(captions, shortest_first, n_gram=n).item(), abs=1e-6)


@pytest.mark.parametrize(("caption", "scores"), [("", (0, 0)), ("zebra", (0, 0)), ("a cat", (None, 1))])
def test_captions_without_tokens_or_matches_score_zero(caption, scores):
    cider, rouge = cider_d([caption, "a dog"], [["a cat"], ["a dog"]]), rouge_l([caption], [["a cat"]])
    assert rouge[0] == scores[1]
    assert cider[0] == scores[0] or scores[0] is None
    assert torch.isfinite(torch.tensor(corpus_bleu([caption], [["a cat"]]))).all()


def test_longest_common_subsequence_is_symmetric():
    assert longest_common_subsequence("abcbdab", "bdcaba") == longest_common_subsequence("bdcaba", "abcbdab") == 4


def test_cider_of_one_picture_alone_is_zero():
    assert cider_d(["a cat"], [["a cat"]]).tolist() == [0.0]


def test_scores_can_exceed_one_and_the_bootstrap_takes_them():
    values = cider_d(["a cat sits here", "the dog runs away"], [["a cat sits here"], ["the dog runs away"]])
    assert values.tolist() == pytest.approx([10.0, 10.0])
    interval = paired_bootstrap(values, torch.zeros(2, dtype=torch.float64), torch.arange(2))
    assert tuple(interval) == pytest.approx((-10.0, -10.0, -10.0))


def test_texts_survive_the_states():
    odd = ["caf\u00e9 \U0001f600 \u6771\u4eac", "line\nbreak\ttab", "lone \ud800 surrogate"]
    metric = CIDEr()
    metric.update(odd, [[text, text + " x"] for text in odd], torch.tensor([4, 2, 9]))
    assert metric._distinct() == {k: (odd[i], odd[i], odd[i] + " x") for i, k in ((1, 2), (0, 4), (2, 9))}


def test_captions_without_ids_are_pictures_of_their_own():
    metric = CIDEr()
    for _ in range(2):
        metric.update(CAPTIONS, REFERENCES)
    assert metric.evaluation().counts["images"] == 6
    named = CIDEr()
    named.update(CAPTIONS * 2, REFERENCES * 2, torch.arange(6))
    assert metric.compute() == named.compute()


def count_unnamed(rank):
    metric = CIDEr()
    if rank == 1:
        metric.update(CAPTIONS, REFERENCES)
    metric.update(CAPTIONS[:1], REFERENCES[:1])
    return metric.evaluation().counts["images"], metric.compute()["cider"]


@pytest.mark.slow
def test_captions_without_ids_are_counted_over_processes():
    one = CIDEr()
    one.update([CAPTIONS[0], *CAPTIONS, CAPTIONS[0]], [REFERENCES[0], *REFERENCES, REFERENCES[0]])
    assert run_processes(count_unnamed) == [(5, one.compute()["cider"])] * 2


def test_ids_with_some_captions_only_are_refused():
    metric = CIDEr()
    metric.update(CAPTIONS, REFERENCES, torch.arange(3))
    metric.update(CAPTIONS[:1], REFERENCES[:1])
    with pytest.raises(DataError, match=r"3 captions with ids of 4"):
        metric.compute()


@pytest.mark.parametrize("what", ["caption", "references"])
def test_one_id_with_different_texts_is_refused(what):
    metric = CIDEr()
    metric.update(CAPTIONS, REFERENCES, torch.tensor([3, 70, 5]))
    caption = "another" if what == "caption" else CAPTIONS[1]
    metric.update([caption], [["else"] if what == "references" else REFERENCES[1]], torch.tensor([70]))
    with pytest.raises(DataError, match="picture 70 came twice with different texts"):
        metric.compute()


@pytest.mark.parametrize("text", ["", " \n", None, 7])
@pytest.mark.parametrize("where", ["caption", "reference"])
def test_empty_and_non_string_texts_are_named(text, where):
    captions, references = list(CAPTIONS), [list(texts) for texts in REFERENCES]
    if where == "caption":
        captions[1] = text
    else:
        references[1][0] = text
    with pytest.raises(DataError, match=f"expected a {where} with some text for picture 70, got "):
        CIDEr().update(captions, references, torch.tensor([3, 70, 5]))
    with pytest.raises(DataError, match="picture number 1 of the batch"):
        CIDEr().update(captions, references)


def test_a_picture_without_references_is_named():
    with pytest.raises(DataError, match="picture 70 has none"):
        CIDEr().update(CAPTIONS, [REFERENCES[0], [], REFERENCES[2]], torch.tensor([3, 70, 5]))


@pytest.mark.parametrize(
    ("captions", "references", "ids"),
    [(CAPTIONS[:2], REFERENCES, 3), (CAPTIONS, REFERENCES[:2], 3), (CAPTIONS, REFERENCES, 2)],
)
def test_numbers_that_do_not_match_are_refused(captions, references, ids):
    with pytest.raises(DataError, match=f"{len(captions)} captions, {len(references)} lists and {ids} ids"):
        CIDEr().update(captions, references, torch.arange(ids))


def test_a_string_in_place_of_a_list_is_refused():
    for captions, references in (("a cat", REFERENCES), (CAPTIONS, CAPTIONS)):
        with pytest.raises(ValueError, match="list of lists of references"):
            CIDEr().update(captions, references)
    with pytest.raises(ValueError, match="int64 ids"):
        CIDEr().update(CAPTIONS, REFERENCES, torch.zeros(3))


def test_captions_go_to_a_file_in_results_format_and_back(tmp_path):
    captions = {70: 'a "cat"\n& <dog>', 3: "\u00e9t\u00e9"}
    path = tmp_path / "run" / "captions.json"
    write_captions(path, captions)
    write_captions(path, captions)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert rows == [{"image_id": 3, "caption": "\u00e9t\u00e9"}, {"image_id": 70, "caption": 'a "cat"\n& <dog>'}]
    assert read_captions(path) == captions
    assert [child.name for child in path.parent.iterdir()] == ["captions.json"]
    write_captions(path, {})
    assert read_captions(path) == {}


def test_a_results_file_can_be_scored_with_pycocotools(tmp_path):
    from pycocotools.coco import COCO

    annotations = [{"id": 1, "image_id": 3, "caption": "a cat"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"id": 3}], "annotations": annotations}))
    write_captions(tmp_path / "captions.json", {3: "one cat"})
    results = COCO(str(tmp_path / "a.json")).loadRes(str(tmp_path / "captions.json"))
    assert [row["caption"] for row in results.imgToAnns[3]] == ["one cat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not valid JSON"),
        ('{"image_id": 1}', "not in COCO results format"),
        ('[{"image_id": 1}]', "not in COCO results format"),
        ('[{"image_id": "1", "caption": "a"}]', "image_id '1'; expected an integer"),
        ('[{"image_id": true, "caption": "a"}]', "image_id True; expected an integer"),
        ('[{"image_id": 1, "caption": ""}]', "'' for picture 1"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "a"}]', "captions picture 1 twice"),
    ],
)
def test_results_files_that_cannot_be_used_are_named(tmp_path, content, message):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(DataError, match=rf"captions\.json .*{message}"):
        read_captions(tmp_path / "captions.json")


def test_an_absent_results_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"captions\.json cannot be read"):
        read_captions(tmp_path / "captions.json")


def test_ids_that_do_not_match_the_references_are_named():
    with pytest.raises(DataError, match=r"2 of them have none .the first is 3. and 1 captions .*.the first is 8."):
        match_captions({8: "a", 1: "b"}, {1: ["x"], 3: ["y"], 4: ["z"]})
