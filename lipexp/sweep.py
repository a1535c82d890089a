"""A sweep as a few stacked models: grouping, splitting, resuming, executors, sweep.csv.

The jobs of a sweep that share their signature (train.py) train as one stack. A stack is split where memory or the
number of workers asks for it; the split is written into the sweep's folder before anything is trained, and a
resumed sweep reuses it, so that it ends as it would have without the interruption.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lipexp.compose import Job
from lipexp.config import ConfigError, one_of, whole
from lipexp.display import SweepDisplay, broken_bound, live_summary
from lipexp.runs import RunFolder, SweepFailed, flat, write_csv, write_file

RECORD = "sweep.json"  # the jobs and their split into stacks
EXECUTORS = ("inline", "process")
SHARE_OF_FREE_MEMORY = 0.25  # for the stacks that train at the same time, unless a limit is given
LARGEST_STACK = 128  # runs; larger stacks are no faster, and keep results back for longer


@dataclass(frozen=True)
class Options:
    """How a sweep is carried out: the settings of the launcher.

    Args:
        executor: `inline` trains in this process, `process` spreads stacks over worker processes.
        workers: how many of those; null is one a core.
        memory_gib: for all stacks that train at the same time; null is a quarter of what is free.
    """

    executor: str = "inline"
    workers: int | None = None
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        one_of("hydra.launcher.executor", self.executor, EXECUTORS)
        if self.workers is not None:
            whole("hydra.launcher.workers", self.workers, least=1)
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ConfigError("hydra.launcher.memory_gib", self.memory_gib, "must be a number above 0")

    @property
    def processes(self) -> int:
        """How many stacks train at the same time."""
        return 1 if self.executor == "inline" else self.workers or os.cpu_count() or 1

    def memory(self) -> int:
        """Bytes for one stack."""
        total = self.memory_gib * 2**30 if self.memory_gib is not None else SHARE_OF_FREE_MEMORY * free_memory()
        return int(total / self.processes)


def free_memory() -> int:
    """Bytes that are free for new programs."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do: its jobs in order, and the stacks they train in, as job numbers."""

    jobs: list[list[str]]  # the overrides of each job
    stacks: list[list[int]]

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """The plan that an earlier call wrote into `folder`; None if there is none."""
        try:
            record = json.loads((folder / RECORD).read_text())
        except FileNotFoundError:
            return None
        return cls(record["jobs"], record["stacks"])

    def write(self, folder: Path) -> None:
        content = json.dumps({"jobs": self.jobs, "stacks": self.stacks})
        write_file(folder / RECORD, lambda path: path.write_text(content))


def split(signatures: Mapping[int, tuple[str, int]], options: Options) -> list[list[int]]:
    """Jobs of equal signature as stacks, small enough for the memory, and enough of them for all workers.

    Args:
        signatures: job number -> (signature, bytes that one run takes).
    """
    groups: dict[str, list[int]] = {}
    for job, (signature, _) in signatures.items():
        groups.setdefault(signature, []).append(job)
    stacks: list[list[int]] = []
    for jobs in groups.values():
        runs = max(1, min(LARGEST_STACK, options.memory() // signatures[jobs[0]][1]))
        pieces = max(-(-len(jobs) // runs), 1)
        if len(groups) < options.processes:  # so that no worker stays idle
            pieces = max(pieces, min(len(jobs), -(-options.processes // len(groups))))
        size = -(-len(jobs) // pieces)
        stacks.extend(jobs[start : start + size] for start in range(0, len(jobs), size))
    return stacks


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process.

    Raises:
        ConfigError: another process holds it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("hydra.sweep.dir", folder, "is in use by another lipexp process") from None
        yield


class End(NamedTuple):
    """How a job ended: `ok`, `failed`, or `missing` when the sweep was interrupted before it."""

    status: str
    reason: str = ""


def end_of(folder: RunFolder) -> End:
    """How the run in `folder` ended, as its files tell."""
    if folder.complete:
        lipschitz = folder.metrics()["lipschitz"]
        return End("failed", broken_bound(lipschitz)) if lipschitz["verdict"] == "FAIL" else End("ok")
    if folder.failed:
        return End("failed", str(folder.failure()["reason"]))
    return End("missing")


class Sweep:
    """The jobs of one sweep and the folder they leave their results in."""

    def __init__(self, jobs: Sequence[Job], folder: Path, options: Options, resume: bool) -> None:
        self.jobs = {job.index: job for job in jobs}
        self.folder, self.options, self.resume = folder, options, resume

    def run(self) -> list[End]:
        """Train what is missing and write sweep.csv.

        Raises:
            ConfigError: the folder is in use, or holds something else.
            SweepFailed: at the end, if jobs failed.
        """
        self._make_folder()
        with exclusive(self.folder):
            plan = self._plan()
            pending = [[job for job in stack if self._end(job).status == "missing"] for stack in plan.stacks]
            stacks = [[self.jobs[job] for job in stack] for stack in pending if stack]
            display = SweepDisplay()
            display.header(len(self.jobs), sum(map(len, stacks)), [len(stack) for stack in stacks])
            try:
                if stacks:
                    execute(stacks, self.options, display)
            finally:
                ends = [self._end(job) for job in self.jobs]
                table = self.rows()
                write_csv(self.folder / "sweep.csv", table)
            display.result(table, self.folder / "sweep.csv")
        failures = [
            f"{end.reason} ({job.folder})"
            for job, end in zip(self.jobs.values(), ends, strict=True)
            if end.status == "failed"
        ]
        if failures:
            raise SweepFailed(failures)
        return ends

    def rows(self) -> list[dict[str, Any]]:
        """The rows of sweep.csv: job, status, reason, its overrides, and its metrics with dotted keys."""
        rows = []
        for number, job in self.jobs.items():
            end = self._end(number)
            row: dict[str, Any] = {"job": number, "status": end.status, "reason": end.reason}
            row |= {key.lstrip("+"): value for key, _, value in (line.partition("=") for line in job.overrides)}
            if RunFolder(job.folder).complete:
                row |= {
                    key: value for key, value in flat(RunFolder(job.folder).metrics()).items() if key not in row
                }
            rows.append(row)
        return rows

    def _end(self, job: int) -> End:
        return end_of(RunFolder(self.jobs[job].folder))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            used = {entry.name for entry in self.folder.iterdir()} - {".lock"}
        except OSError as error:
            raise ConfigError("hydra.sweep.dir", self.folder, f"cannot be written: {error.strerror}") from None
        if used and not self.resume:
            allowed = "is not empty; results are never overwritten (resume=true continues a sweep)"
            raise ConfigError("hydra.sweep.dir", self.folder, allowed)

    def _plan(self) -> Plan:
        """The plan of an interrupted sweep, or a new one, written down before anything is trained."""
        overrides = [list(job.overrides) for job in self.jobs.values()]
        plan = Plan.read(self.folder) if self.resume else None
        if plan is not None and plan.jobs != overrides:
            allowed = f"{self.folder} holds another sweep, of {len(plan.jobs)} jobs"
            raise ConfigError("resume", "true", allowed)
        if plan is None:
            plan = Plan(overrides, split(self._signatures(), self.options))
            plan.write(self.folder)
        return plan

    def _signatures(self) -> dict[int, tuple[str, int]]:
        """Signature and bytes of each job; one that its constructors refuse fails here, by itself."""
        from lipexp.train import build, run_bytes, signature

        signatures = {}
        for number, job in self.jobs.items():
            try:
                member = build(job.composed(), job.choices)
            except ConfigError as error:
                job.write_hydra_files()
                RunFolder(job.folder).write_failure(str(error), step=0)
                continue
            signatures[number] = (signature(member), run_bytes(member))
        return signatures


def execute(stacks: Sequence[Sequence[Job]], options: Options, display: SweepDisplay) -> None:
    """Train the stacks, here or in worker processes."""
    with display.progress():
        if options.executor == "inline":
            for number, jobs in enumerate(stacks):
                train_stack(jobs, display.stack(number, len(jobs)))
        else:
            _in_processes(stacks, options.processes, display)


def train_stack(jobs: Sequence[Job], display: Any) -> None:
    """Train jobs of one signature as one stack; each leaves a result or a failure in its folder.

    A class of the user's that raises breaks the whole stack; then each job is trained alone, so that only those
    that cannot be trained fail.
    """
    from lipexp.train import build, train_many

    folders = [RunFolder(job.folder) for job in jobs]
    for job in jobs:
        job.write_hydra_files()
    try:
        members = [build(job.composed(), job.choices) for job in jobs]
        train_many(members, folders, display, figures=False)
    except Exception as error:
        if len(jobs) == 1:
            (folders[0].path / "train.log").write_text(traceback.format_exc())
            folders[0].write_failure(f"{type(error).__name__}: {error}", step=0)
            return
        for job, folder in zip(jobs, folders, strict=True):
            if end_of(folder).status == "missing":
                train_stack([job], display)


def _in_processes(stacks: Sequence[Sequence[Job]], workers: int, display: SweepDisplay) -> None:
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    messages = context.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(messages, display), daemon=True)
    listener.start()
    start = (messages, os.getpid())
    with ProcessPoolExecutor(min(workers, len(stacks)), context, _start_worker, start) as pool:
        futures = [pool.submit(_work, number, list(jobs)) for number, jobs in enumerate(stacks)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
    messages.put(None)
    listener.join()


class _Remote:
    """The display of a stack in a worker process: it sends what it is told to the parent."""

    def __init__(self, messages: Any, number: int) -> None:
        self.messages, self.number = messages, number

    @contextmanager
    def training(self, total: int) -> Iterator[None]:
        self.messages.put((self.number, 0, total, ""))
        yield

    def tick(self, step: int) -> None:
        self.messages.put((self.number, step, None, None))

    def checkpoint(self, step: int, rows: Sequence[Mapping[str, float | None]]) -> None:
        self.messages.put((self.number, step, None, live_summary(rows)))


def _listen(messages: Any, display: SweepDisplay) -> None:
    """Shows what the workers send, until None."""
    while (message := messages.get()) is not None:
        display.update(*message)


_worker_messages: Any = None


def _start_worker(messages: Any, parent: int) -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent does, however that ended."""
    global _worker_messages
    _worker_messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(number: int, jobs: Sequence[Job]) -> None:
    train_stack(jobs, _Remote(_worker_messages, number))


def launch(
    loader: Any, master: Any, job_overrides: Sequence[Sequence[str]], first: int, options: Mapping[str, Any]
) -> list[Any]:
    """Carry out a sweep for Hydra's launcher: compose every job, train what is missing, write sweep.csv.

    Args:
        loader: Hydra's configuration loader.
        master: the configuration of the sweep itself; its flat key `resume` continues an interrupted one.
        first: the number of the first job.

    Raises:
        HydraException: a job that composition refuses; nothing is written then.
        ConfigError: options or a folder that cannot be used.
        SweepFailed: at the end, if some jobs failed.
    """
    from hydra.core.utils import JobReturn, JobStatus

    from lipexp.compose import Composer

    chosen = Options(**options)
    own = [[line for line in overrides if not line.startswith("resume=")] for overrides in job_overrides]
    composer = Composer(loader, master)
    jobs = [composer.job(number, overrides) for number, overrides in enumerate(own, first)]
    ends = Sweep(jobs, Path(master.hydra.sweep.dir), chosen, resume=bool(master.resume)).run()
    returns = []
    for job, end in zip(jobs, ends, strict=True):
        result = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
        result.return_value = end
        returns.append(result)
    return returns
