"""Command line `bitnet serve`: a server with the interface of OpenAI's API, and a page to chat on.

    bitnet serve runs/nano-stdlib-001                    http://127.0.0.1:8080, also in a browser
    bitnet serve nano.bitnet --slots 8 --port 9000 --api-key-file key.txt
    curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' \\
         -d '{"prompt": "def ", "max_tokens": 32, "temperature": 0}'

Requests are decoded together, up to --slots at once, and each gets the text it would get alone. Needs the packages
starlette and uvicorn: pip install 'bitnet[server]'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet._core import current_isa, get_threads
from bitnet.cache import DTYPES
from bitnet.chat_template import NAMES, choose
from bitnet.command import add_run, exit_status
from bitnet.errors import ConfigError
from bitnet.generation_options import add_form_flags, add_lora_flag, head_of, layout_of, load
from bitnet.report_text import size
from bitnet.text_stream import tokenizer_of
from bitnet.threads import use_threads

if TYPE_CHECKING:
    from bitnet.server.app import Application, Service


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    head, _, rest = (__doc__ or "").partition(": ")[2].partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="bitnet serve", description=head[:1].upper() + head[1:], epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_run(parser)
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                       help="address to listen on; 0.0.0.0: from everywhere (127.0.0.1)")  # fmt: skip
    where.add_argument("--port", type=int, default=8080, metavar="N", help="0: any that is free (8080)")
    where.add_argument("--name", metavar="ID", help="of the model, as clients see it (the run's own)")
    where.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line, of which requests need one")
    where.add_argument("--origin", action="append", default=[], metavar="URL",
                       help="pages of this origin may use the server from a browser; *: all; repeatable")  # fmt: skip
    where.add_argument("--quiet", action="store_true", help="no line for each request")
    room = parser.add_argument_group("room and speed")
    room.add_argument("--slots", type=int, default=4, metavar="N", help="sequences that are decoded at once (4)")
    room.add_argument("--queue", type=int, default=256, metavar="N", help="texts that may wait for a slot (256)")
    room.add_argument("--context", type=int, metavar="N", help="tokens of a sequence (as many as the model reads)")
    room.add_argument("--cache-dtype", choices=tuple(DTYPES), default="f32", help="of keys and values (f32)")
    room.add_argument("--threads", type=int, default=0, metavar="N", help="kernel threads (one a core)")
    add_form_flags(room)
    text = parser.add_argument_group("text, where a request does not say")
    text.add_argument("--template", choices=NAMES, default="auto", help="how conversations are written (auto)")
    text.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: the likeliest (1, as OpenAI's)")
    text.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest that have probability P together")
    text.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    text.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less")
    add_lora_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C, 143 after SIGTERM."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: serve(args), "stopped")


def open_service(args: argparse.Namespace) -> Service:
    """The model, packed, and its engine. Raises CheckpointError, ConfigError."""
    from bitnet.server.answers import Defaults
    from bitnet.server.app import Service
    from bitnet.server.engine import Engine

    defaults = Defaults(args.temperature, args.top_p, args.top_k, args.repetition_penalty)
    defaults.check()
    model = load(args.run, args.layout, args.head, args.lora)
    tokenizer = tokenizer_of(model)
    template = choose(args.template, tokenizer)
    engine = Engine(model, args.slots, args.context, args.cache_dtype)
    name = args.name or Path(args.run).resolve().stem
    print(
        f"{name}: {layout_of(model)} bits a ternary weight, head {head_of(model)}, template {template.name}; "
        f"{engine.slots} slots of {engine.capacity:,} tokens, {size(engine.cache_bytes)} of keys and values",
        flush=True,
    )
    return Service(name, engine, tokenizer, template, defaults, args.queue)


def serve(args: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    try:
        from bitnet.server.app import Access, Application
        from bitnet.server.listen import listen
    except ImportError as error:
        raise ConfigError(f"the server needs the package {error.name}: pip install 'bitnet[server]'") from None
    use_threads(args.threads)
    print(f"cpu: {current_isa()}, {get_threads()} threads", flush=True)
    access = Access(_keys(args.api_key_file), tuple(args.origin))
    log = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    application: Application = Application(lambda: open_service(args), access, log)
    return listen(application, args.host, args.port)


def _keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    keys = tuple(filter(None, (line.strip() for line in path.read_text(encoding="utf-8").splitlines())))
    if not keys:
        raise ConfigError(f"{path} holds no key")
    return keys


if __name__ == "__main__":
    raise SystemExit(main())
