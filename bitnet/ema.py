"""An average of the latent weights along the way: evaluated beside them, kept in each checkpoint as ema.safetensors.

    average = d * average + (1 - d) * weights      after every update, d = min(decay, (1 + step) / (10 + step))

so that the first steps, from weights that mean nothing, are soon forgotten. The average is a model of its own, whose
codes are those of the averaged latent weights: it costs 4 bytes a parameter. Training never reads it.

`bitnet ema RUN OUT` makes it a run folder, which every other command opens.

Source: Polyak and Juditsky 1992; for ternary layers it is the noise of codes near a boundary that averages out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitnet import _core, checkpoint, ops
from bitnet.command import exit_status
from bitnet.errors import ConfigError
from bitnet.formats.safetensors_file import parts_of
from bitnet.model import BitNetForCausalLM


class WeightAverage:
    """The averaged weights of a model in training, as `model`."""

    def __init__(self, source: BitNetForCausalLM, decay: float) -> None:
        self.decay = decay
        self.model = BitNetForCausalLM(source.config)
        self._pairs = list(zip(self.model.parameters(), source.parameters(), strict=True))
        for own, weight in self._pairs:
            own.copy_(weight)

    def update(self, step: int) -> None:
        """Takes in the weights after a step, counted from 0."""
        share = min(self.decay, (1 + step) / (10 + step))
        with ops.no_grad():
            for own, weight in self._pairs:
                own.copy_(_core.add(own, weight, share, 1.0 - share))


def averaged(run: str | Path) -> BitNetForCausalLM:
    """The averaged model of a run's newest checkpoint, or of a checkpoint. CheckpointError if it has none."""
    saved = checkpoint.open_checkpoint(Path(run))
    model = saved.model()
    model.load_state_dict(saved.average())
    return model


def extract(run: str | Path, out: str | Path) -> Path:
    """Writes the average of a run's newest checkpoint, or of a checkpoint, as a run folder with this one checkpoint."""
    saved = checkpoint.open_checkpoint(Path(run))
    if Path(out).exists():
        raise ConfigError(f"{out} exists already; choose another folder")
    average = parts_of(saved.average())
    return checkpoint.write(out, saved.state["step"], saved.config, average, [], saved.state, saved.tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="bitnet ema", description="Make the averaged weights of a run (--ema) a run folder of their own."
    )
    parser.add_argument("run", type=Path, help="a run or checkpoint folder")
    parser.add_argument("out", type=Path, help="the folder to make")
    args = parser.parse_args(argv)

    def work() -> int:
        print(f"{extract(args.run, args.out)}: the averaged weights; {args.out} opens like any run")
        return 0

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(main())
