"""Every exception deltaworks raises on purpose.

DeltaworksError            a failure; the command line exits with 1
├── UserError              something the caller can mend; the command line exits with 2
│   ├── CheckpointError    a model folder or file that is missing, truncated, malformed or of another shape
│   ├── RecipeError        a merge recipe with an unknown key, a wrong type or an impossible request
│   ├── CatalogError       a name that is unknown, taken or of the wrong kind
│   │   └── DamagedError   a file of the catalog that is not what was written
│   ├── PlanError          a plan file that is malformed or of another version
│   ├── WorkloadError      a workload or trace with an unknown key, a wrong value or an impossible request
│   ├── ProfileError       a profile that is unknown or malformed, or tables that do not determine one
│   ├── PlacementError     a placement that cannot be made, or a file that is not one
│   │   └── ImpossibleError    what no number of GPUs does; the command line exits with 1
│   ├── ChangedError       a model that changed since it was registered
│   └── OutputError        an output folder that exists, or that another process is writing
├── BudgetError            a read that would exceed the I/O budget, stopped before it happened
├── NonFiniteError         a merge that would write NaN or infinity
└── VerificationError      a snapshot whose files do not match its manifest
"""

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches


class _Quote(reprlib.Repr):
    """Values from outside as YAML and JSON write them: bounded in depth, in length and in time, whatever they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 3, 4, 4
        self.maxset, self.maxstring, self.maxother = 3, 100, 100

    def repr_NoneType(self, x: None, level: int) -> str:  # noqa: N802  # `reprlib` finds it by the type's name
        """Nothing is called null."""
        del x, level
        return "null"

    def repr_bool(self, x: bool, level: int) -> str:
        """True and false, in lower case."""
        del level
        return "true" if x else "false"

    def repr_int(self, x: int, level: int) -> str:
        """Numbers of more than 64 bits in hexadecimal: decimal digits of a long one take quadratic time."""
        del level  # a number holds nothing further
        text = repr(x) if x.bit_length() <= 64 else hex(x >> max(0, x.bit_length() - 128))
        return text if x.bit_length() <= 128 else f"{text[:30]}... ({x.bit_length():,} bits)"


_QUOTE = _Quote()
_QUOTED = 120
"""Characters of a value that a message quotes."""


def quoted(value: object, width: int = _QUOTED) -> str:
    """A value as a message quotes it: on one line of at most `width` characters.

    Args:
        value: anything that was read from a file or a command line, however large.
        width: the most characters.
    """
    text = _QUOTE.repr(value)
    text = text if text.isprintable() else " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def one_line(text: str, width: int = _QUOTED) -> str:
    """A text from outside as a message includes it, without quotes: on one line of at most `width` characters.

    Args:
        text: of any length, such as the message of another library.
        width: the most characters; what is cut off is marked with dots.
    """
    words = " ".join(text[: 4 * width].split())
    line = words if words.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
    is_whole = len(text) <= 4 * width and len(line) <= width
    return line if is_whole else f"{line[: width - 3]}..."


def plain(text: str, width: int = _QUOTED) -> str:
    """A path or a name as a message includes it: as it is, unless it is long or holds what cannot be printed.

    Args:
        text: of any length.
        width: the most characters of one that is not quoted and cut.
    """
    return text if len(text) <= width and text.isprintable() else quoted(text)


def did_you_mean(name: object, known: Iterable[str], called: str = "", *, cutoff: float = 0.5) -> str:
    """The end of an error about a name that is not known: a known one that is close, or nothing.

    Args:
        name: what was given.
        known: the names that are known.
        called: what to put before the known name.
        cutoff: how like it the known name must be, from 0 to 1.
    """
    if not isinstance(name, str) or len(name) > _QUOTED:
        return ""
    close = get_close_matches(name, list(known), 1, cutoff=cutoff)
    return f"; did you mean {called}{close[0]!r}?" if close else ""


class DeltaworksError(Exception):
    """A failure; its text is one sentence that says what is wrong, where, and what to do.

    Attributes:
        exit_code: Of the command line.
    """

    exit_code = 1


class UserError(DeltaworksError):
    """An error the caller can correct."""

    exit_code = 2


class CheckpointError(UserError):
    """A model folder or file is missing, truncated, malformed or of another shape."""


class RecipeError(UserError):
    """A merge recipe has an unknown key, a wrong type or an impossible request."""


class CatalogError(UserError):
    """A catalog name is unknown, taken or of the wrong kind."""


class DamagedError(CatalogError):
    """A file of the catalog is not what was written; it can be made anew from its source."""


class PlanError(UserError):
    """A plan file is malformed or of another version."""


class WorkloadError(UserError):
    """A workload or a trace has an unknown key, a wrong value or an impossible request."""


class ProfileError(UserError):
    """A profile is unknown or malformed, or tables do not determine one."""


class PlacementError(UserError):
    """A placement cannot be made as asked, or a file is not a placement."""


class ImpossibleError(PlacementError):
    """No number of GPUs does what is asked; the sentence says what can be done. A result, so it exits with 1."""

    exit_code = 1


class ChangedError(UserError):
    """A model changed since it was registered."""


class OutputError(UserError):
    """The output folder exists already, or another process is writing it."""


class BudgetError(DeltaworksError):
    """A read would exceed the I/O budget; it was stopped before it happened."""


class NonFiniteError(DeltaworksError):
    """A merge would write NaN or infinity."""


class VerificationError(DeltaworksError):
    """A snapshot's files do not match its manifest."""
