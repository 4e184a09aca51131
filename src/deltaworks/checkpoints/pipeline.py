"""Streams blocks from reading through computing and writing to committing, over a fixed set of buffers."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Generic, TypeVar

STAGES = ("read", "compute", "write", "commit")

READS_IN_FLIGHT = 8
"""Threads beyond one a core: while these wait for a device, the others compute."""

Task = TypeVar("Task")
Slot = TypeVar("Slot")


class Pipeline(Generic[Task, Slot]):
    """Threads that each take a task through all stages; a slot (its buffers) travels with it and is then used again.

    A task stays with its thread, so what was read is still in the core's cache when it is computed. Memory is what the
    slots hold, however many tasks there are. Tasks start in order, and are committed in that order, by the thread that
    calls `run`; in between they overtake each other. The first exception of any stage stops all and is raised by `run`.

    Args:
        slots: the buffers; more than threads where the commits of fast tasks wait for a slow one before them.
        read: fills a slot for a task.
        compute: works inside the slot; at most one a core at a time.
        write: takes the result out of it.
        commit: is told that all this is done.
        cores: how many compute at a time.
        reads_on_core: reading takes a core too, since what is read is in memory; fewer slots are then in use at a time,
            and their buffers stay in a cache.

    Attributes:
        busy_s: seconds that each of `STAGES` worked, all threads together.
        waited_s: seconds that threads waited before each: for a free slot, for a core, not at all, for the next task.
        threads: how many there are.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        read: Callable[[Task, Slot], None],
        compute: Callable[[Task, Slot], None],
        write: Callable[[Task, Slot], None],
        commit: Callable[[Task, Slot], None],
        cores: int,
        *,
        reads_on_core: bool = False,
    ) -> None:
        self._stages = read, compute, write
        self._commit = commit
        # The slot used last is the one whose buffers are still in a cache.
        self._free, self._is_free = list(slots), threading.Semaphore(len(slots))
        self._cores, self._reads_on_core = threading.Semaphore(cores), reads_on_core
        self.threads = min(cores + READS_IN_FLIGHT, len(slots))
        self._lock = threading.Lock()
        self._done: dict[int, tuple[Task, Slot]] = {}
        self._is_done = threading.Condition(self._lock)
        self._started = self._ended = 0
        self._error: BaseException | None = None
        self.stopping = threading.Event()
        self.busy_s, self.waited_s = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)

    def run(self, tasks: Iterable[Task]) -> None:
        """Handle every task; returns when all are committed."""
        iterator = iter(tasks)

        def take() -> Task | None:
            return next(iterator, None)

        threads = [threading.Thread(target=self._working, args=(take,), daemon=True) for _ in range(self.threads)]
        for thread in threads:
            thread.start()
        try:
            self._committing()
        except BaseException as error:  # raised again below
            self._fail(error)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self.stopping.set()
            self._is_done.notify_all()
        self._is_free.release(self.threads)
        self._cores.release(self.threads)

    def _working(self, take: Callable[[], Task | None]) -> None:
        busy, waited = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
        try:
            while self._handle_next(take, busy, waited):
                pass
        except BaseException as error:  # raised again by run
            self._fail(error)
        with self._lock:
            for stage in STAGES:
                self.busy_s[stage] += busy[stage]
                self.waited_s[stage] += waited[stage]
            self._ended += 1
            self._is_done.notify_all()

    def _handle_next(self, take: Callable[[], Task | None], busy: dict[str, float], waited: dict[str, float]) -> bool:
        """Take one task through the stages; False where there is none, or all is to stop."""
        read, compute, write = self._stages
        times = [time.perf_counter()]
        with self._cores if self._reads_on_core else nullcontext():
            self._is_free.acquire()
            times.append(time.perf_counter())
            with self._lock:
                task = None if self.stopping.is_set() else take()
                number = self._started
                self._started += task is not None
            if task is None:
                self._is_free.release()
                return False
            slot = self._free.pop()
            read(task, slot)
            times.append(time.perf_counter())
            with nullcontext() if self._reads_on_core else self._cores:
                times.append(time.perf_counter())
                if self.stopping.is_set():
                    return False
                compute(task, slot)
        times.append(time.perf_counter())
        write(task, slot)
        times.append(time.perf_counter())
        with self._lock:
            self._done[number] = task, slot
            self._is_done.notify_all()
        for at, stage in ((0, "read"), (2, "compute")):
            waited[stage] += times[at + 1] - times[at]
            busy[stage] += times[at + 2] - times[at + 1]
        busy["write"] += times[5] - times[4]
        return True

    def _committing(self) -> None:
        number = 0
        last_s = time.perf_counter()
        while True:
            with self._lock:
                while number not in self._done and self._ended < self.threads and not self.stopping.is_set():
                    self._is_done.wait()
                if self.stopping.is_set() or number not in self._done:
                    return
                task, slot = self._done.pop(number)
            started = time.perf_counter()
            self._commit(task, slot)
            self._free.append(slot)
            self._is_free.release()
            number += 1
            now = time.perf_counter()
            self.waited_s["commit"] += started - last_s
            self.busy_s["commit"] += now - started
            last_s = now
