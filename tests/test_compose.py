"""The jobs of a sweep are composed as Hydra's launcher composes them, and refused before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lipexp import hydra_app
from lipexp.sweep import launch as sweep
from lipexp.sweep.compose import Job

BASIC = ("hydra/launcher=basic", "hydra/sweeper=basic")


@pytest.fixture
def composed(lipexp, monkeypatch):
    """composed("seed=0,1") -> (exit status, stderr) of `lipexp train -m`, which only writes its records."""
    monkeypatch.setattr(hydra_app, "run_one", lambda config: None)

    def write_only(stacks: Sequence[Sequence[Job]], *others: Any) -> None:
        for job in (job for stack in stacks for job in stack):
            job.write_hydra_files()

    monkeypatch.setattr(sweep, "execute", write_only)
    monkeypatch.setattr(sweep.Sweep, "_failures", lambda *_: [])

    def call(*arguments: str) -> tuple[int, str]:
        done = lipexp("train", "-m", *arguments)
        return done.code, done.err

    return call


def records(folder: Path) -> dict[str, dict[str, str]]:
    """job -> file -> content, of a sweep's .hydra folders."""
    return {
        str(record.parent.relative_to(folder)): {file.name: file.read_text() for file in record.iterdir()}
        for record in folder.rglob(".hydra")
    }


def without_launcher(text: str, folder: str) -> str:
    """hydra.yaml without its launcher and its sweeper, and the overrides and the choices that name them."""
    hydra = yaml.safe_load(text)["hydra"]
    del hydra["launcher"], hydra["sweeper"]
    names = ("hydra/launcher", "hydra/sweeper")
    for name in names:
        del hydra["runtime"]["choices"][name]
    overrides = hydra["overrides"]["hydra"]
    hydra["overrides"]["hydra"] = [line for line in overrides if not line.startswith(names)]
    return yaml.safe_dump(hydra, sort_keys=False).replace(folder, "FOLDER")


SWEEPS = {
    "values": ["seed=0,1", "lipschitz=2,5e-1", "loss.margin=.25", "optim.lr=1e-2", "steps=7"],
    "groups": ["act=relu,groupsort", "constraint=linf", "model.width=8"],
    "a group that brings others": ["dataset=two_moons,absolute_value", "steps=5"],
    "added, forced and deleted keys": ["+act.note=1,2", "++optim.lr=0.5", "++loss.more=true", "~optim.eps"],
    "lists, dicts, null": ["optim.betas=[0.8,0.9],[0.7,0.8]", "act.n_groups=null", "+act.d={a:1,b:[2,c]}"],
    "quoted strings": ["+act.note='a b','c,d=e'", '+act.other="it\'s: #1"', "+act.third=\\,x", "+act.empty=''"],
    "strings like other types": ["+act.note='1','null',yes,1_000,nan"],
    "interpolations": [
        "loss.margin=${lipschitz}",
        "lipschitz=1,2",
        "seed=${hydra:job.num}",
        "+act.t='${now:%Y-%f}'",
    ],
    "experiment": ["experiment=debug", "seed=1,2", "steps=3"],
    "glob": ["experiment=glob(*,exclude=o*)", "act=glob(*,exclude=[a*,f*,g*,l*])"],
    "range, choice, sort, shuffle": ["seed=range(1,3)", "steps=choice(1,2)", "optim.betas=sort([0.9,0.8])"],
    "hydra's own": ["seed=1,2", "hydra.job.name=mine", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
    "a dict for a group": ["model={width:8},{width:16}", "act=relu"],
    "one job": [],
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_the_record_of_a_job_is_the_one_that_hydra_writes(composed, kind):
    _, error = composed(*SWEEPS[kind], "hydra.sweep.dir=sweeps/own")
    assert "Traceback" not in error
    own = records(Path("sweeps/own"))
    assert own
    Path("sweeps/own").rename("sweeps/stack")  # both are composed for one and the same folder
    assert composed(*SWEEPS[kind], "hydra.sweep.dir=sweeps/own", *BASIC) == (0, "")
    hydras = records(Path("sweeps/own"))
    assert set(own) == set(hydras)
    for job, files in hydras.items():
        assert own[job].keys() == files.keys()
        for name in ("config.yaml", "overrides.yaml"):
            assert own[job][name] == files[name]
        folder = str(Path("sweeps/own").resolve())
        assert without_launcher(own[job]["hydra.yaml"], folder) == without_launcher(files["hydra.yaml"], folder)


def test_all_jobs_have_the_time_stamp_of_the_sweep(composed):
    assert composed("seed=0,1,2", "act=relu,maxmin", "hydra.sweep.subdir=${hydra.job.num}-${now:%H-%M-%S-%f}") == (
        0,
        "",
    )
    (folder,) = Path("outputs").glob("*/*")
    assert set(records(folder)) == {f"{job}-{folder.name}" for job in range(6)}


def test_options_found_through_hydras_search_path_are_composed(composed):
    Path("mine/act").mkdir(parents=True)
    Path("mine/act/quiet.yaml").write_text("_target_: lipexp.activations.ReLU\n")
    Path("mine/extra").mkdir()
    Path("mine/extra/one.yaml").write_text("# @package _global_\nsteps: 11\n")
    code, error = composed("act=quiet,relu", "+extra=one", "hydra.searchpath=[file://mine]", "hydra.sweep.dir=s")
    assert (code, error) == (0, "")
    configs = [yaml.safe_load(files["config.yaml"]) for files in records(Path("s")).values()]
    assert [config["steps"] for config in configs] == [11, 11]


def test_hydras_record_may_lie_elsewhere_or_nowhere(composed):
    assert composed("hydra.output_subdir=record", "hydra.sweep.dir=a")[0] == 0
    assert {path.name for path in Path("a/0/record").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert composed("hydra.output_subdir=null", "hydra.sweep.dir=b")[0] == 0
    assert not list(Path("b/0").iterdir())


BAD_SWEEPS = {
    "act=relu,grupsort": "act=grupsort: no such option; did you mean act=groupsort?",
    "seed=1,2,foo": "seed=foo: must be a whole number",
    "los.margin=1,2": "los.margin: no such setting",
    "loss.margn=1,2": "loss.margn: no such setting; did you mean loss.margin?",
    "loss=hinge,bce loss.margin=1": "loss.margin: no such setting",
    "~nothing": "Could not delete from config. 'nothing' does not exist.",
    "loss.margin=1,${nothing}": "Interpolation key 'nothing' not found",
    "seed=1,2 act@b=relu": "act@b",
    "act=glob(zzz)": "--multirun: there is no job in this sweep",
    "hydra.job.num=1,2": "Sweeping over Hydra's configuration is not supported",
    "hydra.sweep.subdir=x seed=1,2": "hydra.sweep.subdir: gives jobs 0 and 1 the same folder",
    "resume=true,false": "resume: is read once, for the whole sweep: true or false",
    "hydra.launcher.executor=foo": "hydra.launcher.executor=foo: no such option (inline, process, slurm)",
    "hydra.launcher.workers=0": "hydra.launcher.workers=0: must be a whole number, at least 1",
    "hydra.launcher.workers=2.5": "hydra.launcher.workers=2.5: must be a whole number, at least 1",
    "hydra.launcher.memory_gib=-1": "hydra.launcher.memory_gib=-1: must be a finite number above 0",
    "hydra.launcher.memory_gib=big": "hydra.launcher.memory_gib=big: must be a finite number above 0",
    "+hydra.launcher.worker=2": "hydra.launcher.worker: no such setting; did you mean hydra.launcher.workers?",
}


@pytest.mark.parametrize("arguments", BAD_SWEEPS)
def test_what_composition_refuses_is_one_line_and_nothing_is_written(composed, arguments):
    code, error = composed(*arguments.split())
    assert code == 2
    assert error.startswith("lipexp: ")
    assert len(error.splitlines()) == 1
    assert BAD_SWEEPS[arguments] in error
    assert not list(Path().iterdir())


def test_a_job_sees_its_settings_resolved_as_under_hydra(composed, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "execute", lambda stacks, *others: seen.extend(j for s in stacks for j in s))
    assert composed("seed=${hydra:job.num}", "loss.margin=${lipschitz}", "lipschitz=3,4")[0] == 0
    configs = [job.composed() for job in seen]
    assert [(config.seed, config.loss.margin) for config in configs] == [(0, 3.0), (1, 4.0)]
    assert [job.config["seed"] for job in seen] == ["${hydra:job.num}"] * 2
