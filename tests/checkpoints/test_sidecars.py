"""Tokenizers and chat templates of model folders, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from deltaworks.checkpoints.sidecars import chat_template, vocabulary
from deltaworks.errors import CheckpointError

VOCAB = {"a": 0, "b": 1}


def tokenizer(path: Path, content: Any) -> Path:
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model": {"vocab": VOCAB}}, VOCAB),
        ({"model": {"vocab": VOCAB}, "added_tokens": None}, VOCAB),
        ({"model": {"vocab": VOCAB}, "added_tokens": []}, VOCAB),
        ({"model": {"vocab": VOCAB}, "added_tokens": [{"id": 7, "content": "<s>"}]}, VOCAB | {"<s>": 7}),
        ({"model": {"vocab": [["a", -1.5], ["b", -2]]}}, VOCAB),
        ({"model": {"vocab": {}}}, {}),
    ],
)
def test_vocabularies(tmp_path: Path, content: Any, expected: dict[str, int]) -> None:
    assert vocabulary(tokenizer(tmp_path, content)) == expected


def test_no_fast_tokenizer(tmp_path: Path) -> None:
    assert vocabulary(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({}, "model: expected the tokens, not null"),
        ({"model": None}, "model: expected the tokens, not null"),
        ({"model": [1]}, r"model: expected the tokens, not \[1\]"),
        ({"model": {}}, "model.vocab: expected the tokens, not null"),
        ({"model": {"vocab": None}}, "model.vocab: expected the tokens, not null"),
        ({"model": {"vocab": "ab"}}, "model.vocab: expected the tokens, not 'ab'"),
        ({"model": {"vocab": {"a": None}}}, r"model.vocab\['a'\]: expected a token's number, not null"),
        ({"model": {"vocab": {"a": "0"}}}, r"model.vocab\['a'\]: expected a token's number, not '0'"),
        ({"model": {"vocab": {"a": 0.0}}}, r"model.vocab\['a'\]: expected a token's number, not 0.0"),
        ({"model": {"vocab": {"a": True}}}, r"model.vocab\['a'\]: expected a token's number, not true"),
        ({"model": {"vocab": {"a": -1}}}, r"model.vocab\['a'\]: expected a token's number, not -1"),
        ({"model": {"vocab": [[]]}}, r"model.vocab\[0\]: expected a token and its score, not \[\]"),
        ({"model": {"vocab": ["a"]}}, r"model.vocab\[0\]: expected a token and its score, not 'a'"),
        ({"model": {"vocab": [[None, 1]]}}, r"model.vocab\[0\]: expected a token and its score"),
        ({"model": {"vocab": VOCAB}, "added_tokens": {}}, "added_tokens: expected a list"),
        ({"model": {"vocab": VOCAB}, "added_tokens": [None]}, r"added_tokens\[0\]: expected a token with content"),
        ({"model": {"vocab": VOCAB}, "added_tokens": [{"id": 1}]}, r"added_tokens\[0\]: expected a token with content"),
        ({"model": {"vocab": VOCAB}, "added_tokens": [{"content": "x"}]}, r"added_tokens\[0\]: expected"),
        ({"model": {"vocab": VOCAB}, "added_tokens": [{"content": "x", "id": [1]}]}, r"added_tokens\[0\]: expected"),
        ([], "not a JSON object"),
        (None, "not a JSON object"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, content: Any, where: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer.json:? .*{where}|tokenizer.json: {where}"):
        vocabulary(tokenizer(tmp_path, content))


@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000, '{"model": {"vocab": {"a": ' + "9" * 5000 + "}}}", '{"\\ud800": 1}']
)
def test_a_tokenizer_beyond_the_bounds(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be read as JSON") as refused:
        vocabulary(tmp_path)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


def test_chat_templates(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ a }}"}')
    assert chat_template(tmp_path) == "{{ a }}"
    (tmp_path / "chat_template.jinja").write_text("{{ ü }}", encoding="utf-8")
    assert chat_template(tmp_path) == "{{ ü }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"one\n{{ \xff }}")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: .*line 2 is not text in UTF-8"):
        chat_template(tmp_path)
