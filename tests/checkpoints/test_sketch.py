import numpy as np

from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES, add_to_sketch, sample_places, signs, sketch_reference


def test_the_kernel_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(3 * TILE + 77, np.float32)
    sketch = np.zeros(BUCKETS, np.float32)
    for tile, start in enumerate(range(0, len(delta), TILE)):
        part = np.zeros(TILE, np.float32)
        count = min(TILE, len(delta) - start)
        part[:count] = delta[start : start + count]
        add_to_sketch(part, count, 5 + tile, signs(), sketch)
    np.testing.assert_allclose(sketch, sketch_reference(delta, 5 * TILE), rtol=1e-4, atol=1e-3)


def test_inner_products_are_estimated_without_bias() -> None:
    """Also of deltas with structure: constant rows, and columns that repeat from row to row."""
    rng = np.random.default_rng(1)
    size = 1 << 14
    column = np.tile(rng.standard_normal(256), size // 256)
    first = (column + rng.standard_normal(size)).astype(np.float32)
    second = (0.5 * column + 0.3 * first + rng.standard_normal(size)).astype(np.float32)
    real = float(first.astype(np.float64) @ second)
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    estimates = [
        float(sketch_reference(first, i * size) @ sketch_reference(second, i * size)) / scale for i in range(200)
    ]
    assert abs(np.mean(estimates) - real / scale) < 4 * np.std(estimates) / 200**0.5
    assert np.std(estimates) < 2 / BUCKETS**0.5


def test_samples_are_spread_over_the_block() -> None:
    places = sample_places(3, 1 << 18)
    assert len(places) == SAMPLES
    np.testing.assert_array_equal(places * SAMPLES // (1 << 18), np.arange(SAMPLES))
    assert (places != sample_places(4, 1 << 18)).any()
    few = sample_places(0, 5)
    assert few.min() >= 0
    assert few.max() < 5
    assert set(few) == set(range(5))
