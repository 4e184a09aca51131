"""Tables in the docs that benchmarks write, between two marks."""

from pathlib import Path

END = "<!-- end of table -->"


def fill(doc: Path, mark: str, lines: list[str]) -> None:
    """Put lines between ``<!-- MARK -->`` and the end mark that follows."""
    opening = f"<!-- {mark} -->"
    head, found, rest = doc.read_text(encoding="utf-8").partition(opening)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"{doc}: lacks {opening} or {END}")
    doc.write_text("\n".join([f"{head}{opening}", *lines, f"{END}{tail}"]), encoding="utf-8")
