"""Ctrl-C is heard, once, and at a place where it does no harm."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress

import pandas as pd
import pytest
from processes import ctrl_c, ended, start, wait_for

from lipexp.interrupts import (
    admit_interrupts,
    find_lost_interrupts,
    hold_interrupts,
    ignore_interrupts,
    orderly_interrupts,
)


def interrupt() -> None:
    """What Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def orderly() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with orderly_interrupts():
        yield
    assert signal.signal(signal.SIGINT, before) is signal.SIG_DFL  # the next one ends what is still alive


@pytest.mark.usefixtures("orderly")
def test_an_interrupt_waits_until_it_is_no_longer_held():
    passed = []

    def go_on() -> None:
        with hold_interrupts():
            interrupt()
            passed.append("inner")
        passed.append("outer")

    with pytest.raises(KeyboardInterrupt), hold_interrupts():
        go_on()
    assert passed == ["inner", "outer"]
    with hold_interrupts():  # it is over
        pass


@pytest.mark.usefixtures("orderly")
def test_a_second_interrupt_does_not_wait():
    with hold_interrupts():
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupt()


@pytest.mark.usefixtures("orderly")
def test_an_interrupt_is_admitted_within_what_holds_it():
    with hold_interrupts():
        with pytest.raises(KeyboardInterrupt), admit_interrupts():
            interrupt()
        interrupt()  # held again
        with pytest.raises(KeyboardInterrupt), admit_interrupts():
            pytest.fail("one that has come before does not wait")


@pytest.mark.usefixtures("orderly")
def test_an_interrupt_hides_the_error_of_what_held_it():
    def fail() -> None:
        interrupt()
        raise ValueError

    with pytest.raises(KeyboardInterrupt), hold_interrupts():
        fail()


def swallowed() -> None:
    with suppress(KeyboardInterrupt):
        interrupt()


def disguised() -> None:
    try:
        interrupt()
    finally:
        raise AttributeError("of something half done")


@pytest.mark.usefixtures("orderly")
@pytest.mark.parametrize("lose", [swallowed, disguised])
def test_a_lost_interrupt_is_found(lose):
    with pytest.raises(KeyboardInterrupt), find_lost_interrupts():
        lose()


def test_other_errors_stay_what_they_are():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with orderly_interrupts(), pytest.raises(ValueError, match="mine"), find_lost_interrupts():
        raise ValueError("mine")
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.usefixtures("orderly")
def test_an_interrupt_is_ignored_where_nothing_may_be_done_by_halves():
    with ignore_interrupts():
        interrupt()
        interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_elsewhere_an_interrupt_is_pythons_own():
    passed = []
    with hold_interrupts():
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        passed.append("held")
    assert passed == ["held"]


def test_a_command_that_ignores_interrupts_goes_on_doing_so():
    """One that a shell has started with nohup or in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with orderly_interrupts():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_an_import_ends_a_sweep_and_fails_no_job(tmp_path):
    """Of a library that swallows it and is broken afterwards; here a scikit-learn made for that."""
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").touch()
    (tmp_path / "sklearn" / "datasets.py").write_text(
        "import pathlib, time\ntry:\n    pathlib.Path('begun').touch()\n    time.sleep(2)\n"
        "except KeyboardInterrupt:\n    pass\n"  # and no make_moons
    )
    arguments = ("seed=0,1", "experiment=debug", "device=cpu", "hydra.sweep.dir=s")
    sweep = start(tmp_path, "train", "-m", *arguments, environment={"PYTHONPATH": "."})
    wait_for((tmp_path / "begun").exists)
    ctrl_c(sweep)
    status, _, err = ended(sweep)
    assert (status, err) == (130, "lipexp: interrupted\n")
    assert pd.read_csv(tmp_path / "s" / "sweep.csv")["status"].tolist() == ["missing", "missing"]
