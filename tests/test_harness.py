"""lm-evaluation-harness gives this package's model the numbers that its own `hf` model gives the same weights.

The model is a small full-precision twin, saved by transformers as a LLaMA. The tasks are files of this test: a choice
between continuations, the probability of whole texts, and texts to be written.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the harness's own model runs on PyTorch")
transformers = pytest.importorskip("transformers", reason="the harness's own model is one of transformers")
pytest.importorskip("lm_eval", reason="the harness is what is tested")

import bitnet  # noqa: E402
from bitnet import checkpoint  # noqa: E402
from bitnet import harness as runner  # noqa: E402
from bitnet.chat_template import EOT, Message, choose, encode  # noqa: E402
from bitnet.errors import ConfigError  # noqa: E402
from bitnet.harness import main as command  # noqa: E402
from bitnet.published import COLUMNS, ROWS  # noqa: E402
from bitnet.tokenizer import ByteTokenizer, CharTokenizer, FileTokenizer  # noqa: E402

CONFIG = bitnet.BitNetConfig(
    300, 48, 80, 2, 6, 3, max_position_embeddings=64, initializer_range=0.15, sub_norms=False, linear="linear"
)
WORDS = "the cat sat on a mat and the dog ran to the house where an old man was reading letters by the fire".split()
CHOICES = [
    {
        "question": " ".join(WORDS[i : i + 3 + i]),
        "choices": [" a mat", " the dog", " on", " it"][: 2 + i % 2],
        "answer": 1,
    }
    for i in range(9)
]
CHOICES[3]["choices"] = [" a mat", " the old house by the fire"]
TEXTS = [{"text": text} for text in ("the cat", "a", " ".join(WORDS), " ".join(WORDS[::-1] * 3))]
PROMPTS = [{"question": " ".join(WORDS[i : i + 4 + 9 * (i % 3)]), "answer": "x"} for i in range(6)]

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["on", "qu"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def make_tokenizer(folder: Path, with_bos: bool) -> None:
    """A byte-level BPE of 300 ids, as a folder that both libraries read; with_bos: every text begins with <s>."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", EOT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    names = {"eos_token": "</s>"}
    if with_bos:
        names["bos_token"] = "<s>"
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def harness() -> Any:
    """The harness's parts, imported once; what it and its libraries warn about is theirs to mend."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        from bitnet import lm_eval_model

        return SimpleNamespace(
            evaluate=lm_eval.simple_evaluate, Instance=Instance, HFLM=HFLM, TaskManager=TaskManager, ours=lm_eval_model
        )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, task, rows in (
        ("tiny_choice", CHOICE, CHOICES), ("tiny_rolling", ROLLING, TEXTS), ("tiny_writing", WRITING, PROMPTS)
    ):  # fmt: skip
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = COMMON.format(name=name, data=data, cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(common + task)
    return folder


@pytest.fixture(scope="module", params=["eos", "bos"])
def models(request: pytest.FixtureRequest, harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ours, the harness's) on the same weights."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder, request.param == "bos")
    model = bitnet.BitNetForCausalLM(CONFIG, seed=5)
    model.tokenizer = FileTokenizer.load(folder / "tokenizer.json")
    names = {"eos_token_id": 1, "bos_token_id": 0 if request.param == "bos" else None, "pad_token_id": 1}
    shape = {name: getattr(CONFIG, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    )}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": CONFIG.rope_theta}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **names, rope_parameters=rope))
    weights = {name: torch.from_numpy(value.numpy().copy()) for name, value in model.named_parameters()}
    other.load_state_dict(weights)
    other.save_pretrained(folder)
    theirs = harness.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
    return SimpleNamespace(
        ours=harness.ours.BitNetLM(model), theirs=theirs, has_bos=request.param == "bos", folder=folder
    )


def instances(harness: Any, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [harness.Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_continuations(harness: Any, models: Any) -> None:
    """Log-likelihoods to 1e-3 nats, the same argmaxes: empty contexts, spaces, contexts and pairs that are cut."""
    long = " ".join(WORDS * 4)
    pairs = [("", " the cat"), ("the ", "cat"), ("the", " cat"), (long, " a"), (long, long[:90]), ("a", " the old man")]
    pairs += [(row["question"], choice) for row in CHOICES for choice in row["choices"] if choice]
    # Some continuations that are greedy, where the likeliest token is a whole character.
    contexts = [context for context, _ in pairs if context]
    wish = {"until": [], "max_gen_toks": 1}
    asked = instances(harness, "generate_until", [(context, wish) for context in contexts])
    greedy = models.theirs.generate_until(asked, disable_tqdm=True)
    pairs += [(context, text) for context, text in zip(contexts, greedy, strict=True) if text]
    requests = instances(harness, "loglikelihood", pairs)
    ours = models.ours.loglikelihood(requests, disable_tqdm=True)
    theirs = models.theirs.loglikelihood(requests, disable_tqdm=True)
    assert [score[0] for score in ours] == pytest.approx([score[0] for score in theirs], abs=1e-3)
    assert [score[1] for score in ours] == [score[1] for score in theirs]
    assert {score[1] for score in ours} == {True, False}
    assert models.ours.scorer.tokens_run < models.ours.scorer.tokens_asked


def test_whole_texts(harness: Any, models: Any) -> None:
    requests = instances(harness, "loglikelihood_rolling", [(row["text"],) for row in TEXTS])
    models.theirs.add_bos_token = False if models.has_bos else None  # else a text follows two of them
    theirs = models.theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    models.theirs.add_bos_token = None
    assert models.ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(theirs, abs=1e-3)


def test_written_texts(harness: Any, models: Any) -> None:
    wishes = [{"until": ["on", "qu"], "max_gen_toks": 24}, {"until": "a", "max_tokens": 9}, {"max_gen_toks": 40}]
    prompts = [(row["question"], wish) for row in PROMPTS for wish in wishes]
    requests = instances(harness, "generate_until", prompts)
    ours = models.ours.generate_until(requests, disable_tqdm=True)
    # One by one: in a batch theirs pads on the left, which moves its positions.
    theirs = [models.theirs.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert ours == theirs


@pytest.mark.parametrize("models", ["eos"], indirect=True)
def test_tasks_of_files(harness: Any, models: Any, tasks: Path) -> None:
    manager = harness.TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["tiny_choice", "tiny_writing", "tiny_rolling"]
    ours, theirs = (
        harness.evaluate(model=lm, tasks=names, task_manager=manager, log_samples=False, bootstrap_iters=0)["results"]
        for lm in (models.ours, models.theirs)
    )
    for name in names:
        numbers = {key: value for key, value in theirs[name].items() if isinstance(value, float)}
        assert numbers
        assert {key: ours[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary model of bytes, saved."""
    folder = tmp_path_factory.mktemp("run")
    config = CONFIG.replace(vocab_size=257, linear="bitlinear", sub_norms=True)
    checkpoint.save(folder, 7, bitnet.BitNetForCausalLM(config, seed=2), {}, {"step": 7}, ByteTokenizer())
    return folder


def test_command(
    harness: Any,
    tasks: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A table of what could be run; a task without data is named with the reason, and stops nothing."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")  # which --offline does too, and does not undo
    folder = tmp_path / "more"
    shutil.copytree(tasks, folder)
    text = (folder / "tiny_choice.yaml").read_text()
    (folder / "gone.yaml").write_text(text.replace("tiny_choice", "gone").replace("gone.jsonl", "nowhere.jsonl"))
    # One of the paper's names, so that its table is printed.
    (folder / "piqa.yaml").write_text(text.replace("task: tiny_choice", "task: piqa"))
    out = tmp_path / "out.json"
    flags = ["--include-path", str(folder), "--offline", "--threads", "1", "--json", str(out), "--num-fewshot", "1"]
    assert command([str(run), "--tasks", "tiny_*,gone", "piqa", "--limit", "3", *flags]) == 0
    bitnet.set_threads(0)
    printed, err = capsys.readouterr()
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert lines["tiny_choice"][1:4] == ["1", "3", "acc"]
    assert lines["piqa"][1:4] == ["1", "3", "acc"]
    assert "BitNet b1.58 3B" in printed and "68.1" in printed and "2402.17764" in printed
    assert "gone was not run: its data cannot be had" in err
    fields = json.loads(out.read_text())
    assert fields["run"] == str(run) and fields["step"] == 7 and list(fields["failed"]) == ["gone"]
    assert set(fields["results"]) == {"tiny_choice", "tiny_rolling", "tiny_writing", "piqa"}
    value = fields["results"]["piqa"]["acc,none"]
    row = next(line for line in printed.splitlines() if line.startswith("this model, acc "))
    assert row.split()[3:] == ["-", "-", "-", "-", "-", f"{100 * value:.1f}", "-", "-"]


def test_interrupted(
    harness: Any, tasks: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the command; what was measured by then is printed."""
    run_task = runner.run_task

    def interrupted(lm: Any, manager: Any, name: str, *rest: Any, **options: Any) -> None:
        if name == "tiny_writing":
            raise KeyboardInterrupt
        run_task(lm, manager, name, *rest, **options)

    monkeypatch.setattr(runner, "run_task", interrupted)
    flags = ["--tasks", "tiny_choice", "tiny_writing", "--include-path", str(tasks), "--limit", "2"]
    assert command([str(run), *flags]) == 130
    printed, err = capsys.readouterr()
    assert "tiny_choice" in printed and err.splitlines()[-1] == "interrupted"


def test_rolling_is_our_own_loss(harness: Any, run: Path) -> None:
    """The ternary model, which nothing else computes alike: the harness's numbers are those of bitnet.evaluation."""
    lm = harness.ours.BitNetLM(str(run))
    texts = [row["text"] for row in TEXTS if len(row["text"]) < 63]
    requests = instances(harness, "loglikelihood_rolling", [(text,) for text in texts])
    found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    model = bitnet.from_pretrained(run)
    for text, total in zip(texts, found, strict=True):
        # eos, which precedes the text there, ends each document here: a window from the first eos to before the second.
        ids = [256, *ByteTokenizer().encode(text)]
        with bitnet.no_grad():
            loss = model([ids[:-1]], [ids[1:]]).item()
        assert -total == pytest.approx(loss * (len(ids) - 1), rel=1e-5)


def test_sampling_and_limits(harness: Any, run: Path) -> None:
    """Sampled texts are the same in every run and differ between repeats; what cannot be honoured is refused."""
    lm = harness.ours.BitNetLM(str(run), batch_size="auto:4", max_batch_size=8, device="cuda:0", seed=3, max_length=40)
    wish = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8, "until": ["\n\n"]}
    requests = instances(harness, "generate_until", [("the cat", wish)] * 4)
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert texts == lm.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) == 4
    assert lm.generate_until([], disable_tqdm=True) == []
    assert lm.generate_until(instances(harness, "generate_until", [("", {"max_gen_toks": 2})])) != [""]
    for wish, message in (
        ({"max_gen_toks": 40}, "max_gen_toks=40 leaves none of the 40 tokens"),
        ({"num_beams": 4}, "num_beams=4, which this model cannot follow"),
    ):
        with pytest.raises(ConfigError, match=message):
            lm.generate_until(instances(harness, "generate_until", [("a", wish)]))
    for options, message in (
        ({"batch_size": "many"}, "a number or auto, not 'many'"),
        ({"max_length": 65}, "64 positions, not 65"),
        ({"add_bos_token": True}, "needs a tokenizer that has a bos"),
    ):
        with pytest.raises(ConfigError, match=message):
            harness.ours.BitNetLM(str(run), **options)


def test_no_token_before_a_text(harness: Any) -> None:
    model = bitnet.BitNetForCausalLM(CONFIG.replace(vocab_size=27))
    model.tokenizer = CharTokenizer(" abcdefghijklmnopqrstuvwxyz")
    lm = harness.ours.BitNetLM(model)
    requests = instances(harness, "loglikelihood", [("", "cat")])
    with pytest.raises(ConfigError, match="prefix_token_id=ID"):
        lm.loglikelihood(requests, disable_tqdm=True)
    named = harness.ours.BitNetLM(model, prefix_token_id=0).loglikelihood(requests, disable_tqdm=True)
    spelled = lm.loglikelihood(instances(harness, "loglikelihood", [("z", "cat")]), disable_tqdm=True)
    assert named[0][0] != spelled[0][0]


def test_chat(harness: Any, models: Any) -> None:
    """A conversation's special tokens come from the template alone; an answer that was begun is gone on with."""
    tokenizer = models.ours.tokens
    lm = harness.ours.BitNetLM(models.ours.model, template="plain")
    history = [{"role": "user", "content": "the cat </s>"}, {"role": "assistant", "content": "sat on"}]
    text = lm.apply_chat_template(history[:1])
    assert lm.apply_chat_template(history, add_generation_prompt=False) == f"{text}sat on"
    bos = [0] if models.has_bos else []
    assert lm.tok_encode(text) == bos + tokenizer.encode("User: the cat </s>\nAssistant:")
    assert lm.ends() == (frozenset([1]), ["</s>", "\nUser:"])
    lm = harness.ours.BitNetLM(models.ours.model)
    assert lm.ends() == (frozenset([1]), ["</s>"])
    parts = choose("bitnet", tokenizer).parts([Message("user", f"the cat {EOT}")])
    assert 2 in parts
    ids = lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": f"the cat {EOT}\ufdd02\ufdd1"}]))
    assert ids == encode(tokenizer, [*parts[:-3], f"User: the cat {EOT}2", *parts[-2:]])
    assert ids.count(2) == 1
    assert lm.ends() == (frozenset([1, 2]), ["</s>"])
    lm = harness.ours.BitNetLM(models.ours.model, template="plain")
    assert lm.chat_template(True) == "plain" and lm.chat_template(False) is None
    assert lm.tokenizer_name.startswith("file-")


def test_refused_requests(run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = ["--include-path", str(tasks)]
    for flags, message in (
        (["--tasks", "tiny_choice", "--include-path", "nowhere"], "there is no folder nowhere"),
        (["--tasks", "tiny_choice", "--limit", "0", *local], "--limit must be above 0, not 0"),
        (["--tasks", "tiny_choice", "--max-length", "99", *local], "64 positions, not 99"),
    ):
        assert command([str(run), *flags]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_the_harness(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval" or name == "bitnet.lm_eval_model"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command([str(run), "--tasks", "piqa"]) == 2
    assert "pip install 'bitnet[eval]'" in capsys.readouterr().err


def test_published_rows() -> None:
    """Each row's mean is the printed one, as far as the rounding of seven numbers allows."""
    for row in ROWS:
        assert len(row.accuracy) == len(COLUMNS)
        if row.average is not None:
            assert sum(row.accuracy) / len(COLUMNS) == pytest.approx(row.average, abs=0.11)
