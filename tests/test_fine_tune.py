"""Fine-tuning: going on from weights that are there, and learning answers only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from train_command import refused, run

from bitnet import BitNetConfig, BitNetForCausalLM, checkpoint, cli, from_pretrained, ops
from bitnet.chat_template import BitnetTemplate, JinjaTemplate, Message, PlainTemplate, Template
from bitnet.conversation import Conversation
from bitnet.conversations import encode_conversation, opening, read_conversations
from bitnet.data import DataLoader, ShardDataset, eval_blocks, eval_rows
from bitnet.data_cli import pack, pack_chat
from bitnet.errors import DataError
from bitnet.formats.hf_export import save_hf
from bitnet.metrics import read_metrics
from bitnet.mixture import Mixture, Source
from bitnet.rows import IGNORE, Conversations
from bitnet.sampling import Sampler
from bitnet.tokenizer import ByteTokenizer
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

SHAPE = (
    "--tokenizer bytes --hidden-size 32 --intermediate-size 48 --num-hidden-layers 1 --num-attention-heads 2".split()
)
SHORT = "--batch-size 2 --seq-len 16 --steps 4 --save-every 2 --sample-tokens 0 --plots false --spike 0".split()
LINES = "".join(f"{n} squared is {n * n}.\n" for n in range(200))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    root = tmp_path_factory.mktemp("base")
    (root / "numbers.txt").write_text(LINES)
    assert run("--data", root / "numbers.txt", *SHAPE, *SHORT, "--out", root / "run") == 0
    return root / "run"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "other.txt"
    path.write_text(LINES[::-1])
    return path


def weights_of(folder: Path, step: int = 4) -> bytes:
    return (checkpoint.folder_of(folder, step) / "model.safetensors").read_bytes()


# ---- going on from a checkpoint -------------------------------------------------------------------------------------


def test_init_begins_where_another_run_ended(base: Path, text: Path) -> None:
    assert run("--init", base, "--data", text, *SHORT, "--lr", "1e-30", "--weight-decay", "0", "--out", "same") == 0
    before, after = from_pretrained(base).state_dict(), from_pretrained("same").state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert run("--init", base, "--data", text, *SHORT, "--out", "other") == 0
    assert weights_of(Path("other")) != weights_of(base)
    assert from_pretrained("other").config == from_pretrained(base).config
    assert [record["step"] for record in read_metrics("other/metrics.jsonl")] == [1, 2, 3, 4]  # a fresh beginning
    options = yaml.safe_load(Path("other/train.yaml").read_text())
    assert options["init"] == str(base)
    assert not options.keys() & {"hidden_size", "tokenizer", "preset"}


def test_init_resumes_to_the_same_bytes_without_its_source(base: Path, text: Path) -> None:
    shutil.copytree(base, "source")
    assert run("--init", "source", "--data", text, *SHORT, "--out", "whole") == 0
    shutil.copytree("whole", "cut")
    shutil.rmtree(checkpoint.folder_of("cut", 4))
    shutil.rmtree("source")
    assert run("--resume", "cut") == 0
    assert weights_of(Path("cut")) == weights_of(Path("whole"))
    assert [record["step"] for record in read_metrics("cut/metrics.jsonl")] == [1, 2, 3, 4]


def test_what_init_decides_cannot_be_chosen(base: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in {
        ("--hidden-size", "64"): "hidden_size and init exclude each other",
        ("--preset", "nano"): "preset and init exclude each other",
        ("--tokenizer", "chars"): "tokenizer and init exclude each other",
        ("--vocab-size", "300"): "vocab_size and init exclude each other",
        ("--twin",): "twin and init exclude each other",
        ("--seq-len", "2100"): "seq_len 2100 is more than the model's max_position_embeddings",
    }.items():
        assert message in refused(capsys, "--init", base, "--data", text, *SHORT[:2], *SHORT[4:], *flags)
    assert "there is no folder" in refused(capsys, "--init", "nowhere", "--data", text, *SHORT)
    assert cli.main(["data", "--data", str(text), "--tokenizer", "chars", "--seq", "16", "--out", "chars"]) == 0
    assert "another tokenizer than that of" in refused(capsys, "--init", base, "--data", "chars", *SHORT)


def test_a_packed_model_has_nothing_to_train(base: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pack", str(base), "-o", "packed.bitnet"]) == 0
    assert "has codes and scales, but no latent weights" in refused(
        capsys, "--init", "packed.bitnet", "--data", text, *SHORT
    )


def test_init_takes_a_hugging_face_folder(base: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = from_pretrained(base)
    save_hf(model, "theirs", packed=False)
    assert run("--init", "theirs", "--data", text, *SHORT, "--out", "tuned") == 0
    assert run("--init", base, "--data", text, *SHORT, "--out", "own") == 0
    assert weights_of(Path("tuned")) == weights_of(Path("own"))
    options = yaml.safe_load(Path("tuned/train.yaml").read_text())
    assert options["init"] == str(Path("theirs").resolve())
    save_hf(model, "codes", packed=True)
    assert "no latent weights" in refused(capsys, "--init", "codes", "--data", text, *SHORT)


def test_init_takes_weights_that_were_stored_in_halves(base: Path, text: Path) -> None:
    """Made f32 while they are read, in memory that the optimizer can take."""
    from safetensors.numpy import load_file, save_file

    save_hf(from_pretrained(base), "halves", packed=False)
    weights = Path("halves/model.safetensors")
    halves = {name: array.astype(np.float16) for name, array in load_file(weights).items()}
    save_file(halves, weights)
    kept = [*SHORT, "--lr", "1e-30", "--weight-decay", "0"]
    assert run("--init", "halves", "--data", text, *kept, "--out", "tuned") == 0
    after = from_pretrained("tuned").state_dict()
    assert all(np.array_equal(after[name], array.astype(np.float32)) for name, array in halves.items())


# ---- conversations --------------------------------------------------------------------------------------------------

TALK = [
    Message("system", "Be brief."),
    Message("user", "One?"),
    Message("assistant", " Two. "),
    Message("user", "Three?"),
    Message("assistant", "Four."),
]
OWN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Bytes(ByteTokenizer):
    """Bytes, and two tokens that end a turn."""

    vocab_size = 260

    def special_tokens(self) -> dict[str, int]:
        return {"<|eot_id|>": 257, "<|end|>": 258}

    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token) if token < 256 else b""


def spelled(tokens: Sequence[int], marks: Sequence[int]) -> str:
    """The text, what is learned in upper case, ids that are no bytes in brackets."""
    text = ""
    for token, mark in zip(tokens, marks, strict=True):
        piece = chr(token) if token < 256 else f"[{token}]"
        text += piece.upper() if mark else piece.lower()
    return text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            BitnetTemplate(Bytes()),
            "system: be brief.[257]user: one?[257]assistant: TWO.[257]user: three?[257]assistant: FOUR.[257]",
        ),
        (PlainTemplate(Bytes()), "be brief.\n\nuser: one?\nassistant: TWO.\nUSER: three?\nassistant: FOUR.[256]"),
        (
            JinjaTemplate(OWN, Bytes()),
            "<system>be brief.[258]\n<user>one?[258]\n<assistant>TWO.[258]\n<user>three?[258]\n<assistant>FOUR.[258]",
        ),
    ],
    ids=["bitnet", "plain", "own"],
)
def test_answers_and_their_ends_are_marked(template: Template, expected: str) -> None:
    tokens, marks = encode_conversation(Bytes(), template, TALK)
    # The case of the text says what is marked; a space before an answer has none.
    assert spelled(tokens, marks) == expected
    assert set(marks) == {0, 1}


def test_a_model_is_asked_with_the_tokens_that_it_learned_from() -> None:
    tokenizer = Bytes()
    template = BitnetTemplate(tokenizer)
    tokens, marks = encode_conversation(tokenizer, template, TALK)
    model = BitNetForCausalLM(BitNetConfig(260, 32, 48, 1, 2, max_position_embeddings=256))
    vars(model)["tokenizer"] = tokenizer
    conversation = Conversation(model, template, Sampler(), "Be brief.")
    conversation.messages = [Message(role, text.strip()) for role, text in TALK[1:3]]
    prompt = conversation.ask("Three?").prompt
    assert tokens[: len(prompt)] == prompt
    assert tokens[len(prompt) :] == [*tokenizer.encode("Four."), 257]
    assert all(marks[len(prompt) :])


def test_without_an_end_a_stop_string_is_learned() -> None:
    class Endless(Bytes):
        eos_id = None

    tokens, marks = encode_conversation(Endless(), PlainTemplate(Endless()), TALK[:3])
    assert spelled(tokens, marks).endswith(" TWO.\nUSER:")


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    template = JinjaTemplate("{% for m in messages %}{{ loop.revindex }}{{ m.content }}<|end|>{% endfor %}", Bytes())
    with pytest.raises(DataError, match=r"does not go on from an answer to the next: 'Two\.'"):
        encode_conversation(Bytes(), template, TALK)


def test_lines_that_are_no_conversation(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    for line, message in {
        "[]": "has neither a list 'messages' nor 'prompt' and 'response'",
        '{"text": "x"}': "has neither",
        '{"messages": ["x"]}': "a message of role None",
        '{"messages": [{"role": "tool", "content": "x"}]}': "role 'tool', which is none of system, user, assistant",
        '{"messages": [{"role": "user", "content": 1}]}': "a message of the user without text",
        '{"prompt": "x", "response": " "}': "a message of the assistant without text",
        '{"messages": [{"role": "user", "content": "x"}]}': "no answer to learn from",
        '{"prompt": "\\ud800", "response": "x"}': "is not Unicode text",
        "{": "is not JSON",
    }.items():
        path.write_text('{"prompt": "a", "response": "b"}\n\n' + line)
        with pytest.raises(DataError, match="line 3") as error:
            list(read_conversations([path]))
        assert message in str(error.value)
    with pytest.raises(DataError, match="there is no file"):
        list(read_conversations([tmp_path / "none.jsonl"]))


# ---- packs of conversations -----------------------------------------------------------------------------------------


@pytest.fixture
def talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty questions of two answers each."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "talks.jsonl"
    lines = [{"prompt": f"{n} + 1?", "response": "It is " * m + f"{n + 1}."} for n in range(40) for m in (0, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def quiet(line: str) -> None:
    pass


def test_a_row_is_a_conversation_with_targets_on_its_answer(talks: Path) -> None:
    folder = pack_chat([talks], "pack", ByteTokenizer(), val_fraction=0.2, log=quiet)
    dataset = ShardDataset(folder)
    dataset.verify()
    held_out = ShardDataset(folder, "validation")
    assert dataset.documents + held_out.documents == 80
    assert 0 < held_out.documents < 40
    seen = set()
    loader = DataLoader(dataset, 3, 40, seed=5)
    assert isinstance(loader.rows, Conversations)
    assert loader.windows_per_epoch == dataset.documents
    for position in range(-(-dataset.documents // 3)):
        tokens, targets = loader.batch(position)
        for row, target in zip(tokens, targets, strict=True):
            text = bytes(token for token in row if 0 < token < 256).decode()
            question, answer = text.removeprefix("User: ").split("\nAssistant:")
            assert (target != IGNORE).sum() == len(answer) + 1
            assert target[target != IGNORE].tolist() == [*answer.encode(), 256]
            seen.add((question, answer))
    assert len(seen) == dataset.documents
    inside = {question for question, _ in seen}
    rows = [row for tokens, _ in eval_blocks(held_out, 4, 40) for row in tokens]
    outside = {bytes(row[:20].clip(0, 255).astype(np.uint8)).decode("latin-1").split("\n")[0][6:] for row in rows}
    assert not inside & outside  # both answers of a question are on one side
    again = pack_chat([talks], "again", ByteTokenizer(), val_fraction=0.2, log=quiet)
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_long_conversations_are_cut_or_take_no_part(talks: Path) -> None:
    folder = pack_chat([talks], "pack", ByteTokenizer(), val_fraction=0, log=quiet)
    dataset = ShardDataset(folder)
    tokens, targets = DataLoader(dataset, 2, 26, order="random").batch(0)
    assert tokens.shape == targets.shape == (2, 26)
    assert eval_rows(dataset, 26) == 80
    assert eval_rows(dataset, 23) == 20  # "User: 9 + 1?\nAssistant:" has 23 tokens, that of 10 + 1 has 24
    assert eval_rows(dataset, 8) == 0
    with pytest.raises(DataError, match="has an answer within 8 tokens"):
        DataLoader(dataset, 2, 8)
    assert opening(TALK) == opening([*TALK[:2], Message("assistant", "Three.")])


def test_micro_batches_weigh_as_much_as_they_have_targets(talks: Path) -> None:
    folder = pack_chat([talks], "pack", ByteTokenizer(), val_fraction=0, log=quiet)
    shape = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)
    options = {"seq_len": 40, "steps": 1, "precision": "fp32", "sample_tokens": 0, "seed": 1}

    def one_step(rows: int, parts: int) -> float:
        config = TrainerConfig(batch_size=rows, grad_accum=parts, **options)
        return float(Trainer(BitNetForCausalLM(shape), folder, config, log=quiet).fit()[0]["train_loss"])

    loader = DataLoader(ShardDataset(folder), 1, 40, seed=1)
    model = BitNetForCausalLM(shape)
    with ops.no_grad():
        pairs = [loader.batch(position) for position in range(6)]
        losses = [model(*pair).item() for pair in pairs]
    counts = [(targets != IGNORE).sum() for _, targets in pairs]
    assert len(set(counts)) > 1
    assert one_step(1, 6) == pytest.approx(np.average(losses, weights=counts), rel=1e-6)


def test_instructions_from_the_command_line(base: Path, talks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "--chat", str(talks), "--tokenizer-of", str(base), "--out", "pack", "--val-fraction", "0.2"]
    assert cli.main([*command, "--verify"]) == 0
    said = capsys.readouterr().out
    assert "80 conversations; template: plain" in said
    assert f"bitnet train --init {base} --data pack" in said
    assert cli.main(command) == 0
    assert "already holds this pack" in capsys.readouterr().out
    short = [*SHORT[:2], "--seq-len", "40", *SHORT[4:], "--eval-every", "2"]
    assert run("--init", base, "--data", "pack", *short, "--out", "tuned") == 0
    assert [record["val_loss"] is not None for record in read_metrics("tuned/metrics.jsonl")] == [False, True] * 2
    shutil.copytree("tuned", "cut")
    shutil.rmtree(checkpoint.folder_of("cut", 4))
    assert run("--resume", "cut") == 0
    assert weights_of(Path("cut")) == weights_of(Path("tuned"))
    assert cli.main([*command, "--template", "plain", "--val-fraction", "0"]) == 0  # replaced: the marks go too
    assert sorted(path.name for path in Path("pack").glob("*-*")) == [
        f"train-00000{name}" for name in (".answers.bin", ".answers.idx", ".bin", ".idx")
    ]
    assert "was trained on other data" in refused(capsys, "--resume", "tuned", "--steps", "8")
    assert cli.main(["data", "--chat", str(talks), "--out", "x"]) == 2
    assert "--chat needs the tokenizer of a model" in capsys.readouterr().err
    assert cli.main([*command, "--dedup", "near"]) == 2
    assert "--dedup is for text, not for the conversations" in capsys.readouterr().err


def test_marks_that_are_not_those_of_the_pack(talks: Path) -> None:
    folder = pack_chat([talks], "pack", ByteTokenizer(), val_fraction=0.2, log=quiet)
    marks = folder / "train-00000.answers.bin"
    good = marks.read_bytes()
    index = marks.with_suffix(".idx")
    good_index = index.read_bytes()
    for path in (marks, index):
        path.write_bytes((folder / path.name.replace("train", "validation")).read_bytes())
    with pytest.raises(DataError, match=r"answers\.bin is not the one the manifest lists"):
        ShardDataset(folder)
    index.write_bytes(good_index)
    marks.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    with pytest.raises(DataError, match="answers"):
        ShardDataset(folder).verify()


def test_a_killed_pack_of_conversations_is_made_anew(talks: Path) -> None:
    whole = pack_chat([talks], "pack", ByteTokenizer(), val_fraction=0.2, log=quiet)
    shutil.copytree(whole, "killed")
    Path("killed", "manifest.json").unlink()
    Path("killed", "unfinished").mkdir()
    again = pack_chat([talks], "killed", ByteTokenizer(), val_fraction=0.2, log=quiet)
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert all((whole / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_conversations_mix_with_text(talks: Path) -> None:
    (talks.parent / "text.txt").write_text(LINES)
    text = pack([talks.parent / "text.txt"], "text", "bytes", log=quiet)
    folder = pack_chat([talks], "pack", ByteTokenizer(), val_fraction=0.2, log=quiet)
    mixture = Mixture([Source(ShardDataset(text), "text", 0.5), Source(ShardDataset(folder), "talks", 0.5)])
    shape = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)
    config = TrainerConfig(steps=2, batch_size=4, grad_accum=2, seq_len=40, sample_tokens=0, eval_every=2)
    trainer = Trainer(BitNetForCausalLM(shape), mixture, config, log=quiet)
    batches = [trainer.loader.batch(position) for position in range(4)]
    learned = [(row != IGNORE).all() for _, targets in batches for row in targets]
    assert any(learned)
    assert not all(learned)
    record = trainer.fit()[-1]
    assert set(record["val_loss_by_source"]) == {"text", "talks"}
