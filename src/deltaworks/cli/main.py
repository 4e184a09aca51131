"""The `deltaworks` command."""

import ctypes
import gc
import os
import sqlite3
import sys
from contextlib import suppress

import typer

from deltaworks.checkpoints.descriptors import raise_limit
from deltaworks.cli import demo, lineage, merges, models, placements, plans, serving, show, surrogates
from deltaworks.errors import DeltaworksError

_M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""

app = typer.Typer(
    help="Merge families of fine-tuned models, exactly and with a record of it; place LoRA adapters on the fewest GPUs."
    " Start with `deltaworks demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
for group in (merges, plans, models, show, lineage, serving, surrogates, placements, demo):
    group.attach(app)


@app.callback()
def _root() -> None:
    pass


def main() -> None:
    """Run the command; exit with 2 for a user's mistake, 1 for a failure, 130 on interrupt."""
    # Imports make a hundred thousand objects that live as long as the process; looking through them is a tenth of it.
    gc.set_threshold(100_000, 20, 20)
    # Planning has threads of its own; those of a BLAS, which NumPy has yet to load, would only get in their way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _return_large_buffers()
    raise_limit()
    try:
        app()
    except DeltaworksError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except sqlite3.Error as error:
        sys.stderr.write(f"error: the catalog cannot be written: {error}\n")
        sys.exit(1)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'the system'}: {error.strerror or error}\n")
        sys.exit(1)
    finally:
        # Nor need the interpreter look through them on its way out.
        gc.freeze()


def _return_large_buffers() -> None:
    """Have freed buffers of a MiB or more go back to the system.

    The GNU C library stops doing so once some were freed, and what is left in the heaps of threads that are gone is not
    used again: analyzing one expert after the other took 100 MiB more.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


if __name__ == "__main__":
    main()
