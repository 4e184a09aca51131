"""The surrogate: what the twin would say of a server, learned from its runs, and distilled to trees that people read.

Source: the idea of a learned surrogate distilled to a shallow tree is that of arXiv 2508.08343 (section 5); the
features, which come from a closed-form equilibrium, are ours.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltaworks.documents import load_json
from deltaworks.errors import ProfileError, quoted
from deltaworks.outputs import write_file
from deltaworks.serving.estimate import FEATURES, Traffic, estimate
from deltaworks.serving.profile import Profile
from deltaworks.serving.tree import Tree, parse_tree

SCHEMA = 1
STARVED = {1.0: "starved", 0.0: "not starved"}
_NAMES = tuple(FEATURES)


@dataclass(frozen=True)
class Surrogate:
    """Two small trees for one profile.

    Attributes:
        profile: The profile's name.
        digest: Its digest when the surrogate was trained.
        throughput: Says what share of the offered tokens gets through.
        starvation: Says 1 for a starved server, else 0.
        accuracy: Errors on runs of the twin that no training saw, of what was learned and of the trees.
    """

    profile: str
    digest: str
    throughput: Tree
    starvation: Tree
    accuracy: dict[str, Any]

    def predict(self, traffic: Traffic, profile: Profile, slots: int, max_rank: int) -> tuple[float, bool]:
        """Throughput in tokens/s, and whether the server starves."""
        features = estimate(traffic, profile, slots, max_rank)
        return traffic.offered_tps * self.throughput.predict(features), self.starvation.predict(features) > 0.5

    def to_json(self) -> dict[str, Any]:
        """What a surrogate's file holds."""
        return {
            "schema": SCHEMA, "profile": self.profile, "profile_digest": self.digest, "features": FEATURES,
            "throughput_share": self.throughput.to_json(_NAMES), "starved": self.starvation.to_json(_NAMES),
            "accuracy": self.accuracy,
        }  # fmt: skip


def built_in_surrogates() -> dict[str, Path]:
    """The surrogates that come with the package, by the name of their profile."""
    folder = Path(str(files("deltaworks.serving") / "surrogates"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_surrogate(profile: Profile, folder: Path | None = None) -> Surrogate | None:
    """The surrogate of a profile: one trained for just this, else the built-in one of its name, else None.

    A built-in one serves the same engine, model and GPU under other flags too: its features follow the flags.

    Args:
        profile: It.
        folder: Of surrogates that the user trained.
    """
    own = None if folder is None else folder / f"{profile.digest}.json"
    path = own if own is not None and own.is_file() else built_in_surrogates().get(profile.name)
    return None if path is None else load_surrogate(path)


def load_surrogate(path: Path) -> Surrogate:
    """A surrogate from its file.

    Raises:
        ProfileError: the file is malformed, or of another version.
    """
    try:
        content = load_json(path, "a surrogate", ProfileError)
        if content["schema"] != SCHEMA or list(content["features"]) != list(_NAMES):
            raise ProfileError(f"{path}: is a surrogate of another version; train it again")
        return Surrogate(
            content["profile"], content["profile_digest"], parse_tree(content["throughput_share"], _NAMES),
            parse_tree(content["starved"], _NAMES), content["accuracy"],
        )  # fmt: skip
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read as a surrogate: {quoted(str(error))}") from None


def save_surrogate(surrogate: Surrogate, path: Path) -> None:
    """Write a surrogate's file, whole or not at all."""
    write_file(path, json.dumps(surrogate.to_json(), indent=1) + "\n")
