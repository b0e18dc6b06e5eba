"""How flags decide widths."""

import itertools

import pytest

from lit_clipq.errors import ConfigError
from lit_clipq.recipes import BitWidths


def test_the_default_is_eight_everywhere():
    assert set(vars(BitWidths.resolve({})).values()) == {8}


def test_more_specific_flags_win():
    widths = BitWidths.resolve({"bits": 8, "text_bits": 6, "text_activation_bits": 16, "vision_weight_bits": 4})
    assert widths.of("vision") == (4, 8)
    assert widths.of("text") == (6, 16)
    assert widths.of("head") == (8, 8)


def test_operand_flags_reach_every_tower():
    widths = BitWidths.resolve({"weight_bits": 4, "activation_bits": 8})
    assert {widths.of(tower) for tower in ("vision", "text", "head")} == {(4, 8)}


@pytest.mark.parametrize(("tower", "operand"), itertools.product(("vision", "text"), ("weight", "activation")))
def test_equal_ranks_that_disagree_are_refused_and_name_the_way_out(tower, operand):
    flags = {f"{tower}_bits": 4, f"{operand}_bits": 8}
    with pytest.raises(ConfigError, match=f"{tower}_{operand}_bits"):
        BitWidths.resolve(flags)
    other = "activation" if operand == "weight" else "weight"
    resolved = BitWidths.resolve({**flags, f"{tower}_{operand}_bits": 6})
    assert getattr(resolved, f"{tower}_{operand}") == 6
    assert getattr(resolved, f"{tower}_{other}") == 4


def test_equal_ranks_that_agree_are_fine():
    assert BitWidths.resolve({"vision_bits": 4, "weight_bits": 4}).vision_weight == 4


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 31, 33, 64])
@pytest.mark.parametrize("flag", ["bits", "text_bits", "weight_bits", "vision_activation_bits"])
def test_widths_that_no_grid_has_are_refused(flag, bits):
    with pytest.raises(ConfigError, match=f"{flag} must be 2 to 16"):
        BitWidths.resolve({flag: bits})


def test_all_float():
    assert BitWidths.resolve({"bits": 32}).all_float
    assert not BitWidths.resolve({"bits": 32, "text_weight_bits": 8}).all_float
