"""What the rows of a block hold, which blocks passes look at, and how large blocks are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from budgets import enter, prepared, write_family
from families import BF16 as BFLOAT16
from families import read_model, recipe
from merges import METHODS
from merges import block as block_of

from deltaworks.catalog.histogram import KEEP_ALL, Interval
from deltaworks.catalog.statistics import DEFAULT_BLOCK_SIZE
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.dtypes import BF16
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.source import Source
from deltaworks.errors import UserError
from deltaworks.merging.block_sizes import stream_block_sizes
from deltaworks.merging.budget import parse_budget
from deltaworks.merging.methods.delta import DeltaSum, Sparsify
from deltaworks.merging.methods.operation import Block
from deltaworks.merging.methods.sce import SelectedSum
from deltaworks.merging.plan import InputTensor, Plan
from deltaworks.merging.prepare import plan_inputs
from deltaworks.merging.stream import Rows, TensorStream

EXPERTS = tuple(f"expert{i}" for i in range(6))


@pytest.fixture
def family(catalog: Catalog, tmp_path: Path) -> Path:
    root = write_family(tmp_path / "family", experts=len(EXPERTS))
    enter(catalog, root)
    return root


def planned(catalog: Catalog, root: Path, method: str, budget: str) -> Plan:
    found, full = prepared(catalog, recipe(method, root, **{"listed": EXPERTS, **METHODS[method]}))
    return found.within(full, parse_budget(budget))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "sce"])
def test_rows_hold_what_is_read_and_nothing_else(catalog: Catalog, family: Path, tmp_path: Path, method: str) -> None:
    plan = planned(catalog, family, method, "15%")
    models = plan_inputs(catalog, plan)
    values = [read_model(m.path) for m in models]
    counters = [ByteCounter() for _ in models]
    sources = {i: Source(m, c) for i, (m, c) in enumerate(zip(models, counters, strict=True))}
    streams = [TensorStream(plan, t, models, 8192, tmp_path) for t in plan.tensors]
    rows = Rows(streams)
    for stream in streams:
        assert stream.tensor.stand_in is not None
        most = 0
        for stage in range(stream.passes):
            for index in stream.looked_at(stage):
                stream.fill(sources, rows, index, stage)
                stream.measure(rows, index, stage)
        for index in range(stream.blocks):
            stream.fill(sources, rows, index, stream.passes)
            block = stream.block(rows, index, np.empty(8, np.uint8), BF16.code)
            most = max(most, len(block.inputs.rows))
            for k, own in enumerate(stream.tensor.inputs):
                read, base = (
                    values[i.model][i.tensor].reshape(-1).view(np.uint16)[block.start : block.start + block.count]
                    for i in (own, stream.tensor.stand_in)
                )
                present = np.repeat(block.inputs.present[k], TILE)[: block.count]
                np.testing.assert_array_equal(block.raw(k, 16).view(np.uint16), np.where(present, read, base))
        assert most == stream.most_rows
        stream.close()
    assert any(s.most_rows < len(s.infos) for s in streams)
    for model, counter in zip(plan.models, counters, strict=True):
        assert model.role == "base" or counter.value == model.bytes_planned
    for source in sources.values():
        source.close()


@pytest.mark.parametrize("method", ["ties", "dare_ties", "sce"])
def test_passes_look_at_what_is_read(catalog: Catalog, family: Path, tmp_path: Path, method: str) -> None:
    plan = planned(catalog, family, method, "5%")
    models = plan_inputs(catalog, plan)
    skipped = 0
    for stream in (TensorStream(plan, t, models, 4096, tmp_path) for t in plan.tensors):
        seen = {
            block
            for k, ranges in enumerate(stream.tensor.reads)
            if ranges is not None and stream.operation.sees(k)
            for first, end in ranges
            for block in range(first, end)
        }
        for stage in range(stream.passes):
            assert set(stream.looked_at(stage)) == (set(range(stream.blocks)) if stage else seen or {0})
        skipped += stream.blocks - len(stream.looked_at(0)) if stream.passes else 0
        stream.close()
    assert skipped


@pytest.mark.parametrize("count", [0, 1, 5000])
@pytest.mark.parametrize(
    "operation",
    [
        DeltaSum((1.0, 1.0), (0.5, 0.5), Sparsify.MAGNITUDE, False, True, True, 1.0, (Interval(9, 1, 2), KEEP_ALL)),
        DeltaSum((1.0, 1.0), (0.5, 0.5), Sparsify.RANDOM, True, True, True, 1.0, keys=(1, 2)),
        SelectedSum(2, 0.3),
        SelectedSum(2, 1.0),
    ],
)
def test_what_is_not_read_is_known(operation: DeltaSum | SelectedSum, count: int) -> None:
    rows, codes = np.zeros((3, 2 * count + 64), np.uint8), np.array([BF16.code] * 3)
    block = block_of(rows, codes, 0, count, np.empty((6, TILE), np.float32), rows[0], BF16.code)
    block.inputs.present[1:] = False
    other = operation.measure(_changed(max(count, 1)))
    measured, known = (
        operation.settle([own, other], 8192) for own in (operation.measure(block), operation.unread(count))
    )
    assert measured == known


def _changed(count: int) -> Block:
    """A block in which the experts differ from the base."""
    values = np.random.default_rng(0).standard_normal((3, count + 32)).astype(BFLOAT16)
    codes = np.array([BF16.code] * 3)
    raw = values.view(np.uint8).reshape(3, -1).copy()
    return block_of(raw, codes, 8192, count, np.empty((6, TILE), np.float32), raw[0].copy(), BF16.code)


def test_blocks_are_as_large_as_what_is_read_of_them_allows(catalog: Catalog, family: Path) -> None:
    plan = planned(catalog, family, "ties", "15%")
    one = replace(plan.tensors[0], shape=(16 << 20,), inputs=tuple(InputTensor(i, "w") for i in range(21)))
    few = replace(one, reads=(None, ((0, 40),), *((),) * 19), stand_in=one.inputs[0])
    many = replace(few, reads=(None, *(((100, 101),),) * 20))
    apart = replace(few, reads=(None, *(((100 * i, 100 * i + 1),) for i in range(20))))
    full = replace(one, reads=(), stand_in=None)
    tensors = {"few": few, "many": many, "apart": apart, "full": full}
    plan = replace(plan, read_cost=None, tensors=tuple(replace(t, name=name) for name, t in tensors.items()))
    sizes = stream_block_sizes(plan, None)
    assert sizes["few"] > DEFAULT_BLOCK_SIZE == sizes["many"] == sizes["full"] < sizes["apart"]
    assert set(stream_block_sizes(plan, 4096).values()) == {4096}
    with pytest.raises(UserError):
        stream_block_sizes(plan, 5000)
    # Where a request costs as much as reading 4 MB, all are as large as that.
    dear = stream_block_sizes(replace(plan, read_cost=(0.04, 1e8)), None)
    assert min(dear.values()) >= 1 << 20
