"""The commands: a saved model and a configuration become an export; mistakes are one sentence and exit code 1."""

import json

import pytest

from lit_clipq import identify, load_clip, quantize, save_quantized
from lit_clipq.console import main
from lit_clipq.export import Samples
from lit_clipq.recipes import make_recipe

FEW = ["--quantize.calibration_samples", "8", "--quantize.calibration_batch_size", "8", "--data.limit", "24"]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    loaded = load_clip("mini-vit", "mini")
    samples, identity = Samples.make(loaded.preprocessing), identify(loaded)
    recipe = make_recipe("vanilla", embeddings=True)
    report = quantize(loaded.model, [(samples.images, samples.tokens[:12])], recipe)
    folder = tmp_path_factory.mktemp("saved") / "artefact"
    save_quantized(folder, loaded.model, report=report, recipe=recipe, identity=identity)
    return folder


def test_a_saved_model_is_exported_and_replaced_only_by_force(artefact, tmp_path, capsys):
    target = tmp_path / "export"
    assert main(["export", str(artefact), str(target)]) == 0
    assert f"exported to {target}" in capsys.readouterr().out
    content = json.loads((target / "export.json").read_text())
    assert content["recipe"]["name"] == "vanilla"
    assert main(["export", str(artefact), str(target)]) == 1
    assert capsys.readouterr().err == (
        f"error: the export {target} exists; give another folder, or --force to replace it\n"
    )
    assert main(["export", str(artefact), str(target), "--force"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["nowhere"], "expected a quantized model in nowhere"),
        (["nowhere", "--format", "tflite"], "--export.format must be onnx, got 'tflite'"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(args, told, tmp_path, capsys):
    assert main(["export", args[0], str(tmp_path / "new"), *args[1:]]) == 1
    assert capsys.readouterr().err.startswith(f"error: {told}")
    assert not list(tmp_path.iterdir())


def test_an_artefact_of_another_version_is_refused(artefact, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for file in artefact.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    content = json.loads((other / "quantization.json").read_text())
    (other / "quantization.json").write_text(json.dumps({**content, "format_version": 99}))
    assert main(["export", str(other), str(tmp_path / "new")]) == 1
    assert "has format version 99" in capsys.readouterr().err


def test_a_configuration_is_exported(tmp_path, capsys):
    options = ["--quantize.recipe", "vanilla", "--export.target", str(tmp_path / "export")]
    assert main(["export", "--config", "mini/retrieval", *FEW, *options]) == 0
    content = json.loads((tmp_path / "export" / "export.json").read_text())
    assert content["reference"] == "float weights"
    assert content["kept_float"] == {}


def test_a_float_configuration_is_refused_before_anything_is_done(tmp_path, capsys):
    options = ["--quantize.bits", "32", "--export.target", str(tmp_path / "export")]
    assert main(["export", "--config", "mini/retrieval", *FEW, *options]) == 1
    assert "expected a task with a CLIP that is quantized" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["retrieval", "classification"])
def test_the_backend_adds_a_column(task, tmp_path, capsys):
    results = tmp_path / "results.json"
    options = ["--quantize.recipe", "vanilla", "--backend", "onnxruntime", "--results", str(results)]
    assert main(["validate", "--config", f"mini/{task}", *FEW, *options]) == 0
    content = json.loads(results.read_text())
    assert content["integer"]["metrics"].keys() == content["metrics"]["float"].keys()
    assert content["integer"]["kernels"]["image"]["MatMulIntegerToFloat"] > 0
    assert "integer" in capsys.readouterr().out


def test_a_backend_is_refused_for_tasks_that_read_more_than_embeddings(capsys, tmp_path):
    options = ["--quantize.recipe", "vanilla", "--backend", "onnxruntime", "--results", str(tmp_path / "results.json")]
    assert main(["validate", "--config", "mini/captioning", *options]) == 1
    assert "the task Captioning needs more of the network than embeddings" in capsys.readouterr().err
