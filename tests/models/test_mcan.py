"""The MCAN head against its definition, written with torch's own functions and masks that fill."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lit_clipq.errors import ConfigError
from lit_clipq.models import MCAN, MCAN_PRESETS, MCANOptions, mcan_options
from lit_clipq.models.mcan import Dropout
from lit_clipq.nn.swap import find_layers

TINY = MCANOptions(
    layers=2, hidden=12, heads=3, feed_forward=20, dropout=0.1, flat_hidden=7, flat_glimpses=2, flat_out=10
)
IMAGE, TEXT, ANSWERS = 5, 6, 9


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = MCAN(TINY, IMAGE, TEXT, ANSWERS).eval()
    for parameter in head.parameters():  # norms and biases that matter
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return head


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(3, 4, IMAGE, generator=generator), torch.randn(3, 6, TEXT, generator=generator)
    image_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    text_mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6, [1, 1, 1, 1, 0, 0]]).bool()
    return image, text, image_mask, text_mask


def plain(state, options, image, text, image_mask, text_mask):
    """MCAN as the paper's figures 2 to 5 have it, from a dictionary of weights."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def attend(q, k, v, mask):
        size = options.hidden // options.heads
        heads = []
        for h in range(options.heads):
            part = slice(h * size, (h + 1) * size)
            scores = torch.einsum("bqd,bkd->bqk", q[..., part], k[..., part]) / math.sqrt(size)
            weights = scores.masked_fill(~mask[:, None, :], -1e9).softmax(-1)
            heads.append(torch.einsum("bqk,bkd->bqd", weights, v[..., part]))
        return torch.cat(heads, dim=-1)

    def self_attention(name, x, mask):
        q, k, v = linear(f"{name}.qkv_proj", x).chunk(3, dim=-1)
        return linear(f"{name}.out_proj", attend(q, k, v, mask))

    def feed_forward(name, x):
        return linear(f"{name}.3", linear(f"{name}.0", x).relu())

    def flatten(name, x, mask):
        weights = feed_forward(f"{name}.mlp", x).masked_fill(~mask[..., None], -1e9).softmax(1)
        glimpses = [(weights[..., g : g + 1] * x).sum(1) for g in range(options.flat_glimpses)]
        return linear(f"{name}.merge", torch.cat(glimpses, dim=1))

    x, y = linear("text_proj", text), linear("image_proj", image)
    for i in range(options.layers):
        x = norm(f"encoder.{i}.attn_norm", x + self_attention(f"encoder.{i}.attn", x, text_mask))
        x = norm(f"encoder.{i}.mlp_norm", x + feed_forward(f"encoder.{i}.mlp", x))
    for i in range(options.layers):
        y = norm(f"decoder.{i}.attn_norm", y + self_attention(f"decoder.{i}.attn", y, image_mask))
        q = linear(f"decoder.{i}.guided_attn.q_proj", y)
        k, v = linear(f"decoder.{i}.guided_attn.kv_proj", x).chunk(2, dim=-1)
        guided = linear(f"decoder.{i}.guided_attn.out_proj", attend(q, k, v, text_mask))
        y = norm(f"decoder.{i}.guided_norm", y + guided)
        y = norm(f"decoder.{i}.mlp_norm", y + feed_forward(f"decoder.{i}.mlp", y))
    flat = flatten("text_flat", x, text_mask) + flatten("image_flat", y, image_mask)
    return linear("answer", norm("norm", flat))


def test_logits_agree_with_the_definition(head, batch):
    with torch.no_grad():
        expected = plain(head.double().state_dict(), TINY, batch[0].double(), batch[1].double(), *batch[2:])
        found = head.float()(*batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_padding_changes_nothing(head, batch):
    image, text, image_mask, text_mask = batch
    with torch.no_grad():
        expected = head(*batch)
        for row in range(3):
            alone = head(image[row : row + 1, image_mask[row]], text[row : row + 1, text_mask[row]])
            torch.testing.assert_close(alone, expected[row : row + 1], rtol=1e-5, atol=1e-5)
        image, text = image.clone(), text.clone()
        image[~image_mask], text[~text_mask] = 1e3, -1e3
        torch.testing.assert_close(head(image, text, image_mask, text_mask), expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_reaches_padding(head, batch):
    image, text = batch[0].requires_grad_(), batch[1].requires_grad_()
    head(image, text, *batch[2:]).square().sum().backward()
    for x, mask in ((image, batch[2]), (text, batch[3])):
        assert (x.grad[~mask] == 0).all()
        assert (x.grad[mask].abs().sum(-1) > 0).all()


def test_every_product_is_a_layer_that_can_be_quantized(head, batch):
    macs = []
    for layer in find_layers({"head": head}):
        layer.module.register_forward_hook(
            lambda module, inputs, output, kind=layer.kind: macs.append(kind.macs(module, inputs, output))
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(*batch)
    assert sum(macs) == counter.get_total_flops() / 2
    names = {layer.name for layer in find_layers({"head": head})}
    assert {"head.decoder.1.guided_attn.kv_proj", "head.encoder.0.attn.qk", "head.image_flat.av"} <= names


def test_dropout_acts_in_training_alone(head, batch):
    assert torch.equal(head(*batch), head(*batch))
    head.train()
    assert not torch.equal(head(*batch), head(*batch))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.73])
def test_dropout_drops_independently_with_its_probability(p):
    torch.manual_seed(0)
    drop = Dropout(p)
    x = torch.ones(400, 501, requires_grad=True)
    y = drop(x)
    kept = (y != 0).float()
    assert torch.equal(y, kept / torch.tensor(1.0) * (1 / (1 - p)))
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 4 * deviation
    for shift in (1, 2, 501):  # neighbours, the two halves of a word, rows
        flat = kept.flatten() - (1 - p)
        correlation = (flat[shift:] * flat[:-shift]).mean() / (p * (1 - p))
        assert abs(correlation.item()) < 4 / kept.numel() ** 0.5
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(drop.eval()(x), x)


def test_presets_are_those_of_the_paper():
    small, large = MCAN_PRESETS["small"], MCAN_PRESETS["large"]
    assert (small.layers, small.hidden, small.heads, small.feed_forward, small.flat_hidden, small.flat_out) == (
        *(6, 512, 8, 2048),
        *(512, 1024),
    )
    assert (large.layers, large.hidden, large.heads, large.feed_forward, large.flat_hidden, large.flat_out) == (
        *(6, 1024, 8, 4096),
        *(512, 2048),
    )
    assert small.dropout == large.dropout == 0.1


@pytest.mark.parametrize(
    ("preset", "changes", "told"),
    [
        ("huge", {}, "small, large, mini"),
        ("small", {"hiden": 4}, "hiden"),
        ("small", {"hidden": 100}, "divisible by heads=8"),
        ("small", {"layers": 0}, "layers=0"),
        ("small", {"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_heads_are_refused(preset, changes, told):
    with pytest.raises(ConfigError, match=told):
        mcan_options(preset, changes)
