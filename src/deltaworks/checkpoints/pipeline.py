"""Streams blocks from reading through computing and writing to committing, over a fixed set of buffers."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

STAGES = ("read", "compute", "write", "commit")

READS_IN_FLIGHT = 8
"""Threads that wait for a device's reads."""

WRITES_IN_FLIGHT = 4
"""Threads that wait for its writes, which are larger."""

Piece = Callable[[], object]
"""A part of the reading for a task, which any thread may do."""

Task = TypeVar("Task")
Slot = TypeVar("Slot")


def slots_for(cores: int) -> int:
    """How many slots keep every thread of a pipeline busy."""
    return cores + READS_IN_FLIGHT + WRITES_IN_FLIGHT


class _Work(NamedTuple, Generic[Task, Slot]):
    number: int
    task: Task
    slot: Slot


_Queue = SimpleQueue[_Work[Task, Slot] | None]


class Pipeline(Generic[Task, Slot]):
    """Threads for each stage, with queues between them; a slot (its buffers) travels with a task, then is used again.

    Memory is what the slots hold, however many tasks there are. Tasks start in order, and are committed in that order,
    by the thread that calls `run`; in between they overtake each other. The first exception of any stage stops all and
    is raised by `run`. Threads that compute go from task to task: what waits for a device is left to others.

    Args:
        slots: the buffers; more than threads where the commits of fast tasks wait for a slow one before them.
        read: fills a slot for a task; what it returns is left to be read, and others help with that.
        compute: works inside the slot, and says whether there is anything to write.
        write: takes the result out of it.
        commit: is told that all this is done.
        cores: how many compute at a time.
        reads_on_core: the threads that compute also read, since what is read is in memory; fewer buffers are then in
            use at a time, and stay in a cache.

    Attributes:
        busy_s: seconds that each of `STAGES` worked, all threads together.
        waited_s: seconds that threads waited before each: for a free slot, for what is read, computed and written.
        threads: how many there are of each but the last, which has one.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        read: Callable[[Task, Slot], Iterable[Piece]],
        compute: Callable[[Task, Slot], bool],
        write: Callable[[Task, Slot], None],
        commit: Callable[[Task, Slot], None],
        cores: int,
        *,
        reads_on_core: bool = False,
    ) -> None:
        self._read, self._compute, self._write, self._commit = read, compute, write, commit
        # The slot used last is the one whose buffers are still in a cache.
        self._free = list(slots)
        # As many as there are free slots and, of tasks already begun, pieces.
        self._to_read = threading.Semaphore(len(slots))
        self._reads_on_core = reads_on_core
        readers = 0 if reads_on_core else READS_IN_FLIGHT
        self.threads = {"read": readers, "compute": cores, "write": min(WRITES_IN_FLIGHT, len(slots))}
        self._left = dict(self.threads)
        self._filled: _Queue[Task, Slot] = SimpleQueue()
        self._computed: _Queue[Task, Slot] = SimpleQueue()
        self._done: _Queue[Task, Slot] = SimpleQueue()
        self._lock = threading.Lock()
        self._pieces: deque[tuple[Piece, _Work[Task, Slot]]] = deque()
        self._unread: dict[int, int] = {}
        self._started = 0
        self._tasks: Iterator[Task] = iter(())
        self._error: BaseException | None = None
        self.stopping = threading.Event()
        self.busy_s, self.waited_s = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)

    def run(self, tasks: Iterable[Task]) -> None:
        """Handle every task; returns when all are committed."""
        self._tasks = iter(tasks)
        loops = {"read": self._reading, "compute": self._computing, "write": self._writing}
        threads = [
            threading.Thread(target=self._working, args=(stage, loops[stage]), daemon=True)
            for stage, count in self.threads.items()
            for _ in range(count)
        ]
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
        self._to_read.release(len(self._free) + sum(self.threads.values()))
        for stage in self.threads:
            self._end(stage)

    def _end(self, stage: str) -> None:
        """Tell the threads of the next stage that nothing follows."""
        following = {"read": self._filled, "compute": self._computed, "write": self._done}[stage]
        after = {"read": "compute", "compute": "write"}.get(stage)
        for _ in range(self.threads[after] if after else 1):
            following.put(None)

    def _working(self, stage: str, loop: Callable[["_Clock"], None]) -> None:
        clock = _Clock()
        try:
            loop(clock)
        except BaseException as error:  # raised again by run
            self._fail(error)
        with self._lock:
            for name in STAGES:
                self.busy_s[name] += clock.busy_s[name]
                self.waited_s[name] += clock.waited_s[name]
            self._left[stage] -= 1
            is_last = not self._left[stage]
        if is_last:
            self._end(stage)

    def _reading(self, clock: "_Clock") -> None:
        while True:
            self._to_read.acquire()
            clock.waited("read")
            with self._lock:
                piece, work = self._pieces.popleft() if self._pieces else (None, None)
            if self.stopping.is_set():
                self._to_read.release()
                return
            if piece is None or work is None:
                work = self._begin()
                if work is None:
                    return
                pieces = list(self._read(work.task, work.slot))
                with self._lock:
                    self._unread[work.number] = len(pieces) + 1
                    self._pieces.extend((piece, work) for piece in pieces)
                if pieces:
                    self._to_read.release(len(pieces))
            else:
                piece()
            clock.worked("read")
            with self._lock:
                self._unread[work.number] -= 1
                is_read = not self._unread[work.number]
            if is_read:
                del self._unread[work.number]
                self._filled.put(work)

    def _begin(self) -> _Work[Task, Slot] | None:
        """The next task, in a slot that is known to be free; None where there is none, or all is to stop."""
        with self._lock:
            task = None if self.stopping.is_set() else next(self._tasks, None)
            if task is None:
                self._to_read.release()
                return None
            work = _Work(self._started, task, self._free.pop())
            self._started += 1
        return work

    def _read_whole(self, clock: "_Clock") -> _Work[Task, Slot] | None:
        """Begin the next task, and read all that it needs."""
        self._to_read.acquire()
        clock.waited("read")
        work = self._begin()
        if work is not None:
            for piece in self._read(work.task, work.slot):
                piece()
            clock.worked("read")
        return work

    def _computing(self, clock: "_Clock") -> None:
        while work := self._read_whole(clock) if self._reads_on_core else self._filled.get():
            clock.waited("compute")
            if self.stopping.is_set():
                return
            following = self._computed if self._compute(work.task, work.slot) else self._done
            clock.worked("compute")
            following.put(work)

    def _writing(self, clock: "_Clock") -> None:
        while work := self._computed.get():
            clock.waited("write")
            if self.stopping.is_set():
                return
            self._write(work.task, work.slot)
            clock.worked("write")
            self._done.put(work)

    def _committing(self) -> None:
        clock, number, waiting = _Clock(), 0, dict[int, _Work[Task, Slot]]()
        while (done := self._done.get()) and not self.stopping.is_set():
            waiting[done.number] = done
            clock.waited("commit")
            while work := waiting.pop(number, None):
                self._commit(work.task, work.slot)
                self._free.append(work.slot)
                self._to_read.release()
                number += 1
            clock.worked("commit")
        self.busy_s["commit"], self.waited_s["commit"] = clock.busy_s["commit"], clock.waited_s["commit"]


class _Clock:
    """Seconds that a thread worked for each stage, and waited before it."""

    def __init__(self) -> None:
        self.busy_s, self.waited_s = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
        self._last_s = time.perf_counter()

    def _passed(self) -> float:
        before, self._last_s = self._last_s, time.perf_counter()
        return self._last_s - before

    def worked(self, stage: str) -> None:
        """The time since the last call was work."""
        self.busy_s[stage] += self._passed()

    def waited(self, stage: str) -> None:
        """The time since the last call was spent waiting."""
        self.waited_s[stage] += self._passed()
