"""Modules and statistics in a notebook cell: well-formed tables that say what the module says."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

import bitnet
from bitnet import nn, ops


class Cells(HTMLParser):
    """The texts of a table, row by row; fails on elements left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "tr" in self.open:
            self.rows[-1][-1] += data


CONFIG = bitnet.BitNetConfig.preset(
    "nano", vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)


def test_every_parameter_of_a_model_is_in_its_table() -> None:
    model = bitnet.BitNetForCausalLM(CONFIG, seed=0)
    rows = Cells(model._repr_html_()).rows
    by_name = {row[0]: row for row in rows[1:]}
    assert sum(int(row[3].replace(",", "")) for name, row in by_name.items() if "all" not in name) == (
        model.num_parameters()
    )
    layer = model.model.layers[1].mlp.down_proj
    row = by_name["model.layers.1.mlp.down_proj"]
    assert row[1:4] == ["BitLinear", "32 × 64", "2,048"]
    assert f"{layer.ternary_stats().zero_share:.1%}" in row[4]
    assert row[5] == f"{layer.weight_scale:.4g}"
    assert by_name["all ternary layers"][3] == f"{model.num_ternary():,}"


def test_twin_packed_and_single_layers_show_themselves() -> None:
    twin = bitnet.BitNetForCausalLM(CONFIG.replace(linear="linear"), seed=0)
    assert "ternary" not in twin._repr_html_()
    packed = bitnet.BitNetForCausalLM(CONFIG, seed=0)
    before = Cells(packed._repr_html_()).rows
    packed.pack("2")
    assert Cells(packed._repr_html_()).rows == before
    assert Cells(nn.BitLinear(8, 4, bias=True)._repr_html_()).rows[1][:4] == ["BitLinear", "BitLinear", "4 × 8", "36"]
    assert nn.ModuleList([])._repr_html_() == "<div>ModuleList: 0 parameters</div>"


def test_statistics_show_shares_and_entropy() -> None:
    rows = Cells(nn.TernaryStats(250, 500, 250, 10)._repr_html_()).rows
    assert rows[0][:2] == ["1,000 codes", "1.5000 bits a weight"]
    assert rows[1:] == [
        ["−1", "250", "25.00%"],
        ["0", "500", "50.00%"],
        ["+1", "250", "25.00%"],
        ["changed last", "10", "1.00%"],
    ]
    assert "no codes" in nn.TernaryStats(0, 0, 0, 0)._repr_html_()


def test_a_tensor_shows_its_values_and_how_often_they_occur() -> None:
    values = np.repeat(np.float32([-1.5, 0.0, 0.0, 2.5]), 50).reshape(10, 20)
    tensor = bitnet.Tensor(values, requires_grad=True)
    text = tensor._repr_html_()
    Cells(text)
    assert "<b>Tensor 10 × 20</b>, f32, requires grad; -1.5 to 2.5; mean 0.25, deviation 1.436; 50.0% zeros<" in text
    heights = [float(tall) for tall in re.findall(r"v-([0-9.]+)h", text)]
    assert heights == [20.0, 40.0, 20.0], "a column for each of three values, half as many of two"
    assert tensor.grad is None
    assert "[[-1.5 -1.5 -1.5" in text


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8", "i32", "ternary2"])
def test_every_dtype_shows_itself(dtype: str) -> None:
    codes = np.arange(-1, 2, dtype=np.int8).repeat(4).reshape(3, 4)
    if dtype == "ternary2":
        tensor = bitnet._core.pack_ternary(bitnet.Tensor(codes, "i8"))
    elif dtype == "bf16":
        tensor = bitnet.Tensor(codes, "f32").to("bf16")
    else:
        tensor = bitnet.Tensor(codes, dtype)
    text = tensor._repr_html_()
    Cells(text)
    assert f"<b>Tensor 3 × 4</b>, {dtype}; -1 to 1; mean 0, deviation 0.8165; 33.3% zeros<" in text


def test_tensors_with_little_to_show() -> None:
    for tensor, said in (
        (ops.tensor(np.float32(7)), "<b>Tensor scalar</b>, f32; 7 to 7; mean 7, deviation 0; 0.0% zeros<"),
        (ops.tensor(np.zeros((0, 3), np.float32)), "<div><b>Tensor 0 × 3</b>, f32</div>"),
        (ops.tensor(np.float32([np.nan, np.inf, 1, 1])), "f32; 1 to 1; mean 1, deviation 0; 0.0% zeros; 2 not finite<"),
        (ops.tensor(np.float32([np.nan])), "f32; 0.0% zeros; 1 not finite<"),
        (bitnet._core.prepare_ternary(bitnet.Tensor(np.ones((4, 4), np.int8), "i8"), 0.5), "prepared</div>"),
    ):
        text = tensor._repr_html_()
        Cells(text)
        assert said in text
        assert "<svg" not in text
    large = ops.tensor(np.arange(3 << 20, dtype=np.float32))
    assert "one value in 3; 0 to 3.146e+06" in large._repr_html_()
