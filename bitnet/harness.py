"""Command line `bitnet lm-eval`: the tasks of EleutherAI's lm-evaluation-harness, beside published results.

Tasks are run one after the other. One whose data cannot be had is named with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet.command import add_run, exit_status
from bitnet.errors import BitnetError, ConfigError
from bitnet.generate import describe
from bitnet.generation_options import add_form_flags
from bitnet.published import COLUMNS, PAPER_TASKS, ROWS

MEANING = """\
acc: share of questions whose right answer got the highest probability; acc_norm: highest probability per character of
the answer. +-: standard error."""
ZERO_SHOT = "The published accuracies are zero-shot, but for 2B-4T, which its report measured in ways of its own."


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet lm-eval",
        description="Runs tasks of EleutherAI's lm-evaluation-harness (pip install 'bitnet[eval]') on a model.",
        epilog="example: bitnet lm-eval runs/700m-001 --tasks paper --limit 200 --json out.json; the harness fetches "
        "each task's questions from the Hugging Face hub once and keeps them",
    )
    add_run(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help="names of the harness, patterns such as 'mmlu_*', files of a task, or paper: those of the paper's table "
        f"({', '.join(PAPER_TASKS)})",
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="more tasks, as .yaml files with their data")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument(
        "--limit", type=float, metavar="N", help="the first N questions of each task, or a share below 1"
    )
    parser.add_argument("--chat", action="store_true", help="put questions as messages, by the model's chat template")
    parser.add_argument("--offline", action="store_true", help="use only data that is on this machine")
    parser.add_argument("--batch-size", metavar="N", help="rows of one pass at most (default: what makes 4096 tokens)")
    parser.add_argument(
        "--max-length", type=int, metavar="T", help="tokens read at most (default: the model's positions)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there too")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core; never changes a number")
    add_form_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    if args.limit is not None and args.limit <= 0:
        raise ConfigError(f"--limit must be above 0, not {args.limit:g}")
    if args.include_path is not None and not args.include_path.is_dir():
        raise ConfigError(f"there is no folder {args.include_path}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from bitnet.lm_eval_model import BitNetLM
    except ImportError as error:
        raise ConfigError(
            f"bitnet lm-eval needs the lm-evaluation-harness (pip install 'bitnet[eval]'): {error}"
        ) from None
    manager, names = find_tasks(args.tasks, args.include_path)
    lm = BitNetLM(
        args.run,
        batch_size=args.batch_size,
        max_length=args.max_length,
        layout=args.layout,
        head=args.head,
        threads=args.threads,
    )
    print(describe(lm.model), file=sys.stderr)
    start = time.perf_counter()
    limit = args.limit if args.limit is None or args.limit < 1 else int(args.limit)
    report = Report()
    try:
        for name in names:
            run_task(
                lm, manager, name, report, num_fewshot=args.num_fewshot, limit=limit, apply_chat_template=args.chat
            )
    finally:
        if report.results:
            print(report.text())
        for name, reason in report.failed.items():
            print(f"{name} was not run: {reason}", file=sys.stderr)
    print(
        f"{time.perf_counter() - start:,.0f} s, {lm.scorer.tokens_run:,} tokens run for scores "
        f"({lm.scorer.tokens_asked:,} without what they share)",
        file=sys.stderr,
    )
    if args.json is not None:
        where = {"run": args.run, "step": getattr(lm.model, "step", None), "limit": limit, "chat": args.chat}
        report.write(args.json, where)
    if not report.results:
        raise ConfigError("no task could be run")
    return 0


def find_tasks(wanted: Sequence[str], folder: Path | None) -> tuple[Any, list[str]]:
    """The harness's TaskManager, and names of tasks, each once, with commas, patterns and "paper" taken apart.

    The harness's own tasks, thousands of files, are read only for names that `folder` does not have. ConfigError
    for an unknown name.
    """
    from lm_eval.tasks import TaskManager

    words = [word for item in wanted for word in item.split(",") if word]
    include = None if folder is None else str(folder)
    manager = TaskManager(include_path=include, include_defaults=False)
    if not all(_matches(manager, word) for word in words):
        manager = TaskManager(include_path=include)
    names: list[str] = []
    for word in words:
        found = _matches(manager, word)
        if not found:
            raise ConfigError(f"the harness has no task {word!r} (lm_eval ls tasks prints those it has)")
        names += [name for name in found if name not in names]
    return manager, names


def _matches(manager: Any, word: str) -> list[str]:
    if word == "paper":
        return PAPER_TASKS if set(PAPER_TASKS) <= set(manager.all_tasks) else []
    if Path(word).suffix in (".yaml", ".yml") and Path(word).is_file():
        return [word]
    found: list[str] = manager.match_tasks([word])
    return found


def run_task(lm: Any, manager: Any, name: str, report: Report, **options: Any) -> None:
    """One task, or group of them, into the report: what it gave, or why it could not be run."""
    from lm_eval import simple_evaluate

    print(f"{name} ...", file=sys.stderr)
    try:
        manager.load([name])
    except Exception as error:  # whatever the network, the hub, a file or the task's own code raises
        report.failed[name] = f"its data cannot be had: {_first_line(error)}"
        return
    try:
        results = simple_evaluate(model=lm, tasks=[name], task_manager=manager, log_samples=False, **options)
    except BitnetError as error:
        report.failed[name] = _first_line(error)
        return
    report.add(results)


class Report:
    """What tasks gave. results: metrics by task; counts: questions; shots: examples before each; failed: reasons."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, int] = {}
        self.shots: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def add(self, results: dict[str, Any]) -> None:
        """Takes over what simple_evaluate gives."""
        self.results |= results["results"]
        self.counts |= {name: counts["effective"] for name, counts in results.get("n-samples", {}).items()}
        self.shots |= results.get("n-shot", {})

    def metrics(self, name: str) -> list[tuple[str, float, float | None]]:
        """(metric, value, standard error) of a task."""
        fields = self.results[name]
        found = []
        for key, value in fields.items():
            metric, _, way = key.partition(",")
            if not way or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = fields.get(f"{metric}_stderr,{way}")
            label = metric if way == "none" else f"{metric} ({way})"
            found.append((label, float(value), error if isinstance(error, int | float) else None))
        return found

    def value(self, name: str, metric: str) -> float | None:
        """One metric of a task, None where it was not measured."""
        if name not in self.results:
            return None
        return next((value for label, value, _ in self.metrics(name) if label == metric), None)

    def text(self) -> str:
        """The table of all metrics; below it, where there are any of the paper's tasks, that of the paper."""
        lines = [("task", "shots", "questions", "metric", "value", "+-")]
        for name in self.results:
            head = (name, str(self.shots.get(name, "")), f"{self.counts[name]:,}" if name in self.counts else "")
            for metric, value, error in self.metrics(name):
                lines.append((*head, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
                head = ("", "", "")
        text = aligned(lines, "<>><>>")
        if any(task in self.results for task in COLUMNS.values()):
            text += f"\n\n{self.beside_published()}\n{ZERO_SHOT}"
        return f"{text}\n\n{MEANING}"

    def beside_published(self) -> str:
        """Accuracy in percent on the paper's tasks: this model, published ones, and where those were published."""
        lines = [("", *COLUMNS, "mean", "")]
        for metric in ("acc", "acc_norm"):
            own = [self.value(task, metric) for task in COLUMNS.values()]
            known = [value for value in own if value is not None]
            mean = f"{100 * sum(known) / len(known):.1f}" if len(known) == len(own) else "-"
            lines.append((f"this model, {metric}", *("-" if v is None else f"{100 * v:.1f}" for v in own), mean, ""))
        for row in ROWS:
            mean = f"{row.average or sum(row.accuracy) / len(row.accuracy):.1f}"
            lines.append((row.name, *(f"{value:.1f}" for value in row.accuracy), mean, row.source))
        return aligned(lines, "<" + ">" * (len(COLUMNS) + 1) + "<")

    def write(self, path: Path, where: dict[str, Any]) -> None:
        """All of it as JSON."""
        from lm_eval import __version__
        from lm_eval.utils import handle_non_serializable

        fields = where | {"harness": __version__, "results": self.results, "questions": self.counts}
        fields |= {"shots": self.shots, "failed": self.failed}
        path.write_text(json.dumps(fields, indent=1, default=handle_non_serializable) + "\n", encoding="utf-8")


def aligned(lines: Sequence[Sequence[str]], sides: str) -> str:
    """Columns as wide as their widest cell, to the left "<" or right ">"."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True))
        for line in lines
    )
    return "\n".join(row.rstrip() for row in rows)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
