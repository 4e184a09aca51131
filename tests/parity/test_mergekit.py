"""Side by side with mergekit 0.1.5, on the micro family and on a random family with odd shapes."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import BF16, MICRO, Array, read_model, recipe, write_family
from merges import merge
from peers import mergekit_python, run_mergekit

from deltaworks.catalog.store import Catalog
from deltaworks.merging.prepare import MergeOptions

pytestmark = pytest.mark.parity

FLOAT32 = "dtype: float32\nout_dtype: bfloat16"
BFLOAT16 = "dtype: bfloat16"
MIXED = {"expert0": "weight: 0.4, density: 0.3", "expert1": "weight: 0.7, density: 0.55", "expert2": "weight: -0.2"}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"base": False, "experts": {k: v.partition(",")[0] for k, v in MIXED.items()}},
    "linear-sum": {"base": False, "experts": dict.fromkeys(MIXED, "weight: 0.5"), "parameters": "normalize: false"},
    "linear-gradient": {"base": False, "experts": {"expert0": "weight: [0, 0.2, 1]", "expert1": "weight: 0.3"},
                        "parameters": "weight: [{filter: mlp, value: 0.5}, {value: 0.1}]"},
    "task_arithmetic": {"experts": MIXED},
    "task_arithmetic-normalize": {"experts": MIXED, "parameters": "normalize: true, lambda: 0.8"},
    "ties": {"experts": MIXED},
    "ties-sum": {"parameters": "weight: 0.4, density: [0.2, 0.9], normalize: false, lambda: 1.3, int8_mask: true"},
    "ties-rescale": {"parameters": "weight: 1, density: 0.4, rescale: true"},
    "ties-filter": {"parameters": "weight: 1, density: [{filter: self_attn, value: 0.25}, {filter: norm, value: 1.0}, "
                    "{value: 0.5}]"},
    "breadcrumbs": {"experts": MIXED},
    "breadcrumbs-gamma": {"parameters": "weight: 0.4, density: [0.2, 0.9], gamma: 0.2, lambda: 1.3, normalize: true"},
    "breadcrumbs-rescale": {"parameters": "weight: 1, density: 0.4, rescale: true"},
    "breadcrumbs_ties": {"experts": MIXED, "parameters": "gamma: [{filter: mlp, value: 0.1}, {value: 0.03}]"},
    "sce": {},
    "sce-select": {"parameters": "select_topk: 0.25"},
    "sce-gradient": {"parameters": "select_topk: [{filter: mlp, value: [0.1, 1.0]}, {value: 0.5}], int8_mask: true"},
    "slerp": {"listed": ("expert0",), "parameters": "t: 0.3"},
    "slerp-gradient": {"listed": ("expert2",), "parameters": "t: [{filter: mlp, value: [0, 0.5, 1]}, {value: 0.7}]"},
    "passthrough": {"base": False, "listed": ("expert1",)},
    "passthrough-scale": {"base": False, "listed": ("expert1",), "parameters": "scale: [{filter: o_proj, value: 0.3}]"},
}  # fmt: skip


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    with Catalog(tmp_path_factory.mktemp("catalog")) as opened:
        yield opened


@pytest.fixture(scope="module", params=["odd", "micro"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mergekit_python()
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "odd":
        write_family(root)
        return root
    if not (MICRO / "base").is_dir():
        pytest.skip("the micro family is not in this checkout")
    (root / "base").symlink_to(MICRO / "base")
    for i, name in enumerate(("c", "perl", "python")):
        (root / f"expert{i}").symlink_to(MICRO / name)
    return root


@pytest.fixture(scope="module")
def both(family: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Every case merged by both tools; gives (inputs, ours, theirs) of a case."""
    out = tmp_path_factory.mktemp("out")
    work = []
    for case, given in CASES.items():
        for label, dtypes in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
            text = recipe(case.partition("-")[0], family, dtypes=dtypes, **given)
            merge(catalog, text, out / "ours" / label / case)
            work.append((text, out / "theirs" / label / case, 0))
    run_mergekit(work)

    def load(label: str, case: str) -> tuple[dict[str, dict[str, Array]], dict[str, Array], dict[str, Array]]:
        listed = CASES[case].get("listed", ("expert0", "expert1", "expert2"))
        inputs = {name: read_model(family / name) for name in ("base", *listed)}
        return inputs, read_model(out / "ours" / label / case), read_model(out / "theirs" / label / case)

    return load


def ulps(a: Array, b: Array) -> Array:
    """Distance of bfloat16 numbers in units in the last place."""

    def ordered(x: Array) -> Array:
        bits = x.view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    distance: Array = np.abs(ordered(a) - ordered(b))
    return distance


def at_threshold(case: str, name: str, inputs: dict[str, dict[str, Array]]) -> Array:
    """Elements where a delta has exactly a magnitude at which it is trimmed; a sort may keep any of them."""
    base = inputs["base"][name].astype(np.float32)
    tied = np.zeros(base.shape, bool)
    if case.startswith("sce"):
        deltas = np.stack([inputs[f"expert{i}"][name].astype(np.float64) - base for i in range(3)])
        spread = deltas.var(axis=0)
        keep = int(np.count_nonzero(spread) * setting(CASES[case].get("parameters", ""), "select_topk", name, 1.0))
        if keep < np.count_nonzero(spread):
            # Variances that nearly equal the last selected one may stand in another order there.
            cut = np.sort(spread, axis=None)[::-1][max(keep - 1, 0)]
            tied |= np.abs(spread / cut - 1) < 1e-5
        return tied
    if not case.startswith(("ties", "breadcrumbs")):
        return tied
    for expert in ("expert0", "expert1", "expert2"):
        delta = np.abs(inputs[expert][name].astype(np.float32) - base)
        density = of_expert(case, name, expert, "density", 1.0)
        if density < 1:
            descending = np.sort(delta, axis=None)[::-1]
            for rank in kept_ranks(case, name, expert, density, delta.size):
                tied |= (delta == descending[rank - 1]) & (rank > 0)
    return tied


def kept_ranks(case: str, name: str, expert: str, density: float, size: int) -> tuple[int, int]:
    """By magnitude from the largest, the first element that stays, and the end."""
    if case.startswith("ties"):
        return 0, max(1, int(density * size))
    smallest = max(0, size - int(density * size) - int(of_expert(case, name, expert, "gamma", 0.01) * size))
    return size - smallest - int(density * size), size - smallest


@pytest.mark.parametrize("case", CASES)
def test_float32_agrees(both: Callable[..., Any], case: str) -> None:
    inputs, ours, theirs = both("float32", case)
    assert ours.keys() == theirs.keys()
    different = total = 0
    for name, mine in ours.items():
        other = theirs[name]
        assert mine.dtype == other.dtype == BF16
        largest = np.max([np.abs(m[name].astype(np.float32)) for m in inputs.values()], axis=0)
        excused = at_threshold(case, name, inputs)
        apart = np.abs(mine.astype(np.float32) - other.astype(np.float32))
        near = apart <= 1e-6 * largest
        if case.startswith("sce-"):
            # Of variances that are nearly equal others are selected, whose squares differ, and so do the shares.
            base = inputs["base"][name].astype(np.float32)
            excused |= apart <= 1e-3 * np.max(
                [np.abs(m[name].astype(np.float32) - base) for m in inputs.values()], axis=0
            )
        assert ((ulps(mine, other) <= 1) | near | excused).all(), name
        different += int(((ulps(mine, other) > 0) & ~excused).sum())
        total += mine.size
    print(f"{case}: {different} of {total:,} elements differ")
    assert different <= 0.001 * total


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_at_least_as_close_to_float64(both: Callable[..., Any], case: str) -> None:
    inputs, ours, theirs = both("bfloat16", case)
    mine = other = 0.0
    for name in ours:
        exact = in_float64(case, name, {k: v[name].astype(np.float64) for k, v in inputs.items()})
        mine += float(np.square(ours[name].astype(np.float64) - exact).sum())
        other += float(np.square(theirs[name].astype(np.float64) - exact).sum())
    assert mine <= other


def setting(text: str, key: str, name: str, default: float) -> float:
    """A parameter as the cases above write it, read independently of the code under test."""
    import yaml

    value = yaml.safe_load("{" + text + "}").get(key, default)
    if isinstance(value, list) and isinstance(value[0], dict):
        value = next((c["value"] for c in value if c.get("filter", "") in name), default)
    if isinstance(value, list):
        layer = int(name.split(".")[2]) / 2 if ".layers." in name else 0.0
        value = np.interp(layer * (len(value) - 1), range(len(value)), value)
    return float(value) if not isinstance(value, bool) else value


def of_expert(case: str, name: str, expert: str, key: str, default: float) -> float:
    """A parameter of one expert in a case."""
    own = CASES[case].get("experts", {}).get(expert, "")
    return setting(own if f"{key}:" in own else CASES[case].get("parameters", ""), key, name, default)


def in_float64(case: str, name: str, tensors: dict[str, Array]) -> Any:
    """The method on whole tensors in float64; ties at a trim threshold by lowest flat index."""
    given, method = CASES[case], case.partition("-")[0]
    shared = given.get("parameters", "")
    listed = given.get("listed", ("expert0", "expert1", "expert2"))

    def of(expert: str, key: str, default: float) -> float:
        return of_expert(case, name, expert, key, default)

    if method == "passthrough":
        return tensors[listed[0]] * of(listed[0], "scale", 1.0)
    if method == "slerp":
        a, b = tensors["base"], tensors[listed[0]]
        cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        t = setting(shared, "t", name, 0.5)
        if abs(cosine) > 0.9995:
            return (1 - t) * a + t * b
        angle = np.arccos(cosine)
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    weights = [of(e, "weight", 1.0) for e in listed]
    if method == "linear":
        total: Any = sum(w * tensors[e] for w, e in zip(weights, listed, strict=True))
        return total / sum(weights) if setting(shared, "normalize", name, True) else total
    base = tensors["base"]
    if method == "sce":
        return base + merged_by_sce(
            np.stack([tensors[e] - base for e in listed]), setting(shared, "select_topk", name, 1.0)
        )
    deltas = []
    for expert, w in zip(listed, weights, strict=True):
        d = tensors[expert] - base
        density = of(expert, "density", 1.0)
        if method in ("ties", "breadcrumbs", "breadcrumbs_ties") and density < 1:
            keep = np.zeros(d.size, bool)
            first, end = kept_ranks(case, name, expert, density, d.size)
            keep[np.argsort(-np.abs(d).ravel(), kind="stable")[first:end]] = True
            kept = np.where(keep.reshape(d.shape), d, 0.0)
            d = kept * (np.abs(d).sum() / np.abs(kept).sum()) if setting(shared, "rescale", name, False) else kept
        deltas.append(w * d)
    total, divisor = sum(deltas), np.full(base.shape, sum(weights))
    if method in ("ties", "breadcrumbs_ties"):
        elected = np.where(total >= 0, 1, -1)
        agree = [np.sign(d) == elected for d in deltas]
        total = sum(np.where(a, d, 0) for a, d in zip(agree, deltas, strict=True))
        taking_part: Any = sum(np.where(a, w, 0) for a, w in zip(agree, weights, strict=True))
        divisor = np.where(taking_part == 0, 1, taking_part)
    if setting(shared, "normalize", name, method == "ties"):
        total = total / divisor
    return base + setting(shared, "lambda", name, 1.0) * total


SLICES = {
    "stacked": """
merge_method: passthrough
slices:
  - sources: [{model: ROOT/expert0, layer_range: [0, 2]}]
  - sources: [{model: ROOT/expert1, layer_range: [1, 3], parameters: {scale: [{filter: o_proj, value: 0.5}]}}]
  - sources: [{model: ROOT/expert0, layer_range: [2, 3]}]
""",
    "slerped": """
merge_method: slerp
base_model: ROOT/base
slices:
  - sources: [{model: ROOT/base, layer_range: [0, 2]}, {model: ROOT/expert0, layer_range: [0, 2]}]
    parameters: {t: [0.1, 0.9]}
  - sources: [{model: ROOT/base, layer_range: [2, 3]}, {model: ROOT/expert0, layer_range: [2, 3]}]
parameters: {t: [{filter: mlp, value: [0, 0.5, 1]}, {value: 0.4}]}
""",
    "shifted": """
merge_method: task_arithmetic
base_model: ROOT/base
slices:
  - sources:
      - {model: ROOT/base, layer_range: [1, 3]}
      - {model: ROOT/expert0, layer_range: [1, 3], parameters: {weight: 0.3}}
      - {model: ROOT/expert1, layer_range: [0, 2], parameters: {weight: [0.1, 0.6]}}
""",
}


@pytest.mark.parametrize("case", SLICES)
def test_slices_agree(family: Path, catalog: Catalog, tmp_path: Path, case: str) -> None:
    text = SLICES[case].replace("ROOT", str(family)) + FLOAT32 + "\n"
    merge(catalog, text, tmp_path / "ours")
    run_mergekit([(text, tmp_path / "theirs", 0)])
    ours, theirs = read_model(tmp_path / "ours"), read_model(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    distances = np.concatenate([ulps(t, theirs[n]).ravel() for n, t in ours.items()])
    assert distances.max() <= 1
    assert np.count_nonzero(distances) <= 0.001 * distances.size
    config = [
        json.loads((tmp_path / who / "config.json").read_text())["num_hidden_layers"] for who in ("ours", "theirs")
    ]
    assert config[0] == config[1]


def merge_both(catalog: Catalog, text: str, folder: Path, seeds: Iterable[int]) -> None:
    """Merge a recipe with several seeds, to ``ours0`` and so on, and with mergekit to ``theirs0``."""
    for seed in seeds:
        merge(catalog, text, folder / f"ours{seed}", MergeOptions(seed=seed))
    run_mergekit([(text, folder / f"theirs{seed}", seed) for seed in seeds])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", ["true", "false"])
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_dare_has_the_same_mask_statistics(
    family: Path, catalog: Catalog, tmp_path: Path, method: str, rescale: str, dtypes: str
) -> None:
    """One expert with weight 1: what is left of its delta shows the mask and the factor."""
    parameters = f"weight: 1, density: 0.35, rescale: {rescale}"
    text = recipe(method, family, listed=("expert1",), parameters=parameters, dtypes=dtypes)
    seeds = range(8)
    merge_both(catalog, text, tmp_path, seeds)
    base, expert = read_model(family / "base"), read_model(family / "expert1")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        b = base[name].astype(np.float32)
        d = expert[name].astype(np.float32) - b
        moved = np.abs(d) > 1e-6 * np.abs(b)
        figures: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
        for who, seen in figures.items():
            for seed in seeds:
                left = read_model(tmp_path / f"{who}{seed}")[name].astype(np.float32) - b
                kept = (np.abs(left) > 0.2 * np.abs(d)) & moved
                seen.append((float(kept.sum() / moved.sum()), float(np.median(left[kept] / d[kept]))))
        share, factor = (np.array([[s[i] for s in v] for v in figures.values()]) for i in (0, 1))
        noise = 4 * np.sqrt(0.35 * 0.65 / moved.sum() / len(seeds)) + 1e-3
        assert abs(share.mean(axis=1) - 0.35).max() < noise
        spread = 4 * np.sqrt((factor.var(axis=1) / len(seeds)).sum()) + 1e-3
        assert abs(factor[0].mean() - factor[1].mean()) < spread
        if rescale == "true":
            for who in figures:
                left = read_model(tmp_path / f"{who}0")[name].astype(np.float32) - b
                assert np.abs(left).sum() == pytest.approx(np.abs(d).sum(), rel=0.01)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("rescale", ["true", "false"])
def test_della_keeps_elements_by_their_rank(
    family: Path, catalog: Catalog, tmp_path: Path, method: str, rescale: str
) -> None:
    """One expert with weight 1: what is left of its delta shows who stays, by fifths of each row, and the factor."""
    density, epsilon = 0.35, 0.3
    parameters = f"weight: 1, density: {density}, epsilon: {epsilon}, rescale: {rescale}"
    text = recipe(method, family, listed=("expert1",), parameters=parameters, dtypes="dtype: float32")
    seeds = range(8)
    merge_both(catalog, text, tmp_path, seeds)
    base, expert = read_model(family / "base"), read_model(family / "expert1")
    # A matrix, and a vector, which is a row of its own.
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        b = base[name].astype(np.float32)
        d = np.atleast_2d(expert[name].astype(np.float32) - b)
        moved = np.abs(d) > 1e-6 * np.abs(b)
        # Equals are told apart by mergekit's sort, but who comes first is chance there, so the mean counts.
        ranks = np.apply_along_axis(mean_ranks, 1, np.abs(d))
        fifth = np.where(moved, 5 * ranks // d.shape[1], 5)
        chance = density - epsilon + 2 * epsilon * ranks / (d.shape[1] - 1)
        for who in ("ours", "theirs"):
            left = [np.atleast_2d(read_model(tmp_path / f"{who}{s}")[name] - b) for s in seeds]
            kept = np.stack([np.abs(x) > 0.2 * np.abs(d) for x in left])
            for part in range(5):
                of_part = fifth == part
                if not of_part.any():
                    continue
                noise = 4.5 * np.sqrt(0.25 / of_part.sum() / len(seeds)) + 2e-3
                assert abs(kept[:, of_part].mean() - chance[of_part].mean()) < noise, (who, name, part)
            if rescale == "true":
                assert np.abs(left[0]).sum() == pytest.approx(np.abs(d).sum(), rel=1e-3), who
            else:
                np.testing.assert_allclose(left[0][kept[0] & moved], d[kept[0] & moved], rtol=0.01)


def mean_ranks(sizes: Array) -> Array:
    """Of each element the mean rank of those as large, from 0."""
    ascending = np.sort(sizes)
    below, upto = (np.searchsorted(ascending, sizes, side) for side in ("left", "right"))
    return (below + upto - 1) / 2


def merged_by_sce(deltas: Array, topk: float) -> Any:
    """The merged delta in float64; of equal variances the lowest flat indices."""
    if topk < 1:
        spread = deltas.var(axis=0).ravel()
        selected = np.zeros(spread.size, bool)
        selected[np.argsort(-spread, kind="stable")[: int(np.count_nonzero(spread) * topk)]] = True
        deltas = np.where(selected.reshape(deltas.shape[1:]), deltas, 0)
    squares = np.square(deltas).reshape(len(deltas), -1).mean(axis=1)
    shares = squares / squares.sum() if squares.sum() >= 1e-6 else np.full(len(deltas), 1 / len(deltas))
    agree = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1, -1)
    weights = agree * shares.reshape(-1, *[1] * (deltas.ndim - 1))
    return (weights * deltas).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-6)
