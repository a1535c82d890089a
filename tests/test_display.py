"""The screen of a run and of a sweep: live lines, and the table of its jobs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from lipexp.display import Display, SweepDisplay, composing
from lipexp.screen import Screen


def screen(**options: object) -> Screen:
    return Screen(record=True, file=io.StringIO(), **{"width": 80, **options})


RESULTS = {"lipschitz.measured": 0.50009, "lipschitz.certified": 0.50001, "lipschitz.target": 1.0}
OK = {"status": "ok", "reason": "", "lipschitz.verdict": "PASS", **RESULTS}
