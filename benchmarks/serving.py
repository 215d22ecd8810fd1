"""What a server does under load: `bitnet serve` beside its own batch without a server, and beside llama-cpp-python's.

    python benchmarks/serving.py --preset 125m --clients 1 4 8 16 --slots 8 --prompt 128 --gen 64 --threads 2
    python benchmarks/serving.py --beside llama-cpp --llama-python PATH

For each number of clients, every engine has a turn in every round, with the same prompts: `bitnet`, the server, a
process of its own; `in_process`, generate_batch in this one, with as many slots as the server has or as there are
clients, whichever is less; `llama_cpp`, python -m llama_cpp.server, if asked for. A client sends one request after the
other and reads the stream. Prompts are random and new in each round, so nothing of them is held from before, but for
the first --shared tokens. All texts that the server gave have to be those of generate_batch, else the exit status is 1.

The model is the preset's shape with random weights that all engines can run (inference_engines.py), and a tokenizer of
one character for each id, without an end: so every text is --gen tokens long, each sent as soon as it is drawn, and
every id of the vocabulary may be drawn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import history
import httpx
import machine
import numpy as np
import serving_load
import serving_servers
from inference_engines import shared
from interchange import RandomSource
from serving_load import Ask, Prompts, Turn
from turns import REST

from bitnet import BitNetConfig, BitNetForCausalLM, __version__, current_isa, get_threads, set_threads
from bitnet.batching import generate_batch
from bitnet.errors import ConfigError
from bitnet.formats.gguf_export import save_gguf
from bitnet.formats.packing import save_packed
from bitnet.formats.source import assemble
from bitnet.generation_options import head_of, layout_of, load
from bitnet.head import HEADS
from bitnet.layout import LAYOUTS
from bitnet.tokenizer import CharTokenizer

SEED = 20  # of every request: a text depends on its prompt, this, and nothing else
WARM_TOKENS = 4  # of the requests before the first round, which record a step of each size


@dataclass
class Found:
    """What an engine did for one number of clients, a number for each round or each token."""

    about: str
    speeds: list[float] = field(default_factory=list)  # generated tokens a second, of all clients together
    prompt_speeds: list[float] = field(default_factory=list)  # prompt tokens a second, over the same time
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    client_shares: list[float] = field(default_factory=list)  # of one core, which the clients took
    reused: int = 0
    texts: list[str] = field(default_factory=list)
    error: str | None = None

    def add(self, turn: Turn, ask: Ask) -> None:
        """A turn of a server."""
        self.add_texts([reply.text for reply in turn.replies], turn.seconds, ask)
        self.client_shares.append(turn.cpu_seconds / turn.seconds)
        for reply in turn.replies:
            self.first.append(reply.first)
            self.between += reply.between
            self.reused += reply.reused

    def add_texts(self, texts: list[str], seconds: float, ask: Ask) -> None:
        """Texts, and how long all of them took."""
        self.texts += texts
        self.speeds.append(len(texts) * ask.gen / seconds)
        self.prompt_speeds.append(len(texts) * ask.prompt / seconds)


# ---- the model ------------------------------------------------------------------------------------------------------


def random_model(config: BitNetConfig) -> BitNetForCausalLM:
    """Packed, of random weights, with its tokenizer."""
    model = assemble(RandomSource(config), "2")
    vars(model)["tokenizer"] = CharTokenizer(serving_load.alphabet(config.vocab_size))
    return model


@dataclass
class Engines:
    """The model in this process, URLs of the servers, and what each engine is, or why it cannot run."""

    model: BitNetForCausalLM
    urls: dict[str, str]
    about: dict[str, str | Exception]

    @staticmethod
    def start(args: argparse.Namespace, work: Path, stack: ExitStack) -> Engines:
        """All of them, until the stack ends."""
        made = random_model(shared(BitNetConfig.preset(args.preset), args.prompt + args.gen))
        file, context = work / "model.bitnet", args.prompt + args.gen
        save_packed(made, file)
        model = load(str(file), args.layout, args.head)
        same = ["--layout", layout_of(model)]  # what "auto" finds faster is measured: it may differ from time to time
        own = serving_servers.bitnet(file, args.slots, context, args.threads, [*same, *head_flag(args.head)])
        urls = {"bitnet": stack.enter_context(own).url}
        engines = Engines(model, urls, {"bitnet": f"bitnet {__version__}, {current_isa()}"})
        if "llama-cpp" in args.beside:
            try:
                engines.start_llama_cpp(made, args, work / "model.gguf", stack)
            except (OSError, ConfigError, serving_load.ServerError) as error:
                engines.about["llama_cpp"] = error
                print(f"llama-cpp cannot run: {error}", flush=True)
        return engines

    def start_llama_cpp(
        self, made: BitNetForCausalLM, args: argparse.Namespace, file: Path, stack: ExitStack
    ) -> None:  # fmt: skip
        """The model as llama.cpp reads it. Raises OSError, ConfigError, ServerError where that cannot be."""
        self.about["llama_cpp"] = f"llama-cpp-python {serving_servers.llama_version(args.llama_python)}"
        save_gguf(made, file, flavour="llama.cpp", weights="tq2_0", embeddings=args.embeddings)
        server = serving_servers.llama_cpp(args.llama_python, file, args.prompt + args.gen, args.threads)
        url = stack.enter_context(server).url
        serving_load.check_llama_cpp(url, args.prompt)
        self.urls["llama_cpp"] = url


def head_flag(head: str | None) -> list[str]:
    """Of `bitnet serve`."""
    return [] if head is None else ["--head", head]


# ---- turns ----------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, engines: Engines, clients: int) -> dict[str, Found]:
    """What each engine did with so many clients."""
    model = engines.model
    ask = Ask(args.prompt, args.gen, args.temperature, SEED)
    at_once = min(args.slots, clients)
    found = {name: Found(str(about), error=str(about) if isinstance(about, Exception) else None)
             for name, about in engines.about.items()}  # fmt: skip
    found["in_process"] = Found(f"generate_batch, {at_once} slots")

    def prompts(number: int, requests: int) -> Prompts:
        return serving_load.draw(model.config.vocab_size, clients, requests, ask.prompt, args.shared, [clients, number])

    warm = Ask(ask.prompt, min(WARM_TOKENS, ask.gen), ask.temperature, SEED)
    for number in range(args.rounds + 1):
        print(f"{clients} clients, {f'round {number} of {args.rounds}' if number else 'warming up'}", file=sys.stderr)
        given, asked = (prompts(number, args.requests), ask) if number else (prompts(0, 1), warm)
        turns: dict[str, Callable[[Prompts, Ask], None]] = {
            name: partial(served, found[name], url) for name, url in engines.urls.items()
        }
        turns["in_process"] = partial(in_process, found["in_process"], model, at_once)
        for name, turn in turns.items():
            if found[name].error is not None:
                continue
            time.sleep(REST)
            try:
                turn(given, asked)
            except (serving_load.ServerError, httpx.HTTPError) as error:
                if name == "bitnet":
                    raise
                found[name].error = f"{type(error).__name__}: {error}"
                print(f"{name} cannot go on: {found[name].error}", flush=True)
        if number == 0:  # of which nothing is kept but whether it worked
            found = {name: Found(one.about, error=one.error) for name, one in found.items()}
    return found


def served(found: Found, url: str, prompts: Prompts, ask: Ask) -> None:
    """A turn of a server."""
    found.add(serving_load.load(url, prompts, ask), ask)


def in_process(found: Found, model: BitNetForCausalLM, slots: int, prompts: Prompts, ask: Ask) -> None:
    """The same texts without a server."""
    given = serving_load.in_order(prompts)
    start = time.perf_counter()
    texts = generate_batch(model, given, ask.gen, ask.temperature, seed=ask.seed, slots=slots)
    found.add_texts(texts, time.perf_counter() - start, ask)


# ---- what is made of them -------------------------------------------------------------------------------------------


def spread(seconds: list[float]) -> dict[str, float]:
    """The middle, and what 95 of 100 do not exceed; nothing of an empty list."""
    if not seconds:
        return {}
    return {"median": statistics.median(seconds), "p95": float(np.percentile(seconds, 95, method="inverted_cdf"))}


def report(one: Found, base: Found) -> dict[str, Any]:
    """What is known of one engine. base: in_process, whose speed its own is set beside."""
    if one.error is not None:
        return {"error": one.error}
    ratios = [speed / other for speed, other in zip(one.speeds, base.speeds, strict=True)]
    return {
        "about": one.about,
        "tokens_per_second": statistics.median(one.speeds),
        "prompt_tokens_per_second": statistics.median(one.prompt_speeds),
        "samples": one.speeds,
        "first_token_seconds": spread(one.first),
        "between_tokens_seconds": spread(one.between),
        "share_of_in_process": statistics.median(ratios),
        "client_core_share": statistics.median(one.client_shares) if one.client_shares else None,
        "texts": len(one.texts),
        "reused_tokens": one.reused,
    }


def table(reports: dict[str, Any]) -> str:
    """Speeds of all clients together with their range, times in milliseconds, and how the texts compare."""
    lines = [f"{'':11} {'tokens/s':>24} {'prompt':>8} {'first token, ms':>16} {'between, ms':>14} "
             f"{'of in_process':>13} {'clients took':>12} {'equal texts':>13}",
             f"{'':46}{'median':>9} {'95 %':>6} {'median':>7} {'95 %':>6}"]  # fmt: skip
    for name, one in reports.items():
        if "error" in one:
            lines.append(f"{name:11} cannot run: {one['error'].splitlines()[-1]}")
            continue
        samples, core = one["samples"], one["client_core_share"]
        speed = f"{one['tokens_per_second']:,.1f} ({min(samples):,.1f} .. {max(samples):,.1f})"
        prompt, share = f"{one['prompt_tokens_per_second']:,.0f}", f"{one['share_of_in_process']:.1%}"
        first, between = milliseconds(one["first_token_seconds"], 0), milliseconds(one["between_tokens_seconds"], 1)
        taken = "-" if core is None else f"{core:.0%} core"
        equal = f"{one['equal_texts']} of {one['texts']}" if "equal_texts" in one else "-"
        lines.append(f"{name:11} {speed:>24} {prompt:>8} {first[0]:>9} {first[1]:>6} {between[0]:>7} {between[1]:>6} "
                     f"{share:>13} {taken:>12} {equal:>13}")  # fmt: skip
    return "\n".join(lines)


def milliseconds(seconds: dict[str, float], digits: int) -> tuple[str, str]:
    """What spread() gave, for the table."""
    if not seconds:
        return "-", "-"
    return f"{1000 * seconds['median']:,.{digits}f}", f"{1000 * seconds['p95']:,.{digits}f}"


def entries(reports: dict[str, Any]) -> list[dict[str, Any]]:
    """What compare.py compares: the speed of each engine and, of servers, both times."""
    found = []
    for name, one in reports.items():
        found.append(history.entry(name, one.get("samples", []), "tokens/s", True))
        for kind in ("first_token", "between_tokens"):
            times = one.get(f"{kind}_seconds")
            if times:
                found.append(history.entry(f"{name} {kind}", [times["median"]], "seconds", False, p95=times["p95"]))
    return found


def bench(args: argparse.Namespace, here: dict[str, Any], work: Path, runs: list[history.Run]) -> bool:
    """A run for each number of clients, added as it ends; whether all texts of the server were the batch's own."""
    good = True
    with ExitStack() as stack:
        engines = Engines.start(args, work, stack)
        head, layout = head_of(engines.model), layout_of(engines.model)
        print(f"{args.preset}, {layout} bits a ternary weight, head {head}; {engines.about['bitnet']}")
        for clients in args.clients:
            names = "preset slots prompt gen shared threads requests rounds temperature embeddings".split()
            settings = {name: getattr(args, name) for name in names}
            settings |= {"clients": clients, "head": head, "layout": layout}
            found = measure(args, engines, clients)
            reports = {name: report(one, found["in_process"]) for name, one in found.items()}
            pairs = zip(found["bitnet"].texts, found["in_process"].texts, strict=True)
            reports["bitnet"]["equal_texts"] = sum(one == other for one, other in pairs)
            equal = reports["bitnet"]["equal_texts"] == reports["bitnet"]["texts"]
            print("\n" + ", ".join(f"{name} {value}" for name, value in settings.items()))
            print(table(reports), flush=True)
            runs.append(history.run("serving", settings, here, entries(reports), texts_equal=equal, **reports))
            good = good and equal
    if not good:
        print("the server gave texts that generate_batch does not give", file=sys.stderr)
    return good


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="What a server does under load.")
    parser.add_argument("--preset", default="125m", metavar="P", help="shape of which preset (125m)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16], metavar="N",
                        help="that send at once (1 4 8 16)")  # fmt: skip
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="sequences decoded at once (8)")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of each prompt (128)")
    parser.add_argument("--gen", type=int, default=64, metavar="N", help="tokens of each text (64)")
    parser.add_argument("--shared", type=int, default=0, metavar="N", help="tokens with which all prompts begin (0)")
    parser.add_argument("--requests", type=int, default=2, metavar="R", help="of each client in a round (2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="turns of each engine (3)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: the likeliest (1)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of each engine (one a core)")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto",
                        help="bits of bitnet's ternary weights in memory (auto)")  # fmt: skip
    parser.add_argument("--head", choices=HEADS, help="output head of bitnet (as the file has it, bf16)")
    parser.add_argument("--beside", nargs="+", choices=("llama-cpp",), default=[], metavar="S",
                        help="llama-cpp: the server of llama-cpp-python too")  # fmt: skip
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH",
                        help="an interpreter with llama-cpp-python[server] (default: this one)")  # fmt: skip
    parser.add_argument("--embeddings", choices=("f16", "q8_0"), default="f16",
                        help="and output head of llama.cpp, whose other weights are TQ2_0 (f16)")  # fmt: skip
    history.add_arguments(parser)
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a sentence for numbers that make no load."""
    for name in ("slots", "gen", "requests", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if min(args.clients) < 1:
        parser.error(f"--clients must be at least 1, not {min(args.clients)}")
    if not 0 <= args.shared < args.prompt:
        parser.error(f"--shared must be 0 to {args.prompt - 1}, less than the prompt, not {args.shared}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    check(parser, args)
    set_threads(args.threads)
    args.threads = get_threads()
    here = machine.fingerprint()
    print(machine.one_line(here))
    runs: list[history.Run] = []
    with ExitStack() as stack:
        stack.callback(lambda: history.keep(args, runs) if runs else None)  # whatever comes later
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        good = bench(args, here, work, runs)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
