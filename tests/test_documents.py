"""Documents: what their readers give, and the one sentence that they refuse with."""

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaworks import documents
from deltaworks.documents import load_document, load_json, parse_json, parse_yaml, read_bytes
from deltaworks.errors import ProfileError, WorkloadError, quoted

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]\n" for i in range(1, 10)
)
HALF, PAIR = "\\ud83e", "\\ud83e\\udd8a"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-5", {"a": 1e-5}),
        ("a: -2E3", {"a": -2000.0}),
        ("a: .5e1", {"a": 5.0}),
        ("a: 2024-13-45", {"a": "2024-13-45"}),
        ("a: 2024-11-05 10:00:00", {"a": "2024-11-05 10:00:00"}),
        ("a: =", {"a": "="}),
        (f'a: "{PAIR}"', {"a": "\N{FOX FACE}"}),
        ("\ufeffa: 1", {"a": 1}),
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}),
        ("x: &x [1]\ny: *x", {"x": [1], "y": [1]}),
        ("", None),
        ("yes", True),
        ("[" * 100 + "]" * 100, json.loads("[" * 100 + "]" * 100)),
    ],
)
def test_yaml_that_is_read(text: str, value: object) -> None:
    assert parse_yaml(text, "w.yaml", "a workload", WorkloadError) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
        ("b:\n  1: x\n  1.0: y", "line 3: the key '1.0' is given twice"),
        ("a:\n  - x\n\t- y", "line 3 begins with a tab; YAML indents with spaces"),
        ("a:\n\tb: 1", "line 2 begins with a tab"),
        (LAUGHS, "line 6: with its aliases expanded it has more than 1,000,000 values"),
        ("a: &a [*a]", "line 1: the alias 'a' holds itself"),
        ("a: *b", "line 1: found undefined alias 'b'"),
        ("a:\n- " + 5000 * "[", "line 2: its values are nested more than 100 deep"),
        (101 * "[" + 101 * "]", "line 1: its values are nested more than 100 deep"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 999)),
            "line 100: its values are nested",
        ),
        (5000 * "- ", "line 1: its values are nested more than 100 deep"),
        ("a: " + 5000 * "9", "line 1: '999.* has 5,000 digits; at most 100 are read"),
        ("a: .nan", "line 1: '.nan' is not a finite number"),
        ("a: 1e400", "line 1: '1e400' is not a finite number"),
        (f'a: "{HALF}"', "line 1: the text '.*' has half of a surrogate pair"),
        ("a: 1\nb: \x01", r"line 2 has the character '\\x01', which YAML does not allow"),
        ("a: !!int five", "line 1: 'five' is not a valid int"),
        ("a: " + 400 * "1:" + "1.0", "line 1: '1:1.* is not a valid float"),
        ('a: "\\UFFFFFFFF"', "it is not valid YAML"),
        ("a: !!bool [x]", "line 1: expected a scalar node"),
        ("a: !!map [x]", "line 1: a mapping or list is not a valid map"),
        ("a: !!python/name:os.system", "line 1: could not determine a constructor"),
        ("a: !!timestamp 2024-13-45", "line 1: could not determine a constructor"),
        ("{[1]: 2}", r"line 1: \[1\] cannot be a key"),
        ("a: 'b", "line 1: while scanning a quoted scalar: found unexpected end of stream"),
        ("--- 1\n--- 2", "line 2: expected a single document"),
    ],
)
def test_yaml_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(WorkloadError, match=f"^w.yaml: cannot be read as a workload: {said}") as caught:
        parse_yaml(text, "w.yaml", "a workload", WorkloadError)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        ('{\n"a": }', "line 2, column 6 is not valid JSON: Expecting value"),
        ("", "line 1, column 1 is not valid JSON"),
        ("[NaN]", "NaN is not a number that JSON allows"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("[1e400]", "the number 1e400 is too large"),
        (f"[{5000 * '9'}]", "a whole number has 5,000 digits; at most 100 are read"),
        (5000 * "[", "nested more than 100 deep"),
        (200_000 * '{"a":', "nested more than 100 deep"),
        (101 * "[" + 101 * "]", "its values are nested more than 100 deep"),
        (f'{{"{HALF}": 1}}', "has half of a surrogate pair"),
        (f'[[["{HALF}"]]]', "has half of a surrogate pair"),
    ],
)
def test_json_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(ProfileError, match=f"^p.json: cannot be read as a profile: .*{said}"):
        parse_json(text, "p.json", "a profile", ProfileError)


def test_json_that_is_read() -> None:
    def parsed(text: str, *, finite: bool = True) -> object:
        return parse_json(text, "p.json", "a profile", ProfileError, finite=finite)

    assert parsed(f'{{"{PAIR}": 5e-05, "b": 1e+30}}') == {"\N{FOX FACE}": 5e-5, "b": 1e30}
    assert parsed(f"[{99 * '9'}]") == [10**99 - 1]
    assert parsed("[1e400, Infinity]", finite=False) == [float("inf")] * 2
    assert parsed(100 * "[" + 100 * "]") == json.loads(100 * "[" + 100 * "]")


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
))  # fmt: skip
def test_json_is_what_the_standard_library_reads(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(text, "p.json", "a profile", ProfileError) == json.loads(text)


def test_a_document_is_json_where_it_can_be(tmp_path: Path) -> None:
    for name, text, value in (
        ("a.json", f'{{"n": "{PAIR}", "r": 5e-05}}', {"n": "\N{FOX FACE}", "r": 5e-5}),
        ("a.yaml", f' {{"n": "{PAIR}",\n\t"r": 5e-05}}', {"n": "\N{FOX FACE}", "r": 5e-5}),
        ("flow", "{n: [1, 2]}", {"n": [1, 2]}),
        ("block", "n: [1, 2]", {"n": [1, 2]}),
    ):
        (tmp_path / name).write_text(text)
        assert load_document(tmp_path / name, "a workload", WorkloadError) == value
    for name, text, said in (
        ("b.json", "{n: 1}", "line 1, column 2 is not valid JSON"),
        ("b.yaml", '{"n": 1, "n": 2}', "the key 'n' is given twice"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(WorkloadError, match=f"{name}: cannot be read as a workload: {said}"):
            load_document(tmp_path / name, "a workload", WorkloadError)


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "big").write_bytes(bytes(101))
    (tmp_path / "latin").write_bytes(b'{\n"a": "\xe9"}')
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)
        listening.bind("socket")
    for name, said in (
        ("pipe", "pipe: cannot be read as a profile: it is a named pipe, not a file"),
        ("socket", "it is a socket"),
        ("folder", "it is a folder, not a file"),
        ("big", "it has more than 100 bytes"),
        ("missing", "missing: cannot be read as a profile: No such file"),
        (300 * "x", "File name too long"),
        (5000 * "x", r"^.{,125}: cannot be read as a profile: File name too long"),
        ("a\nb", r"/a\\nb': cannot be read as a profile: No such file"),
        ("a\0b", "the file name is invalid"),
        ("latin", "line 2 is not text in UTF-8"),
    ):
        with pytest.raises(ProfileError, match=said):
            load_json(tmp_path / name, "a profile", ProfileError, limit=100)
    with pytest.raises(ProfileError, match="it is a device"):
        read_bytes(Path("/dev/zero"), "a profile", ProfileError)
    monkeypatch.setattr(documents, "YAML_BYTES", 5)
    (tmp_path / "long").write_text('{"a": 1\n"b": 2}')
    with pytest.raises(ProfileError, match="line 2, column 1 is not valid JSON: Expecting ',' delimiter"):
        load_document(tmp_path / "long", "a profile", ProfileError)
    with pytest.raises(ProfileError, match="more than 5 characters of YAML; write it as JSON"):
        parse_yaml("a: 1111", "p", "a profile", ProfileError)


def test_a_quoted_value_is_short_and_on_one_line() -> None:
    value: list[object] = ["x" * 1000]
    for _ in range(60):
        value = [value] * 60  # far too many to print
    for given_value in (value, "y\n" * 5000, dict.fromkeys(range(999), "z" * 99), 10**50_000, "a  b"):
        text = quoted(given_value)
        assert len(text) <= 120
        assert "\n" not in text
    assert quoted("a  b") == "'a  b'"
