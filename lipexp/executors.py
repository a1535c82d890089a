"""Where the stacks of a sweep train: in this process, spread over worker processes, or in SLURM."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from hydra.core.utils import env_override

from lipexp.compose import Job
from lipexp.config import one_line
from lipexp.display import StackDisplay, SweepDisplay
from lipexp.runs import RunFolder, SweepFailed
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


def in_worker(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments), in a worker process.

    Raises:
        SweepFailed: it died.
    """
    try:
        with _pool(1) as pool:
            result, seconds = pool.submit(_measured, function, *arguments).result()
    except BrokenProcessPool:
        reason = "of too little memory perhaps, or by the hand of a class of yours"
        raise SweepFailed([f"a worker process died before any job trained, {reason}"]) from None
    spent.append(seconds)
    return result


def _measured(function: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """The result, and the CPU seconds that it took."""
    started = time.process_time()
    return function(*arguments), time.process_time() - started


def _in_processes(stacks: Sequence[Sequence[Job]], workers: int, display: SweepDisplay) -> Iterator[Sequence[Job]]:
    """Yields the jobs of each stack when it has ended; of the others as well, once a worker has died."""
    messages = CONTEXT.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(messages, display), daemon=True)
    listener.start()
    with _pool(workers, messages) as pool:
        futures = {pool.submit(_work, number, list(jobs)): jobs for number, jobs in enumerate(stacks)}
        try:
            for future in as_completed(list(futures)):
                spent.append(future.result())
                yield futures.pop(future)
        except BrokenProcessPool:  # the listener is left behind: the dead worker may hold its queue
            yield from futures.values()
            return
    messages.put(None)
    listener.join()


@contextmanager
def _pool(workers: int, messages: Any = None) -> Iterator[ProcessPoolExecutor]:
    """So many worker processes, which end at once when the body is interrupted or fails."""
    prepare_workers()
    # The server may have started before this process got all of its environment.
    with ProcessPoolExecutor(workers, CONTEXT, _start_worker, (messages, dict(os.environ))) as pool:
        try:
            yield pool
        except BaseException:
            stop_workers()
            for process in list((pool._processes or {}).values()):
                process.kill()
            raise


def _listen(messages: Any, display: SweepDisplay) -> None:
    """Shows what the workers send, until None."""
    while (message := messages.get()) is not None:
        display.update(*message)


_worker_messages: Any = None


def _start_worker(messages: Any, environment: Mapping[str, str]) -> None:
    """This worker has the environment of its parent, and ends when that does, however it ended."""
    global _worker_messages
    _worker_messages = messages
    os.environ.clear()
    os.environ.update(environment)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(number: int, jobs: Sequence[Job]) -> float:
    """Train one stack; returns the CPU seconds of this worker for it, its imports not included."""
    started = time.process_time()
    display = StackDisplay(lambda *message: _worker_messages.put(message), number)
    train_stack(jobs, display)
    display.done()
    return time.process_time() - started
