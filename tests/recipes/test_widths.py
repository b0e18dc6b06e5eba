"""How flags decide widths."""

import itertools

import pytest

from lit_clipq.errors import ConfigError
from lit_clipq.recipes import BitWidths


def test_the_default_is_eight_everywhere():
    widths = BitWidths.resolve({})
    assert {widths.of(name) for name in ("clip.visual.conv1", "clip.token_embedding", "head.proj")} == {(8, 8)}


def test_more_specific_flags_win():
    widths = BitWidths.resolve({"bits": 8, "text_bits": 6, "text_activation_bits": 16, "vision_weight_bits": 4})
    assert widths.of("clip.visual.conv1") == (4, 8)
    assert widths.of("clip.transformer.resblocks.0.mlp.c_fc") == (6, 16)
    assert widths.of("head.proj") == (8, 8)


def test_a_classifier_is_an_image_tower():
    assert BitWidths.resolve({"bits": 8, "vision_bits": 4}).of("vision.blocks.0.mlp.fc1") == (4, 4)


def test_operand_flags_reach_every_tower():
    widths = BitWidths.resolve({"weight_bits": 4, "activation_bits": 8})
    assert {widths.of(name) for name in ("clip.visual.conv1", "clip.text_projection", "head.proj")} == {(4, 8)}


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
    assert BitWidths.resolve({"bits": 32}).all_float()
    assert not BitWidths.resolve({"bits": 32, "text_weight_bits": 8}).all_float()
    assert BitWidths.resolve({"vision_bits": 32, "text_bits": 32}).all_float(("vision", "text"))
    assert not BitWidths.resolve({"bits": 32}, {"clip.visual.*": "w4"}).all_float()


PATTERNS = {"clip.visual.*": "w4a8", "*.mlp.*": "a16", "clip.visual.*.mlp.c_proj": "float", "head.*": 6}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip.visual.conv1", (4, 8)),
        ("clip.visual.transformer.resblocks.0.mlp.c_fc", (4, 16)),
        ("clip.visual.transformer.resblocks.0.mlp.c_proj", (32, 32)),
        ("clip.transformer.resblocks.0.mlp.c_proj", (5, 16)),
        ("clip.text_projection", (5, 5)),
        ("head.proj", (6, 6)),
    ],
)
def test_of_several_patterns_that_match_the_last_one_wins_for_what_it_says(name, expected):
    assert BitWidths.resolve({"bits": 5}, PATTERNS).of(name) == expected


@pytest.mark.parametrize("widths", ["", "w", "8w", "w4x8", "w1", "w4a17", "w-4", 1, 17, True, None, [4, 8]])
def test_widths_of_a_pattern_that_cannot_be_are_refused_with_the_pattern(widths):
    with pytest.raises(ConfigError, match=r"clip\.visual\.\*"):
        BitWidths.resolve({}, {"clip.visual.*": widths})
