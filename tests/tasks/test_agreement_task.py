"""Agreement on a folder of pictures, and retrieval with one side quantized."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from datamodules import MiniRetrieval, PictureFolder
from lit_clipq.cli import main
from lit_clipq.errors import DataError
from lit_clipq.mini import ensure_world, world_folder
from lit_clipq.models import encode_image, encode_text, load_clip
from lit_clipq.recipes import make_recipe

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/agreement.yaml")
MODEL = ["--model.name", "mini-vit", "--model.pretrained", "mini", "--data.num_workers", "0"]
FEW = ["--data.limit", "30", "--quantize.calibration_samples", "4", "--trainer.accelerator", "cpu"]
VANILLA = ["--quantize.recipe", "vanilla"]


@pytest.fixture(scope="module")
def world(cache_folder) -> Path:
    folder = world_folder(None, "small")
    ensure_world(folder.parent, "small")
    return folder


def run(tmp_path: Path, *options: str, config: str = CONFIG, model=MODEL) -> dict:
    path = tmp_path / "results.json"
    assert main(["validate", "--config", config, *model, *FEW, *VANILLA, *options, "--results", str(path)]) == 0
    return json.loads(path.read_text())


def test_pictures_alone_are_compared_and_the_text_tower_stays_float(world, tmp_path):
    results = run(tmp_path, "--data.root", str(world / "images"), "--quantize.bits", "3")
    metrics = results["metrics"]
    assert set(metrics["float"].values()) == {1.0}
    assert set(metrics["quantized"]) == set(metrics["float"])
    assert {name.split("_quantized")[0] for name in metrics["quantized"]} == {
        "cosine_image",
        "top1_i2i",
        "top10_i2i",
        "rank_correlation_i2i",
    }
    assert 0 < metrics["quantized"]["top1_i2i"] < 1
    assert metrics["quantized"]["cosine_image"] < 0.999
    assert results["samples"] == {"images": 27, "skipped": 0, "calibration_held_out": 3}
    assert {entry["tower"] for entry in results["map"] if not entry["reason"]} == {"vision"}


def test_captions_bring_texts(world, tmp_path):
    file = world / "annotations/captions_val.json"
    results = run(tmp_path, "--data.root", str(world / "images"), "--data.captions", str(file), "--quantize.bits", "3")
    names = set(results["metrics"]["quantized"])
    assert {"cosine_text", "top1_t2i", "top10_i2t_quantized_index"} <= names
    assert not any("i2i" in name for name in names)
    assert results["samples"]["captions"] == 27 * 5
    assert {entry["tower"] for entry in results["map"] if not entry["reason"]} == {"vision", "text"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data.root", "absent"], "give a folder of pictures with --data.root"),
        (["--data.captions", "absent"], "give a file of captions with --data.captions"),
        (["--data.captions", str(ROOT / "pyproject.toml")], "expected a picture and its caption"),
    ],
)
def test_what_is_absent_is_named(world, tmp_path, capsys, options, told):
    args = ["validate", "--config", CONFIG, *MODEL, *FEW, *VANILLA, "--data.root", str(world / "images"), *options]
    assert main([*args, "--results", str(tmp_path / "results.json")]) == 1
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_json_that_holds_no_captions_is_refused(world, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text("[]")
    data = PictureFolder(str(world / "images"), captions=str(path))
    data.preprocessing = load_clip("mini-vit").preprocessing
    with pytest.raises(DataError, match="is no file of captions"):
        data.setup()


def test_tables_and_json_name_the_same_captions(world, tmp_path):
    content = json.loads((world / "annotations/captions_val.json").read_text())
    names = {row["id"]: row["file_name"] for row in content["images"]}
    rows = [f"{names[row['image_id']]},{row['caption']}" for row in content["annotations"]]
    table = tmp_path / "captions.txt"
    table.write_text("\n".join(["image,caption", *rows]))
    read = []
    for file in (table, world / "annotations/captions_val.json"):
        data = PictureFolder(str(world / "images"), captions=str(file))
        read.append([(picture.path.name, picture.captions) for picture in data.read_evaluation()])
    assert read[0] == read[1]


def embedded(bits: int) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Embeddings of 30 pictures and their captions, and the captions of each, from the library alone."""
    from lit_clipq.api import quantize

    loaded = load_clip("mini-vit", "mini")
    data = MiniRetrieval(limit=30)
    data.preprocessing = loaded.preprocessing
    data.prepare_data()
    data.setup()
    if bits < 32:
        from lit_clipq.recipes import BitWidths

        recipe = make_recipe("vanilla", bits=BitWidths.resolve({"bits": bits}))
        quantize(loaded.model, list(data.calibration_dataloader(4, 32, 0)), recipe)
    pictures, captions = data.val_dataloader()
    with torch.inference_mode():
        images = torch.cat([encode_image(loaded.model, batch["images"]) for batch in pictures])
        texts = torch.cat([encode_text(loaded.model, batch["texts"]) for batch in captions])
    owners = [data.captions.owners[i].tolist() for i in range(len(data.captions))]
    return F.normalize(images, dim=1), F.normalize(texts, dim=1), owners


def test_retrieval_reports_each_side_quantized_alone(tmp_path):
    options = ["--model.asymmetric", "true", "--quantize.bits", "4"]
    metrics = run(tmp_path, *options, config="mini/retrieval", model=[])["metrics"]
    floats, quantized = embedded(32), embedded(4)
    assert metrics["float"]["recall@1_t2i_quantized_index"] == metrics["float"]["recall@1_t2i"]
    for name, texts, images in (
        ("recall@1_t2i_quantized_queries", quantized[1], floats[0]),
        ("recall@1_t2i_quantized_index", floats[1], quantized[0]),
    ):
        best = (texts @ images.T).argmax(1).tolist()
        hits = [image == own for image, owners in zip(best, floats[2], strict=True) for own in owners]
        assert metrics["quantized"][name] == pytest.approx(sum(hits) / len(hits))
        best = (images @ texts.T).argmax(1).tolist()
        found = sum(number in floats[2][text] for number, text in enumerate(best)) / len(images)
        mirrored = name.replace("t2i", "i2t").replace("queries", "?").replace("index", "queries").replace("?", "index")
        assert metrics["quantized"][mirrored] == pytest.approx(found)
