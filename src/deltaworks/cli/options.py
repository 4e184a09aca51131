"""Options that several commands share, and how results are printed."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

CatalogPath = Annotated[
    Path | None,
    typer.Option(
        "--catalog",
        metavar="PATH",
        help="Folder of the catalog. [default: $DELTAWORKS_CATALOG, else deltaworks/ in the user's data folder]",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Compute threads. [default: all cores]", show_default=False)
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Elements handled at once, a power of two from 4096 to 4194304; memory grows with it. [default: by size]",
        show_default=False,
    ),
]
ReplaceFile = Annotated[bool, typer.Option("--force", help="Also replace a file of another kind at -o.")]
ProfileName = Annotated[
    str,
    typer.Option(
        "--profile",
        metavar="P",
        help="A built-in profile (llama-3.1-8b-h100-64gb, qwen-2.5-7b-h100-64gb, tiny-llama-cpu) or a file of one.",
        show_default=False,
    ),
]


def print_json(content: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
