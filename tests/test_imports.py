"""Imports that the garbage collector does not slow down."""

from __future__ import annotations

import gc
import sys

import pytest

from lipexp.imports import quick_imports


@pytest.fixture(autouse=True)
def _as_before():
    yield
    gc.unfreeze()
    gc.enable()


def test_the_garbage_collector_rests_during_imports_alone():
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_works_again_when_an_import_fails():
    with pytest.raises(ModuleNotFoundError), quick_imports():
        import no_such_module  # noqa: F401
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off():
    gc.disable()
    with quick_imports():
        pass
    assert not gc.isenabled()


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_kept_is_never_looked_at_again(keep, monkeypatch, tmp_path):
    """But only if something was imported: the command may be called in a long-lived process."""
    gc.unfreeze()
    with quick_imports(keep=keep):
        import gc as known  # noqa: F401
    assert gc.get_freeze_count() == 0
    (tmp_path / "not_known_before.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with quick_imports(keep=keep):
        import not_known_before  # noqa: F401
    assert (gc.get_freeze_count() > 0) == keep
    del sys.modules["not_known_before"]
