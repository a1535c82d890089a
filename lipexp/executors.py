"""Where the stacks of a sweep train: in this process, spread over worker processes, or in SLURM."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from hydra.core.utils import env_override

from lipexp.compose import Job
from lipexp.config import one_line
from lipexp.display import StackDisplay, SweepDisplay
from lipexp.interrupts import find_lost_interrupts
from lipexp.runs import RunFolder
from lipexp.workers import Done, Worker, WorkerDied, crew, tell, wait_for

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
            with closing(_in_processes(stacks, min(workers, len(stacks)), display)) as ended:
                for jobs in ended:
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
    except (Exception, SystemExit) as error:  # a user's class may raise anything
        if len(jobs) == 1:
            (folders[0].path / "train.log").write_text(traceback.format_exc())
            folders[0].write_failure(one_line(error), display.step)
            return
        for job, folder in zip(jobs, folders, strict=True):
            if not folder.ended:
                _train_stack([job], display)


def in_worker(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments), which tells nothing meanwhile, in a worker process.

    Raises:
        WorkerDied: it did not come back.
    """
    with crew() as workers:
        workers.append(worker := Worker())
        worker.begin(function, *arguments)
        wait_for([worker])
        with suppress(WorkerDied):  # within, where it does not concern the server
            result, seconds = worker.answer()
            spent.append(seconds)
            return cast(Result, result)
    raise WorkerDied


def _in_processes(
    stacks: Sequence[Sequence[Job]], processes: int, display: SweepDisplay
) -> Generator[Sequence[Job], None, None]:
    """Yields the jobs of each stack when it has ended, or its worker has died."""
    # The largest first: so the processes end at about the same time.
    waiting = deque(sorted(range(len(stacks)), key=lambda number: -len(stacks[number])))
    busy: dict[Worker, int] = {}  # with which stack
    with crew() as workers:

        def begin(worker: Worker | None) -> None:
            if worker is None:
                workers.append(worker := Worker())
            busy[worker] = number = waiting.popleft()
            worker.begin(_work, number, list(stacks[number]))

        for _ in range(processes):
            begin(None)
        while busy:
            for worker in wait_for(list(busy)):
                idle: Worker | None = worker
                try:
                    answer = worker.answer()
                    if not isinstance(answer, Done):
                        display.update(*answer)
                        continue
                    spent.append(answer.seconds)
                except WorkerDied:
                    display.died(busy[worker])
                    worker.end()  # if it was its server that died
                    workers.remove(worker)
                    idle = None
                ended = busy.pop(worker)
                if waiting:
                    begin(idle)
                yield stacks[ended]


def _work(number: int, jobs: Sequence[Job]) -> None:
    """Train one stack, in a worker."""
    display = StackDisplay(lambda *message: tell(message), number)
    train_stack(jobs, display)
    display.done()
