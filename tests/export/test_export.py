"""Exports: what the file computes, what is refused, and that a failure leaves nothing behind."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from benchmarks.families import FAMILIES, enliven, sample, small_config
from lit_clipq import load_clip, quantize
from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.export import ExportOptions, Samples, embeddings, export_clip
from lit_clipq.export.graph import Graph
from lit_clipq.export.kernels import INTEGER, Kernel, check_kernels
from lit_clipq.export.parity import PRODUCT_DB, compare_products, product_model, sqnr
from lit_clipq.export.products import form_of
from lit_clipq.export.towers import ImageTower, TextTower
from lit_clipq.nn.modules import QLinear, QModule
from lit_clipq.nn.quantizer import TwinGeluQuantizer, UniformQuantizer
from lit_clipq.recipes import make_recipe
from lit_clipq.recipes.widths import BitWidths
from lit_clipq.runtime import load
from lit_clipq.runtime.session import open_session
from tests.export.conftest import Exported, make


def named_layers(model: torch.nn.Module) -> dict[str, QModule]:
    return {f"clip.{name}": layer for name, layer in model.named_modules() if isinstance(layer, QModule)}


def graph_of(layer: QModule, *examples: torch.Tensor) -> Graph:
    graph = Graph()
    names = ("a", "b")[: len(examples)]
    with graph.layer("layer", names, [x.shape for x in examples]) as product:
        product.output = form_of(layer).emit(graph, product, *names)
    return graph


def run_layer(layer: QModule, *inputs: torch.Tensor) -> np.ndarray:
    graph = graph_of(layer, *inputs)
    session = open_session(product_model(graph, graph.products["layer"]))
    return session.run(None, dict(zip(("a", "b"), (x.numpy() for x in inputs), strict=False)))[0]


def test_every_product_is_an_integer_kernel_and_equals_the_fake_quantized_one(twin: Exported):
    content = json.loads((twin.report.path / "export.json").read_text())
    products = [layer for layer in named_layers(twin.loaded.model).values() if layer.id != "embedding"]
    kernels = [item for tower in ("image", "text") for item in twin.report.kernels[tower].items()]
    counted = sum(count for kernel, count in kernels if kernel in INTEGER)
    assert counted == len(products)
    for tower in ("image", "text"):
        parity = twin.report.parity[tower]
        assert parity.worst[1] >= PRODUCT_DB
        assert parity.integer_db >= parity.fake_db - 1
        assert content["towers"][tower]["parity"]["integer_db"] == round(parity.integer_db, 2)


@pytest.mark.parametrize("count", [1, 5])
def test_batch_and_text_length_are_free(twin: Exported, count):
    model = load(twin.report.path)
    images, tokens = twin.samples.images[:count], twin.samples.tokens[:count]
    with torch.no_grad():
        image = ImageTower(twin.loaded.model)(images).numpy()
        text = TextTower(twin.loaded.model, tokens.shape[1])(tokens).numpy()
    assert sqnr(model.image_tower(images.numpy()), image) > 30
    assert sqnr(model.text_tower(tokens.numpy()), text) > 30  # runs to the end of the longest text
    whole = model._sessions["text"].run(None, {"tokens": tokens.numpy()})[0]
    assert sqnr(model.text_tower(tokens.numpy()), whole) > 60


def test_a_twin_product_is_two_integer_products():
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 8)
    weight, grid = UniformQuantizer(8, symmetric=True, restricted=True), TwinGeluQuantizer(8, -0.25)
    weight.set_range(linear.weight.detach().min(), linear.weight.detach().max())
    grid.positive_step = torch.tensor(2.0**-6)
    values, bias = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
    layer = QLinear(linear, weight, grid)
    layer.freeze()
    x = torch.nn.functional.gelu(torch.randn(2, 5, 24) * 2)
    # oracle: codes by hand, integer products in int64
    codes = np.rint(values / float(weight.scale)).clip(-128, 127).astype(np.int64)
    n = 128
    below = np.rint(np.where(x < 0, -x, 0) / float(grid.negative_step)).clip(0, n).astype(np.int64)
    above = np.rint(np.where(x < 0, 0, x) * 2**6).clip(0, n - 1).astype(np.int64)
    parts = float(grid.negative_step) * -(below @ codes.T) + 2.0**-6 * (above @ codes.T)
    expected = parts * float(weight.scale) + bias
    assert sqnr(run_layer(layer, x), expected) > 100


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_are_stored_in_half_a_byte(bits):
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 6)
    weight, grid = UniformQuantizer(bits, symmetric=True), UniformQuantizer(8, symmetric=False)
    weight.set_range(linear.weight.detach().min(), linear.weight.detach().max())
    grid.set_range(torch.tensor(-3.0), torch.tensor(3.0))
    layer = QLinear(linear, weight, grid)
    layer.freeze()
    x = torch.randn(2, 2, 16)
    graph = graph_of(layer, x)
    stored = next(tensor for name, tensor in graph.stored.items() if name.endswith("weight"))
    assert stored.data_type == TensorProto.INT4
    assert len(stored.raw_data) == 16 * 6 / 2
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.int8), layer.weight_codes.numpy().T)
    assert sqnr(run_layer(layer, x), layer(x).detach().numpy()) > 100


class Saturating:
    """A session that adds up pairs of products of unsigned and signed bytes in 16 bits, as CPUs without VNNI do."""

    def __init__(self, model: bytes) -> None:
        self.graph = onnx.load_from_string(model).graph
        self.stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer}

    def run(self, _, inputs):
        values = {**self.stored, **inputs}
        grids = {}
        for node in self.graph.node:
            a, *rest = (values.get(name) for name in node.input)
            if node.op_type == "QuantizeLinear":
                out = np.clip(np.rint(a / rest[0]) + rest[1].astype(np.int32), 0, 255).astype(np.uint8)
            elif node.op_type == "DequantizeLinear":
                out = a
                grids[node.output[0]] = rest[0], rest[1].astype(np.int64)
            elif node.op_type == "MatMul":
                (scale, zero), (weight_scale, _) = (grids[name] for name in node.input)
                pairs = a.astype(np.int64)[..., None] * rest[0].astype(np.int64)  # (..., in, out)
                pairs = pairs.reshape(*pairs.shape[:-2], -1, 2, pairs.shape[-1]).sum(-2).clip(-(2**15), 2**15 - 1)
                total = pairs.sum(-2) - zero * rest[0].astype(np.int64).sum(0)
                out = (total * scale * weight_scale).astype(np.float32)
            else:
                assert node.op_type == "Add", node.op_type
                out = a + rest[0]
            values[node.output[0]] = out
        return [values[self.graph.output[0].name]]


def saturating_session(model: bytes):
    kinds = {node.op_type for node in onnx.load_from_string(model).graph.node}
    plain = kinds <= {"QuantizeLinear", "DequantizeLinear", "MatMul", "Add"}
    signed = any(tensor.data_type == TensorProto.INT8 for tensor in onnx.load_from_string(model).graph.initializer)
    return Saturating(model) if plain and signed else open_session(model)


@pytest.mark.parametrize(("bits", "fails"), [(8, True), (7, False)])
def test_parity_fails_in_a_session_that_saturates_unless_weights_have_seven_bits(bits, fails):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 16)
    weight, grid = UniformQuantizer(bits, symmetric=True), UniformQuantizer(8, symmetric=False)
    weight.set_range(linear.weight.detach().min(), linear.weight.detach().max())
    grid.set_range(torch.tensor(-1.0), torch.tensor(3.0))
    layer = QLinear(linear, weight, grid)
    layer.freeze()
    x = torch.randn(2, 2, 64) + 1
    graph = graph_of(layer, x)
    found = compare_products(layer, x, graph, {"layer": form_of(layer)}, saturating_session)
    assert (found["layer"] < PRODUCT_DB) == fails
    assert compare_products(layer, x, graph, {"layer": form_of(layer)})["layer"] > PRODUCT_DB


def test_a_saturating_session_leaves_no_export_behind_and_names_the_layer(twin: Exported, tmp_path):
    with pytest.raises(ModelError, match=r"worst layer clip\.\S+ reaches"):
        export_clip(twin.loaded, ExportOptions(str(tmp_path / "new")), samples=twin.samples, open_=saturating_session)
    assert not list(tmp_path.iterdir())


def test_an_export_is_replaced_only_by_force(twin: Exported, tmp_path):
    options = ExportOptions(str(twin.report.path))
    with pytest.raises(ConfigError, match="--force"):
        export_clip(twin.loaded, options, samples=twin.samples)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds mine\.txt and no export"):
        export_clip(twin.loaded, ExportOptions(str(tmp_path), force=True), samples=twin.samples)


@pytest.mark.parametrize(
    ("options", "widths", "told"),
    [
        ({"softmax_grid": "log2"}, {}, r"layer clip\.\S+av \(and \d+ more layers\) cannot be exported: the grid 'log'"),
        ({}, {"activation_bits": 16}, "codes of 16 bits do not fit int8; give at most 8 bits"),
    ],
)
def test_a_grid_without_an_integer_form_is_refused_by_layer(options, widths, told, tmp_path):
    loaded = load_clip("mini-vit", "mini")
    samples = Samples.make(loaded.preprocessing)
    recipe = make_recipe("vanilla", bits=BitWidths.resolve(widths, None), attention_products=True, **options)
    quantize(loaded.model, [(samples.images, samples.tokens[:12])], recipe)
    with pytest.raises(ConfigError, match=told):
        export_clip(loaded, ExportOptions(str(tmp_path / "new")), samples=samples)
    assert not list(tmp_path.iterdir())


def test_fallback_keeps_what_cannot_be_exported_float_and_lists_it(tmp_path):
    exported = make(
        "mini-vit", "vanilla", tmp_path / "new", attention_products=True, softmax_grid="log2", fallback="float"
    )
    kept = json.loads((tmp_path / "new" / "export.json").read_text())["kept_float"]
    assert sorted(kept) == [name for name in sorted(named_layers(exported.loaded.model)) if name.endswith(".av")]
    assert all("grid 'log'" in reason for reason in kept.values())


def test_a_float_network_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a quantized network"):
        export_clip(load_clip("mini-vit", "mini"), ExportOptions(str(tmp_path / "new")))


def test_a_product_in_float_is_named():
    kernels = [Kernel("clip.a", "MatMulIntegerToFloat", expected=True), Kernel("clip.b", "FusedConv", expected=True)]
    with pytest.raises(ModelError, match=r"1 of 2 products would be computed in float: clip\.b \(FusedConv\)"):
        check_kernels(kernels)


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"--export\.fallback must be refuse or float, got 'int'"):
        ExportOptions(fallback="int")


@pytest.mark.parametrize(("title", "kept"), [("SigLIP", 0), ("ConvNeXt", 4)])
def test_towers_of_other_families_export(title, kept, tmp_path):
    family = next(family for family in FAMILIES if family.title == title)
    loaded = load_clip(str(small_config(family, tmp_path)))
    enliven(loaded.model)
    samples = Samples(*sample(loaded.model, 8))
    reference = embeddings(loaded, samples)
    recipe = make_recipe("vanilla", attention_products=True)
    quantize(loaded.model, [(samples.images[:4], samples.tokens[:4])], recipe)
    options = ExportOptions(str(tmp_path / "new"), fallback="float")
    report = export_clip(loaded, options, reference=reference, samples=samples)
    assert len(report.kept_float) == kept  # depthwise convolutions in front of a LayerNorm
    assert all(name.endswith("conv_dw") for name in report.kept_float)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini-vit", "mini-resnet"])
@pytest.mark.parametrize(("recipe", "widths"), [("vanilla", {}), ("deploy_int8", {}), ("ptq4clip", {"weight_bits": 4})])
def test_recipes_export(name, recipe, widths, tmp_path):
    exported = make(name, recipe, tmp_path / "new", widths)
    assert not exported.report.kept_float
    assert set(exported.report.kernels["image"]) <= INTEGER
