"""llama.cpp runs what is exported, and computes what the model computes; what is refused, it would compute wrongly.

It is asked where LLAMA_PYTHON, or else this interpreter, has llama_cpp.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import CONFIGS, copy_of, logits, make_model
from made_tokenizers import llama3_tokenizer, nasty_texts
from test_tokenizer import SOURCE

from bitnet import BitNetConfig, BitNetForCausalLM
from bitnet.formats.gguf_export import WEIGHTS, save_gguf
from bitnet.formats.gguf_file import GgufFile, Part, write
from bitnet.formats.gguf_source import open_gguf
from bitnet.formats.gguf_types import F32
from bitnet.formats.source import assemble
from bitnet.optim import AdamW
from bitnet.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON", sys.executable)
PROCESS = Path(__file__).with_name("llama_cpp_process.py")
RUNS = ("llama.cpp", "llama")  # the flavours that are for it
ARRAY = np.ndarray[Any, Any]


def sequence(count: int) -> list[int]:
    """Each token follows from the one before."""
    tokens = [1]
    while len(tokens) < count:
        tokens.append((5 * tokens[-1] + 7) % 96)
    return tokens


TOKENS = sequence(40)


def ask(
    models: list[Path],
    vocabularies: dict[str, list[str]] | None = None,
    quantize: list[tuple[str, str, int]] | None = None,
) -> dict[str, Any]:
    """See llama_cpp_process.py."""
    request = {"quantize": quantize or [], "models": [str(path) for path in models], "tokens": TOKENS,
               "vocabularies": vocabularies or {}}  # fmt: skip
    done = subprocess.run(
        [LLAMA_PYTHON, PROCESS], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def is_there() -> None:
    if subprocess.run([LLAMA_PYTHON, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(f"{LLAMA_PYTHON} has no llama_cpp; LLAMA_PYTHON names an interpreter that does")


def trained(config: BitNetConfig) -> BitNetForCausalLM:
    """A model that knows which token follows."""
    model = BitNetForCausalLM(config, 3)
    optimizer = AdamW(model, lr=1e-2)
    tokens = np.array([sequence(97)])
    for step in range(120):
        optimizer.lr = 1e-2 * (1 - step / 120)
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    return model


@pytest.fixture(scope="module")
def models(is_there: None) -> dict[str, BitNetForCausalLM]:
    return {
        **{flavour: make_model(CONFIGS[flavour]) for flavour in RUNS},
        **{f"{flavour} trained": trained(CONFIGS[flavour].replace(num_hidden_layers=1)) for flavour in RUNS},
        "llama tied": make_model(CONFIGS["llama"].replace(tie_word_embeddings=True), 2),
        "llama twin": make_model(CONFIGS["llama"].replace(linear="linear"), 2),
        "llama.cpp relu2": make_model(CONFIGS["ik"]),
    }


@pytest.fixture(scope="module")
def found(models: dict[str, BitNetForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ARRAY]:
    """Logits of every model in every type of weights, by "model weights"."""
    folder = tmp_path_factory.mktemp("gguf")
    paths = {}
    for name, model in models.items():
        flavour = name.partition(" ")[0]
        for weights in WEIGHTS[flavour]:
            if weights == "i2_s" or (name == "llama twin" and weights.startswith("tq")):
                continue
            paths[f"{name} {weights}"] = folder / f"{name} {weights}"
            save_gguf(model, folder / f"{name} {weights}", flavour=flavour, weights=weights, embeddings="f32",
                      force_activation=name == "llama.cpp relu2")  # fmt: skip
    answers = ask(list(paths.values()))["logits"]
    assert None not in answers
    return {name: np.array(answer) for name, answer in zip(paths, answers, strict=True)}


def full_precision(model: BitNetForCausalLM) -> ARRAY:
    """Logits without quantization of activations."""
    floats = copy_of(model)
    floats.to_full_precision()
    return logits(floats, TOKENS)


@pytest.mark.parametrize("name", ["llama.cpp", "llama.cpp trained", "llama", "llama trained", "llama tied"])
@pytest.mark.parametrize("weights", ["f32", "f16"])
def test_floats_are_the_model_without_quantized_activations(
    models: dict[str, BitNetForCausalLM], found: dict[str, ARRAY], name: str, weights: str
) -> None:
    """To rounding. Of F16 it is that of activations to F16, 2^-12 each in every layer, where llama.cpp was not compiled
    for the processor it runs on (1e-3 of a deviation was seen), and in a llama of F16 that of each scale."""
    wanted, got = full_precision(models[name]), found[f"{name} {weights}"]
    assert np.abs(got - wanted).max() < (1e-2 * wanted.std() if weights == "f16" else 1e-4)


def test_a_full_precision_model_is_the_same(models: dict[str, BitNetForCausalLM], found: dict[str, ARRAY]) -> None:
    wanted = logits(models["llama twin"], TOKENS)
    assert np.abs(found["llama twin f32"] - wanted).max() < 1e-4
    assert np.abs(found["llama twin f16"] - wanted).max() < 1e-2 * wanted.std()
    assert np.abs(found["llama twin bf16"] - wanted).max() < 0.1 * wanted.std()


@pytest.mark.parametrize("name", ["llama.cpp", "llama", "llama tied"])
def test_ternary_types_differ_by_quantized_activations_alone(
    models: dict[str, BitNetForCausalLM], found: dict[str, ARRAY], name: str
) -> None:
    """llama.cpp quantizes activations per 256 values, this package per token: both are as far from no quantization."""
    model = models[name]
    floats, ours = full_precision(model), logits(model, TOKENS)
    np.testing.assert_array_equal(found[f"{name} tq1_0"], found[f"{name} tq2_0"])
    theirs = found[f"{name} tq2_0"]
    far = np.sqrt(((ours - floats) ** 2).mean())
    assert np.sqrt(((theirs - floats) ** 2).mean()) < 1.5 * far
    assert np.sqrt(((theirs - ours) ** 2).mean()) < 1.5 * far
    assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("flavour", RUNS)
@pytest.mark.parametrize("weights", ["tq2_0", "tq1_0", "f16", "bf16", "f32"])
def test_a_trained_model_says_the_same(
    models: dict[str, BitNetForCausalLM], found: dict[str, ARRAY], flavour: str, weights: str
) -> None:
    ours, theirs = logits(models[f"{flavour} trained"], TOKENS), found[f"{flavour} trained {weights}"]
    assert theirs.argmax(-1).tolist() == ours.argmax(-1).tolist() == sequence(len(TOKENS) + 1)[1:]


def test_squared_relu_would_be_computed_wrongly(models: dict[str, BitNetForCausalLM], found: dict[str, ARRAY]) -> None:
    """Why it is refused: the file says relu2, and these are the logits of silu."""
    model = models["llama.cpp relu2"]
    wanted, got = full_precision(model), found["llama.cpp relu2 f32"]
    assert np.abs(got - wanted).max() > 0.2 * wanted.std()
    silu = BitNetForCausalLM(model.config.replace(hidden_act="silu"))
    silu.load_state_dict(model.state_dict())
    assert np.abs(got - full_precision(silu)).max() < 1e-4


def test_files_that_it_does_not_load(tmp_path: Path) -> None:
    """Why the other flavours are for others, and why a bitnet file has no output head."""
    bitnet = make_model(CONFIGS["bitnet.cpp"])
    for flavour in ("bitnet.cpp", "ik"):
        save_gguf(bitnet, tmp_path / flavour, flavour=flavour)
    save_gguf(make_model(CONFIGS["llama.cpp"]), tmp_path / "x", flavour="llama.cpp", weights="f32", embeddings="f32")
    file = open_gguf(tmp_path / "x").file
    parts = [Part(e.name, e.shape, e.type, lambda e=e: bytes(file.view(e))) for e in file.tensors.values()]  # type: ignore[misc]
    head = np.zeros((96, 256), np.float32)
    write(tmp_path / "headed", file.metadata, [*parts, Part("output.weight", head.shape, F32, lambda: head)])
    names = ["bitnet.cpp", "ik", "headed", "x"]
    loaded = [answer is not None for answer in ask([tmp_path / name for name in names])["logits"]]
    assert dict(zip(names, loaded, strict=True)) == {"bitnet.cpp": False, "ik": False, "headed": False, "x": True}


@pytest.mark.parametrize("flavour", RUNS)
@pytest.mark.parametrize("weights", ["f32", "f16"])
def test_what_its_own_quantizer_writes_is_read(
    models: dict[str, BitNetForCausalLM], tmp_path: Path, flavour: str, weights: str
) -> None:
    """Codes as they are, embeddings in its Q6_K or Q4_K; the scale as halves have it, unless it is beside them."""
    model = models[flavour]
    save_gguf(model, tmp_path / "x", flavour=flavour, weights=weights)
    types = {"TQ1_0": 36, "TQ2_0": 37}
    ask([], quantize=[(str(tmp_path / "x"), str(tmp_path / name), number) for name, number in types.items()])
    for name in types:
        file = GgufFile(tmp_path / name)
        assert file.tensors["blk.0.ffn_up.weight"].type.name == name
        assert file.tensors["token_embd.weight"].type.name == ("Q6_K" if flavour == "llama.cpp" else "Q4_K")
        back = assemble(open_gguf(tmp_path / name))
        assert back.config == model.config
        for (path, layer), (_, kept) in zip(model.bitlinears(), back.bitlinears(), strict=True):
            np.testing.assert_array_equal(kept.codes().numpy(), layer.codes().numpy(), err_msg=path)
            lost = 0 if file.tensors.keys() & {"blk.0.ffn_up.scale"} else 2**-11
            assert kept.weight_scale == pytest.approx(layer.weight_scale, rel=lost, abs=0)
        table, known = (m.model.embed_tokens.weight.numpy() for m in (back, model))
        assert np.abs(table - known).max() < 0.1 * np.abs(known).max()


def test_texts_become_the_same_tokens(tmp_path: Path) -> None:
    """In a whole model, and in the model that is read back."""
    tokenizers: dict[str, Tokenizer] = {
        "llama-3": llama3_tokenizer(SOURCE),
        "sentencepiece": SentencePieceTokenizer.train([SOURCE], 700),
        "bytes": ByteTokenizer(),
    }
    texts, wanted = nasty_texts(40), {}
    for name, tokenizer in tokenizers.items():
        model = make_model(CONFIGS["llama.cpp"].replace(vocab_size=tokenizer.vocab_size + 3))
        path = tmp_path / name
        save_gguf(model, path, flavour="llama.cpp", tokenizer=tokenizer)
        back = assemble(open_gguf(path))
        assert [back.tokenizer.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]  # type: ignore[attr-defined]
        wanted[str(path)] = [tokenizer.encode(text) for text in texts]
    assert ask([], dict.fromkeys(wanted, texts))["ids"] == wanted
    assert None not in ask(list(map(Path, wanted)))["logits"]
