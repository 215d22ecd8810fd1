"""Packed files written, mapped, verified and loaded; codes and streams that are refused; tensors over buffers."""

import tempfile
from pathlib import Path

import growth
import numpy as np

from bitnet import BitNetConfig, BitNetForCausalLM, _core, no_grad
from bitnet.formats.bitnet_file import BitnetFile
from bitnet.formats.packing import load_packed, save_packed
from bitnet.tokenizer import ByteTokenizer

MODEL = BitNetForCausalLM(BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=16))
FIFTHS = _core.pack_fifths(_core.Tensor(np.ones((20, 40), np.int8)))
STREAM = _core.rans_encode(FIFTHS)


def refused(call: object, *arguments: object) -> None:
    try:
        call(*arguments)  # type: ignore[operator]
    except ValueError:
        return
    raise AssertionError("not refused")


def step() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.bitnet")
        save_packed(MODEL, path, coded=True, tokenizer=ByteTokenizer())
        model = load_packed(path)
        with no_grad():
            assert model([[1, 2]]).shape == (1, 2, 257)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        refused(load_packed, path)
        path.write_bytes(data[:-1])
        refused(BitnetFile, path)


def core() -> None:
    _ = _core.unpack_fifths(FIFTHS, 20, 40), _core.rans_decode(STREAM, FIFTHS.size)
    refused(_core.unpack_fifths, b"\xff" * FIFTHS.size, 20, 40)
    refused(_core.unpack_fifths, FIFTHS, 20, 41)
    refused(_core.pack_fifths, _core.Tensor(np.full((2, 2), 3, np.int8)))
    refused(_core.rans_decode, STREAM[:-1], FIFTHS.size)
    refused(_core.rans_decode, STREAM, 1 << 40)
    tensor = _core.from_buffer(FIFTHS, "i8", (FIFTHS.size,))
    _ = tensor.numpy(), tensor.detach()
    refused(_core.from_buffer, FIFTHS, "i8", (1,))


growth.assert_none(step, rounds=20)
growth.assert_none(core)
