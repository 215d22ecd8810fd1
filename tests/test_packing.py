"""Models in `.bitnet` files: the same bits as the run they come from; the commands that write, read and judge them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, _core, checkpoint, cli, info
from bitnet.decoding import Decoder
from bitnet.errors import CheckpointError
from bitnet.formats import bitnet_file, weights
from bitnet.formats.bitnet_file import BitnetFile, Section, write
from bitnet.formats.packing import SavedSource, load_packed, save_packed
from bitnet.formats.source import assemble
from bitnet.formats.weights import bf16_bits
from bitnet.tokenizer import ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer

SHAPE = BitNetConfig(257, 48, 80, 2, 4, 2, max_position_embeddings=64)
TOKENS = np.arange(10)[None] * 7 % 257
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "hidden_act": "relu2"},
    "ternary head": {"quantize_head": True, "sub_norms": False},
    "tied ternary head": {"quantize_head": True, "tie_word_embeddings": True, "use_rms_norm": True},
    "twin": {"linear": "linear"},
}


def trained(changes: dict[str, Any], seed: int = 3) -> BitNetForCausalLM:
    """A model whose norms are no longer ones, and whose codes are mostly zero."""
    model = BitNetForCausalLM(SHAPE.replace(**changes), seed)
    rng = np.random.default_rng(seed)
    for _, parameter in model.named_parameters():
        values = parameter.numpy()
        values[...] = rng.normal(size=values.shape) if values.ndim == 1 else values**3
    return model


def logits(model: BitNetForCausalLM) -> list[np.ndarray[Any, Any]]:
    """Of a prompt and some tokens after it, and the loss."""
    with bitnet.no_grad():
        loss = model(TOKENS, TOKENS).numpy()
    decoder = Decoder(model)
    return [decoder.prefill(TOKENS.tolist()), *(decoder.step([token]) for token in range(3)), loss]


def same(a: BitNetForCausalLM, b: BitNetForCausalLM) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(logits(a), logits(b), strict=True))


@pytest.mark.parametrize("coded", [False, True], ids=["fifths", "coded"])
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_packed_file_gives_the_logits_of_the_run(tmp_path: Path, changes: dict[str, Any], coded: bool) -> None:
    model = trained(changes)
    save_packed(model, tmp_path / "m.bitnet", coded=coded, tokenizer=ByteTokenizer(), provenance={"step": "7"})
    opened = bitnet.from_pretrained(tmp_path / "m.bitnet")
    codes = {name: (layer.codes().numpy(), layer.weight_scale) for name, layer in model.bitlinears()}
    assert opened.config == model.config
    assert isinstance(vars(opened)["tokenizer"], ByteTokenizer)
    assert vars(opened)["provenance"] == {"step": "7"}
    assert (vars(opened)["step"], vars(opened)["trained_seq_len"]) == (7, None)
    for name, layer in opened.bitlinears():
        assert layer.is_packed
        np.testing.assert_array_equal(layer.codes().numpy(), codes[name][0])
        assert layer.weight_scale == codes[name][1]
    assert sum(1 for _ in opened.bitlinears()) == len(codes)
    assert not any(layer.is_packed for _, layer in model.bitlinears())
    model.pack()
    assert same(opened, model)
    assert same(load_packed(tmp_path / "m.bitnet", layout="1.6"), model)
    save_packed(opened, tmp_path / "again.bitnet", coded=coded, provenance={"step": "7"})
    assert (tmp_path / "again.bitnet").read_bytes() == (tmp_path / "m.bitnet").read_bytes()
    save_packed(model, tmp_path / "m.bitnet", coded=coded, tokenizer=ByteTokenizer(), force=True)
    assert same(load_packed(tmp_path / "m.bitnet", verify=False), model)


def test_packing_leaves_no_codes_with_the_model(tmp_path: Path) -> None:
    model = trained({})
    before = _core.memory_stats()["in_use"]
    save_packed(model, tmp_path / "m.bitnet")
    assert _core.memory_stats()["in_use"] == before


def sections(path: Path) -> dict[str, Section]:
    return BitnetFile(path).sections


def test_sizes(tmp_path: Path) -> None:
    """1.6 bits and what rounds up to a byte; coded, the entropy and a few bytes."""
    model = trained({"hidden_size": 256, "intermediate_size": 512})
    for coded in (False, True):
        save_packed(model, tmp_path / "m.bitnet", coded=coded, force=True)
        for name, layer in model.bitlinears():
            section = sections(tmp_path / "m.bitnet")[f"{name}.weight"]
            entropy = layer.ternary_stats().entropy
            assert entropy < 1.3
            assert section.form == ("fifths-coded" if coded else "fifths")
            if coded:
                assert 8 * section.bytes <= section.count * min(math.log2(3), 1.002 * entropy) + 8 * 12
            else:
                assert section.bytes == math.ceil(section.count / 5)


def test_a_layer_that_coding_would_not_shrink_stays_plain(tmp_path: Path) -> None:
    model = BitNetForCausalLM(SHAPE.replace(hidden_size=8, intermediate_size=8, num_attention_heads=1))
    save_packed(model, tmp_path / "m.bitnet", coded=True)
    assert {s.form for name, s in sections(tmp_path / "m.bitnet").items() if "_proj" in name} == {"fifths"}


# ---- bf16 -----------------------------------------------------------------------------------------------------------


def test_bf16_only_where_it_loses_nothing_unless_asked(tmp_path: Path) -> None:
    model = trained({})
    path = tmp_path / "m.bitnet"
    matrices = ("model.embed_tokens.weight", "lm_head.weight")
    save_packed(model, path)
    assert {sections(path)[name].form for name in matrices} == {"f32"}
    exact = logits(model)
    save_packed(model, path, floats="bf16", force=True)
    assert {sections(path)[name].form for name in matrices} == {"bf16"}
    assert sections(path)["model.norm.weight"].form == "f32"
    rounded = load_packed(path)
    assert any(not np.array_equal(a, b) for a, b in zip(logits(rounded), exact, strict=True))
    save_packed(rounded, path, force=True)
    assert {sections(path)[name].form for name in matrices} == {"bf16"}
    assert same(load_packed(path), rounded)
    save_packed(rounded, path, floats="f32", force=True)
    assert {sections(path)[name].form for name in matrices} == {"f32"}
    assert same(load_packed(path), rounded)
    with pytest.raises(ValueError, match="floats must be one of bf16, f32, not 'f16'"):
        save_packed(model, path, floats="f16", force=True)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_every_kind_of_model_runs_from_bf16(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Layers of a twin too, which add a residual."""
    model = trained(changes)
    for _, parameter in model.named_parameters():
        if parameter.ndim == 2:
            halves = bf16_bits(parameter.numpy()).astype(np.uint32) << 16
            parameter.copy_(halves.view(np.float32))
    save_packed(model, tmp_path / "m.bitnet")
    forms = {section.form for section in sections(tmp_path / "m.bitnet").values() if len(section.shape) == 2}
    assert forms <= {"bf16", "fifths"}
    assert same(load_packed(tmp_path / "m.bitnet"), model)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_a_head_that_was_packed_in_bf16_is_saved_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = trained(changes).pack(head="bf16")
    save_packed(model, tmp_path / "m.bitnet")
    head = "model.embed_tokens.weight" if changes else "lm_head.weight"
    assert sections(tmp_path / "m.bitnet")[head].form == "bf16"
    assert same(load_packed(tmp_path / "m.bitnet"), model)


def test_rounding_bf16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", 7)
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, np.uint32)
    bits[:6] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0xFF800000, 0x00000001]
    values = bits.view(np.float32)
    got = bf16_bits(values.reshape(40, 100))
    assert got.shape == (40, 100)
    with bitnet.no_grad():
        want = bitnet.tensor(values).to("bf16").to("f32").numpy()
    np.testing.assert_array_equal((got.reshape(-1).astype(np.uint32) << 16).view(np.float32), want)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharTokenizer("abcé", separator=True),
        SentencePieceTokenizer.train(["the cat sat on the mat, the dog on the log " * 9], 300),
    ],
    ids=["chars", "sentencepiece"],
)
def test_the_tokenizer_comes_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = BitNetForCausalLM(SHAPE.replace(vocab_size=tokenizer.vocab_size))
    vars(model)["tokenizer"] = tokenizer
    save_packed(model, tmp_path / "m.bitnet")
    found = vars(load_packed(tmp_path / "m.bitnet"))["tokenizer"]
    assert found.fingerprint() == tokenizer.fingerprint()


# ---- files that do not fit themselves -------------------------------------------------------------------------------


def rewritten(path: Path, changes: dict[str, Any], drop: str = "", form: str = "") -> None:
    """The file again with other fields in its config, without a section, or with one under another form."""
    file = BitnetFile(path)
    parts = []
    for section in file.sections.values():
        data = bytes(file.view(section))
        content = bitnet_file.Content(section.form, data, section.scale)
        if section.name == drop:
            if not form:
                continue
            content = bitnet_file.Content(form, bytes(4 * section.count))
        parts.append(bitnet_file.Part(section.name, section.shape, lambda content=content: content))
    write(path, file.config | changes, file.provenance, parts, force=True)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "drop", "form", "sentence"),
    [
        ({}, Q, "", f"it has no {Q}, which its config asks for"),
        ({}, "model.norm.weight", "", r"it has no model\.norm\.weight"),
        ({}, "model.layers.0.mlp.ffn_sub_norm.weight", "", "it has no .*ffn_sub_norm"),
        ({"num_hidden_layers": 1}, "", "", r"it has model\.layers\.1\.\S+, for which its config has no place"),
        ({"num_hidden_layers": 3}, "", "", r"it has no model\.layers\.2\."),
        ({"num_hidden_layers": 10**9}, "", "", r"it has no model\.layers\.2\."),
        ({"hidden_size": 64}, "", "", r"embed_tokens\.weight has shape \(257, 48\), but \(257, 64\) by its config"),
        ({"vocab_size": 10**12}, "", "", r"has shape \(257, 48\), but \(1000000000000, 48\)"),
        ({"max_position_embeddings": 2**40}, "", "", "rotary tables are made for at most 1048576"),
        ({"hidden_act": "tanh"}, "", "", "hidden_act must be one of"),
        ({"hidden_size": "48"}, "", "", "hidden_size must be a positive integer"),
        ({"linear": "linear"}, "", "", "is stored as ternary codes, which its config does not want"),
        ({}, Q, "f32", f"{Q} is stored as floats, which its config does not want"),
        ({"rms_norm_eps": None}, "", "", "rms_norm_eps must be a positive number, not None"),
        ({"rope_theta": "10000"}, "", "", "rope_theta must be a positive number"),
    ],
)
def test_a_file_that_does_not_fit_its_config(
    tmp_path: Path, changes: dict[str, Any], drop: str, form: str, sentence: str
) -> None:
    path = tmp_path / "m.bitnet"
    save_packed(trained({}), path)
    rewritten(path, changes, drop, form)
    with pytest.raises(CheckpointError, match=sentence):
        bitnet.from_pretrained(path)


def test_a_damaged_section_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.bitnet"
    save_packed(trained({}), path, tokenizer=ByteTokenizer())
    good = path.read_bytes()
    for section in sections(path).values():
        data = bytearray(good)
        data[section.offset + section.bytes // 2] ^= 16
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{section.name} is damaged"):
            bitnet.from_pretrained(path)
    section = sections(path)[Q]
    data = bytearray(good)
    data[section.offset] = 250
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{Q} cannot be read: row 0 of a ternary weight has 1 bytes above 242"):
        load_packed(path, verify=False)


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    state = {"step": 30, "tokens": 480, "val_loss": 5.5, "config": {"seq_len": 16}, "rng": {"seed": 0}}
    state["data"] = {"tokens": 1000, "shards": ["ab" * 32]}
    checkpoint.save(folder, 30, trained({"hidden_size": 64, "intermediate_size": 256}), {}, state, ByteTokenizer())
    return folder


@pytest.mark.parametrize("options", [[], ["--coded"], ["--embeddings", "bf16"]])
def test_pack_then_every_command_that_reads(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    path = tmp_path / "small.bitnet"
    assert cli.main(["pack", str(run), "-o", str(path), *options]) == 0
    printed = capsys.readouterr().out
    assert f"{path}: {path.stat().st_size:,} bytes, " in printed
    assert f"bitnet generate {path}" in printed
    assert BitnetFile(path).provenance == {
        "run": "small", "step": "30", "tokens": "480", "val_loss": "5.5", "seq_len": "16", "seed": "0",
        "data_tokens": "1000", "data_sha256": "ab" * 32, "packed_by": f"bitnet {bitnet.__version__}",
    }  # fmt: skip
    commands = [["generate", "-p", "ab", "--max-new-tokens", "9"], ["evaluate", "--data", str(run / "text.txt")]]
    (run / "text.txt").write_text("To be, or not to be, that is the question.")
    for command in commands:
        outputs = []
        for model in (run, path):
            assert cli.main([command[0], str(model), *command[1:]]) == 0
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1] or "bf16" in options
    assert cli.main(["bench", str(path), "--prompt", "4", "--gen", "2", "--rounds", "1"]) == 0


def test_packing_a_packed_file_codes_it(tmp_path: Path, run: Path) -> None:
    plain, coded, again = (tmp_path / name for name in ("plain", "coded", "again"))
    assert cli.main(["pack", str(run), "-o", str(plain)]) == 0
    assert cli.main(["pack", str(run), "-o", str(coded), "--coded"]) == 0
    assert cli.main(["pack", str(coded), "-o", str(again)]) == 0
    assert again.read_bytes() == plain.read_bytes()
    assert coded.stat().st_size < plain.stat().st_size


def test_requests_to_pack_that_cannot_be_met(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.bitnet"
    path.write_bytes(b"precious")
    for source, sentence in [(run, "exists already; --force"), (tmp_path / "no", "exists already; --force")]:
        assert cli.main(["pack", str(source), "-o", str(path)]) == 2
        assert sentence in capsys.readouterr().err
    assert path.read_bytes() == b"precious"
    assert cli.main(["pack", str(tmp_path / "no"), "-o", str(path), "--force"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert cli.main(["pack", str(path), "-o", str(path), "--force"]) == 2
    assert "it is no .bitnet file: it has 8 bytes" in capsys.readouterr().err
    assert path.read_bytes() == b"precious"
    assert cli.main(["pack", str(run), "-o", str(path), "--force"]) == 0
    assert len(BitnetFile(path).sections) > 1


def test_a_checkpoint_that_does_not_fit_is_not_packed(tmp_path: Path, run: Path) -> None:
    folder = tmp_path / "step"
    shutil.copytree(run / "checkpoints" / "step-00000030", folder)
    for changes, sentence in [
        ({"num_hidden_layers": 1}, "for which its config has no place"),
        ({"hidden_size": 32}, r"embed_tokens\.weight has shape \(257, 64\), but \(257, 32\) by its config"),
        ({"tie_word_embeddings": True}, r"it has lm_head\.weight"),
        ({"num_hidden_layers": 4}, r"it has no .*q_proj\.weight, which its config asks for"),
    ]:
        saved = checkpoint.load(folder)
        vars(saved)["config"] = saved.config.replace(**changes)
        with pytest.raises(CheckpointError, match=sentence):
            assemble(SavedSource(saved))


def test_info_tells_what_is_there(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.bitnet"
    cli.main(["pack", str(run), "-o", str(path), "--coded"])
    capsys.readouterr()
    assert cli.main(["info", str(path), "--json", str(tmp_path / "info.json")]) == 0
    printed, error = capsys.readouterr()
    assert error == ""
    found = json.loads((tmp_path / "info.json").read_text())
    layers = {f"{name}.weight": layer for name, layer in bitnet.from_pretrained(run).bitlinears()}
    entries = {entry["name"]: entry for entry in found["sections"]}
    for name, layer in layers.items():
        entry, stats = entries[name], layer.ternary_stats()
        assert entry["codes"] == [stats.minus, stats.zero, stats.plus]
        assert (entry["entropy"], entry["zero_share"]) == (stats.entropy, stats.zero_share)
        assert (entry["scale"], entry["is_whole"]) == (layer.weight_scale, True)
        assert entry["bits_per_weight"] == 8 * entry["bytes"] / stats.count
        assert f"{entry['bits_per_weight']:.4f}" in next(line for line in printed.splitlines() if name in line)
    assert found["ternary"]["weights"] == sum(layer.weight.size for layer in layers.values())
    assert found["tokenizer"]["kind"] == "bytes"
    assert found["provenance"]["run"] == "small"
    assert found["damage"] == []
    for part in (
        "checksums: 26 of 26 sections are whole",
        "tokenizer: bytes, 257 ids",
        "step 30",
        "next: bitnet gener",
    ):
        assert part in printed


def test_info_finds_damage(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.bitnet"
    cli.main(["pack", str(run), "-o", str(path), "--coded"])
    data = bytearray(path.read_bytes())
    damaged = [sections(path)[name] for name in (Q, "tokenizer/bitnet_tokenizer.json", "model.norm.weight")]
    for section in damaged:
        data[section.offset] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert cli.main(["info", str(path)]) == 1
    printed, error = capsys.readouterr()
    assert printed.count("DAMAGED") == 3
    assert "checksums: 23 of 26 sections are whole" in printed
    assert sorted(error.splitlines()) == sorted(
        f"error: {path}: {s.name} is damaged: its checksum differs from the one in the header" for s in damaged
    )
    path.write_bytes(data[:-1])
    assert cli.main(["info", str(path)]) == 2
    assert "it is cut off" in capsys.readouterr().err


def test_counting_codes_without_unpacking() -> None:
    for size in (1, 4, 5, 6, 1003):
        codes = np.random.default_rng(size).integers(-1, 2, (1, size), np.int8)
        counts = info.count_codes(_core.pack_fifths(_core.Tensor(codes)), size)
        assert [counts.minus, counts.zero, counts.plus] == [int((codes == value).sum()) for value in (-1, 0, 1)]
