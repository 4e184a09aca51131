"""Merging in one call, and whole-tensor references."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.histogram import BINS, Histogram, drain
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.checkpoint import open_checkpoint
from deltaworks.checkpoints.codec import TILE, decode_reference, encode_reference
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.source import Source
from deltaworks.merging.methods.operation import Block, Inputs
from deltaworks.merging.plan import Plan
from deltaworks.merging.prepare import MergeOptions, plan_inputs, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.snapshot import MergeResult, run_plan

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"base": False, "parameters": "weight: [0.2, 0.9]"},
    "task_arithmetic": {"parameters": "weight: 0.4"},
    "ties": {"parameters": "weight: 0.7, density: [0.2, 0.6]"},
    "dare_linear": {"parameters": "weight: 0.7, density: 0.3"},
    "dare_ties": {"parameters": "weight: 0.7, density: 0.3, normalize: true"},
    "della": {"parameters": "weight: 0.7, density: [0.3, 0.6], epsilon: 0.2"},
    "della_linear": {"parameters": "weight: 0.7, density: 0.4, epsilon: [0.0, 0.3]"},
    "breadcrumbs": {"parameters": "weight: 0.7, density: [0.2, 0.6], gamma: 0.05"},
    "breadcrumbs_ties": {"parameters": "weight: 0.7, density: 0.3, gamma: [0.0, 0.2], normalize: true"},
    "sce": {"parameters": "select_topk: [0.3, 1.0]"},
    "slerp": {"listed": ("expert1",), "parameters": "t: [0, 0.7]"},
    "passthrough": {"base": False, "listed": ("expert1",), "parameters": "scale: [{filter: o_proj, value: 0.0}]"},
}
"""Every method, with parameters for `families.recipe`."""


def merge(catalog: Catalog, text: str, out: Path, options: MergeOptions | None = None, **more: Any) -> MergeResult:
    """Merge a recipe given by its text."""
    plan = prepare_plan(catalog, parse_recipe(text), options)
    return run_plan(catalog, plan, plan_inputs(catalog, plan), out, options, **more)


def drained(dense: NDArray[np.uint32]) -> Histogram:
    """The non-empty bins of a dense histogram, which is emptied."""
    bins, counts = np.empty(BINS, np.uint16), np.empty(BINS, np.int64)
    expected = np.flatnonzero(dense), dense[dense > 0]
    used = drain(dense, bins, counts)
    np.testing.assert_array_equal(bins[:used], expected[0])
    np.testing.assert_array_equal(counts[:used], expected[1])
    assert not dense.any()
    return Histogram(bins[:used].copy(), counts[:used].copy())


def raw_tensors(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor in a model folder, 8-bit floats too, which safetensors cannot give to NumPy."""
    checkpoint = open_checkpoint(path, ByteCounter())
    return {t.name: (path / t.file).read_bytes()[t.offset : t.offset + t.nbytes] for t in checkpoint.tensors.values()}


def whole_tensor_bytes(catalog: Catalog, plan: Plan) -> dict[str, NDArray[np.uint8]]:
    """Every output tensor of a plan, computed on whole tensors in float32 and rounded once."""
    models = plan_inputs(catalog, plan)
    sources = [Source(m, ByteCounter()) for m in models]
    result = {}
    for tensor in plan.tensors:
        inputs = []
        for i, name in tensor.inputs:
            info = models[i].checkpoint.find(name)
            assert info is not None
            raw = np.empty(info.nbytes, np.uint8)
            sources[i].read(info, 0, info.count, raw)
            inputs.append(decode_reference(raw, info.dtype))
        result[tensor.name] = encode_reference(tensor.operation.reference(inputs), tensor.dtype)
    for source in sources:
        source.close()
    return result


def block(
    rows: NDArray[np.uint8],
    codes: NDArray[np.int64],
    start: int,
    count: int,
    scratch: NDArray[np.float32],
    out: NDArray[np.uint8],
    out_code: int,
) -> Block:
    """A block that was read in full, to the front of every row."""
    present = np.ones((len(rows), max(1, -(-count // TILE))), np.bool_)
    inputs = Inputs(rows, codes, np.zeros(len(rows), np.int64), np.arange(len(rows)), present, 0)
    masks = np.empty((len(rows), 2 * -(-count // 32)), np.uint16)
    return Block(inputs, start, count, scratch, out, out_code, masks)
