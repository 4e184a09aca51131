"""Streams blocks through reader, compute and writer threads over a fixed set of buffers."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

STAGES = ("read", "compute", "write")

Task = TypeVar("Task")
Slot = TypeVar("Slot")


class Pipeline(Generic[Task, Slot]):
    """Three stages, joined by queues; a slot (its buffers) travels with a task and is then used again.

    Memory is what the slots hold, however many tasks there are. Tasks start in order and may finish in any. The first
    exception of any stage stops all of them and is raised by `run`. The thread that calls `run` is the writer, so what
    `write` touches needs no lock.

    Args:
        slots: the buffers; at least one a thread keeps every stage busy.
        read: fills a slot for a task.
        compute: works inside the slot.
        write: empties it.
        readers: number of reader threads.
        workers: number of compute threads.

    Attributes:
        busy_s: seconds that the threads of each of `STAGES` worked, all of its threads together.
        waited_s: seconds that they waited: readers for free buffers, the others for work.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        read: Callable[[Task, Slot], None],
        compute: Callable[[Task, Slot], None],
        write: Callable[[Task, Slot], None],
        readers: int,
        workers: int,
    ) -> None:
        self._read, self._compute, self._write = read, compute, write
        self._readers, self._workers = readers, workers
        self._free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._filled: queue.SimpleQueue[tuple[Task, Slot] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Task, Slot] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self.stopping = threading.Event()
        self.busy_s, self.waited_s = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)

    def run(self, tasks: Iterable[Task]) -> None:
        """Handle every task; returns when all are written."""
        iterator = iter(tasks)
        stages = [(self._reading, (iterator,))] * self._readers + [(self._computing, ())] * self._workers
        threads = [threading.Thread(target=self._guarded, args=stage, daemon=True) for stage in stages]
        self._reading_left, self._computing_left = self._readers, self._workers
        for thread in threads:
            thread.start()
        self._guarded(self._writing, ())
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _guarded(self, stage: Callable[..., None], arguments: tuple[Iterator[Task], ...]) -> None:
        try:
            stage(*arguments)
        except BaseException as error:  # raised again by run
            with self._lock:
                self._error = self._error or error
            self.stopping.set()
            for _ in range(self._readers):
                self._free.put(None)
            for _ in range(self._workers):
                self._filled.put(None)
            self._done.put(None)

    def _spent(self, stage: str, waiting: float, started: float) -> float:
        """Count what a thread did since ``waiting``: it waited until ``started`` and has worked since; returns now."""
        now = time.perf_counter()
        with self._lock:
            self.waited_s[stage] += started - waiting
            self.busy_s[stage] += now - started
        return now

    def _reading(self, tasks: Iterator[Task]) -> None:
        last_s = time.perf_counter()
        while (slot := self._free.get()) is not None and not self.stopping.is_set():
            started = time.perf_counter()
            with self._lock:
                task = next(tasks, None)
                if task is None:
                    self._reading_left -= 1
                    last = not self._reading_left
            if task is None:
                # The slot goes to the other readers, which must see the end too.
                self._free.put(slot)
                for _ in range(self._workers if last else 0):
                    self._filled.put(None)
                return
            self._read(task, slot)
            self._filled.put((task, slot))
            last_s = self._spent("read", last_s, started)

    def _computing(self) -> None:
        last_s = time.perf_counter()
        while (item := self._filled.get()) is not None and not self.stopping.is_set():
            started = time.perf_counter()
            self._compute(*item)
            self._done.put(item)
            last_s = self._spent("compute", last_s, started)
        with self._lock:
            self._computing_left -= 1
            last = not self._computing_left
        if last:
            self._done.put(None)

    def _writing(self) -> None:
        last_s = time.perf_counter()
        while (item := self._done.get()) is not None and not self.stopping.is_set():
            started = time.perf_counter()
            self._write(*item)
            self._free.put(item[1])
            last_s = self._spent("write", last_s, started)
