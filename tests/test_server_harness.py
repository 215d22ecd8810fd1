"""lm-evaluation-harness as a client of a served model gets the numbers and texts of this package's own harness model.

Both read the same bits of logits. The server's log-softmax is in float64 and JSON keeps all its digits; the harness
model's adds f32 exponentials in float64, within 1e-6 of that for each token (bitnet/scoring.py). So sums of log
probabilities agree to 1e-6 for each token that is scored, and greedy texts are equal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="the harness counts tokens with its tokenizers")
for package in ("lm_eval", "tenacity", "aiohttp", "uvicorn"):
    pytest.importorskip(package, reason="the harness's client and the server need it")

import bitnet  # noqa: E402
from bitnet import checkpoint  # noqa: E402
from bitnet.chat_template import EOT  # noqa: E402
from bitnet.tokenizer import FileTokenizer  # noqa: E402

CONTEXT = 64
CONFIG = bitnet.BitNetConfig(300, 48, 80, 2, 6, 3, max_position_embeddings=CONTEXT, initializer_range=0.15)
EACH = 1e-6  # nats, of one token's log probability
WORDS = "the cat sat on a mat and the dog ran to the house where an old man was reading letters by the fire".split()
ROWS = {
    "choice": [
        {"question": " ".join(WORDS[i : i + 3 + 2 * i]), "choices": [" a mat", " the dog ran to", " on"], "answer": 1}
        for i in range(7)
    ],
    "rolling": [{"text": text} for text in ("the cat", "a", " ".join(WORDS), " ".join(WORDS[::-1] * 5))],
    "writing": [{"question": " ".join(WORDS[i : i + 2 + 9 * (i % 3)]), "answer": "x"} for i in range(6)],
}
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["on", "qu"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def harness() -> Any:
    """The harness's parts; what it and its libraries warn about is theirs to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval
        from lm_eval.api.instance import Instance
        from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
        from lm_eval.tasks import TaskManager

        from bitnet.lm_eval_model import BitNetLM
    return SimpleNamespace(
        evaluate=lm_eval.simple_evaluate, Instance=Instance, TaskManager=TaskManager, ours=BitNetLM,
        completions=LocalCompletionsAPI, chat=LocalChatCompletion,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary model with a byte-level BPE, and in `tokenizer` beside it the same BPE as transformers reads it."""
    import tokenizers

    folder = tmp_path_factory.mktemp("served")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", EOT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    names = folder / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(names)
    tokenizer = FileTokenizer.load(names / "tokenizer.json")
    assert tokenizer.bos_id is None and tokenizer.eos_id == 1
    checkpoint.save(folder / "run", 1, bitnet.BitNetForCausalLM(CONFIG, seed=5), {}, {"step": 1}, tokenizer)
    return folder / "run"


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    """Where `bitnet serve` serves it, with two slots, so that a batch of requests has to wait for each other."""
    flags = [str(run), "--port", "0", "--slots", "2", "--threads", "1", "--quiet"]
    command = [sys.executable, "-m", "bitnet.cli", "serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    ready = next((line for line in process.stdout if line.startswith("ready: ")), None)
    assert ready is not None
    yield ready.split()[1].rstrip(",")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.fixture(scope="module")
def tasks(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A TaskManager of the tasks above."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        source = f"{{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}"
        head = f"task: served_{name}\ndataset_path: json\ndataset_kwargs: {source}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + task)
    return harness.TaskManager(include_path=str(folder), include_defaults=False)


def client(harness: Any, url: str, run: Path, **options: Any) -> Any:
    """The harness's client. It sends up to CONTEXT - 1 tokens, and asks for one more."""
    names = str(run.parent / "tokenizer")
    place = f"{url}/v1/completions"
    return harness.completions(
        base_url=place, model="served", tokenizer=names, max_length=CONTEXT, max_retries=1,
        tokenizer_backend="huggingface", **options,
    )  # fmt: skip


def in_process(harness: Any, run: Path, task: str) -> Any:
    """This package's model, cut to what the client sends: of a scored text it reads all but the last token."""
    return harness.ours(str(run), threads=1, max_length=CONTEXT - (1 if task == "writing" else 2))


def responses(harness: Any, tasks: Any, lm: Any, task: str) -> list[Any]:
    """What a model answered to each request of a task."""
    found = harness.evaluate(
        model=lm, tasks=[f"served_{task}"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    samples = sorted(found["samples"][f"served_{task}"], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for (answer,) in sample["resps"]]


def sizes(run: Path, texts: list[str]) -> list[int]:
    """How many tokens each text has."""
    tokenizer = FileTokenizer.load(run.parent / "tokenizer" / "tokenizer.json")
    return [len(tokenizer.encode(text)) for text in texts]


WAYS = {"one by one": {}, "five prompts a request": {"batch_size": 5}, "four requests at once": {"num_concurrent": 4}}


@pytest.mark.parametrize("way", WAYS)
def test_choices(harness: Any, tasks: Any, run: Path, url: str, way: str) -> None:
    """Log probabilities of continuations, and whether they are greedy; the longest questions lose their beginning."""
    served = responses(harness, tasks, client(harness, url, run, **WAYS[way]), "choice")
    ours = responses(harness, tasks, in_process(harness, run, "choice"), "choice")
    continuations = [choice for row in ROWS["choice"] for choice in row["choices"]]
    assert len(served) == len(ours) == len(continuations)
    for (found, is_greedy), (wanted, was_greedy), tokens in zip(served, ours, sizes(run, continuations), strict=True):
        assert found == pytest.approx(wanted, abs=EACH * tokens)
        assert is_greedy == was_greedy
    assert len({score for score, _ in served}) == len(served)


def test_greedy_continuations(harness: Any, run: Path, url: str) -> None:
    """is_greedy is true of what the model itself writes, and of nothing else."""
    ours = in_process(harness, run, "choice")
    contexts = [row["question"] for row in ROWS["choice"]]
    wish = {"until": [], "max_gen_toks": 1}
    asked = [harness.Instance("generate_until", {}, (context, wish), i) for i, context in enumerate(contexts)]
    texts = ours.generate_until(asked, disable_tqdm=True)
    pairs = [pair for pair in zip(contexts, texts, strict=True) if pair[1]] + [(contexts[0], " the fire")]
    requests = [harness.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    served = client(harness, url, run).loglikelihood(requests, disable_tqdm=True)
    wanted = ours.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in served] == [greedy for _, greedy in wanted]
    assert {greedy for _, greedy in served} == {True, False}


@pytest.mark.parametrize("way", ["one by one", "four requests at once"])
def test_whole_texts(harness: Any, tasks: Any, run: Path, url: str, way: str) -> None:
    """Texts of many windows, the first of which follows eos."""
    served = responses(harness, tasks, client(harness, url, run, **WAYS[way]), "rolling")
    ours = responses(harness, tasks, in_process(harness, run, "rolling"), "rolling")
    lengths = sizes(run, [row["text"] for row in ROWS["rolling"]])
    assert max(lengths) > 2 * CONTEXT
    for found, wanted, tokens in zip(served, ours, lengths, strict=True):
        assert found == pytest.approx(wanted, abs=EACH * tokens)


@pytest.mark.parametrize("way", WAYS)
def test_written_texts(harness: Any, tasks: Any, run: Path, url: str, way: str) -> None:
    served = responses(harness, tasks, client(harness, url, run, **WAYS[way]), "writing")
    assert served == responses(harness, tasks, in_process(harness, run, "writing"), "writing")
    assert len(set(served)) > 1


def test_prompts_as_texts(harness: Any, tasks: Any, run: Path, url: str) -> None:
    """The client sends texts instead of ids; the server makes the ids."""
    served = responses(harness, tasks, client(harness, url, run, tokenized_requests=False), "writing")
    assert served == responses(harness, tasks, in_process(harness, run, "writing"), "writing")


def test_conversations(harness: Any, run: Path, url: str) -> None:
    """local-chat-completions: the server's template writes what this package's does."""
    lm = harness.chat(base_url=f"{url}/v1/chat/completions", model="served", tokenizer_backend=None, max_retries=1)
    ours = in_process(harness, run, "writing")
    talks = [
        [{"role": "user", "content": "the cat"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "mat"}, {"role": "user", "content": "on"}],
    ]
    wish = {"until": ["qu"], "max_gen_toks": 12, "do_sample": False}
    texts = []
    for model in (lm, ours):
        prompts = [model.apply_chat_template(talk) for talk in talks]
        requests = [harness.Instance("generate_until", {}, (prompt, wish), i) for i, prompt in enumerate(prompts)]
        texts.append(model.generate_until(requests, disable_tqdm=True))
    assert texts[0] == texts[1] and len(set(texts[0])) == 2
