"""What the catalog knows of one registered model."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from deltaworks.checkpoints.checkpoint import Checkpoint


class Kind(StrEnum):
    """What a registered model is."""

    BASE = "base"
    EXPERT = "expert"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model.

    Attributes:
        name: its name in the catalog.
        kind: base model, expert (a full fine-tune of a base) or LoRA adapter.
        source: what the user gave: a path or a hub id.
        base: name of its base model; None for a base.
        base_is_declared: whether the user said so, rather than a recipe that was merged.
        fingerprint: BLAKE3 over the names and contents of its weight files, in hex.
        checkpoint: its tensors and files as they were when it was registered.
        is_gone: whether its weight files are gone, and it is read from its layers in the catalog; its path is then
            that of its small files there.
    """

    name: str
    kind: Kind
    source: str
    base: str | None
    base_is_declared: bool
    fingerprint: str
    checkpoint: Checkpoint
    is_gone: bool = False

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.checkpoint.path
