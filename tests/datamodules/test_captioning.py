import json

import pytest
import torch

from datamodules import CocoCaptioning, Flickr8kCaptioning, Flickr30kCaptioning, MiniCaptioning, MiniCaptionText
from datamodules.captioning import TokenDataset
from lit_clipq.errors import ConfigError, DataError
from lit_clipq.metrics import CIDEr
from lit_clipq.mini.world import picture_captions


def ready(data, preprocessing):
    data.preprocessing = preprocessing
    data.prepare_data()
    data.setup("validate")
    return data


def epoch(data):
    batches = list(data.val_dataloader())
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in ("images", "image_ids")}
    return {**joined, **{key: [x for batch in batches for x in batch[key]] for key in ("references", "file_names")}}


def test_every_picture_comes_once_with_its_id_and_all_references(coco, preprocessing):
    root = coco(val=20, train=3)
    seen = epoch(ready(CocoCaptioning(str(root), preset="val2017", batch_size=7), preprocessing))
    content = json.loads((root / "annotations/captions_val2017.json").read_text())
    expected = {image["id"]: [] for image in content["images"]}
    for rows in content["annotations"]:
        expected[rows["image_id"]].append(rows["caption"].strip())
    assert seen["image_ids"].tolist() == [image["id"] for image in content["images"]]
    assert dict(zip(seen["image_ids"].tolist(), seen["references"], strict=True)) == expected
    assert seen["file_names"] == [str(root / "val2017" / image["file_name"]) for image in content["images"]]
    assert seen["images"].shape == (20, 3, 8, 8)
    assert seen["image_ids"].dtype == torch.int64


def test_karpathy_test_gives_cocoids_and_limit_takes_the_first(karpathy, preprocessing):
    file = karpathy / "dataset_coco.json"
    content = json.loads(file.read_text())
    for row in content["images"]:
        row["cocoid"] += 391_000
    file.write_text(json.dumps(content))
    data = ready(CocoCaptioning(str(karpathy), limit=4, batch_size=3), preprocessing)
    seen = epoch(data)
    assert seen["image_ids"].tolist() == [391_000, 391_001, 391_002, 391_003]
    assert [len(texts) for texts in seen["references"]] == [7, 5, 5, 5]
    counts = data.sample_counts()
    assert (counts["images"], counts["captions"], counts["calibration_held_out"]) == (4, 22, 0)


def test_one_id_for_two_pictures_is_an_error(karpathy, preprocessing):
    file = karpathy / "dataset_coco.json"
    content = json.loads(file.read_text())
    content["images"][1]["cocoid"] = content["images"][0]["cocoid"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"gives 1 ids to more than one picture .0"):
        ready(CocoCaptioning(str(karpathy)), preprocessing)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_pictures(coco, preprocessing, monkeypatch, world_size):
    data = ready(CocoCaptioning(str(coco(val=11, train=4)), preset="val2017", batch_size=4), preprocessing)
    whole = epoch(data)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr("datamodules.sampler.shard", lambda rank=rank: (rank, world_size))
        part = epoch(data)
        parts += zip(part["image_ids"].tolist(), part["references"], strict=True)
    assert sorted(parts) == sorted(zip(whole["image_ids"].tolist(), whole["references"], strict=True))


def test_calibration_pairs_pictures_with_captions_that_are_not_evaluated(coco, preprocessing):
    data = ready(CocoCaptioning(str(coco(val=6, train=5)), preset="val2017"), preprocessing)
    images, texts = next(iter(data.calibration_dataloader(4, 4, 0)))
    known = [f"train2017 picture {i}" + " very" * k for i in range(5) for k in range(6)] + ["shared text"]
    assert images.shape[0] == texts.shape[0] == 4
    assert {tuple(row.tolist()) for row in texts} <= {tuple(row.tolist()) for row in preprocessing.tokenizer(known)}


def test_a_missing_picture_is_named_or_left_out_with_its_references(coco, preprocessing):
    root = coco(val=6, train=1)
    (root / "val2017/val2017_002.jpg").unlink()
    with pytest.raises(DataError, match=r"val2017_002\.jpg is missing"):
        ready(CocoCaptioning(str(root), preset="val2017"), preprocessing)
    data = ready(CocoCaptioning(str(root), preset="val2017", on_error="skip"), preprocessing)
    assert epoch(data)["image_ids"].tolist() == [100, 101, 103, 104, 105]
    assert data.sample_counts()["skipped"] == 1


def test_workers_load_the_same_batches(coco, preprocessing):
    root = str(coco(val=9, train=1))
    one, two = (
        epoch(ready(CocoCaptioning(root, preset="val2017", batch_size=4, num_workers=n), preprocessing)) for n in (0, 2)
    )
    assert torch.equal(one.pop("images"), two.pop("images"))
    assert torch.equal(one.pop("image_ids"), two.pop("image_ids"))
    assert one == two


def test_flickr30k_without_ids_counts_its_pictures(tmp_path, preprocessing, draw):
    rows = []
    for i in range(5):
        draw(tmp_path / "images" / f"{i}.jpg", i)
        sentences = [{"raw": f"picture {i} caption {k}"} for k in range(5)]
        rows.append({"filename": f"{i}.jpg", "split": "test" if i > 2 else "train", "sentences": sentences})
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": rows}))
    seen = epoch(ready(Flickr30kCaptioning(str(tmp_path)), preprocessing))
    assert seen["image_ids"].tolist() == [0, 1]
    assert seen["references"][1] == [f"picture 4 caption {k}" for k in range(5)]


def test_flickr8k_evaluates_all_but_a_slice(real_data, preprocessing):
    data = ready(Flickr8kCaptioning(str(real_data / "flickr8k"), limit=60), preprocessing)
    counts = data.sample_counts()
    assert (counts["images"], counts["captions"], counts["calibration_held_out"]) == (54, 270, 6)


def test_the_mini_world_gives_five_references_and_can_be_scored(preprocessing):
    data = ready(MiniCaptioning(limit=24, batch_size=10), preprocessing)
    metric = CIDEr()
    for batch in data.val_dataloader():
        metric.update([texts[0] for texts in batch["references"]], batch["references"], batch["image_ids"])
    assert metric.evaluation().scores["cider"].clusters.tolist() == list(range(1, 25))
    assert metric.evaluation().counts == {"images": 24, "references": 120}
    assert metric.compute()["bleu4"] == pytest.approx(1, abs=1e-9)
    assert metric.compute()["cider"] > 2


class WordTokenizer:
    """Words are numbered as they come; 0 begins, 1 ends, 2 fills."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self):
        self.words = {}

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[self.words.setdefault(word, len(self.words) + 3) for word in t.split()] for t in texts]}


@pytest.fixture
def text_data():
    data = MiniCaptionText(batch_size=8, seed=5, limit=20)
    data.tokenizer = WordTokenizer()
    data.setup("fit")
    return data


def decode(data, batch):
    names = {number: word for word, number in data.tokenizer.words.items()}
    texts = []
    for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        assert set(ids[length:]) <= {2}
        assert (ids[0], ids[length - 1]) == (0, 1)
        texts.append(" ".join(names[i] for i in ids[1 : length - 1]))
    return texts


def test_an_epoch_has_one_caption_of_each_picture_and_the_next_epoch_another(text_data):
    loader = text_data.train_dataloader()
    expected = [[text + "." for text in picture_captions("train", i)] for i in range(20)]
    owner = {text: i for i, five in enumerate(expected) for text in five}
    seen = []
    for number in range(5):
        loader.sampler.set_epoch(number)
        batches = list(loader)
        assert [len(batch["input_ids"]) for batch in batches] == [8, 8]
        assert all(batch["input_ids"].dtype == torch.int64 for batch in batches)
        texts = [text for batch in batches for text in decode(text_data, batch)]
        assert len({owner[text] for text in texts}) == 16
        seen += texts
    assert len(set(seen)) > 60


def test_the_dev_split_is_validated_whole(text_data):
    texts = [text for batch in text_data.val_dataloader() for text in decode(text_data, batch)]
    assert texts == [text + "." for i in range(500) for text in picture_captions("dev", i)]


def test_ranks_share_training_and_validation_texts(text_data, monkeypatch):
    whole_train = [row for batch in text_data.train_dataloader() for row in decode(text_data, batch)]
    whole_dev = [row for batch in text_data.val_dataloader() for row in decode(text_data, batch)]
    text_data.batch_size = 4
    train, dev = [], []
    for rank in range(2):
        for module in ("datamodules.captioning", "datamodules.sampler"):
            monkeypatch.setattr(f"{module}.shard", lambda rank=rank: (rank, 2))
        train += [row for batch in text_data.train_dataloader() for row in decode(text_data, batch)]
        dev += [row for batch in text_data.val_dataloader() for row in decode(text_data, batch)]
    assert sorted(train) == sorted(whole_train)
    assert sorted(dev) == sorted(whole_dev)


def test_batches_are_as_wide_as_their_longest_text():
    data = TokenDataset([[5], [6, 7], [8], [9], [4, 4, 4]] * 2, padding=0)
    batch = data[torch.tensor([[0, 0], [1, 1]])]
    assert batch["input_ids"].tolist() == [[5, 0], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_a_tokenizer_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"needs --data\.tokenizer, or a task that has a `tokenizer`"):
        MiniCaptionText(batch_size=4, limit=8).setup("fit")
    pytest.importorskip("transformers", reason="reads tokenizer folders")
    with pytest.raises(ConfigError, match="is no folder"):
        MiniCaptionText(str(tmp_path / "absent"), batch_size=4, limit=8).setup("fit")
    with pytest.raises(ConfigError, match="holds no tokenizer that can be read"):
        MiniCaptionText(str(tmp_path), batch_size=4, limit=8).setup("fit")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 8, "limit": 7}])
def test_text_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="MiniCaptionText needs a batch_size"):
        MiniCaptionText(**options)
