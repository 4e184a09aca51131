"""Analysis keeps experts in layers, and they come back as they were."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from families import BF16, random_tensors, shapes, tuned, write_model
from numpy.typing import NDArray
from shell import Shell

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.models import Model
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.codec import decode_reference
from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.checkpoints.sketch import SAMPLES, sample_places, sketch_reference
from deltaworks.errors import DeltaworksError
from deltaworks.layers.cells import DEPTH
from deltaworks.layers.decode import decode_block
from deltaworks.layers.file import LayerFile
from deltaworks.layers.opened import opened_bytes


def raw(model: Model, name: str) -> NDArray[np.uint8]:
    info = model.checkpoint.tensors[name]
    out = np.empty(info.nbytes, np.uint8)
    with RangeReader(model.path / info.file, ByteCounter()) as reader:
        reader.read_into(out, info.offset)
    return out


def comes_back(catalog: Catalog, expert: Model, base: Model) -> dict[str, bool]:
    """Whether each of the expert's tensors is a delta, once all of them were found to come back."""
    file = LayerFile(catalog.layers_file(expert.fingerprint, base.fingerprint), ByteCounter())
    for name in expert.checkpoint.tensors:
        tensor = file.tensors[name]
        parts = []
        for block in range(tensor.blocks):
            own = None
            if tensor.is_delta:
                info = base.checkpoint.tensors[name]
                whole = decode_reference(raw(base, name), info.dtype)
                start = block * file.block_size
                own = whole[start : start + file.count(tensor, block)]
            parts.append(file.restore(tensor, block, own))
        np.testing.assert_array_equal(np.concatenate(parts), raw(expert, name))
    file.close()
    return {name: file.tensors[name].is_delta for name in expert.checkpoint.tensors}


def registered(catalog: Catalog, root: Path, dtype: Any = BF16, base_dtype: Any = BF16) -> tuple[Model, Model]:
    names = shapes()
    base = random_tensors(0, names, np.dtype(base_dtype))
    counts = np.arange(700, dtype=np.int64)
    expert = tuned(1, base, dtype=np.dtype(dtype)) | {"model.counts": counts}
    write_model(root / "base", base | {"model.counts": counts})
    write_model(root / "expert", expert, shards=2)
    base_model = register(catalog, "base", str(root / "base"))
    return base_model, register(catalog, "expert", str(root / "expert"), "base")


def test_what_layers_leave_is_sketched_and_sampled(catalog: Catalog, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    own = rng.normal(0, 0.02, 40 * 4096 - 700).astype(BF16)
    write_model(tmp_path / "base", {"w": own})
    write_model(tmp_path / "expert", {"w": (own + rng.normal(0, 0.001, len(own))).astype(BF16)})
    base = register(catalog, "base", str(tmp_path / "base"))
    expert = register(catalog, "expert", str(tmp_path / "expert"), "base")
    analyze(catalog, expert, base, layers=True, block_size=4096)
    file = LayerFile(catalog.layers_file(expert.fingerprint, base.fingerprint), ByteCounter())
    (residual,) = file.residuals
    tensor = file.tensors["w"]
    before, after = (decode_reference(raw(m, "w"), DTYPES["BF16"]) for m in (base, expert))
    largest = int(file.index["ends"][tensor.first : tensor.first + tensor.blocks, -1].max())
    for depth in range(1, DEPTH):
        rest, sample = np.zeros_like(after), np.zeros(SAMPLES, np.float32)
        for block in range(tensor.blocks):
            part = slice(block * 4096, (block + 1) * 4096)
            count = file.count(tensor, block)
            row = np.zeros(opened_bytes(count, largest), np.uint8)
            file.open_block(tensor, block, depth, row)
            told = np.empty(count, np.float32)
            decode_block(row, before[part], count, told)
            rest[part] = after[part] - told
            sample[block::40] = rest[part][sample_places(block, count)[block::40]]
        sketch = sketch_reference(rest, 0)
        assert residual["sketch"][depth - 1] == pytest.approx(sketch / np.linalg.norm(sketch), abs=2e-3)
        assert residual["sample"][depth - 1] == pytest.approx(sample, rel=1e-3, abs=1e-6)
    file.close()


@pytest.mark.parametrize(
    ("dtype", "base_dtype"),
    [
        (BF16, BF16),
        (np.float16, np.float16),
        (np.float32, BF16),
        (BF16, np.float32),
        (np.float64, BF16),
        (ml_dtypes.float8_e4m3fn, BF16),
        (ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2),
    ],
)
def test_an_expert_comes_back_from_its_layers(catalog: Catalog, tmp_path: Path, dtype: Any, base_dtype: Any) -> None:
    base, expert = registered(catalog, tmp_path, dtype, base_dtype)
    summary = analyze(catalog, expert, base, layers=True, block_size=4096)
    is_delta = comes_back(catalog, expert, base)
    assert not is_delta["model.counts"]
    assert {v for k, v in is_delta.items() if k != "model.counts"} == {np.dtype(dtype) != np.float64}
    file = catalog.layers_file(expert.fingerprint, base.fingerprint)
    assert 0 < summary["layers_bytes"] <= file.stat().st_size


def test_layers_are_built_once(catalog: Catalog, tmp_path: Path) -> None:
    base, expert = registered(catalog, tmp_path)
    analyze(catalog, expert, base)
    file = catalog.layers_file(expert.fingerprint, base.fingerprint)
    assert not file.exists()
    analyze(catalog, expert, base, layers=True)
    before = file.stat().st_mtime_ns
    analyze(catalog, expert, base, layers=True)
    assert file.stat().st_mtime_ns == before
    analyze(catalog, expert, base, layers=True, force=True)
    assert file.stat().st_mtime_ns > before
    assert {p.name for p in file.parent.iterdir()} == {file.name, f"{file.stem}.files"}


def test_nothing_is_left_of_layers_that_failed(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, expert = registered(catalog, tmp_path)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("deltaworks.layers.file.os.pwrite", full)
        with pytest.raises((DeltaworksError, OSError), match="space"):
            analyze(catalog, expert, base, layers=True)
    assert not list((catalog.path / "layers").iterdir())
    analyze(catalog, expert, base, layers=True)
    comes_back(catalog, expert, base)


def test_what_layers_will_take_is_said_first(tmp_path: Path) -> None:
    with Catalog(tmp_path / "catalog") as catalog:
        registered(catalog, tmp_path)
    shell = Shell(tmp_path)
    refused = shell.run("analyze", "expert", "--layers", "--layers-limit", "1kB", code=2)
    assert "more than the limit of 1.0 kB; raise --layers-limit" in refused.stderr
    done = shell.run("analyze", "expert", "--layers", "--json")
    assert "the layers of 1 expert will take about" in done.stderr
    (found,) = json.loads(done.stdout)["analyses"]
    assert found["layers_bytes"] > 0
