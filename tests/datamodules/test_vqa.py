"""Visual question answering: official files in every packing, pictures with their questions, what is refused."""

import gzip
import json
import logging
import re
import zipfile
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from datamodules import MiniVQA, VQAv2
from datamodules.sampler import ShuffledBatches
from datamodules.vqa_files import Question
from lit_clipq.errors import ConfigError, DataError
from lit_clipq.metrics.functional import AnswerVocabulary
from lit_clipq.mini import PRESETS, WORLD_HASHES, world_folder
from lit_clipq.mini.world import Preset, write_world
from lit_clipq.pictures import load_rgb
from tests.metrics import oracles

NAMES = {
    "train": ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"),
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
}
ARCHIVES = {
    "train": ("v2_Questions_Train_mscoco.zip", "v2_Annotations_Train_mscoco.zip"),
    "val": ("v2_Questions_Val_mscoco.zip", "v2_Annotations_Val_mscoco.zip"),
}
OTHER_ANSWER = {"multiple_choice_answer": "Two."}
FIRST_IMAGE = {"train": 9, "val": 400}
VOTES = ["cat"] * 4 + ["A dog."] * 3 + ["dog", "two", "bird"]  # of which dog, with 4 votes, ties with cat


def files_of(split, pictures):
    """Question and annotation rows: question file and picture order differ from id order."""
    asked, answered = [], []
    for k in (0, 1):
        for i in reversed(range(pictures)):
            image_id = FIRST_IMAGE[split] + i
            key = {"image_id": image_id, "question_id": image_id * 1000 + k}
            asked.append({**key, "question": f" {split} question {k} about {i}? "})
            votes = VOTES if k else ["yes"] * (10 - i % 3) + ["no"] * (i % 3)
            answers = [{"answer": vote, "answer_confidence": "yes", "answer_id": j + 1} for j, vote in enumerate(votes)]
            kind = {"answer_type": "other" if k else "yes/no", "question_type": "what" if k else "is the"}
            answered.append({**key, **kind, "multiple_choice_answer": "A cat" if k else "yes", "answers": answers})
    return asked, answered[::-1]


def path_of(root, split, image_id):
    return root / f"{split}2014" / f"COCO_{split}2014_{image_id:012}.jpg"


def pack(path, rows, packing, archive):
    data = json.dumps({"info": {}, path.stem.rpartition("_")[2]: rows}).encode()
    if packing == "json":
        path.write_bytes(data)
    elif packing == "json.gz":
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        target = path.with_name(archive if packing == "official" else path.name + ".zip")
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(path.name, data)
            file.writestr("__MACOSX/._" + path.name, b"")


@pytest.fixture
def vqa(tmp_path, draw):
    """Write a VQA v2 folder with two questions about each of `val` and `train` pictures."""

    def write(val=6, train=5, packing="json"):
        root = tmp_path / "vqa"
        root.mkdir(exist_ok=True)
        for split, count in (("train", train), ("val", val)):
            rows = files_of(split, count)
            for name, archive, part in zip(NAMES[split], ARCHIVES[split], rows, strict=True):
                pack(root / name, part, packing, archive)
            for i in range(count):
                draw(path_of(root, split, FIRST_IMAGE[split] + i), FIRST_IMAGE[split] + i)
        return root

    return write


def ready(preprocessing, root, stage=None, kind=VQAv2, **options):
    data = kind(str(root), **{"min_answer_count": 2, **options})
    data.preprocessing = preprocessing
    data.prepare_data()
    data.setup(stage)
    return data


def epoch(loader):
    batches = list(loader)
    whole = {
        key: torch.cat([batch[key] for batch in batches]) for key in batches[0] if torch.is_tensor(batches[0][key])
    }
    return whole | {key: [x for batch in batches for x in batch[key]] for key in ("answers", "answer_types")}


def edit(root, split, which, change):
    path = root / NAMES[split][which]
    content = json.loads(path.read_text())
    change(content["annotations" if which else "questions"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("packing", ["json", "json.gz", "json.zip", "official"])
def test_batches_hold_every_question_with_its_picture_and_target(vqa, preprocessing, packing):
    root = vqa(packing=packing)
    data = ready(preprocessing, root, batch_size=5)
    assert data.answers.words == ("cat", "yes")  # each the most common of eleven
    seen = epoch(data.val_dataloader())
    asked, answered = files_of("val", 6)
    asked = {row["question_id"]: row for row in asked}
    answered = {row["question_id"]: row for row in answered}
    assert sorted(seen["question_ids"].tolist()) == sorted(asked)
    for i, question_id in enumerate(seen["question_ids"].tolist()):
        row, truth = asked[question_id], answered[question_id]
        votes = [said["answer"] for said in truth["answers"]]
        assert seen["image_ids"][i] == row["image_id"]
        picture = preprocessing.image(load_rgb(path_of(root, "val", row["image_id"])))
        assert torch.equal(seen["images"][i], picture)
        assert torch.equal(seen["texts"][i], preprocessing.tokenizer([row["question"]])[0])
        assert seen["answers"][i] == votes
        assert seen["answer_types"][i] == truth["answer_type"]
        expected = [min(1.0, 0.3 * votes.count(word)) for word in ("cat", "yes")]
        assert seen["targets"][i].tolist() == pytest.approx(expected, abs=1e-7)
    dtypes = {key: value.dtype for key, value in seen.items() if torch.is_tensor(value)}
    assert dtypes == {
        "images": torch.float32,
        "texts": torch.int64,
        "targets": torch.float32,
        "question_ids": torch.int64,
        "image_ids": torch.int64,
    }


def test_setup_says_what_there_is(vqa, preprocessing, caplog):
    with caplog.at_level(logging.INFO):
        data = ready(preprocessing, vqa())
    assert data.sample_counts() == {
        "images": 6,
        "skipped": 0,
        "calibration_held_out": 0,
        "questions": 12,
        "vocabulary": 2,
        "questions_outside_vocabulary": 0,
        "answers_outside_vocabulary": 6 * 6 + 6,
    }
    assert "42 of 120 given answers are not among them" in caplog.text
    assert [len(data.pictures_of(split)) for split in ("train", "val")] == [5, 6]
    assert [len(data.train_questions), len(data.val_questions)] == [10, 12]
    assert data.train_questions[0] == Question(
        13000, 13, "train question 0 about 4?", ("yes",) * 9 + ("no",), "yes/no", "is the", "yes"
    )
    for split in ("train", "val"):
        ids = [FIRST_IMAGE[split] + i for i in reversed(range(5 if split == "train" else 6))]
        assert data.image_ids_of(split) == ids
        assert [picture.path for picture in data.pictures_of(split)] == [path_of(data.root, split, i) for i in ids]


def test_training_questions_are_read_for_training_only(vqa, preprocessing):
    data = ready(preprocessing, vqa(), stage="validate")
    assert data.train_questions == []
    with pytest.raises(ConfigError, match=r"got 0 questions.*setup\('fit'\)"):
        data.train_dataloader()
    evaluated = data.val_questions
    data.setup("fit")
    assert (len(data.train_questions), data.val_questions) == (10, evaluated)


def test_a_picture_is_decoded_once_for_all_its_questions_in_a_batch(vqa, preprocessing, monkeypatch):
    data = ready(preprocessing, vqa(), batch_size=12)
    opened = []
    monkeypatch.setattr("datamodules.vqa.load_rgb", lambda path: opened.append(path) or load_rgb(path))
    list(data.val_dataloader())
    assert len(opened) == len(set(opened)) == 6


def test_workers_load_the_same_batches(vqa, preprocessing):
    root = vqa()
    one, two = (epoch(ready(preprocessing, root, batch_size=4, num_workers=n).val_dataloader()) for n in (0, 2))
    assert all(torch.equal(one[key], two[key]) for key in one if torch.is_tensor(one[key]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_evaluation_and_training_batches(vqa, preprocessing, monkeypatch, world_size):
    root = vqa(val=7, train=9)
    whole = ready(preprocessing, root, batch_size=world_size * 2, train_batch_size=world_size * 2)
    evaluation = epoch(whole.val_dataloader())["question_ids"].tolist()
    training = [batch["question_ids"].tolist() for batch in whole.train_dataloader()]
    data = ready(preprocessing, root, batch_size=2, train_batch_size=world_size * 2)
    parts, shares = [], []
    for rank in range(world_size):
        for module in ("sampler", "vqa"):
            monkeypatch.setattr(f"datamodules.{module}.shard", lambda rank=rank: (rank, world_size))
        parts += epoch(data.val_dataloader())["question_ids"].tolist()
        shares.append([batch["question_ids"].tolist() for batch in data.train_dataloader()])
    assert sorted(parts) == sorted(evaluation)
    assert len(evaluation) == 14
    assert [sorted(sum(batch, [])) for batch in zip(*shares, strict=True)] == [sorted(batch) for batch in training]  # noqa: RUF017 short


def test_training_order_follows_seed_and_epoch():
    def order(seed, epoch):
        batches = ShuffledBatches(20, 3, seed)
        batches.set_epoch(epoch)
        rows = [row.tolist() for row in batches]
        assert len(rows) == len(batches) == 6
        return sum(rows, [])  # noqa: RUF017 short

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert all(len(set(order(seed, 0))) == 18 for seed in (0, 1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_unusable_pictures_are_named_or_skipped_with_their_questions(vqa, preprocessing, caplog, split):
    root = vqa()
    missing, broken = (path_of(root, split, FIRST_IMAGE[split] + i) for i in (1, 3))
    missing.unlink()
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{missing.name} is missing"):
        ready(preprocessing, root)
    data = ready(preprocessing, root, on_error="skip")
    questions = data.train_questions if split == "train" else data.val_questions
    gone = {FIRST_IMAGE[split] + 1, FIRST_IMAGE[split] + 3}
    expected = {row["question_id"] for row in files_of(split, 5 if split == "train" else 6)[0]}
    assert {q.question_id for q in questions} == {key for key in expected if key // 1000 not in gone}
    assert data.sample_counts()["skipped"] == (2 if split == "val" else 0)
    assert data.answers.counts == (11, 11)  # the vocabulary does not depend on pictures
    assert "2 missing or damaged" in caplog.text


def test_limits_take_the_first_pictures_with_all_their_questions(vqa, preprocessing):
    data = ready(preprocessing, vqa(), limit=2, train_limit=3)
    assert [q.question_id for q in data.val_questions] == [405000, 405001, 404000, 404001]
    assert data.image_ids_of("train") == [13, 12, 11]
    assert data.answers.counts == (11, 11)


# Calibration


def test_train_pictures_calibrate_with_their_own_questions(vqa, preprocessing):
    data = ready(preprocessing, vqa(), stage="validate")
    ((images, texts),) = data.calibration_dataloader(4, 4, 0)
    asked = {}
    for row in files_of("train", 5)[0]:
        asked.setdefault(row["image_id"], []).append(tuple(preprocessing.tokenizer([row["question"]])[0].tolist()))
    pictures = {i: preprocessing.image(load_rgb(path_of(data.root, "train", i))) for i in asked}
    for image, text in zip(images, texts, strict=True):
        (own,) = [i for i, picture in pictures.items() if torch.equal(picture, image)]
        assert tuple(text.tolist()) in asked[own]


def test_without_train_pictures_a_slice_leaves_the_evaluation_with_its_questions(vqa, preprocessing):
    root = vqa()
    for path in (root / "train2014").iterdir():
        path.unlink()
    data = ready(preprocessing, root, stage="validate", held_out_calibration=2)
    counts = data.sample_counts()
    assert (counts["images"], counts["questions"], counts["calibration_held_out"]) == (4, 8, 2)
    ((images, texts),) = data.calibration_dataloader(2, 2, 0)
    assert len(images) == len(texts) == 2
    assert not {picture.path for picture in data._pool} & {picture.path for picture in data.pictures}


# The vocabulary


@pytest.mark.parametrize(("least", "words"), [(1, ("cat", "yes", "2")), (2, ("cat", "yes")), (11, ("cat",))])
def test_the_threshold_is_an_option(vqa, preprocessing, least, words):
    root = vqa()
    edit(root, "train", 1, lambda rows: next(r for r in rows if r["answer_type"] == "yes/no").update(OTHER_ANSWER))
    assert ready(preprocessing, root, min_answer_count=least).answers.words == words


def test_a_saved_vocabulary_needs_no_training_files(vqa, preprocessing, tmp_path):
    root = vqa()
    for name in NAMES["train"]:
        (root / name).unlink()
    with pytest.raises(DataError, match=r"v2_OpenEnded_mscoco_train2014_questions\.json.*v2_Questions_Train"):
        ready(preprocessing, root, stage="validate")
    AnswerVocabulary(("no", "yes", "dog"), (3, 2, 1), 6).save(tmp_path / "answers.json")
    options = {"vocabulary": str(tmp_path / "answers.json"), "held_out_calibration": 2}
    data = ready(preprocessing, root, stage="validate", **options)
    assert data.answers.words == ("no", "yes", "dog")
    with pytest.raises(DataError, match="None of 0 pictures"):
        data.setup("fit")


def test_the_fingerprint_follows_questions_answers_and_vocabulary(vqa, preprocessing, tmp_path):
    root = vqa()
    first = ready(preprocessing, root, stage="validate").fingerprint()
    assert ready(preprocessing, root, batch_size=3, num_workers=1, seed=4).fingerprint() == first
    prints = {"limit": ready(preprocessing, root, limit=3).fingerprint()}
    AnswerVocabulary(("no", "yes"), (3, 2), 6).save(tmp_path / "answers.json")
    prints["vocabulary"] = ready(preprocessing, root, vocabulary=str(tmp_path / "answers.json")).fingerprint()
    edit(root, "val", 1, lambda rows: rows[3]["answers"][2].update(answer="perhaps"))
    prints["answer"] = ready(preprocessing, root).fingerprint()
    edit(root, "val", 1, lambda rows: rows[3].update(answer_type="number"))
    prints["type"] = ready(preprocessing, root).fingerprint()
    assert len({first, *prints.values()}) == 5


# What is refused


def drop(rows):
    del rows[2:4]


def twice(rows):
    rows.append(rows[0])


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, drop, r"annotations\.json has 2 annotations without questions in .*question_id 40[0-9]{4}, 40[0-9]{4}\)"),
        (1, drop, r"questions\.json has 2 questions without annotations in .*question_id 40[0-9]{4}, 40[0-9]{4}\)"),
        (0, twice, r"questions\.json has 1 question ids twice \(405000\)"),
        (1, twice, r"annotations\.json has 1 question ids twice"),
        (0, lambda rows: rows[0].update(image_id=7), r"different pictures for 1 questions \(question_id 405000\)"),
        (0, lambda rows: rows[0].pop("question"), r"not in VQA v2 format \(KeyError\('question'\)"),
        (0, lambda rows: rows[0].pop("question_id"), "every row needs its question_id"),
        (1, lambda rows: rows[0].update(answers=[]), "has 0 answers, expected at least 2"),
        (1, lambda rows: rows[0]["answers"][0].update(answer=3), "not in VQA v2 format"),
        (1, lambda rows: rows[0].pop("answer_type"), "not in VQA v2 format"),
        (1, lambda rows: rows.insert(0, "x"), "expected a list of annotations"),
    ],
    ids=[
        "annotations-alone",
        "questions-alone",
        "question-twice",
        "annotation-twice",
        "other-picture",
        "no-text",
        "no-id",
        "no-answers",
        "number-for-answer",
        "no-type",
        "no-row",
    ],
)
def test_files_that_do_not_fit_are_named(vqa, preprocessing, which, change, message):
    root = vqa()
    edit(root, "val", which, change)
    with pytest.raises(DataError, match=message):
        ready(preprocessing, root)


def test_files_without_questions_are_named(vqa, preprocessing):
    root = vqa()
    for which in (0, 1):
        edit(root, "val", which, lambda rows: rows.clear())
    with pytest.raises(DataError, match="lists no questions"):
        ready(preprocessing, root)


@pytest.mark.parametrize("packing", ["json", "json.gz", "json.zip"])
def test_truncated_files_are_named(vqa, preprocessing, packing):
    root = vqa(packing=packing)
    path = root / (NAMES["val"][1] + packing.removeprefix("json"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=re.escape(path.name) + ".*may be truncated"):
        ready(preprocessing, root)


def test_an_archive_with_several_json_files_is_refused(vqa, preprocessing):
    root = vqa(packing="official")
    path = root / ARCHIVES["val"][0]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.json", "{}")
    with pytest.raises(DataError, match=f"{re.escape(path.name)} holds 2 JSON files"):
        ready(preprocessing, root)


def fitting():
    return SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), lightning_module=None)


def test_absent_data_says_what_is_expected_where(tmp_path):
    data = VQAv2(str(tmp_path))
    with pytest.raises(DataError) as caught:
        data.prepare_data()
    told = str(caught.value)
    urls = [f"s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/{name}" for names in ARCHIVES.values() for name in names]
    expected = [*NAMES["train"], *NAMES["val"], *urls, f"{tmp_path}/val2014/", "--data.download true"]
    assert [text for text in expected if text not in told] == []
    assert "train2014/" not in told
    data.trainer = fitting()
    with pytest.raises(DataError, match="train2014/"):
        data.prepare_data()


def test_only_what_is_absent_is_fetched(vqa, tmp_path):
    data = VQAv2(str(vqa(packing="json.gz")))
    assert [archive.name for archive in data.archives()] == ["val2014.zip"]
    data.trainer = fitting()
    assert [archive.name for archive in data.archives()] == ["train2014.zip", "val2014.zip"]
    nothing = VQAv2(str(tmp_path / "empty"), images_root=str(tmp_path / "coco"))
    assert [archive.name for archive in nothing.archives()] == [*ARCHIVES["train"], *ARCHIVES["val"]]


@pytest.mark.parametrize("option", ["min_answer_count", "train_limit"])
def test_options_out_of_range_are_refused_by_name(option):
    with pytest.raises(ConfigError, match=f"--data.{option} must be at least 1, got 0"):
        VQAv2("data", **{option: 0})


def test_the_vocabulary_is_there_after_setup_only():
    with pytest.raises(ConfigError, match="setup"):
        VQAv2("data").answers  # noqa: B018 raises


# Real files


def rows_of(real_data, split):
    files = (real_data / "vqa" / f"{name}.gz" for name in NAMES[split])
    questions, annotations = (json.loads(gzip.decompress(file.read_bytes())) for file in files)
    return questions["questions"], annotations["annotations"]


@pytest.mark.slow
def test_the_official_files_load_and_the_vocabulary_follows_the_papers_rule(real_data):
    data = VQAv2(str(real_data / "vqa"))
    vocabulary = data.count_answers()
    counted = Counter()
    for split, expected in (("train", 48_061), ("val", 8_977)):
        asked, answered = rows_of(real_data, split)
        questions = data.read_split(split)
        assert len(questions) == len(asked) == expected
        truth = {row["question_id"]: row for row in answered}
        for question, row in zip(questions, asked, strict=True):
            said = truth[row["question_id"]]
            assert (question.question_id, question.image_id) == (row["question_id"], row["image_id"])
            assert question.text == row["question"].strip()
            assert question.answers == tuple(answer["answer"] for answer in said["answers"])
            assert (question.answer_type, question.question_type) == (said["answer_type"], said["question_type"])
        counted.update(oracles.processed_answer(row["multiple_choice_answer"]) for row in answered)
    frequent = {word: count for word, count in counted.items() if count > 8}
    assert dict(zip(vocabulary.words, vocabulary.counts, strict=True)) == frequent
    assert len(vocabulary) == 411
    assert list(vocabulary.words) == sorted(frequent, key=lambda word: (-frequent[word], word))


@pytest.mark.slow
def test_the_real_questions_are_asked_where_pictures_exist(real_data, preprocessing, tmp_path):
    photographs = {int(path.stem): path for path in (real_data / "coco/train2017").iterdir()}
    expected = {}
    for split in ("train", "val"):
        (tmp_path / f"{split}2014").mkdir()
        asked, _ = rows_of(real_data, split)
        expected[split] = {row["question_id"] for row in asked if row["image_id"] in photographs}
        for image_id in {row["image_id"] for row in asked} & photographs.keys():
            path_of(tmp_path, split, image_id).symlink_to(photographs[image_id])
    assert len(expected["train"]) == 31
    assert len(expected["val"]) == 7
    options = {"images_root": str(tmp_path), "on_error": "skip", "min_answer_count": 9}
    data = ready(preprocessing, real_data / "vqa", **options)
    assert {question.question_id for question in data.train_questions} == expected["train"]
    assert set(epoch(data.val_dataloader())["question_ids"].tolist()) == expected["val"]
    images, texts = next(iter(data.calibration_dataloader(8, 8, 0)))
    assert len(images) == len(texts) == 8


# The mini world


@pytest.mark.slow
def test_the_mini_world_is_evaluated_without_the_world_of_training(preprocessing):
    data = MiniVQA()
    data.preprocessing = preprocessing
    data.prepare_data()
    data.setup("validate")
    counts = data.sample_counts()
    assert (counts["images"], counts["questions"], counts["calibration_held_out"]) == (500, 1500, 0)
    assert not world_folder(None, "train").exists()
    assert data.answers.questions == 3 * (6000 + 2500)
    assert len(data.answers) == counts["vocabulary"] == 55
    assert MiniVQA(preset="full").count_answers() == data.answers
    assert all(len(question.answers) == 10 for question in data.val_questions)
    batch = next(iter(data.val_dataloader()))
    assert set(batch["answer_types"]) == {"yes/no", "number", "other"}
    images, texts = next(iter(data.calibration_dataloader(16, 16, 0)))
    assert len(images) == len(texts) == 16
    assert all(picture.path.name.startswith("calibration_") for picture in data._pool)


def test_training_on_the_mini_world_writes_its_world(preprocessing, monkeypatch, tmp_path):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setitem(PRESETS, "train", Preset({"train": 12, "dev": 2}, {"train": 6}, {}))
    monkeypatch.setitem(WORLD_HASHES, "train", write_world(tmp_path / "scratch", "train"))
    monkeypatch.setitem(PRESETS, "small", Preset({"val": 4, "calibration": 3}, {"val": 4, "calibration": 3}, {}))
    (tmp_path / "scratch2").mkdir()
    monkeypatch.setitem(WORLD_HASHES, "small", write_world(tmp_path / "scratch2", "small"))
    data = MiniVQA(str(tmp_path / "root"), batch_size=4, train_batch_size=4, workers=1)
    data.preprocessing, data.trainer = preprocessing, fitting()
    data.prepare_data()
    assert world_folder(tmp_path / "root", "train").is_dir()
    data.setup("fit")
    assert (len(data.train_questions), len(data.pictures_of("train"))) == (18, 6)
    assert [len(batch["question_ids"]) for batch in data.train_dataloader()] == [4] * 4


def test_mini_without_workers_is_refused():
    with pytest.raises(ConfigError, match="workers"):
        MiniVQA(workers=0)
