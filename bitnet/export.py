"""Command line `bitnet export`: a trained model in the form that another program reads."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.agreement import Logits, compare_logits, logits_of, tokens_of
from bitnet.command import add_run, bar, exit_status, peak_memory
from bitnet.durable import refuse_existing
from bitnet.errors import ConfigError
from bitnet.formats.source import Progress, Reading
from bitnet.model import BitNetForCausalLM
from bitnet.pretrained import is_onnx, open_model, open_without_copies


@dataclass(frozen=True)
class Target:
    """suffix: what is added to the run's name where no --out says otherwise; options: the flags that it knows."""

    suffix: str
    options: tuple[str, ...]
    next: str


TARGETS = {
    "hf": Target("-hf", ("dtype",), "transformers.AutoModelForCausalLM.from_pretrained({out!r})"),
    "hf-packed": Target(
        "-hf-packed", ("dtype", "linear_class"), "transformers.AutoModelForCausalLM.from_pretrained({out!r})"
    ),
    "gguf": Target(
        ".gguf",
        ("flavour", "weights", "embeddings", "i2s_order", "force_activation"),
        "llama-cli -m {out}, or bitnet generate {out} -p TEXT",
    ),
    "onnx": Target("-onnx", ("weights",), "onnxruntime_genai.Model({out!r}), or bitnet generate {out} -p TEXT"),
    "bitnet": Target(".bitnet", ("coded", "embeddings"), "bitnet info {out}, or bitnet generate {out} -p TEXT"),
}

FORMS = """\
  hf         a folder for transformers: latent weights, quantized as it runs; can be trained on
  hf-packed  a folder for transformers: codes in two bits and scales, as microsoft/bitnet-b1.58-2B-4T is published
  gguf       one file; --flavour chooses whose: llama.cpp (SiLU with sub-norms), bitnet.cpp and ik (ReLU2 too), llama
             (no sub-norms); what a program would compute wrongly is refused, with the flavour that works
  onnx       a folder for onnxruntime and onnxruntime-genai, the integers bit for bit; or OUT.onnx, the model alone
  bitnet     one file for this package, as bitnet pack writes it"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet export",
        description="Write a model in the form that another program reads:\n\n" + FORMS,
        epilog="example: bitnet export runs/nano-stdlib-001 --to gguf --flavour llama.cpp --verify",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--to", required=True, choices=TARGETS, help="the form")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="default: RUN's name with a suffix, here")
    parser.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="TEXT",
        help="read the result back (run it, for onnx) and compare its logits with the source's on TEXT",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out, such as one refused")
    chosen = parser.add_argument_group("choices of a form")
    chosen.add_argument("--flavour", choices=("llama.cpp", "bitnet.cpp", "ik", "llama"), help="gguf: whose")
    chosen.add_argument("--weights", metavar="TYPE", help="gguf: tq2_0, tq1_0, i2_s, f16, f32; onnx: int8, int2")
    chosen.add_argument("--embeddings", metavar="TYPE", help="gguf: f16, f32, bf16, q8_0; bitnet: bf16, f32")
    chosen.add_argument("--dtype", choices=("f32", "bf16"), help="hf: of all but codes (bf16 if that loses nothing)")
    chosen.add_argument("--linear-class", choices=("autobitlinear", "bitlinear"), help="hf-packed (autobitlinear)")
    chosen.add_argument("--i2s-order", choices=("x86", "arm"), help="gguf, bitnet.cpp: order of bytes (x86)")
    chosen.add_argument("--force-activation", action="store_true", default=None, help="gguf: although it runs wrongly")
    chosen.add_argument("--coded", action="store_true", default=None, help="bitnet: entropy-code what gets smaller")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    target = TARGETS[args.to]
    options = _options(args, target)
    out = args.out or Path(Path(args.run).resolve().with_suffix("").name + target.suffix)
    refuse_existing(out, args.force, folder=out.is_dir())  # before anything is read; the writer knows its own kind
    start = time.perf_counter()
    model, provenance = open_without_copies(args.run, Reading(), bar("reading"))
    if args.no_tokenizer:
        vars(model)["tokenizer"] = None
    write(model, args.to, out, options, provenance, args.force, bar("writing"))
    print(written(out, time.perf_counter() - start))
    if args.verify is not None:
        print(verify(model, out, args.verify or None))
    print(f"next: {target.next.format(out=str(out))}")
    return 0


def _options(args: argparse.Namespace, target: Target) -> dict[str, Any]:
    """The flags of this form that were given; ConfigError for one of another form."""
    given = {}
    for name in sorted({name for other in TARGETS.values() for name in other.options}):
        value = getattr(args, name)
        if value is None:
            continue
        if name not in target.options:
            forms = ", ".join(form for form, other in TARGETS.items() if name in other.options)
            raise ConfigError(f"--{name.replace('_', '-')} is a choice of {forms}, not of {args.to}")
        given[name] = value
    if args.to == "gguf" and "flavour" not in given:
        raise ConfigError("--to gguf needs a --flavour: llama.cpp, bitnet.cpp, ik or llama (bitnet export --help)")
    return given


def write(
    model: BitNetForCausalLM,
    form: str,
    out: Path,
    options: dict[str, Any],
    provenance: dict[str, str],
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a model in one of TARGETS; options: keyword arguments of its writer."""
    if form in ("hf", "hf-packed"):
        from bitnet.formats.hf_export import save_hf

        save_hf(model, out, packed=form == "hf-packed", force=force, progress=progress, **options)
    elif form == "gguf":
        from bitnet.formats.gguf_export import save_gguf

        save_gguf(model, out, force=force, progress=progress, **options)
    elif form == "onnx":
        from bitnet.formats.onnx_export import save_onnx

        save_onnx(model, out, force=force, progress=progress, **options)
    else:
        from bitnet.formats.packing import save_packed

        coded, floats = options.get("coded", False), options.get("embeddings")
        save_packed(model, out, coded=coded, floats=floats, provenance=provenance, force=force, progress=progress)


def verify(model: BitNetForCausalLM, out: Path, text: str | None) -> str:
    """One line: how far the logits of what was written are from the model's, and who read it."""
    tokens = tokens_of(model, getattr(model, "tokenizer", None), text)
    if is_onnx(out):
        from bitnet.formats.onnx_run import onnx_logits

        again: Logits = onnx_logits(out)
        reader = "run by onnxruntime"
    else:
        again = logits_of(open_model(out, Reading()))
        reader = "read back"
    return f"{reader}: {compare_logits(logits_of(model)(tokens), again(tokens))}"


def written(path: Path, seconds: float) -> str:
    """One line: size, time and memory that it took."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(path.name + "*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    return f"{path}: {size:,} bytes, {seconds:.1f} s, peak memory {peak_memory() / 1e9:.2f} GB"


if __name__ == "__main__":
    raise SystemExit(main())
