"""benchmarks/serving.py: prompts, clients, servers and what is made of them, in short runs; no speeds.

llama-cpp-python's server is compared where LLAMA_PYTHON, or else this interpreter, has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitnet import get_threads, set_threads

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compare
import history
import serving
import serving_load
import serving_servers

LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON", sys.executable)
SHORT = ["--slots", "2", "--prompt", "16", "--gen", "8", "--rounds", "1", "--threads", "1"]
SETTINGS = "preset slots prompt gen shared threads requests rounds temperature embeddings clients head layout".split()
REPORT = {
    "about", "tokens_per_second", "prompt_tokens_per_second", "samples", "first_token_seconds",
    "between_tokens_seconds", "share_of_in_process", "client_core_share", "texts", "reused_tokens",
}  # fmt: skip


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = get_threads()
    yield
    set_threads(before)


def run(folder: Path, *options: str, status: int = 0) -> list[dict[str, Any]]:
    """What a short run writes."""
    file = folder / "serving.json"
    assert serving.main([*SHORT, *options, "--history", str(folder / "history"), "--json", str(file)]) == status
    return history.read(file)


# ---- clients ----


def test_prompts_share_what_they_are_told_to() -> None:
    prompts = serving_load.draw(1000, 3, 4, 20, 5, [3, 1])
    order = serving_load.in_order(prompts)
    assert order[:4] == [prompts[0][0], prompts[1][0], prompts[2][0], prompts[0][1]]
    assert len(order) == 12
    assert {len(prompt) for prompt in order} == {20}
    assert len({prompt[:5] for prompt in order}) == 1
    assert len({prompt[:6] for prompt in order}) == 12
    assert set("".join(order)) <= set(serving_load.alphabet(1000))
    again = serving_load.in_order(serving_load.draw(1000, 3, 4, 20, 5, [3, 2]))
    assert not {prompt[5:9] for prompt in order} & {prompt[5:9] for prompt in again}
    assert again[0][:5] == order[0][:5]


def test_times_of_a_reply() -> None:
    """Tokens that came in one piece came at the same time."""
    reply = serving_load.Reply(10.0, "abcd", [10.5, 10.75, 10.75, 11.75])
    assert reply.first == 0.5
    assert reply.between == [0.25, 0.0, 1.0]


def test_a_server_that_ends_leaves_its_last_words() -> None:
    with pytest.raises(OSError, match=r"ended with status 3: no model there$"):
        serving_servers.Server([sys.executable, "-c", "print('no model there'); exit(3)"], r"ready: (\S+)")


# ---- what is made of them ----


def test_a_report_by_hand() -> None:
    """Two rounds of two texts of four tokens, after prompts of eight."""
    ask = serving_load.Ask(8, 4, 1.0, 0)
    one, base = serving.Found("a server"), serving.Found("a batch")
    for start, seconds in ((0.0, 2.0), (100.0, 4.0)):
        replies = [serving_load.Reply(start, "abcd", [start + at for at in times], 3)
                   for times in ((0.5, 0.75, 1.0, 1.25), (1.0, 2.0, 3.0, 4.0))]  # fmt: skip
        one.add(serving_load.Turn(replies, seconds, 0.5), ask)
        base.add_texts(["abcd", "abcd"], 1.0, ask)
    found = serving.report(one, base)
    assert found.keys() == REPORT
    assert found["samples"] == [4.0, 2.0]
    assert (found["tokens_per_second"], found["prompt_tokens_per_second"]) == (3.0, 6.0)
    assert found["share_of_in_process"] == (4 / 8 + 2 / 8) / 2
    assert found["first_token_seconds"] == {"median": 0.75, "p95": 1.0}
    assert found["between_tokens_seconds"] == {"median": 0.625, "p95": 1.0}
    assert (found["client_core_share"], found["reused_tokens"], found["texts"]) == (0.1875, 12, 4)
    assert serving.report(serving.Found("", error="away"), base) == {"error": "away"}
    lines = serving.table({"bitnet": {**found, "equal_texts": 3}, "llama_cpp": {"error": "a\nb"}}).splitlines()
    assert lines[2].split() == "bitnet 3.0 (2.0 .. 4.0) 6 750 1,000 625.0 1,000.0 37.5% 19% core 3 of 4".split()
    assert lines[3].split(maxsplit=1) == ["llama_cpp", "cannot run: b"]


# ---- runs ----


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer clients than slots and more, beside a server that is not there."""
    options = ["--preset", "char", "--clients", "1", "3", "--shared", "4"]
    runs = run(tmp_path, *options, "--beside", "llama-cpp", "--llama-python", str(tmp_path / "python"))
    printed = capsys.readouterr().out
    assert printed.count("llama-cpp cannot run: ") == 1
    assert [one["settings"]["clients"] for one in runs] == [1, 3]
    for one, clients in zip(runs, (1, 3), strict=True):
        assert one["settings"].keys() == set(SETTINGS)
        assert one["texts_equal"] is True
        assert one["bitnet"].keys() == REPORT | {"equal_texts"}
        assert one["in_process"].keys() == REPORT
        assert one["llama_cpp"].keys() == {"error"}
        assert one["bitnet"]["equal_texts"] == one["bitnet"]["texts"] == one["in_process"]["texts"] == 2 * clients
        assert one["bitnet"]["reused_tokens"] >= 2 * clients * 4  # the beginning, which the warm-up left
        assert list(compare.entries(one)) == ["bitnet", "bitnet first_token", "bitnet between_tokens", "in_process"]
    assert runs[1]["in_process"]["about"] == "generate_batch, 2 slots"


def test_another_text_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of four texts, which are compared character by character."""
    right = serving.generate_batch

    def wrong(*given: Any, **options: Any) -> list[str]:
        texts = right(*given, **options)
        assert len(set(texts)) == len(texts)  # so that one prompt's text is not another's
        return [*texts[:-1], texts[-1][:-1] + chr(ord(texts[-1][-1]) ^ 1)]

    monkeypatch.setattr(serving, "generate_batch", wrong)
    [one] = run(tmp_path, "--preset", "char", "--clients", "2", status=1)
    assert one["texts_equal"] is False
    assert (one["bitnet"]["equal_texts"], one["bitnet"]["texts"]) == (3, 4)
    assert "texts that generate_batch does not give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--slots", "0"], "--slots must be at least 1, not 0"),
        (["--clients", "4", "0"], "--clients must be at least 1, not 0"),
        (["--prompt", "8", "--shared", "8"], "--shared must be 0 to 7, less than the prompt, not 8"),
    ],
)
def test_numbers_that_make_no_load(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.main(options)
    assert sentence in capsys.readouterr().err


def test_beside_llama_cpp(tmp_path: Path) -> None:
    try:
        serving_servers.llama_version(LLAMA_PYTHON)
    except OSError as error:
        pytest.skip(f"{error}; LLAMA_PYTHON names an interpreter that can")
    options = ["--preset", "nano", "--clients", "2", "--beside", "llama-cpp", "--llama-python", LLAMA_PYTHON]
    [one] = run(tmp_path, *options)
    assert one["texts_equal"] is True
    assert one["llama_cpp"].keys() == REPORT
    assert one["llama_cpp"]["texts"] == 4
    assert one["llama_cpp"]["about"].startswith("llama-cpp-python ")
