"""The rules of the house: imports go one way, the core needs no PyTorch, the command line starts light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deltaworks

SOURCE = Path(deltaworks.__file__).parent
ROOMS = {
    "checkpoints": {"checkpoints"},
    "layers": {"checkpoints", "layers"},
    "catalog": {"checkpoints", "layers", "catalog"},
    "merging": {"checkpoints", "layers", "catalog", "merging"},
    "serving": {"checkpoints", "catalog", "serving"},
    "reports": {"checkpoints", "layers", "catalog", "merging", "serving", "reports"},
    "cli": {"checkpoints", "layers", "catalog", "merging", "serving", "reports", "cli"},
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    files = list((SOURCE / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = {parts[1] for m in imported(path) if (parts := m.split("."))[0] == "deltaworks" and len(parts) > 2}
        assert rooms <= ROOMS[room], path


def test_the_core_needs_no_pytorch() -> None:
    for path in SOURCE.rglob("*.py"):
        assert not {m for m in imported(path) if m.split(".")[0] in ("torch", "transformers", "ray")}, path


def test_help_needs_no_compiler() -> None:
    code = "import sys, deltaworks, deltaworks.cli.main; print([m for m in sys.modules if m in ('numba', 'pyarrow')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_everything_public_can_be_imported() -> None:
    for name in deltaworks.__all__:
        assert getattr(deltaworks, name).__doc__
    with pytest.raises(AttributeError):
        _ = deltaworks.nothing  # type: ignore[attr-defined, unused-ignore]
