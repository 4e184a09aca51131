"""Streams blocks through reader, compute and writer threads over a fixed set of buffers."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

Task = TypeVar("Task")
Slot = TypeVar("Slot")


class Pipeline(Generic[Task, Slot]):
    """Three stages, joined by queues; a slot (its buffers) travels with a task and is then used again.

    Memory is what the slots hold, however many tasks there are. Tasks start in order and may finish in any. The first
    exception of any stage stops all of them and is raised by `run`.

    Args:
        slots: the buffers; at least one a thread keeps every stage busy.
        read: fills a slot for a task.
        compute: works inside the slot.
        write: empties it.
        readers: number of reader threads.
        workers: number of compute threads.
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
        self._order = threading.Lock()
        self._error: BaseException | None = None
        self.stopping = threading.Event()

    def run(self, tasks: Iterable[Task]) -> None:
        """Handle every task; returns when all are written."""
        iterator = iter(tasks)
        readers = [threading.Thread(target=self._reading, args=(iterator,), daemon=True) for _ in range(self._readers)]
        workers = [threading.Thread(target=self._computing, daemon=True) for _ in range(self._workers)]
        writer = threading.Thread(target=self._writing, daemon=True)
        try:
            for thread in (*readers, *workers, writer):
                thread.start()
            for thread in readers:
                thread.join()
            for _ in workers:
                self._filled.put(None)
            for thread in workers:
                thread.join()
            self._done.put(None)
            writer.join()
        except BaseException as interruption:
            self._fail(interruption)
            for thread in (*readers, *workers):
                thread.join()
            self._done.put(None)
            writer.join()
            raise
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._order:
            self._error = self._error or error
        self.stopping.set()
        for _ in range(self._readers):
            self._free.put(None)
        for _ in range(self._workers):
            self._filled.put(None)

    def _reading(self, tasks: Iterator[Task]) -> None:
        try:
            while (slot := self._free.get()) is not None and not self.stopping.is_set():
                with self._order:
                    task = next(tasks)
                self._read(task, slot)
                self._filled.put((task, slot))
        except StopIteration:
            # The slot of the task that is not there goes to the other readers, which must see the end too.
            self._free.put(slot)
        except BaseException as error:  # handed to the caller of run
            self._fail(error)

    def _computing(self) -> None:
        try:
            while (item := self._filled.get()) is not None and not self.stopping.is_set():
                self._compute(*item)
                self._done.put(item)
        except BaseException as error:
            self._fail(error)

    def _writing(self) -> None:
        try:
            while (item := self._done.get()) is not None and not self.stopping.is_set():
                self._write(*item)
                self._free.put(item[1])
        except BaseException as error:
            self._fail(error)
