import os
import time
from pathlib import Path

import pytest
from families import random_tensors, tuned, write_model

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.ahead import fetch_ahead
from deltaworks.checkpoints.cached import cached_bytes
from deltaworks.cli.merges import _fetch_ahead
from deltaworks.errors import RecipeError
from deltaworks.layers.records import index_place

SIZE = 12 << 20


def in_memory(path: Path) -> int:
    with path.open("rb") as file:
        return cached_bytes(file.fileno(), 0, SIZE) or 0


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files that the page cache does not hold."""
    made = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in made:
        path.write_bytes(b"x" * SIZE)
        forget(path)
    return made


def forget(path: Path) -> None:
    """Have the page cache drop a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(path):
        pytest.skip("this file system keeps what was written in memory, or does not say")


def wait_for(path: Path, nbytes: int) -> None:
    for _ in range(100):
        # The system may pass over a few pages of what it is advised to fetch.
        if in_memory(path) >= nbytes * 7 // 8:
            return
        time.sleep(0.05)
    pytest.fail(f"{in_memory(path):,} bytes in memory, not {nbytes:,}")


def test_files_are_in_memory_soon(files: list[Path]) -> None:
    fetch_ahead(dict.fromkeys(files, 0))
    for path in files:
        wait_for(path, SIZE)


def test_of_some_files_only_the_ends(files: list[Path]) -> None:
    fetch_ahead({files[0]: SIZE - (4 << 20), files[1]: SIZE + 1})
    wait_for(files[0], 4 << 20)
    assert in_memory(files[0]) < SIZE - (4 << 20)
    assert not in_memory(files[1])


def test_no_more_than_asked_for_is_fetched_and_the_starts_first(files: list[Path]) -> None:
    fetch_ahead(dict.fromkeys(files, 0), 8 << 20)
    for path in files:
        wait_for(path, 4 << 20)
    time.sleep(0.2)
    assert sum(in_memory(path) for path in files) < 16 << 20


def test_what_is_not_there_is_passed_over(tmp_path: Path) -> None:
    fetch_ahead({tmp_path / "none": 0})
    fetch_ahead({})


def test_a_merge_fetches_the_models_that_its_recipe_names(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    moved = files[0].rename(tmp_path / "m" / "model.safetensors")
    (tmp_path / "r.yml").write_text("base_model: nobody/there\nmodels:\n  - model: 'm'\n    parameters: {weight: 1}\n")
    _fetch_ahead(tmp_path / "r.yml", tmp_path / "c", all_models=True, layers=None)
    wait_for(moved, SIZE)


def test_a_merge_within_a_budget_fetches_the_base_that_the_catalog_knows(tmp_path: Path) -> None:
    base, expert = tmp_path / "base", tmp_path / "expert"
    for seed, path in enumerate((base, expert)):
        write_model(path, random_tensors(seed, {"x": (SIZE // 2,)}))
    (tmp_path / "r.yml").write_text(f"models:\n  - model: {expert}\n  - model: expert\n")
    with Catalog(tmp_path / "c") as catalog:
        register(catalog, "base", str(base))
        register(catalog, "expert", str(expert), "base")
    weights = [path / "model.safetensors" for path in (base, expert)]
    for path in weights:
        forget(path)
    _fetch_ahead(tmp_path / "r.yml", tmp_path / "c", all_models=False, layers=None)
    wait_for(weights[0], SIZE)
    assert not in_memory(weights[1])


def test_a_merge_within_a_budget_fetches_what_planning_reads_of_layers(tmp_path: Path) -> None:
    base = random_tensors(0, {"x": (SIZE // 2,)})
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "expert", tuned(1, base))
    (tmp_path / "r.yml").write_text("models:\n  - model: expert\n")
    with Catalog(tmp_path / "c") as catalog:
        of = register(catalog, "base", str(tmp_path / "base"))
        model = register(catalog, "expert", str(tmp_path / "expert"), "base")
        analyze(catalog, model, of, layers=True)
        file = catalog.layers_file(model.fingerprint, of.fingerprint)
    size, place = file.stat().st_size, index_place(file)
    assert place is not None
    assert 0 < size - place < size // 4
    for layers, least in ((False, 0), (None, size - place)):
        forget(file)
        _fetch_ahead(tmp_path / "r.yml", tmp_path / "c", all_models=False, layers=layers)
        wait_for(tmp_path / "base" / "model.safetensors", SIZE)
        forget(tmp_path / "base" / "model.safetensors")
        assert least * 7 // 8 <= in_memory(file) < size // 2


def test_a_recipe_with_a_budget_or_one_that_is_missing_fetches_nothing(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text("models:\n  - model: .\nx-deltaworks:\n  budget: 10%\n")
    _fetch_ahead(tmp_path / "r.yml", tmp_path / "c", all_models=True, layers=None)
    with pytest.raises(RecipeError, match="No such file"):
        _fetch_ahead(tmp_path / "none.yml", tmp_path / "c", all_models=True, layers=None)
    time.sleep(0.2)
    assert not any(in_memory(path) for path in files)
    assert not (tmp_path / "c").exists()
