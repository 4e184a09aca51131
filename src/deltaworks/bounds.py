"""Bounds on what documents may hold."""

import re

MAX_DEPTH = 100
"""Mappings and lists within each other, at most."""
MAX_NODES = 1_000_000
"""Values in a YAML document, at most, an alias counting as all that it stands for."""
MAX_DIGITS = 100
"""Digits of a whole number, at most."""

SURROGATE = re.compile("[\ud800-\udfff]")
TOO_DEEP = f"its values are nested more than {MAX_DEPTH} deep"


class RefusedError(ValueError):
    """A value in a well-formed document that is beyond a bound."""
