from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import BF16, random_tensors, read_model, tuned, write_family, write_model
from numpy.typing import NDArray

from deltaworks.catalog.analyze import analyze, delta_tensors
from deltaworks.catalog.cuts import find_cuts
from deltaworks.catalog.histogram import Interval, bins_reference
from deltaworks.catalog.models import Model
from deltaworks.catalog.register import register
from deltaworks.catalog.statistics import TensorStatistics, measure_reference
from deltaworks.catalog.statistics_file import read_statistics
from deltaworks.catalog.store import Catalog
from deltaworks.errors import CatalogError, UserError
from deltaworks.merging.methods.delta import close_cut, lower_bits_reference

SHAPES = {
    "model.layers.0.w.weight": (97, 131),
    "model.layers.1.w.weight": (64, 64),
    "model.norm.weight": (5,),
    "e": (0,),
}


def family(
    catalog: Catalog, root: Path, dtype: Any = BF16, scale: float = 0.01
) -> tuple[Model, Model, dict[str, NDArray[np.float32]]]:
    """A registered base and expert, and the deltas between them."""
    tensors = random_tensors(0, SHAPES, np.dtype(dtype))
    expert = tuned(1, tensors, scale, np.dtype(dtype))
    base_model = register(catalog, "base", str(write_model(root / "base", tensors)))
    model = register(catalog, "expert", str(write_model(root / "expert", expert)), "base")
    return base_model, model, {n: expert[n].astype(np.float32) - tensors[n].astype(np.float32) for n in SHAPES}


def statistics(catalog: Catalog, expert: Model, base: Model) -> dict[str, TensorStatistics]:
    found = catalog.find_analysis(expert.fingerprint, base.fingerprint)
    assert found is not None
    return {t.name: t for t in read_statistics(found[1])}


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32, np.float64])
def test_measures_what_numpy_measures(catalog: Catalog, tmp_path: Path, dtype: Any) -> None:
    base, expert, deltas = family(catalog, tmp_path, dtype)
    base_tensors, expert_tensors = read_model(tmp_path / "base"), read_model(tmp_path / "expert")
    summary = analyze(catalog, expert, base, block_size=4096)
    found = statistics(catalog, expert, base)
    assert found.keys() == deltas.keys()
    for name, delta in deltas.items():
        flat, tensor = delta.ravel(), found[name]
        assert tensor.elements == flat.size
        assert len(tensor.blocks) == max(1, -(-flat.size // 4096))
        whole = np.bincount(bins_reference(flat), minlength=1 << 16)
        np.testing.assert_array_equal(tensor.total.bins, np.flatnonzero(whole))
        np.testing.assert_array_equal(tensor.total.counts, whole[whole > 0])
        first, second = (tensors[name].astype(np.float32).ravel() for tensors in (base_tensors, expert_tensors))
        for i, block in enumerate(tensor.blocks):
            part = slice(i * 4096, (i + 1) * 4096)
            values, histogram, sketch = measure_reference(first[part], second[part], i * 4096)
            np.testing.assert_allclose(block.sketch, sketch, rtol=1e-4, atol=1e-6 * np.abs(delta[part]).sum())
            np.testing.assert_allclose(block.values, values, rtol=1e-12)
            np.testing.assert_array_equal(block.histogram.bins, histogram.bins)
            np.testing.assert_array_equal(block.histogram.counts, histogram.counts)
            assert block.elements == histogram.counts.sum()
    assert summary["elements"] == sum(d.size for d in deltas.values())
    assert summary["nonfinite"] == []


def test_reads_everything_once_and_then_never_again(catalog: Catalog, tmp_path: Path) -> None:
    base, expert, _ = family(catalog, tmp_path)
    pairs = delta_tensors(expert, base)
    summary = analyze(catalog, expert, base)
    assert summary["bytes_read"] == sum(b.nbytes + e.nbytes for b, e in pairs)
    for shard in (tmp_path / "expert").glob("*.safetensors"):
        shard.unlink()
    assert analyze(catalog, expert, base) == summary


def test_another_block_size_measures_again(catalog: Catalog, tmp_path: Path) -> None:
    base, expert, _ = family(catalog, tmp_path)
    assert analyze(catalog, expert, base, block_size=4096)["block_size"] == 4096
    assert analyze(catalog, expert, base)["block_size"] == 4096
    assert analyze(catalog, expert, base, block_size=8192)["block_size"] == 8192
    assert statistics(catalog, expert, base)["model.layers.0.w.weight"].block_size == 8192


@pytest.mark.parametrize("block_size", [4095, 1000, 1 << 23, 0, -4096])
def test_block_sizes_are_powers_of_two(catalog: Catalog, tmp_path: Path, block_size: int) -> None:
    base, expert, _ = family(catalog, tmp_path)
    if block_size == 0:
        return  # stands for the default
    with pytest.raises(UserError, match="power of two"):
        analyze(catalog, expert, base, block_size=block_size)


def test_what_is_not_finite_is_named(catalog: Catalog, tmp_path: Path) -> None:
    tensors = random_tensors(0, SHAPES)
    expert = tuned(1, tensors)
    expert["model.norm.weight"][2] = np.nan
    base = register(catalog, "base", str(write_model(tmp_path / "base", tensors)))
    model = register(catalog, "expert", str(write_model(tmp_path / "expert", expert)), "base")
    summary = analyze(catalog, model, base)
    assert summary["nonfinite"] == ["model.norm.weight"]
    assert np.isfinite(summary["relative_norm"])


def test_a_damaged_statistics_file_is_named(catalog: Catalog, tmp_path: Path) -> None:
    base, expert, _ = family(catalog, tmp_path)
    analyze(catalog, expert, base)
    file = catalog.statistics_file(expert.fingerprint, base.fingerprint)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CatalogError, match="analyze the expert again"):
        list(read_statistics(file))


@pytest.mark.parametrize(("dtype", "scale"), [(BF16, 0.01), (BF16, 1.0), (np.float16, 0.1), (np.float32, 0.01)])
@pytest.mark.parametrize("block_size", [4096, 8192])
def test_cuts_are_exact_for_every_type(
    catalog: Catalog, tmp_path: Path, dtype: Any, scale: float, block_size: int
) -> None:
    base, expert, deltas = family(catalog, tmp_path, dtype, scale)
    analyze(catalog, expert, base, block_size=block_size)
    wanted = [
        (n, max(1, int(share * d.size))) for n, d in deltas.items() if d.size for share in np.linspace(0.01, 0.99, 23)
    ]
    cuts = find_cuts(catalog, expert, base, wanted)
    for (name, keep), found in zip(wanted, cuts, strict=True):
        delta, cut = deltas[name].ravel(), found
        if isinstance(cut, Interval):
            blocks = [delta[i : i + block_size] for i in range(0, delta.size, block_size)]
            zeros = [np.zeros_like(b) for b in blocks]
            cut = close_cut(
                cut, [lower_bits_reference(z, b, cut.bin >> 1) for z, b in zip(zeros, blocks, strict=True)], block_size
            )
        bits, index = np.abs(delta).view(np.uint32), np.arange(delta.size)
        tied = (bits == cut.threshold) & (index >= cut.start)
        kept = (
            (bits > cut.threshold)
            | ((bits == cut.threshold) & (index < cut.start))
            | (tied & (tied.cumsum() <= cut.quota))
        )
        expected = np.zeros(delta.size, bool)
        expected[np.argsort(-np.abs(delta), kind="stable")[:keep]] = True
        np.testing.assert_array_equal(kept & (delta != 0), expected & (delta != 0))
    for shard in (tmp_path / "expert").glob("*.safetensors"):
        shard.unlink()
    assert find_cuts(catalog, expert, base, wanted) == cuts, "cuts are remembered"


def test_cuts_need_an_analysis(catalog: Catalog, tmp_path: Path) -> None:
    base, expert, _ = family(catalog, tmp_path)
    with pytest.raises(CatalogError, match="deltaworks analyze expert"):
        find_cuts(catalog, expert, base, [("model.norm.weight", 2)])


def test_an_unrelated_model_is_noticed(catalog: Catalog, tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes:
        def start(self, label: str, total_bytes: int) -> None: ...
        def advance(self, nbytes: int) -> None: ...
        def finish(self) -> None: ...
        def note(self, text: str) -> None:
            notes.append(text)

    write_family(tmp_path, 1)
    write_model(tmp_path / "other", {n: -v for n, v in random_tensors(0, SHAPES).items()})
    base = register(catalog, "base", str(write_model(tmp_path / "base2", random_tensors(0, SHAPES))))
    other = register(catalog, "other", str(tmp_path / "other"), "base")
    analyze(catalog, other, base, progress=Notes())
    assert len(notes) == 1
    assert "is it a fine-tune of it?" in notes[0]
