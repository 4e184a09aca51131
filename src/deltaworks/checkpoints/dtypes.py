"""The element types of safetensors files."""

from dataclasses import dataclass

from deltaworks.errors import UserError, quoted


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the name in a safetensors header, such as ``BF16``.
        bits: size of one element.
        code: number by which compiled kernels tell float types apart; -1 for types that are only copied.
        torch_name: the name in ``config.json`` and in recipes; empty where PyTorch has none.
    """

    name: str
    bits: int
    code: int = -1
    torch_name: str = ""

    @property
    def is_float(self) -> bool:
        """Whether merge arithmetic applies; other types are copied bit by bit."""
        return self.code >= 0

    def nbytes(self, count: int) -> int:
        """Bytes of `count` elements."""
        return count * self.bits // 8


BF16 = DType("BF16", 16, 0, "bfloat16")
F16 = DType("F16", 16, 1, "float16")
F32 = DType("F32", 32, 2, "float32")
F64 = DType("F64", 64, 3, "float64")
F8_E4M3 = DType("F8_E4M3", 8, 4, "float8_e4m3fn")
F8_E5M2 = DType("F8_E5M2", 8, 5, "float8_e5m2")

FLOATS = (BF16, F16, F32, F64, F8_E4M3, F8_E5M2)

BY_CODE = {d.code: d for d in FLOATS}
"""Float types by their code."""

DTYPES = {
    d.name: d
    for d in (
        *FLOATS,
        *(DType(f"{sign}{bits}", bits) for sign in "IU" for bits in (8, 16, 32, 64)),
        DType("BOOL", 8),
        DType("C64", 64),
        DType("F4", 4),
        DType("F6_E2M3", 6),
        DType("F6_E3M2", 6),
        DType("F8_E8M0", 8),
    )
}


def float_dtype(name: str) -> DType:
    """The float type a recipe calls `name` (``bfloat16``, ``torch.bfloat16``, ``BF16``).

    Raises:
        UserError: no such type.
    """
    wanted = name.removeprefix("torch.")
    for dtype in FLOATS:
        if wanted in (dtype.torch_name, dtype.name):
            return dtype
    raise UserError(f"unknown dtype {quoted(name)}; choose one of {', '.join(d.torch_name for d in FLOATS)}")


def promote(first: DType, second: DType) -> DType:
    """The smallest float type that holds both, as PyTorch promotes; two different 8-bit types become BF16."""
    if first == second:
        return first
    if first.bits != second.bits:
        return first if first.bits > second.bits else second
    return BF16 if first.bits == 8 else F32
