import threading
import time
from collections.abc import Callable, Iterator

import pytest

from deltaworks.checkpoints.pipeline import Pipeline


class Slot:
    def __init__(self) -> None:
        self.value = 0


def nothing(task: int, slot: Slot) -> None:
    pass


@pytest.mark.parametrize(("slots", "cores"), [(1, 1), (2, 2), (4, 1), (12, 3)])
def test_every_task_passes_every_stage_and_is_committed_in_order(slots: int, cores: int) -> None:
    committed: list[int] = []
    thread = threading.get_ident()

    def read(task: int, slot: Slot) -> None:
        slot.value = task

    def compute(task: int, slot: Slot) -> None:
        assert slot.value == task
        slot.value = task * task

    def write(task: int, slot: Slot) -> None:
        time.sleep(task % 3 * 1e-4)
        slot.value += 1

    def commit(task: int, slot: Slot) -> None:
        assert slot.value == task * task + 1
        assert threading.get_ident() == thread
        committed.append(task)

    Pipeline([Slot() for _ in range(slots)], read, compute, write, commit, cores).run(range(500))
    assert committed == list(range(500))


def test_no_more_compute_at_a_time_than_there_are_cores() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def compute(task: int, slot: Slot) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.001)
        with lock:
            inside -= 1

    Pipeline([Slot() for _ in range(8)], nothing, compute, nothing, nothing, 2).run(range(60))
    assert most == 2


def test_no_more_tasks_in_flight_than_slots() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def read(task: int, slot: Slot) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)

    def commit(task: int, slot: Slot) -> None:
        nonlocal inside
        with lock:
            inside -= 1

    Pipeline([Slot() for _ in range(3)], read, lambda *_: time.sleep(0.001), nothing, commit, 2).run(range(60))
    assert most <= 3


def test_it_tells_where_the_time_went() -> None:
    slots = [Slot() for _ in range(2)]
    pipeline = Pipeline(slots, nothing, lambda *_: time.sleep(0.01), nothing, nothing, 1)
    pipeline.run(range(20))
    assert pipeline.busy_s["compute"] >= 0.2
    assert pipeline.waited_s["compute"] > pipeline.busy_s["read"]
    assert pipeline.waited_s["commit"] > pipeline.busy_s["commit"]


@pytest.mark.parametrize("stage", range(4))
def test_an_error_stops_everything(stage: int) -> None:
    seen: list[int] = []

    def fail(task: int, slot: Slot) -> None:
        seen.append(task)
        if task == 20:
            raise RuntimeError("boom")

    stages: list[Callable[[int, Slot], None]] = [nothing] * 4
    stages[stage] = fail
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="boom"):
        Pipeline([Slot() for _ in range(4)], stages[0], stages[1], stages[2], stages[3], 2).run(range(10_000))
    assert len(seen) < 5000
    assert threading.active_count() == before


def test_an_error_among_the_tasks_themselves() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise RuntimeError("boom")

    pipeline = Pipeline([Slot()], nothing, nothing, nothing, nothing, 1)
    with pytest.raises(RuntimeError, match="boom"):
        pipeline.run(tasks())
