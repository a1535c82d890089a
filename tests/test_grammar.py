"""Generated command lines: each ends as a run does, or with one line, exit status 2, and nothing left behind."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path

import pytest
from commands import INLINE, TINY, time_limit
from conftest import CONF, call_command, options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lipexp.config import GROUPS
from lipexp.runs import flat

SIZES = (
    "model.width",
    "model.depth",
    "dataset.n_train",
    "dataset.n_val",
    "dataset.n_test",
    "dataset.n_inputs",
    "batch_size",
)
HYDRA = (
    *(
        "hydra.run.dir",
        "hydra.sweep.dir",
        "hydra.sweep.subdir",
        "hydra.job.name",
        "hydra.job.chdir",
        "hydra.verbose",
    ),
    *("hydra.output_subdir", "hydra.mode", "hydra.callbacks", "hydra.job.env_set", "hydra.job.id", "hydra.nope"),
    *(
        "hydra.launcher.workers",
        "hydra.launcher.memory_gib",
        "hydra.launcher.table",
        "hydra.launcher.slurm.mem_gb",
    ),
    *("hydra.sweeper.params", "hydra.sweeper.max_batch_size", "hydra.searchpath", "hydra.help.header"),
    *("hydra/launcher", "hydra/sweeper", "hydra/job_logging", "hydra/output"),
)


def settings_of(group: str) -> list[str]:
    """The settings of all options of a group."""
    found = set()
    for option in options(group):
        content = OmegaConf.load(CONF / group / f"{option}.yaml")
        found |= {f"{group}.{key}" for key in flat(OmegaConf.to_container(content.get(group, content)))}
    return sorted(found)


FLAT = [
    "seed",
    "lipschitz",
    "steps",
    "eval_every",
    "device",
    "threads",
    "radii",
    "max_regions",
    "resume",
    "experiment",
]
KEYS = [*FLAT, *GROUPS, *(key for group in GROUPS for key in settings_of(group)), *HYDRA, "nope", "act.nope", ""]

words = st.sampled_from(
    [option for group in GROUPS for option in options(group)] + ["debug", "margins", "basic", "search"]
)
numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from(
        [10**13, 10**400, -(10**20), 1e-400, 1e-30, 1e30, 1e38, 1e300, float("inf"), float("nan"), -0.0]
    ),
    st.floats(-2, 2).map(lambda value: round(value, 3)),
).map(str)
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
JUNK = "null true false '' \" [ } ??? ${nope} ${lipschitz} ${seed} ${oc.env:NOPE} ${hydra:job.num} ${.x} ${ $ inf "
JUNK += "a,b , \\ = a=b ~ é ∇ 'a"
junk = st.sampled_from([*JUNK.split(), "'a b'", "\x1b[31m", "\n"])
elements = st.one_of(words, numbers, junk, text)
nested = st.recursive(
    elements,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda values: f"[{','.join(values)}]"),
        st.dictionaries(st.sampled_from(["a", "_target_", "lr", "1"]), inner, max_size=2).map(
            lambda pairs: "{" + ",".join(f"{key}:{value}" for key, value in pairs.items()) + "}"
        ),
    ),
    max_leaves=4,
)
sweeps = st.one_of(
    st.lists(elements, min_size=2, max_size=3).map(",".join),
    st.tuples(st.sampled_from(["range", "interval", "choice", "glob", "sort", "shuffle"]), elements, elements).map(
        lambda parts: f"{parts[0]}({parts[1]},{parts[2]})"
    ),
    st.sampled_from(
        ["range(3)", "range(1,4,2)", "sort(3,1,2)", "glob(*)", "shuffle(range(3))", "tag(log,interval(1,2))"]
    ),
)


usual = st.one_of(
    st.sampled_from(
        ["seed=3", "lipschitz=2", "eval_every=1", "radii=[]", "threads=1", "max_regions=50", "optim.lr=0.1"]
    ),
    st.sampled_from(GROUPS).flatmap(
        lambda group: st.sampled_from(options(group)).map(lambda option: f"{group}={option}")
    ),
)


@st.composite
def overrides(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(KEYS))
    prefix = draw(st.sampled_from(["", "", "", "", "+", "++", "~"]))
    if prefix == "~" and draw(st.booleans()):
        return prefix + key
    value = draw(st.one_of(elements, nested, sweeps))
    if key in SIZES and value.lstrip("-").isdigit() and 40 < int(value) < 10**13:
        value = "8"
    if key == "steps":  # which may be any number, and take for ever
        value = re.sub(r"\d{3,}", "8", value)
    return f"{prefix}{key}={value}"


MODES = ["", "", "", "-m", "-m", "-m hydra/sweeper=search", "--cfg job", "--cfg", "-p act", "-m --cfg job", "-x"]
MODES += ["--info defaults", "-cd nowhere", "-cn nope", "--resolve"]
flags = st.sampled_from(MODES).map(str.split)


def run(arguments: list[str]) -> tuple[int, str]:
    """The exit status and stderr of the command in this process; 0 to 2 with the files that belong to it."""
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit():
            code = call_command("train", *arguments)
        left = [path for path in Path().rglob("*") if path.is_file()]
    lines = err.getvalue().splitlines()
    assert "Traceback" not in err.getvalue(), err.getvalue()
    assert all(line.startswith("lipexp: ") for line in lines), err.getvalue()
    if code == 2:
        assert (len(lines), left) == (1, [])
    elif code == 1:
        assert lines
        assert left
    else:
        assert (code, lines) == (0, [])
    return code, err.getvalue()


def check(count: int) -> None:
    statuses = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(flags, st.lists(st.one_of(usual, overrides()), min_size=1, max_size=3))
    def every_line(words, lines):
        # The last one wins: what is generated must not train for hours.
        own = [*words, *TINY, *lines, *([INLINE] if "-m" in words else [])]
        statuses.append(run([*own, *(["steps=1"] if not any("steps" in line for line in lines) else [])])[0])

    every_line()
    assert len(statuses) >= count
    assert {0, 2} <= set(statuses)


def test_a_few_command_lines_are_carried_out_or_refused():
    check(25)


@pytest.mark.slow
def test_two_thousand_command_lines_are_carried_out_or_refused():
    check(int(os.environ.get("LIPEXP_COMMAND_LINES", "2000")))
