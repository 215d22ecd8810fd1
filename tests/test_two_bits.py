"""Four codes a byte: the published examples, every group size, and the code that means nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.formats.two_bits import pack, unpack

# Rows 0..7 of two columns, and their bytes in a packed Hugging Face file.
HF_CODES = np.array([[-1, 0], [1, -1], [0, 1], [1, 1], [-1, -1], [0, 0], [1, 0], [-1, 1]], np.int8)
HF_BYTES = bytes.fromhex("84491a98")
EXAMPLE = np.array([(i * i + i // 5) % 3 - 1 for i in range(256)], np.int8)
LOW_32 = (
    "54a19568251a89062201484012508454a19568251a89062201484012508454a1"
    "2201484012508454a19568251a89062201484012508454a19568251a89062201"
)
HIGH_32 = (
    "154a562958a4629088402101840512154a562958a4629088402101840512154a"
    "88402101840512154a562958a4629088402101840512154a562958a462908840"
)
HIGH_16 = (
    "14514619669a69a49042082080010514669a69a4904208208001051451461966"
    "9042082080010514514619669a69a49080010514514619669a69a49042082080"
)


@pytest.mark.parametrize(
    ("codes", "data", "group", "high_first"),
    [
        (HF_CODES, HF_BYTES, 4, False),
        (EXAMPLE, bytes.fromhex(LOW_32), 32, False),
        (EXAMPLE, bytes.fromhex(HIGH_32), 32, True),
        (EXAMPLE, bytes.fromhex(HIGH_16), 16, True),
    ],
    ids=["hugging face", "tq2_0", "i2_s x86", "i2_s arm"],
)
def test_published_bytes(codes: np.ndarray, data: bytes, group: int, high_first: bool) -> None:
    packed = pack(codes, group, high_first)
    assert packed.tobytes()[: len(data)] == data
    np.testing.assert_array_equal(unpack(packed, group, high_first), codes.reshape(-1))


@settings(deadline=None)
@given(st.integers(0, 5), st.sampled_from([1, 2, 7, 16, 32, 100]), st.booleans(), st.randoms(use_true_random=False))
def test_what_was_packed_comes_back(groups: int, group: int, high_first: bool, rng: object) -> None:
    codes = np.array([rng.choice((-1, 0, 1)) for _ in range(4 * groups * group)], np.int8)  # type: ignore[attr-defined]
    packed = pack(codes, group, high_first)
    for at, code in enumerate(codes):  # the definition, a code at a time
        place, within = divmod(at, 4 * group)
        i, m = divmod(within, group)
        assert packed[place * group + m] >> (6 - 2 * i if high_first else 2 * i) & 3 == code + 1
    np.testing.assert_array_equal(unpack(packed, group, high_first), codes)


@pytest.mark.parametrize("pair", range(4))
@pytest.mark.parametrize("high_first", [False, True])
def test_the_unused_code_is_refused(pair: int, high_first: bool) -> None:
    data = np.full(64, 0x55, np.uint8)
    data[37] |= 3 << 2 * pair
    with pytest.raises(ValueError, match=r"byte 37 of its codes is 0x.., which holds a 3"):
        unpack(data, 32, high_first)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="100 codes are no multiple of 128"):
        pack(np.zeros(100, np.int8), 32, False)
    with pytest.raises(ValueError, match="33 bytes are no multiple of 32"):
        unpack(np.zeros(33, np.uint8), 32, False)
