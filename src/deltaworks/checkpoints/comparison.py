"""Whether two models hold the same tensors; where they do not, a sentence that says in what they differ, and why."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.tensor_names import HEAD, LAYER, is_embeddings, is_recomputed
from deltaworks.errors import plain, quoted
from deltaworks.wording import counted

_WRAPPERS = {
    "_orig_mod", "module", "model", "transformer", "language_model", "text_model", "base_model", "backbone",
    "llm", "bert", "roberta", "gpt_neox", "thinker", "decoder",
}  # fmt: skip
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_FUSED_EXPERTS = re.compile(r"\.experts\.(?:gate_up_proj|down_proj|gate_proj|up_proj)(?:\.weight)?$")


class Named(NamedTuple):
    """The tensors of a model, and what messages call it."""

    name: str
    tensors: Mapping[str, TensorInfo]


def explain_difference(first: Named, second: Named) -> str | None:
    """A sentence that says which tensors one of two models has and the other lacks; None where there are none.

    A head that one of them leaves out because it is tied to the embeddings is not a difference, and neither are buffers
    that loaders compute. Where the same tensors have other names, the sentence says so.
    """
    extra = _lacking(first, second), _lacking(second, first)
    if not any(extra):
        return None
    if (
        cause := _prefixed(first, second)
        or _prefixed(second, first)
        or _renamed(first, second)
        or _fused(first, second)
    ):
        return cause
    texts = []
    for names, has, lacks in ((extra[0], first, second), (extra[1], second, first)):
        if names:
            count = counted(len(names), "tensor")
            texts.append(f"{has.name} has {count} that {lacks.name} lacks, first {plain(names[0])}")
    if len(texts) == 1 and all(LAYER.fullmatch(n) for n in (*extra[0], *extra[1])) and _is_deeper(first, second):
        return f"{texts[0]}; take the layers that both have with slices"
    return f"{', and '.join(texts)}; only models with the same tensors can be merged"


def shapes_differ(tensor: str, first: tuple[str, Sequence[int]], second: tuple[str, Sequence[int]]) -> str:
    """A sentence that says how the shapes of a tensor differ between two models, given with their names."""
    (one, shape), (other, its) = first, second
    is_vocabulary = is_embeddings(tensor) or tensor.endswith(HEAD)
    is_longer = len(shape) == len(its) and tuple(shape[1:]) == tuple(its[1:])
    return (
        f"tensor {quoted(tensor)} is {list(shape)} in {one} and {list(its)} in {other};"
        " models can be merged only where shapes agree"
        + (" (align their vocabularies first)" if is_vocabulary and is_longer else "")
    )


def _lacking(has: Named, lacks: Named) -> list[str]:
    """Names of tensors that one model has and the other lacks, in the order of the first."""
    heads = any(n.endswith(HEAD) for n in lacks.tensors)
    return [
        name
        for name, tensor in has.tensors.items()
        # A head under another name is not a tied head.
        if name not in lacks.tensors and not (name.endswith(HEAD) and not heads) and not is_recomputed(tensor)
    ]


def _is_deeper(first: Named, second: Named) -> bool:
    """Whether two models hold the same tensors in all layers that both have."""
    depths = [
        max((int(m["index"]) for n in m_.tensors if (m := LAYER.fullmatch(n))), default=-1) for m_ in (first, second)
    ]
    common = min(depths)
    shallow = [
        {n for n in m_.tensors if (m := LAYER.fullmatch(n)) and int(m["index"]) <= common} for m_ in (first, second)
    ]
    return depths[0] != depths[1] and shallow[0] == shallow[1]


def _prefixed(shorter: Named, other: Named) -> str | None:
    """Says under which prefix `other` holds the tensors of `shorter`, where it does."""
    names, theirs = _weights(shorter), _weights(other)
    if not names or not theirs:
        return None
    held = set(theirs)
    prefixes = {n.removesuffix(names[0]) for n in theirs if n.endswith(f".{names[0]}")}
    for prefix in sorted(prefixes, key=len):
        if all(prefix + name in held for name in names):
            beside = len(theirs) - len(names)
            more = f", beside {beside} others" if beside else ""
            return (
                f"{other.name} has the same tensors as {shorter.name} under {quoted(prefix)}{more};"
                " rename them, or save both models with the same version of transformers, first"
            )
    return None


def _renamed(first: Named, second: Named) -> str | None:
    """Says under which names the second model holds the tensors of the first, where only wrappers' names differ."""
    names, theirs = _weights(first), _weights(second)
    stripped, their_stripped = _strip(names), _strip(theirs)
    if stripped.keys() != their_stripped.keys() or not len(stripped) == len(names) == len(theirs):
        return None
    for key, name in stripped.items():
        if their_stripped[key] == name:
            continue
        return (
            f"{second.name} has the same tensors as {first.name} under other names ({plain(name)} is"
            f" {plain(their_stripped[key])}"
            " there); rename them, or save both models with the same version of transformers, first"
        )
    return None


def _fused(first: Named, second: Named) -> str | None:
    """Says that one model holds the experts of its layers in one tensor, and the other one by one."""
    for one, other in ((first, second), (second, first)):
        if any(_ONE_EXPERT.search(n) for n in one.tensors) and any(_FUSED_EXPERTS.search(n) for n in other.tensors):
            return (
                f"{other.name} holds the experts of a layer in one tensor, and {one.name} holds each by itself;"
                " save both models with the same version of transformers first"
            )
    return None


def _weights(model: Named) -> list[str]:
    return [n for n, t in model.tensors.items() if not n.endswith(HEAD) and not is_recomputed(t)]


def _strip(names: Iterable[str]) -> dict[str, str]:
    """Names by what is left of them without the names of modules that only wrap a model."""
    result = {}
    for name in names:
        parts = name.split(".")
        while len(parts) > 1 and parts[0] in _WRAPPERS:
            parts = parts[1:]
        result[".".join(p for p in parts if p != "_orig_mod")] = name
    return result
