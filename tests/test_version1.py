"""Artefacts that version 0.1.0 wrote in format 1: they load, and are what they were."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lit_clipq
from lit_clipq.checkpoint import read_artefact
from lit_clipq.checkpoint.tensors import quantized_modules
from lit_clipq.errors import ModelError
from lit_clipq.models.loading import build_clip
from lit_clipq.nn.quantizer import TwinGeluQuantizer, TwinSoftmaxQuantizer
from lit_clipq.nn.start_token import StartTokenScores

FOLDER = Path(__file__).parent / "version1"


@pytest.mark.parametrize("name", ["ptq4clip", "vanilla"])
def test_outputs_codes_and_constants_are_those_that_were_saved(name):
    loaded = lit_clipq.load_quantized(FOLDER / name)
    kept = load_file(FOLDER / f"{name}_outputs.safetensors")
    with torch.no_grad():
        image, text = loaded.model.encode_image(kept["images"]), loaded.model.encode_text(kept["texts"])
    # another processor sums products in another order, and a code may turn over
    assert (image - kept["image"]).norm() < 0.05 * kept["image"].norm()
    assert (text - kept["text"]).norm() < 0.05 * kept["text"].norm()
    stored = load_file(FOLDER / name / "model.safetensors")
    state = {f"clip.{key}": value for key, value in loaded.model.state_dict().items()}
    scales = [key for key in stored if key.endswith((".scale", ".zero_point", ".constant", ".split"))]
    assert scales
    assert all(torch.equal(state[key], stored[key]) for key in scales)


def test_recipe_grids_and_reports_are_read_as_this_version_has_them():
    artefact = read_artefact(FOLDER / "ptq4clip")
    recipe = artefact.recipe
    assert (recipe.name, [stage.name for stage in recipe.stages]) == (
        "ptq4clip",
        ["equalize", "grids", "start_tokens", "search"],
    )
    assert recipe.stages[-1].grid.count == 50
    assert recipe.bits.of("clip.visual.conv1") == (4, 8)
    modules = quantized_modules({"clip": lit_clipq.load_quantized(FOLDER / "ptq4clip").model})
    kinds = {type(q) for module in modules.values() for q in module.quantizers}
    assert {TwinGeluQuantizer, TwinSoftmaxQuantizer} <= kinds
    assert any(isinstance(module, StartTokenScores) for module in modules.values())
    vanilla = read_artefact(FOLDER / "vanilla").recipe
    assert vanilla.exclude == ("clip.visual.conv1",)
    assert vanilla.attention_products


def test_saved_again_it_is_format_2_with_the_same_bits(tmp_path):
    artefact = read_artefact(FOLDER / "ptq4clip")
    loaded = lit_clipq.load_quantized(FOLDER / "ptq4clip")
    fresh = build_clip(artefact.identity.model_config(), None, precision="fp32")
    report = artefact.load_into(fresh.model)
    lit_clipq.save_quantized(
        tmp_path / "again", fresh.model, report=report, recipe=artefact.recipe, identity=artefact.identity
    )
    again = read_artefact(tmp_path / "again")
    assert again.content["format_version"] == 2
    assert again.recipe == artefact.recipe
    state, other = loaded.model.state_dict(), lit_clipq.load_quantized(tmp_path / "again").model.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_a_cut_one_is_refused(tmp_path):
    folder = shutil.copytree(FOLDER / "vanilla", tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ModelError, match="cut short or edited"):
        lit_clipq.load_quantized(folder)
