"""A supervised classifier as a task: timm's own forward and transform are the oracle."""

import json
import shutil

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

import lit_clipq
from benchmarks.families import enliven
from datamodules import ImageFolderClassification
from lit_clipq.cli import main
from lit_clipq.contracts import MeasuredTask
from lit_clipq.errors import CalibrationError, ConfigError, DataError, ModelError
from lit_clipq.models import load_classifier
from lit_clipq.recipes import make_recipe
from lit_clipq.tasks import ImageClassification

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
SMALL = "test_vit"  # timm's own for tests: 160 pixels, 0.4 M parameters


@pytest.fixture
def folder(tmp_path):
    """Six classes of three pictures of noise, and their names."""
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASSES):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(256, (90 + 10 * number, 120, 3), generator=generator, dtype=torch.uint8)
            pixels = (pixels * (label + 1) / 6).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / name / f"{number}.png")
    (tmp_path / "pictures" / "classes.json").write_text(json.dumps(dict(zip(CLASSES, CLASSES, strict=True))))
    return tmp_path / "pictures"


def make(name=SMALL, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageClassification(name, num_classes=len(CLASSES), ks=(1, 2), **options)


def run(task, folder, tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    data = ImageFolderClassification(str(folder), batch_size=4, held_out_calibration=2)
    Trainer(default_root_dir=tmp_path, **quiet).validate(task, datamodule=data, verbose=False)
    return data


def test_accuracy_is_that_of_timm_picture_by_picture(folder, tmp_path):
    task = make()
    data = run(task, folder, tmp_path)
    transform = create_transform(**resolve_model_data_config(task.model), is_training=False)
    hits = {1: 0, 2: 0}
    for picture in data.pictures:
        with torch.no_grad():
            order = task.model(transform(Image.open(picture.path).convert("RGB"))[None])[0].argsort(descending=True)
        for k in hits:
            hits[k] += int(picture.label in order[:k].tolist())
    assert len(data.pictures) == 16
    assert task.results() == {f"top{k}": pytest.approx(count / 16) for k, count in hits.items()}
    assert hits[2] > 0
    assert task.sample_counts() == {"images": 16}


def test_it_is_a_task_whose_passes_can_be_compared_and_calibrates_without_texts(folder, tmp_path):
    task = make()
    assert isinstance(task, MeasuredTask)
    data = run(task, folder, tmp_path)
    (batch,) = data.calibration_dataloader(samples=2, batch_size=4, seed=0)
    assert batch[1] is None
    assert task.calibration_forward(batch)["logits"].shape == (2, len(CLASSES))
    with pytest.raises(CalibrationError, match="without"):
        task.calibration_forward((None, torch.ones(2, 3, dtype=torch.int64)))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "convnext_atto"])
def test_preprocessing_is_what_timm_publishes_for_the_name(name):
    loaded = load_classifier(name)
    config = timm.get_pretrained_cfg(name)
    picture = Image.effect_noise((300, 300), 80).convert("RGB")
    prepared = loaded.preprocessing.image(picture)
    assert prepared.shape == config.input_size
    black = loaded.preprocessing.image(Image.new("RGB", (300, 300)))[:, 0, 0]
    torch.testing.assert_close(black, -torch.tensor(config.mean) / torch.tensor(config.std))
    scaled = int(config.input_size[1] / config.crop_pct)
    kinds = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    resized = picture.resize((scaled, scaled), kinds[config.interpolation])
    left, top = (resized.width - config.input_size[2]) // 2, (resized.height - config.input_size[1]) // 2
    centre = torch.tensor(list(resized.getdata())).view(resized.height, resized.width, 3)[top:, left:][:8, :8]
    expected = (centre.permute(2, 0, 1) / 255 - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(
        config.std
    ).view(3, 1, 1)
    difference = (prepared[:, :8, :8] - expected).abs().mean()
    assert difference < 0.02 * expected.std()  # 8-bit rounding of the resized picture
    with pytest.raises(ModelError, match="reads no texts"):
        loaded.preprocessing.tokenizer(["a text"])


@pytest.mark.parametrize("recipe", ["vanilla", pytest.param("ptq4clip", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_classifiers_are_quantized_by_the_same_recipes(name, recipe):
    task = make(name)
    enliven(task.model)
    images = torch.randn(4, *timm.get_pretrained_cfg(name).input_size)
    with torch.no_grad():
        expected = task.logits(images)
    made = make_recipe(recipe)
    report = lit_clipq.quantize(task.roots(), [(images, None)], made, forward=task.calibration_forward)
    with torch.no_grad():
        found = task.logits(images)
    assert {entry.name.partition(".")[0] for entry in report.map.quantized} == {"vision"}
    assert report.map.float_share < (0.25 if recipe == "vanilla" else 1e-9)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_local_weights_replace_the_random_ones_and_must_fit(tmp_path):
    source = make().model
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    for file in ("weights.safetensors", "weights.pth"):
        task = ImageClassification(SMALL, str(tmp_path / file), num_classes=len(CLASSES))
        assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), source.parameters(), strict=True))
    with pytest.raises(ModelError, match=r"does not fit classifier 'test_vit'.*2 tensors"):
        ImageClassification(SMALL, str(tmp_path / "weights.pth"), num_classes=3)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"name": "vit_tinny_patch16_224"}, ModelError, "close matches: vit_tiny_patch16_224"),
        ({"name": SMALL, "pretrained": "absent.pth"}, ModelError, "does not exist"),
        ({"name": SMALL, "num_classes": 0}, ConfigError, "num_classes of at least 1"),
        ({"name": SMALL, "ks": (0,)}, ConfigError, "`ks` of at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(options, error, told):
    with pytest.raises(error, match=told):
        ImageClassification(**options)


def test_data_of_other_classes_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"tells 1,000 classes apart, but the data names 6; .*num_classes"):
        run(ImageClassification(SMALL), folder, tmp_path)


CONFIG = ["validate", "--config", "configs/imagenet_timm.yaml", "--model.name", SMALL, "--model.pretrained", "null"]
FEW = ["--data.num_workers", "0", "--quantize.calibration_samples", "4", "--trainer.accelerator", "cpu"]


@pytest.mark.parametrize("recipe", ["vanilla", pytest.param("ptq4clip", marks=pytest.mark.slow)])
def test_the_configuration_runs_on_photographs_of_imagenet(recipe, real_data, tmp_path, capsys):
    root, chosen = tmp_path / "imagenet" / "val", sorted((real_data / "imagenet_1000").glob("*.jpg"))[::50]
    for photograph in chosen:
        (root / photograph.stem).mkdir(parents=True)
        shutil.copy(photograph, root / photograph.stem)
    results = tmp_path / "results.json"
    options = ["--data.root", str(tmp_path / "imagenet"), "--quantize.recipe", recipe, "--results", str(results)]
    assert main([*CONFIG, *FEW, *options]) == 0
    content = json.loads(results.read_text())
    assert content["metrics"]["quantized"].keys() == {"top1", "top5"}
    assert content["samples"] == {"images": 18, "skipped": 0, "calibration_held_out": 2, "classes": 1000}
    assert {entry["name"].partition(".")[0] for entry in content["map"] if not entry["reason"]} == {"vision"}


def test_saving_is_refused_before_anything_is_evaluated(folder, tmp_path, capsys):
    options = ["--data.root", str(folder), "--model.num_classes", "6", "--results", str(tmp_path / "results.json")]
    assert main([*CONFIG, *FEW, *options, "--quantize.save", str(tmp_path / "saved")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: --quantize.save keeps a CLIP, but this task has none (it quantizes vision)")
    assert not (tmp_path / "saved").exists()
    assert not (tmp_path / "results.json").exists()
