"""Where the stacks of a sweep train: in this process, spread over worker processes, or in SLURM."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from hydra.core.utils import env_override

from lipexp.compose import Job
from lipexp.config import one_line
from lipexp.display import StackDisplay, SweepDisplay
from lipexp.interrupts import find_lost_interrupts
from lipexp.runs import RunFolder
from lipexp.workers import CONTEXT, prepare_workers, stop_workers

if TYPE_CHECKING:
    from lipexp.slurm import Cluster

Result = TypeVar("Result")
Told: TypeAlias = Callable[[Sequence[Job]], None]

spent: list[float] = []  # CPU seconds of each task that a worker has finished; no rusage counts forked workers


def execute(
    stacks: Sequence[Sequence[Job]],
    workers: int | None,
    display: SweepDisplay,
    cluster: Cluster | None = None,
    begin: Told = lambda jobs: None,
    finish: Told = lambda jobs: None,
) -> None:
    """Train the stacks in so many worker processes; None is here, one after the other.

    A worker that dies leaves jobs without a result and without a failure.

    Args:
        cluster: has been given the stacks, and trains them.
        begin: called in this process with the jobs of a stack when it is handed over to training.
        finish: called in this process with the jobs of a stack when its training has ended.
    """
    with display.progress():
        if cluster is None and workers is None:
            for number, jobs in enumerate(stacks):
                begin(jobs)
                part = StackDisplay(display.update, number)
                train_stack(jobs, part)
                part.done()
                finish(jobs)
            return
        for jobs in stacks:
            begin(jobs)
        if cluster is not None:
            cluster.follow(display)
            for jobs in stacks:
                finish(jobs)
        elif workers is not None:
            for jobs in _in_processes(stacks, min(workers, len(stacks)), display):
                finish(jobs)


def train_stack(jobs: Sequence[Job], display: StackDisplay) -> None:
    """Train jobs of one signature as one stack; each leaves a result or a failure in its folder.

    A class of the user's that raises breaks the whole stack; then each job is trained alone, so that only those
    that cannot be trained fail.
    """
    with env_override(jobs[0].env):
        _train_stack(jobs, display)


def _train_stack(jobs: Sequence[Job], display: StackDisplay) -> None:
    from lipexp.train import build, train_many

    folders = [RunFolder(job.folder) for job in jobs]
    for job in jobs:
        job.write_hydra_files()
    try:
        with find_lost_interrupts():
            members = [build(job.resolved, job.choices) for job in jobs]
            train_many(members, folders, display, figures=False)
    except Exception as error:  # a user's class may raise anything
        if len(jobs) == 1:
            (folders[0].path / "train.log").write_text(traceback.format_exc())
            folders[0].write_failure(one_line(error), display.step)
            return
        for job, folder in zip(jobs, folders, strict=True):
            if not folder.ended:
                _train_stack([job], display)


class WorkerDied(Exception):
    """A worker process ended before its task: by the hand of a class of the user's, or of the system."""


class Worker:
    """A worker process, which does one task after the other; the death of another one does not concern it.

    Args:
        update: called here with each message that the tasks send.
    """

    def __init__(self, update: Callable[..., None] = lambda *message: None) -> None:
        prepare_workers()
        messages, self._sender = CONTEXT.Pipe(duplex=False)
        self._listener = threading.Thread(target=_listen, args=(messages, update), daemon=True)
        self._listener.start()
        # The server may have started before this process got all of its environment.
        self._pool = ProcessPoolExecutor(1, CONTEXT, _start_worker, (self._sender, dict(os.environ)))

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[tuple[Result, float]]:
        """Its result, and the CPU seconds that it took; BrokenProcessPool if the process dies."""
        future = self._pool.submit(_measured, function, *arguments)
        self._sender.close()  # the process has begun, and holds the only other one: its death ends the listener
        return future

    def end(self) -> None:
        """Waits until all messages have arrived."""
        with suppress(BrokenProcessPool):
            self._pool.submit(_send, None)
        self._pool.shutdown()
        self._listener.join()

    def kill(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown()
        self._listener.join(timeout=1)  # what a class of the user's has forked may hold a sender, too


@contextmanager
def _crew() -> Iterator[list[Worker]]:
    """The workers that the body adds to a list. They end with it; at once, if it is interrupted or fails."""
    crew: list[Worker] = []
    try:
        yield crew
    except BaseException:
        stop_workers()
        for worker in crew:
            worker.kill()
        raise
    for worker in crew:
        worker.end()


def in_worker(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments), in a worker process.

    Raises:
        WorkerDied: it did not come back.
    """
    with _crew() as crew:
        crew.append(Worker())
        with suppress(BrokenProcessPool):
            result, seconds = crew[0].submit(function, *arguments).result()
            spent.append(seconds)
            return result
        crew.clear()
    raise WorkerDied


def _measured(function: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """The result, and the CPU seconds that it took, the imports of this worker not included."""
    started = time.process_time()
    return function(*arguments), time.process_time() - started


def _in_processes(stacks: Sequence[Sequence[Job]], workers: int, display: SweepDisplay) -> Iterator[Sequence[Job]]:
    """Yields the jobs of each stack when it has ended, or its worker has died."""
    # The largest first: so the processes end at about the same time.
    waiting = deque(sorted(range(len(stacks)), key=lambda number: -len(stacks[number])))
    running: dict[Future[Any], tuple[int, Worker]] = {}
    with _crew() as crew:

        def begin(worker: Worker | None) -> None:
            if worker is None:
                crew.append(worker := Worker(display.update))
            number = waiting.popleft()
            running[worker.submit(_work, number, list(stacks[number]))] = number, worker

        for _ in range(workers):
            begin(None)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, worker = running.pop(future)
                died = isinstance(future.exception(), BrokenProcessPool)
                if died:
                    display.died(number)
                    crew.remove(worker)
                else:
                    _, seconds = future.result()
                    spent.append(seconds)
                if waiting:
                    begin(None if died else worker)
                yield stacks[number]


def _listen(messages: Connection, update: Callable[..., None]) -> None:
    """Hands on what a worker sends, until None, or its death."""
    with suppress(EOFError):
        while (message := messages.recv()) is not None:
            update(*message)


_sender: Any = None  # of the messages of this worker


def _send(message: tuple[Any, ...] | None) -> None:
    _sender.send(message)


def _start_worker(sender: Connection, environment: Mapping[str, str]) -> None:
    """This worker has the environment of its parent, and ends when that does, however it ended.

    Ctrl-C is left to the parent. But it is not blocked here, and not ignored: what a class of the user's starts
    would inherit that, and go on for ever.
    """
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    global _sender
    _sender = sender
    os.environ.clear()
    os.environ.update(environment)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(number: int, jobs: Sequence[Job]) -> None:
    """Train one stack."""
    display = StackDisplay(lambda *message: _send(message), number)
    train_stack(jobs, display)
    display.done()
