"""Worker processes, and the server that they are forked from; it imports what they need, once for all of them.

The server has run no torch operation, so it has no threads that a fork would lose; the process of the command may
have.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any, NamedTuple

from lipexp.interrupts import hold_interrupts, ignore_interrupts

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["lipexp.preload"]
GRACE = 2.0  # seconds in which a worker may end by itself
NOT_KNOWN = 255  # the exit code of a process whose server has died


def begin_workers() -> None:
    """Start the imports of worker processes, which take seconds, while this process does something else.

    Raises:
        OSError: this machine starts none.
    """
    CONTEXT.set_forkserver_preload(PRELOAD)
    resource_tracker.ensure_running()  # the server would start it, and let Ctrl-C in again
    with hold_interrupts(), _no_interrupt():  # it keeps this: Ctrl-C is left to this process
        forkserver.ensure_running()


def prepare_workers() -> None:
    """`begin_workers`, once workers are certain to be wanted.

    Raises:
        ConfigError: this machine starts none.
    """
    try:
        begin_workers()
    except OSError as error:  # of a socket in a folder with a long name, for one
        raise _no_process(error) from None


def _no_process(error: Exception) -> Exception:
    from lipexp.config import ConfigError  # which takes longer to import than all of this module

    return ConfigError("hydra.launcher.executor", "process", f"cannot start a process here: {error}")


def stop_workers() -> None:
    """End the server at once, whatever it imports: it holds our output, and perhaps a worker half begun."""
    server: Any = forkserver._forkserver
    with ignore_interrupts():
        if server._forkserver_pid is not None:
            with suppress(ProcessLookupError):
                os.kill(server._forkserver_pid, signal.SIGKILL)
            server._stop()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits until the body is done; processes that the body starts never get one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Workers ---------------------------------------------------------------------------------------------------------


class WorkerDied(Exception):
    """A worker process ended before its task: by the hand of a class of the user's, or of the system."""


class Done(NamedTuple):
    """The answer that ends a task."""

    result: Any
    seconds: float  # of CPU time, the imports of this worker not included


class Failed(NamedTuple):
    """The answer that ends a task with an error."""

    error: BaseException


class Worker:
    """A process that does one task after the other; the death of another one does not concern it.

    Raises:
        ConfigError: this machine starts none.
    """

    def __init__(self) -> None:
        try:
            self._start()
        except (OSError, EOFError):  # of a server that has died
            stop_workers()
            try:
                self._start()
            except (OSError, EOFError) as error:
                raise _no_process(error) from None

    def _start(self) -> None:
        prepare_workers()
        self._answers, theirs = CONTEXT.Pipe()
        # The server may have started before this process got all of its environment.
        self._process = CONTEXT.Process(target=_serve, args=(theirs, dict(os.environ)))
        self._process.start()
        theirs.close()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Do function(*arguments), and answer."""
        with suppress(OSError):  # it is dead, and `answer` says so
            self._answers.send((function, arguments))

    def answer(self) -> Any:
        """What a task has told, or Done; to be asked for after `wait_for`.

        Raises:
            WorkerDied: there will be no answer.
            BaseException: what the task has raised.
        """
        try:
            if not self._answers.poll():
                raise WorkerDied
            answer = self._answers.recv()
        except (OSError, EOFError):
            raise WorkerDied from None
        if isinstance(answer, Failed):
            raise answer.error
        return answer

    def let_go(self) -> None:
        """There is no other task."""
        with suppress(OSError):
            self._answers.send(None)

    def end(self, seconds: float = 0.0) -> None:
        """Wait for its end so long, then kill it."""
        self._process.join(seconds)
        if self._process.exitcode in (None, NOT_KNOWN):
            assert self._process.pid is not None
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.join(GRACE)
        self._answers.close()

    def handles(self) -> tuple[Any, Any]:
        """What `multiprocessing.connection.wait` takes: of its answers, and of its end."""
        return self._answers, self._process.sentinel


def wait_for(workers: Sequence[Worker]) -> list[Worker]:
    """Those that have an answer, or are dead; at least one."""
    owner = {handle: worker for worker in workers for handle in worker.handles()}
    return list(dict.fromkeys(owner[handle] for handle in connection.wait(list(owner))))


@contextmanager
def crew() -> Iterator[list[Worker]]:
    """The workers that the body adds to a list. They end with it; at once, if it is interrupted or fails."""
    workers: list[Worker] = []
    try:
        yield workers
    except BaseException:
        with ignore_interrupts():
            for worker in workers:
                worker.end()
            stop_workers()
        raise
    for worker in workers:
        worker.let_go()
    end = time.monotonic() + GRACE  # of threads that a class of the user's may have left
    for worker in workers:
        worker.end(max(0.0, end - time.monotonic()))


# In a worker -----------------------------------------------------------------------------------------------------

_tasks: Any = None  # the connection to the parent


def tell(message: Any) -> None:
    """An answer that does not end the task."""
    with suppress(OSError):  # nobody listens any more
        _tasks.send(message)


def _serve(tasks: Any, environment: Mapping[str, str]) -> None:
    """Do what comes, in the environment of the parent, until None; end when the parent does, however it ended.

    Ctrl-C is left to the parent. But it is not blocked here, and not ignored: what a class of the user's starts
    would inherit that, and go on for ever.
    """
    global _tasks
    _tasks = tasks
    signal.signal(signal.SIGINT, lambda *_: None)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # of a parent that has gone
        while (task := tasks.recv()) is not None:
            tasks.send(_answer(*task))


def _answer(function: Callable[..., Any], arguments: Sequence[Any]) -> Done | Failed:
    started = time.process_time()
    try:
        return Done(function(*arguments), time.process_time() - started)
    except BaseException as error:
        return Failed(error if _can_be_sent(error) else RuntimeError(repr(error)))


def _can_be_sent(error: BaseException) -> bool:
    """Errors with arguments of their own often cannot be made again from what they were sent as."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
