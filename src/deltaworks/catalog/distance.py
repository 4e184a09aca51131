"""How far a model may be from its base."""

FAR_FROM_BASE = 1.0
"""Relative norm of a delta from which on an expert is not a plausible fine-tune: two unrelated models differ by 1.4."""


def far_from(name: str, base: str, relative_norm: float) -> str:
    """What there is to say of a model whose delta has a norm beyond `FAR_FROM_BASE`, relative to the base's."""
    return f"{name} differs from {base} by {relative_norm:.0%} of its norm; is it a fine-tune of it?"
