"""Modules and statistics in a notebook cell: well-formed tables that say what the module says."""

from __future__ import annotations

from html.parser import HTMLParser

import bitnet
from bitnet import nn


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
