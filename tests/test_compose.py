"""The jobs of a sweep are composed as Hydra's launcher composes them, and refused before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import BASIC, INLINE
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lipexp import hydra_app
from lipexp.config import plain
from lipexp.runs import RunFolder
from lipexp.sweep import executors, launch
from lipexp.sweep.compose import Job
from lipexp.sweep.plan import Plan


@pytest.fixture
def jobs(monkeypatch) -> list[Job]:
    """The jobs that `lipexp train -m` was about to train: here they only write their records."""
    composed: list[Job] = []

    def write_only(stacks: Sequence[Sequence[Job]], *others: Any) -> None:
        for job in (job for stack in stacks for job in stack):
            composed.append(job)
            job.write_hydra_files()

    def plan(jobs: Sequence[Job], *others: Any) -> Plan:
        """Of all jobs, also of those whose classes would refuse their arguments."""
        return Plan([list(job.overrides) for job in jobs], "", [[job.index for job in jobs]], {}, 0, "inline")

    monkeypatch.setattr(launch, "make_plan", plan)
    monkeypatch.setattr(executors, "inline", write_only)

    def write_config(config: DictConfig) -> None:  # by Hydra's own launcher
        RunFolder(Path(HydraConfig.get().runtime.output_dir)).write_config(plain(config))

    monkeypatch.setattr(hydra_app, "run_one", write_config)
    return composed


@pytest.fixture
def compose_only(jobs, lipexp):
    """compose_only("seed=0,1", "hydra.sweep.dir=s") -> Result; the jobs are then missing."""
    return lambda *arguments: lipexp("train", "-m", INLINE, *arguments)


def records(folder: Path) -> dict[str, dict[str, str]]:
    """job -> file -> content, of the records of a sweep's jobs: .hydra/config.yaml, and Hydra's own, wherever."""
    found: dict[str, dict[str, str]] = {}
    for file in folder.rglob("*.yaml"):
        if file.match(".hydra/config.yaml") or file.name in ("hydra.yaml", "overrides.yaml"):
            found.setdefault(str(file.parent.parent.relative_to(folder)), {})[file.name] = file.read_text()
    return found


def without_launcher(text: str) -> dict[str, Any]:
    """hydra.yaml without its launcher and its sweeper, and the overrides and the choices that name them."""
    hydra = yaml.safe_load(text)["hydra"]
    for name in ("launcher", "sweeper"):
        del hydra[name], hydra["runtime"]["choices"][f"hydra/{name}"]
    overrides = hydra["overrides"]["hydra"]
    hydra["overrides"]["hydra"] = [o for o in overrides if not o.startswith(("hydra/", "hydra.launcher"))]
    return hydra


SWEEPS = {
    "values, added, forced and deleted keys": [
        *("seed=0,1", "lipschitz=5e-1", "loss.margin=.25", "optim.lr=1e-2", "+act.note=1", "++optim.lr=0.5"),
        *("++loss.more=true", "~optim.eps", "optim.betas=[0.8,0.9]", "act.n_groups=null", "+act.d={a:1,b:[2,c]}"),
    ],
    "strings": [
        *(
            "+act.note='a b','c,d=e','1'",
            "+act.odd=[null,yes,1_000,nan]",
            '+act.other="it\'s: #1"',
            "+act.more=''",
        ),
    ],
    "interpolations": ["loss.margin=${lipschitz}", "seed=${hydra:job.num}", "+act.t='${now:%Y}'"],
    "groups, one of which brings others": [
        *("dataset=two_moons,absolute_value", "act=relu", "model={width:8}", "steps=5"),
    ],
    "glob, range, choice, sort": [
        *(
            "experiment=glob(deb*)",
            "act=glob(m*)",
            "seed=range(1,3)",
            "loss.margin=choice(0.1)",
            "steps=sort(2,1)",
        ),
    ],
    "hydra's own": [
        *("seed=1,2", "hydra.job.name=mine", "hydra.sweep.subdir=${hydra.job.override_dirname}"),
        *("hydra.searchpath=[file://mine]", "act=quiet"),
    ],
    "one job": [],
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_the_record_of_a_job_is_the_one_that_hydra_writes(compose_only, lipexp, kind):
    Path("mine/act").mkdir(parents=True)
    Path("mine/act/quiet.yaml").write_text("_target_: lipexp.activations.ReLU\n")
    error = compose_only(*SWEEPS[kind], "hydra.sweep.dir=sweeps/own").err
    assert "Traceback" not in error
    own = records(Path("sweeps/own"))
    Path("sweeps/own").rename("sweeps/stack")  # both are composed for one and the same folder
    done = lipexp("train", "-m", *SWEEPS[kind], "hydra.sweep.dir=sweeps/own", *BASIC)
    assert (done.code, done.err) == (0, "")
    hydras = records(Path("sweeps/own"))
    assert set(own) == set(hydras) != set()
    for job, files in hydras.items():
        both = [record | {"hydra.yaml": without_launcher(record["hydra.yaml"])} for record in (own[job], files)]
        assert both[0] == both[1]


def test_all_jobs_have_the_time_stamp_of_the_sweep(compose_only):
    subdir = "hydra.sweep.subdir=${hydra.job.num}-${now:%H-%M-%S-%f}"
    compose_only("seed=0,1", "act=relu,maxmin", subdir)
    (folder,) = Path("outputs").glob("*/*")
    assert set(records(folder)) == {f"{job}-{folder.name}" for job in range(4)}


def test_a_job_sees_its_settings_resolved_as_under_hydra(compose_only, jobs):
    compose_only("seed=${hydra:job.num}", "loss.margin=${lipschitz}", "lipschitz=3,4")
    seen = [(job.resolved["seed"], job.resolved["loss"]["margin"]) for job in jobs]
    assert seen == [(0, 3.0), (1, 4.0)]
    for job in jobs:
        assert RunFolder(job.folder).config() == job.resolved


class Listener(Callback):
    def on_job_end(self, config, job_return, **others): ...


IN_ONE_PROCESS = "is for hydra/launcher=basic: the jobs of a stack train in one process"
BAD_SWEEPS = {
    "act=relu,grupsort": "act=grupsort: no such option; did you mean act=groupsort?",
    "seed=1,2,foo": "seed=foo: must be a whole number",
    "loss=hinge,bce loss.margin=1": "loss.margin: no such setting",
    "~nothing": "Could not delete from config. 'nothing' does not exist.",
    "loss.margin=1,${nothing}": "Interpolation key 'nothing' not found",
    "seed=1,2 act@b=relu": "act@b",
    "act=glob(zzz)": "--multirun: there is no job in this sweep",
    "seed=interval(0,1)": "interval(…): is for a search, hydra/sweeper=search",
    "hydra.job.num=1,2": "Sweeping over Hydra's configuration is not supported",
    "hydra.sweep.subdir=x seed=1,2": "hydra.sweep.subdir: gives jobs 0 and 1 the same folder",
    "resume=true,false": "resume: is read once, for the whole sweep: true or false",
    "hydra.launcher.executor=foo": "hydra.launcher.executor=foo: no such option (auto, inline, process, slurm)",
    "hydra.launcher.workers=0": "hydra.launcher.workers=0: must be a whole number, at least 1",
    "hydra.launcher.workers=2.5": "hydra.launcher.workers=2.5: must be a whole number",
    "hydra.launcher.memory_gib=-1": "hydra.launcher.memory_gib=-1.0: must be a finite number above 0",
    "hydra.launcher.memory_gib=big": "hydra.launcher.memory_gib=big: must be a number",
    "hydra.launcher.worker=2": "hydra.launcher.worker: no such setting; did you mean hydra.launcher.workers?",
    "hydra.launcher.slurm.what=2": "hydra.launcher.slurm.what: no such setting",
    "hydra.job.chdir=true": f"hydra.job.chdir=true: {IN_ONE_PROCESS}",
    "+hydra.job.env_set.A=1": f"hydra.job.env_set={{'A': '1'}}: {IN_ONE_PROCESS}",
    f"+hydra.callbacks.mine._target_={__name__}.Listener": "hydra.callbacks: Listener.on_job_end is for hydra/l",
}


@pytest.mark.parametrize("arguments", BAD_SWEEPS)
def test_what_composition_refuses_is_one_line_and_nothing_is_written(compose_only, arguments):
    done = compose_only(*arguments.split())
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert done.err.startswith("lipexp: ")
    assert BAD_SWEEPS[arguments] in done.err
    assert not list(Path().iterdir())
