"""Small towers of every kind, and the float networks that stages in front of the grids make of them."""

import copy

import torch
from torch import nn

from lit_clipq.api import quantize_many
from lit_clipq.models import encode_image, encode_text
from lit_clipq.recipes import BitWidths, compose
from tests.models.conftest import CONFIGS, build


def tower(kind):
    """Build a small CLIP of a kind whose LayerNorms have an outlier, and return it with two batches."""
    torch.manual_seed(0)
    model = build(CONFIGS[kind])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data[1] = 30
    return model, batch_for(model, kind, 1), batch_for(model, kind, 2)


def batch_for(model, kind, seed):
    """Return a batch of three pictures and texts."""
    size = 64 if kind == "resnet" else 32
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(8, 58, (3, model.context_length), generator=generator)
    texts[:, 0], texts[:, -1] = 1, 7 if kind == "custom_text_eos" else 59
    return torch.rand(3, 3, size, size, generator=generator), texts


@torch.no_grad()
def embed(model, batch):
    """Return both embeddings."""
    return encode_image(model, batch[0]), encode_text(model, batch[1])


def largest_change(before, after):
    """Return the largest difference, relative to the largest value, of pairs of tensors."""
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(before, after, strict=True))


def prepared(model, batches, stages, *, bits=8, **options):
    """Quantize with stages, and return the form that is not in place, with the float state that it was made from."""
    recipe = compose([*stages, "grids", "ranges"], bits=BitWidths.resolve({"bits": bits}), **options)
    (form,) = quantize_many(model, batches, [recipe])
    return form, copy.deepcopy(model.state_dict())


def same_state(model, state):
    """Whether a model has these values and no others, to the bit."""
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], x) for name, x in state.items())
