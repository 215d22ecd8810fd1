"""The chat page of the server: one file that reaches its own origin only and makes no markup of what a model writes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import bitnet

PAGE = Path(bitnet.__file__).parent / "server" / "page.html"
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Reader(HTMLParser):
    """Elements of a page with their attributes, refusing a tag that closes what is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> on line {self.getpos()[0]} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> on line {self.getpos()[0]} closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


@pytest.fixture(scope="module")
def source() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Reader:
    reader = Reader()
    reader.feed(source)
    reader.close()
    return reader


@pytest.fixture(scope="module")
def script(page: Reader) -> str:
    return page.text["script"]


def ids(page: Reader) -> list[str]:
    return [attributes["id"] or "" for _, attributes in page.elements if "id" in attributes]


def test_every_tag_is_closed(page: Reader) -> None:
    assert page.open == []


def test_size(source: str) -> None:
    assert 10_000 < len(source.encode()) < 40_000


def test_nothing_comes_from_elsewhere(source: str, page: Reader) -> None:
    assert "://" not in source
    assert not re.search(r"url\(|@import|\bimport\b|WebSocket|XMLHttpRequest|sendBeacon", source)
    for tag, attributes in page.elements:
        assert tag not in {"img", "iframe", "object", "embed", "base"}
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"


def test_policy_allows_the_own_origin_only(page: Reader) -> None:
    (policy,) = [a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["form-action"] == rules["base-uri"] == "'none'"


def test_text_never_becomes_markup_or_code(source: str, page: Reader) -> None:
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|ContextualFragment|srcdoc"
    assert not re.search(markup, source)
    assert not re.search(r"\beval\b|\bFunction\(|javascript:", source)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_ids_are_unique_and_those_of_the_script_exist(page: Reader, script: str) -> None:
    known = ids(page)
    assert len(set(known)) == len(known)
    used = set(re.findall(r'\bat\("([^"]*)"\)', script))
    assert {"log", "question", "send", "stop", "key"} <= used
    looped = re.findall(r"for \(const id of \[([^\]]*)\]\)", script)
    used |= {name for names in looped for name in re.findall(r'"([^"]*)"', names)}
    assert used <= set(known)


def test_settings_of_the_script_are_fields_of_the_form(page: Reader, script: str) -> None:
    (listed,) = re.findall(r"FIELDS = \[([^\]]*)\]", script)
    fields = {
        attributes["name"] for tag, attributes in page.elements if tag in {"input", "textarea"} and "name" in attributes
    }
    assert set(re.findall(r'"([^"]*)"', listed)) == fields


def test_the_key_is_not_among_what_is_kept(page: Reader) -> None:
    (key,) = [attributes for _, attributes in page.elements if attributes.get("id") == "key"]
    assert key["type"] == "password"
    assert "name" not in key


def test_every_field_has_a_label(source: str, page: Reader) -> None:
    labelled = {attributes["for"] for tag, attributes in page.elements if tag == "label" and "for" in attributes}
    assert labelled <= set(ids(page))
    outside = re.sub(r"<label\b(?:(?!</label>).)*<(?:input|textarea)\b.*?</label>", "", source, flags=re.DOTALL)
    rest = Reader()
    rest.feed(outside)
    fields = [attributes.get("id") for tag, attributes in rest.elements if tag in {"input", "textarea"}]
    assert fields
    assert set(fields) <= labelled
    assert any(attributes.get("aria-live") == "polite" for _, attributes in page.elements)


def test_it_speaks_the_protocol(script: str) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/v1/completions"):
        assert f'"{path}"' in script
    assert "stream: true, stream_options: { include_usage: true }" in script
