import threading
import time
from collections.abc import Callable, Iterator

import pytest

from deltaworks.checkpoints.pipeline import Pipeline


class Slot:
    def __init__(self) -> None:
        self.value = 0


@pytest.mark.parametrize(("readers", "workers"), [(1, 1), (2, 2), (3, 5)])
def test_every_task_passes_every_stage(readers: int, workers: int) -> None:
    written: list[int] = []

    def read(task: int, slot: Slot) -> None:
        slot.value = task

    def compute(task: int, slot: Slot) -> None:
        assert slot.value == task
        slot.value = task * task

    def write(task: int, slot: Slot) -> None:
        assert slot.value == task * task
        written.append(task)

    Pipeline([Slot() for _ in range(4)], read, compute, write, readers, workers).run(range(500))
    assert sorted(written) == list(range(500))


def test_no_more_tasks_in_flight_than_slots() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def read(task: int, slot: Slot) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)

    def write(task: int, slot: Slot) -> None:
        nonlocal inside
        with lock:
            inside -= 1

    Pipeline([Slot() for _ in range(3)], read, lambda *_: time.sleep(0.001), write, 2, 2).run(range(60))
    assert most <= 3


def test_it_tells_where_the_time_went() -> None:
    slots = [Slot() for _ in range(2)]
    pipeline: Pipeline[int, Slot] = Pipeline(slots, lambda *_: None, lambda *_: time.sleep(0.01), lambda *_: None, 1, 1)
    pipeline.run(range(20))
    assert pipeline.busy_s["compute"] >= 0.2
    assert pipeline.waited_s["read"] > pipeline.busy_s["read"]
    assert pipeline.waited_s["write"] > pipeline.busy_s["write"]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_error_stops_everything(stage: int) -> None:
    seen: list[int] = []

    def fail(task: int, slot: Slot) -> None:
        seen.append(task)
        if task == 20:
            raise RuntimeError("boom")

    stages: list[Callable[[int, Slot], None]] = [lambda *_: None, lambda *_: None, lambda *_: None]
    stages[stage] = fail
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="boom"):
        Pipeline([Slot() for _ in range(4)], stages[0], stages[1], stages[2], 2, 2).run(range(10_000))
    assert len(seen) < 5000
    assert threading.active_count() == before


def test_an_error_among_the_tasks_themselves() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise RuntimeError("boom")

    pipeline: Pipeline[int, Slot] = Pipeline([Slot()], lambda *_: None, lambda *_: None, lambda *_: None, 1, 1)
    with pytest.raises(RuntimeError, match="boom"):
        pipeline.run(tasks())
