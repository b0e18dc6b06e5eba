"""`quantize` on small networks: what it changes, what it refuses, what it leaves clean."""

import copy

import pytest
import torch
from torch import nn

from lit_clipq.api import preview, quantize
from lit_clipq.errors import CalibrationError, ConfigError, ModelError
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.modules import QModule
from lit_clipq.recipes import BitWidths, make_recipe


class Net(nn.Module):
    """Convolution, a product of activations, a linear layer and a bare product that is no layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, stride=2)
        self.product = MatMul()
        self.linear = nn.Linear(4, 6)
        self.bare = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        x = self.conv(x).flatten(2)
        x = self.product(x, x.transpose(1, 2)).mean(1)
        return self.linear(x) @ self.bare


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(4, 3, 6, 6, generator=generator) for _ in range(3)]


def run(net, batches, recipe=None, **options):
    return quantize(
        {"net": net}, batches, recipe or make_recipe("vanilla", attention_products=True), forward=net, **options
    )


def test_ranges_are_the_extremes_over_all_batches(net, batches):
    with torch.no_grad():
        inputs = torch.cat([net.conv(x).flatten(2).reshape(-1) for x in batches])
    run(net, batches, make_recipe("vanilla", bits=BitWidths.resolve({"bits": 8}), attention_products=True))
    quantizer = net.product.input_quantizers["a"]
    low, high = inputs.min().clamp(max=0), inputs.max().clamp(min=0)
    assert quantizer.scale == (high - low) / 255
    assert set(quantizer.codes(inputs).unique().tolist()) >= {0, 255}


def test_error_shrinks_with_the_width(net, batches):
    expected = net(batches[0])
    errors = []
    for bits in (2, 4, 6, 8, 12):
        copied = copy.deepcopy(net)
        run(copied, batches, make_recipe("vanilla", bits=BitWidths.resolve({"bits": bits})))
        errors.append((copied(batches[0]) - expected).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * expected.norm()


def test_32_bits_touch_nothing(net, batches):
    before = {name: type(module) for name, module in net.named_modules()}
    report = run(net, batches, make_recipe("vanilla", bits=BitWidths.resolve({"bits": 32})))
    assert {name: type(module) for name, module in net.named_modules()} == before
    assert report.float_bytes == report.quantized_bytes


def test_the_map_counts_every_product_also_those_outside_of_layers(net, batches):
    report = run(net, batches, make_recipe("vanilla", exclude=("net.linear",)))
    macs = {entry.name: entry.macs for entry in report.map.entries}
    assert macs["net.conv"] == 9 * 4 * 12
    assert macs["net.product"] == 4 * 4 * 9
    assert macs["net.linear"] == 4 * 6
    assert macs["net (products outside of layers)"] == 36
    assert report.map.float_share == pytest.approx((144 + 24 + 36) / (432 + 144 + 24 + 36))


def test_sizes_are_of_the_stored_network(net, batches):
    report = run(net, batches, make_recipe("vanilla", bits=BitWidths.resolve({"bits": 4})))
    assert report.float_bytes == sum(p.numel() for p in net.parameters()) * 4 + (4 * 12 + 4 * 6) * 4
    assert report.quantized_bytes < report.float_bytes
    assert report.seconds > 0


def test_a_dry_run_plans_and_swaps_nothing(net, batches):
    report = run(net, batches, dry_run=True)
    assert len(report.map.quantized) == 3
    assert report.memory_bytes == 8 * 4
    assert not any(isinstance(module, QModule) for module in net.modules())


def test_batches_may_be_an_iterator(net, batches):
    twin = copy.deepcopy(net)
    run(net, iter(batches))
    run(twin, batches)
    assert torch.equal(net(batches[0]), twin(batches[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_calibration_values_name_the_first_layer_and_leave_the_network_float(net, batches, value):
    batches[1][0, 0, 0, 0] = value
    before = net(batches[0])
    with pytest.raises(CalibrationError, match=r"layer net\.conv received NaN or Inf"):
        run(net, batches)
    assert torch.equal(net(batches[0]), before)
    assert not any(isinstance(module, QModule) for module in net.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_bad_weights_are_named(net, batches):
    net.linear.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"net\.linear\.weight"):
        run(net, batches)


def test_layers_that_no_forward_reaches_are_float_and_listed(net, batches):
    net.unused = nn.Linear(2, 2)
    report = run(net, batches)
    (entry,) = [entry for entry in report.map.entries if entry.name == "net.unused"]
    assert entry.reason == "no calibration forward of the model reaches it"
    assert (entry.weight_bits, entry.activation_bits, entry.macs) == (32, 32, 0)
    assert isinstance(net.unused, nn.Linear)


def test_a_tower_that_no_batch_reaches_is_an_error_with_the_ways_out(net, batches):
    roots = {"net": net, "other": nn.Sequential(nn.Linear(2, 2))}
    with pytest.raises(CalibrationError, match=r"layer other\.0 saw 0 calibration .*, or set its tower"):
        quantize(roots, batches, make_recipe("vanilla"), forward=net)
    quantize(roots, batches, make_recipe("vanilla", bits=BitWidths.resolve({}, {"other.*": "float"})), forward=net)


def test_an_empty_calibration_set_is_refused(net):
    with pytest.raises(CalibrationError, match="empty"):
        run(net, [])


def test_a_memory_limit_below_the_need_says_what_is_needed(net, batches):
    with pytest.raises(CalibrationError, match="needs 32 bytes"):
        run(net, batches, memory_limit_bytes=16)


def test_a_quantized_network_is_not_quantized_again(net, batches):
    run(net, batches)
    with pytest.raises(ConfigError, match="quantized already"):
        run(net, batches)


def test_it_works_inside_inference_mode(net, batches):
    with torch.inference_mode():
        run(net, batches)
    assert not any(p.is_inference() for p in net.parameters())
    assert net(batches[0]).requires_grad


def test_towers_at_32_bits_each_touch_nothing(net, batches):
    bits = BitWidths.resolve({"vision_bits": 32, "text_bits": 32})
    assert not bits.all_float()  # other networks would have 8 bits
    clip = nn.ModuleDict({"visual": net})
    before = {name: type(module) for name, module in clip.named_modules()}
    report = quantize({"clip": clip}, batches, make_recipe("vanilla", bits=bits), forward=net)
    assert {name: type(module) for name, module in clip.named_modules()} == before
    assert report.map.entries == ()


def test_a_recipe_that_leaves_every_layer_float_is_refused(net, batches):
    with pytest.raises(ConfigError, match=r"no layer is left to quantize, net\.conv: excluded by '\*'"):
        run(net, batches, make_recipe("vanilla", exclude=("*",)))


def test_a_preview_plans_without_touching_the_network(net):
    before = {name: type(module) for name, module in net.named_modules()}
    planned = preview({"net": net}, make_recipe("vanilla", attention_products=True))
    assert [entry.name for entry in planned.quantized] == ["net.conv", "net.product", "net.linear"]
    assert {name: type(module) for name, module in net.named_modules()} == before
    assert not any(p.is_meta for p in net.parameters())
    with pytest.raises(ConfigError, match="matches none"):
        preview({"net": net}, make_recipe("vanilla", include=("visual",)))
