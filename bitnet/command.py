"""What the command lines share: the model they work on, and how one ends, with a sentence and a status."""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from functools import partial

from bitnet.errors import BitnetError
from bitnet.formats.source import Progress, Reading

RUN = "run folder, one checkpoint in it, Hugging Face folder or hub id, ONNX folder, .bitnet, .gguf or .onnx file"


REFUSALS = (BitnetError, OSError, MemoryError)  # what a command says in a sentence, without a traceback


def said(error: BaseException) -> str:
    """The sentence of an error; that of memory may come without one."""
    return str(error) or ("there is not enough memory for that" if isinstance(error, MemoryError) else repr(error))


def add_run(parser: argparse.ArgumentParser) -> None:
    """The model that a command works on."""
    parser.add_argument("run", metavar="RUN", help=RUN)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What another project's file does not say."""
    group = parser.add_argument_group("what a file does not say, or says wrong")
    group.add_argument("--activation", choices=("silu", "relu2"), help="of a GGUF file (default: as it says)")
    group.add_argument(
        "--linear",
        choices=("bitlinear", "linear"),
        help="bitlinear: take the matrices of a full-precision checkpoint as the latent weights of ternary layers; "
        "linear: those of a ternary one as they are",
    )
    group.add_argument("--i2s-order", choices=("x86", "arm"), default="x86", help="of I2_S in a GGUF file (x86)")


def reading_of(args: argparse.Namespace) -> Reading:
    """What add_reading's flags say."""
    return Reading(args.activation, args.linear, args.i2s_order)


def bar(what: str) -> Progress:
    """A progress bar over the names of weights, gone when it is full."""
    from tqdm import tqdm

    return partial(tqdm, desc=what, unit="tensor", disable=None, leave=False)


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def exit_status(work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """work()'s own status; 2, with the error in one line, for a request that cannot be met; 130 after Ctrl-C.

    interrupted: what is said then.
    """
    try:
        return work()
    except REFUSALS as error:
        print(f"error: {said(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
