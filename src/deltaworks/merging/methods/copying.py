"""Tensors that are taken over bit by bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.errors import CheckpointError
from deltaworks.merging.methods.operation import Block, Operation


@dataclass(frozen=True, slots=True)
class Copy(Operation):
    """The first input as it is.

    Further inputs must hold the same bytes: integer tensors have no average, so models that disagree about one cannot
    be merged.

    Attributes:
        element_bits: size of one element.
    """

    kind: ClassVar[str] = "copy"
    calculates: ClassVar[bool] = False

    element_bits: int

    def merge(self, block: Block) -> int:
        """Fill `block.out`."""
        first = block.raw(0, self.element_bits)
        for k in range(1, len(block.inputs.present)):
            if not np.array_equal(first, block.raw(k, self.element_bits)):
                raise CheckpointError("an integer tensor differs between the models, and integers cannot be averaged")
        block.out[: len(first)] = first
        return 0

    def reference(self, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The first input."""
        return inputs[0]

    def to_json(self) -> dict[str, Any]:
        """What a plan stores of it."""
        return {"element_bits": self.element_bits}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(content["element_bits"])
