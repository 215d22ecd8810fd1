"""What a checkpoint costs in memory: a copy of nothing but the tensor that is written or read.

The unit is one copy of the weights, 4 bytes a parameter. The largest tensor, the embedding, is about 1/8 of it.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from small_runs import pack_numbers

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")

SCRIPT = """
    import sys
    from pathlib import Path
    from bitnet import BitNetConfig, BitNetForCausalLM
    from bitnet.ema import WeightAverage
    from bitnet.trainer import Trainer
    from bitnet.trainer_config import TrainerConfig

    what, moments, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])

    def model(*shape):
        return BitNetForCausalLM(BitNetConfig(*shape, max_position_embeddings=64))

    def trainer(model, out):
        options = {"plots": False, "batch_size": 2, "seq_len": 16, "eval_blocks": 2, "moments": moments}
        return Trainer(model, root / "pack", TrainerConfig(10, **options), out=root / out, log=lambda line: None)

    def status(name):
        return next(int(s.split()[1]) for s in open("/proc/self/status") if s.startswith(name + ":")) * 1024

    small = trainer(model(257, 32, 48, 1, 2), "small")  # what is loaded and set up once
    small.save()
    small.resume()
    large = model(4096, 512, 1408, 4, 8)
    run = None if what == "average" else trainer(large, "large")
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    if what == "average":
        kept = WeightAverage(large, 0.9)
    else:
        getattr(run, what)()
        assert run.keeper.saved == 0
    print((status("VmHWM") - before) / (4 * large.num_parameters()))
"""


def peak(what: str, moments: str, root: Path) -> float:
    """How far one of save, resume and average raises the peak, in copies of the weights."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), what, moments, str(root)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("moments", ["f32", "bf16"])
def test_a_foreground_save_and_a_resume_hold_no_second_copy(tmp_path: Path, moments: str) -> None:
    """Written: views of live memory, and bf16 moments one at a time in f32, at most 1/8 of a copy; a third is allowed.

    Read: a tensor's pages of the file, its f32 and, of bf16 moments, its bf16: 1/8 + 1/8 + 1/16 at most; and the bits
    of one whole bf16 moment, 1/2. One copy is allowed for bf16, half of one for f32.
    """
    pack_numbers(tmp_path)
    assert peak("save", moments, tmp_path) < 1 / 3
    assert peak("resume", moments, tmp_path) < (1 / 2 if moments == "f32" else 1)


def test_a_weight_average_is_one_copy(tmp_path: Path) -> None:
    """One copy is the average itself; half of one more is allowed."""
    pack_numbers(tmp_path)
    assert 0.9 < peak("average", "f32", tmp_path) < 1.5
