import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deltaworks.checkpoints.pipeline import Pipeline


class Slot:
    def __init__(self) -> None:
        self.value = 0


def nothing(task: int, slot: Slot) -> Any:
    return ()


def slow(task: int, slot: Slot) -> bool:
    time.sleep(0.001)
    return True


def all_is_written(task: int, slot: Slot) -> bool:
    return True


@pytest.mark.parametrize("reads_on_core", [False, True])
@pytest.mark.parametrize(("slots", "cores"), [(1, 1), (2, 2), (4, 1), (12, 3)])
def test_every_task_passes_every_stage_and_is_committed_in_order(slots: int, cores: int, reads_on_core: bool) -> None:
    committed: list[int] = []
    parts: dict[int, list[int]] = {}
    thread = threading.get_ident()

    def read(task: int, slot: Slot) -> list[Callable[[], object]]:
        slot.value = task
        parts[task] = list(range(task % 7))
        return [parts[task].pop for _ in range(task % 7)]

    def compute(task: int, slot: Slot) -> bool:
        assert slot.value == task
        assert not parts[task]
        slot.value = task * task
        return task % 5 > 0

    def write(task: int, slot: Slot) -> None:
        time.sleep(task % 3 * 1e-4)
        slot.value += 1

    def commit(task: int, slot: Slot) -> None:
        assert slot.value == task * task + (task % 5 > 0)
        assert threading.get_ident() == thread
        committed.append(task)

    pipeline = Pipeline(
        [Slot() for _ in range(slots)], read, compute, write, commit, cores, reads_on_core=reads_on_core
    )
    pipeline.run(range(500))
    assert committed == list(range(500))


def test_no_more_compute_at_a_time_than_there_are_cores() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def compute(task: int, slot: Slot) -> bool:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.001)
        with lock:
            inside -= 1
        return True

    Pipeline([Slot() for _ in range(8)], nothing, compute, nothing, nothing, 2).run(range(60))
    assert most == 2


def test_no_more_tasks_in_flight_than_slots() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def read(task: int, slot: Slot) -> tuple[()]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        return ()

    def commit(task: int, slot: Slot) -> None:
        nonlocal inside
        with lock:
            inside -= 1

    Pipeline([Slot() for _ in range(3)], read, slow, nothing, commit, 2).run(range(60))
    assert most <= 3


def test_it_tells_where_the_time_went() -> None:
    slots = [Slot() for _ in range(2)]
    pipeline = Pipeline(slots, nothing, slow, nothing, nothing, 1)
    pipeline.run(range(100))
    assert pipeline.busy_s["compute"] >= 0.1
    assert pipeline.waited_s["read"] > pipeline.busy_s["read"]
    assert pipeline.waited_s["write"] > pipeline.busy_s["write"]
    assert pipeline.waited_s["commit"] > pipeline.busy_s["commit"]


@pytest.mark.parametrize("reads_on_core", [False, True])
@pytest.mark.parametrize("stage", range(4))
def test_an_error_stops_everything(stage: int, reads_on_core: bool) -> None:
    seen: list[int] = []

    def fail(task: int, slot: Slot) -> Any:
        seen.append(task)
        if task == 20:
            raise RuntimeError("boom")
        return () if stage == 0 else True

    stages: list[Callable[[int, Slot], Any]] = [nothing, all_is_written, nothing, nothing]
    stages[stage] = fail
    before = threading.active_count()
    slots = [Slot() for _ in range(4)]
    with pytest.raises(RuntimeError, match="boom"):
        Pipeline(slots, stages[0], stages[1], stages[2], stages[3], 2, reads_on_core=reads_on_core).run(range(10_000))
    assert len(seen) < 5000
    assert threading.active_count() == before


def test_the_reading_for_one_task_is_shared_among_threads() -> None:
    """Each part waits for the others, so that no thread could do two of them."""
    together = threading.Barrier(4, timeout=10)
    slots = [Slot()]
    Pipeline(slots, lambda *_: [together.wait] * 4, all_is_written, nothing, nothing, 1).run(range(10))


@pytest.mark.parametrize("reads_on_core", [False, True])
def test_an_error_in_a_part_of_the_reading_stops_everything(reads_on_core: bool) -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    slots = [Slot() for _ in range(3)]
    pipeline = Pipeline(
        slots, lambda *_: [int, fail, int], all_is_written, nothing, nothing, 2, reads_on_core=reads_on_core
    )
    with pytest.raises(RuntimeError, match="boom"):
        pipeline.run(range(1000))


def test_an_error_among_the_tasks_themselves() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise RuntimeError("boom")

    pipeline = Pipeline([Slot()], nothing, all_is_written, nothing, nothing, 1)
    with pytest.raises(RuntimeError, match="boom"):
        pipeline.run(tasks())
