"""What is known of a model that is not opened: the same sentences where there is none, and no weights downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bitnet import BitNetConfig, BitNetForCausalLM, checkpoint, from_pretrained
from bitnet.errors import CheckpointError
from bitnet.formats.hf_export import save_hf
from bitnet.formats.packing import save_packed
from bitnet.pretrained import config_of, outline_of

SHAPE = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)


def put(run: Path) -> Path:
    checkpoint.save(run, 5, BitNetForCausalLM(SHAPE), {}, {"step": 5})
    return run


def test_the_outline_of_all_that_can_be_opened(tmp_path: Path) -> None:
    run = put(tmp_path / "run")
    model = from_pretrained(run)
    save_packed(model, tmp_path / "packed.bitnet")
    save_hf(model, tmp_path / "codes", packed=True)
    save_hf(model, tmp_path / "latent", packed=False)
    for path, is_latent in ((run, True), (checkpoint.folder_of(run, 5), True), (tmp_path / "latent", True),
                            (tmp_path / "packed.bitnet", False), (tmp_path / "codes", False)):  # fmt: skip
        found = outline_of(path)
        assert found.is_latent == is_latent, path
        assert found.lora is None
        assert found.config == from_pretrained(path).config == config_of(path)
        assert any(layer.is_packed for _, layer in from_pretrained(path).bitlinears()) != is_latent


def test_what_is_not_there_is_told_as_by_opening(tmp_path: Path) -> None:
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for path, sentence in (("nowhere", "there is no folder"), ("begun", "has no checkpoint yet"),
                           ("other", "is neither a run")):  # fmt: skip
        said = []
        for look in (config_of, from_pretrained):
            with pytest.raises(CheckpointError, match=sentence) as error:
                look(tmp_path / path)
            said.append(str(error.value))
        assert said[0] == said[1]


@pytest.mark.parametrize("packed", [False, True])
def test_of_a_hub_id_no_weights_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    hub = pytest.importorskip("huggingface_hub")
    save_hf(BitNetForCausalLM(SHAPE), tmp_path / "hub", packed=packed)

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, allow_patterns) == ("some/model", ["*.json"])
        folder = tmp_path / "cache"
        folder.mkdir()
        shutil.copy(tmp_path / "hub" / "config.json", folder)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    found = outline_of("some/model")
    assert found.config == from_pretrained(tmp_path / "hub").config
    assert found.is_latent != packed
