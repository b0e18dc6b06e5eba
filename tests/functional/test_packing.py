"""Dense bit packing, against a string of bits."""

import pytest
import torch

from lit_clipq.functional.packing import pack_codes, packed_size, unpack_codes

WIDTHS = range(2, 17)


def by_hand(codes: list[int], bits: int) -> list[int]:
    stream = "".join(format(code % 2**bits, f"0{bits}b")[::-1] for code in codes)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]


def every_code(bits: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), generator=generator)
    codes[: min(2, count)] = torch.tensor([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1])[:count]
    return codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_equals_a_string_of_bits(bits):
    codes = every_code(bits, 37)
    assert pack_codes(codes, bits).tolist() == by_hand(codes.tolist(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (3, 5, 7), ()])
def test_unpacking_is_the_exact_inverse(bits, shape):
    codes = every_code(bits, torch.Size(shape).numel()).reshape(shape)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(codes.numel(), bits),)
    restored = unpack_codes(packed, bits, shape)
    assert restored.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert torch.equal(restored.long(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_bit_is_wasted(bits):
    assert packed_size(8000, bits) == 1000 * bits


def test_strided_codes_are_read_in_row_major_order():
    codes = every_code(3, 20).reshape(4, 5).T
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, (5, 4)).long(), codes)


@pytest.mark.parametrize("codes", [[-9], [8]])
def test_codes_that_do_not_fit_are_refused(codes):
    with pytest.raises(ValueError, match=r"expected codes in -8\.\.7"):
        pack_codes(torch.tensor(codes), 4)


def test_a_wrong_size_is_refused():
    packed = pack_codes(torch.zeros(10, dtype=torch.int8), 5)
    for wrong in (packed[:-1], packed.short()):
        with pytest.raises(ValueError, match="expected 7 bytes for 10 codes of 5 bits"):
            unpack_codes(wrong, 5, (10,))
