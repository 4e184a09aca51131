"""How messages count things and list names."""

from collections.abc import Sequence


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things, such as ``1 GPU`` or ``2,000 GPUs``.

    Args:
        count: How many.
        noun: What one of them is called, with what belongs to it, such as ``request of the trace``.
        plural: What several are called, where that is not the noun with an ``s``.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def listed(names: Sequence[str], most: int = 5, longest: int = 40) -> str:
    """Some names as a sentence lists them, such as ``a, b and 7 more``.

    Args:
        names: All of them.
        most: How many are written out.
        longest: Characters of a name; longer ones are cut.
    """
    written = [name if len(name) <= longest else f"{name[:longest]}..." for name in names[:most]]
    written += [f"{len(names) - most:,} more"] if len(names) > most else []
    return " and ".join(filter(None, (", ".join(written[:-1]), written[-1]))) if written else ""
