"""Whether a merged model is what its manifest and its plan say, and nothing else would be loaded in its place."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from deltaworks.catalog.fingerprint import combine, hash_file
from deltaworks.checkpoints.own_files import own_file
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.sidecars import PATTERNS
from deltaworks.errors import CheckpointError, PlanError, VerificationError, quoted
from deltaworks.merging.execute import output_shards
from deltaworks.merging.manifest import DIGEST, MANIFEST, PLAN, RECIPE, listed_files, manifest_digest, read_manifest
from deltaworks.merging.plan import Plan, load_plan
from deltaworks.progress import Progress, Silent

_LOADED: Final = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5",
    "*.msgpack", "*.gguf", "*.onnx", "*.py", "config.json", "adapter_config.json",
    "hf_quant_config.json", "quantize_config.json", "quant_config.json", "params.json", *PATTERNS,
)  # fmt: skip
"""Files that a loader reads, or may prefer to the weights that were merged."""
_LOADED_BELOW: Final = ("additional_chat_templates/*",)
_REQUIRED: Final = ("README.md", RECIPE, PLAN)
_MESSAGE_PARTS: Final = 20


def verify(out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Check the snapshot at `out`: every file, every member of its manifest that can be recomputed, and unlisted files.

    Every file that the manifest lists is hashed. The manifest's digest, the fingerprint, and what the plan beside the
    weights says of the merge are computed anew. Files that are not listed are reported; those that a loader would read
    are an error.

    Returns:
        `files` and `bytes` checked, `plan_digest`, `unknown` (files the manifest does not list), and `has_digest`
        (whether the manifest has a digest of itself, which older ones lack).

    Raises:
        OutputError: `out` is not a snapshot, or its manifest is malformed.
        VerificationError: something is missing or differs; the message names it.
    """
    progress = progress or Silent()
    manifest = read_manifest(out)
    expected = {s["file"]: s["blake3"] for s in manifest["shards"]} | manifest["files"]
    wrong = [f"{MANIFEST} was edited: its digest differs"] if _is_edited(manifest) else []
    present: dict[str, Path] = {}
    for name in expected:
        try:
            file = own_file(out / name)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        if file is None:
            wrong.append(f"{name} is missing")
        else:
            present[name] = file
    sizes = {name: file.stat().st_size for name, file in present.items()}
    progress.start("verify", sum(sizes.values()))
    found = {name: hash_file(file, ByteCounter(), progress) for name, file in present.items()}
    progress.finish()
    wrong += [f"{name} differs" for name, digest in found.items() if digest != expected[name]]
    wrong += [f"{n} has another size" for n, size in _listed_sizes(manifest).items() if sizes.get(n, size) != size]
    wrong += _lists(manifest)
    if "fingerprint" in manifest:
        shards = manifest["shards"]
        if combine([s["file"] for s in shards], [s["blake3"] for s in shards]) != manifest["fingerprint"]:
            wrong.append("the fingerprint is not that of the shards")
    if found.get(PLAN) == expected.get(PLAN) and PLAN in found:
        wrong += _against_plan(out, manifest)
    unknown = sorted(name for name in _all_files(out) if name not in expected and name != MANIFEST)
    wrong += [
        f"{name} is not listed, and a loader may read it"
        for name in unknown
        if any(fnmatchcase(name, pattern) for pattern in (_LOADED if "/" not in name else _LOADED_BELOW))
    ]
    if wrong:
        more = f", and {len(wrong) - _MESSAGE_PARTS} more" if len(wrong) > _MESSAGE_PARTS else ""
        raise VerificationError(f"{out} does not match its manifest: {', '.join(wrong[:_MESSAGE_PARTS])}{more}")
    return {
        "output": str(out),
        "plan_digest": manifest["plan_digest"],
        "files": len(expected),
        "bytes": sum(sizes.values()),
        "unknown": unknown,
        "has_digest": DIGEST in manifest,
        "verified": True,
    }


def _is_edited(manifest: Mapping[str, Any]) -> bool:
    return DIGEST in manifest and manifest_digest(manifest) != manifest[DIGEST]


def _listed_sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    return {s["file"]: s["bytes"] for s in manifest["shards"]}


def _lists(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What the lists of a manifest lack that every snapshot has."""
    names = listed_files(manifest)
    if not manifest["shards"]:
        yield "it lists no weights"
    if not manifest["inputs"]:
        yield "it lists no inputs"
    for name in _REQUIRED:
        if name not in manifest["files"]:
            yield f"it does not list {name}"
    for name in sorted(n for n, times in Counter(names).items() if times > 1):
        yield f"it lists {name} twice"


def _against_plan(out: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """How a manifest differs from what the plan beside it says."""
    try:
        plan = load_plan(out / PLAN)
        shards = output_shards(plan)
    except PlanError as error:
        yield f"{PLAN} cannot be read: {error}"
        return
    said = _facts(plan) | {"shards": [(s.name, s.nbytes) for s in shards]}
    own = {key: manifest[key] for key in said if key in manifest}
    own |= {
        "inputs": [{k: model.get(k) for k in said["inputs"][0]} for model in manifest["inputs"]],
        "shards": [(s["file"], s["bytes"]) for s in manifest["shards"]],
    }
    for key, value in said.items():
        if key in own and own[key] != value:
            yield f"{key} is not what {PLAN} says ({quoted(own[key], 60)} and not {quoted(value, 60)})"
    if plan.budget_bytes is not None and manifest["expert_bytes_read"] > plan.budget_bytes:
        yield f"expert_bytes_read ({manifest['expert_bytes_read']:,}) is more than the budget ({plan.budget_bytes:,})"
    recipe = out / RECIPE
    if recipe.is_file() and recipe.read_bytes() != plan.recipe.encode():
        yield f"{RECIPE} is not the recipe of {PLAN}"


def _facts(plan: Plan) -> dict[str, Any]:
    """What a manifest repeats of its plan."""
    return {
        "plan_digest": plan.digest,
        "method": plan.method,
        "seed": plan.seed,
        "inputs": [m._asdict() for m in plan.models],
        "budget_bytes": plan.budget_bytes,
        "expert_bytes": plan.expert_bytes,
        "expert_bytes_planned": plan.expert_bytes_planned,
        "predicted_error": plan.predicted_error,
        "error_bound": plan.error_bound,
        "accounting": list(plan.accounting),
        "notes": list(plan.notes),
    }


def _all_files(out: Path) -> Iterator[str]:
    """Every file and link in a folder, by its name relative to that; folders that are links are not entered."""
    for folder, folders, files in os.walk(out):
        inside = Path(folder).relative_to(out)
        yield from (str(inside / name) for name in files)
        yield from (str(inside / name) for name in folders if (Path(folder) / name).is_symlink())
