"""Tables stored as codes: lookups against the decoded table, and what a table cannot be."""

import pytest
import torch
from torch import nn

from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import PerChannel, PerGroup, PerTensor, PerToken, extrema
from lit_clipq.nn.embedding import QEmbedding
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.nn.size import stored_bytes
from lit_clipq.nn.swap import find_layers
from lit_clipq.recipes import BitWidths, make_recipe


@pytest.fixture
def table():
    torch.manual_seed(0)
    return nn.Embedding(30, 8)


def quantized(table, bits=4, granularity=None, *, symmetric=True):
    quantizer = UniformQuantizer(bits, symmetric=symmetric, granularity=granularity or PerChannel(0))
    layer = QEmbedding(table, quantizer)
    quantizer.set_range(*extrema(table.weight.detach(), quantizer.granularity))
    layer.freeze()
    return layer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 11])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(4)], ids=str)
def test_lookups_are_rows_of_the_rounded_table(table, granularity, bits, symmetric):
    layer = quantized(table, bits, granularity, symmetric=symmetric)
    ids = torch.randint(30, (3, 2, 5))
    assert torch.equal(layer(ids), layer.weight_quantizer(table.weight.detach())[ids])


def test_no_float_copy_of_the_table_remains(table):
    layer = quantized(table)
    assert not any(value.is_floating_point() and value.numel() > 30 for value in layer.state_dict().values())
    assert not any(value.is_floating_point() and value.numel() > 30 for value in layer.buffers())
    assert list(layer.parameters()) == []
    assert stored_bytes(layer) == 30 * 8 // 2 + 30 * (4 + 4)


def test_rows_have_the_type_of_the_float_table(table):
    assert quantized(table.bfloat16())(torch.tensor([1])).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [-1, 30])
def test_ids_outside_of_the_table_are_refused_as_by_the_float_table(table, bad):
    layer = quantized(table)
    for lookup in (table, layer):
        with pytest.raises(IndexError):
            lookup(torch.tensor([bad]))


@pytest.mark.parametrize("granularity", [PerToken(), PerChannel(1)])
def test_grids_across_rows_are_refused(table, granularity):
    with pytest.raises(ValueError, match="per tensor, per row or per group"):
        QEmbedding(table, UniformQuantizer(4, symmetric=True, granularity=granularity))


def test_a_table_that_changes_itself_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        QEmbedding(nn.Embedding(3, 4, max_norm=1.0), None)


def test_recipes_leave_tables_float_unless_asked_and_positions_always():
    text = nn.ModuleDict({"word": nn.Embedding(9, 4), "position_embeddings": nn.Embedding(5, 4), "fc": nn.Linear(4, 4)})
    layers = find_layers({"clip": text})

    def reasons(recipe):
        return {entry.name: entry.reason for entry in recipe.plan(layers).entries}

    assert reasons(make_recipe("vanilla"))["clip.word"] == "embedding tables are off in this recipe"
    asked = reasons(make_recipe("vanilla", embeddings=True))
    assert asked == {"clip.word": "", "clip.position_embeddings": "positions stay float", "clip.fc": ""}
    widths = BitWidths.resolve({"weight_bits": 32})
    assert reasons(make_recipe("vanilla", embeddings=True, bits=widths))["clip.word"] == "text is set to 32 bits"
    with pytest.raises(ConfigError, match="matches none"):
        make_recipe("vanilla", include=("clip.token*",)).plan(layers)
