"""Sweeps through SLURM on a machine that has none: settings and refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lipexp.config import ConfigError
from lipexp.members import build
from lipexp.sweep.compose import Job
from lipexp.sweep.options import LauncherOptions, SlurmOptions
from lipexp.sweep.slurm.cluster import Cluster
from lipexp.sweep.slurm.submitted import read, write

EXECUTOR = "hydra.launcher.executor=slurm"


@pytest.fixture
def refused(lipexp):
    """refused("hydra.launcher.slurm.mem_gb=0") -> the one line that says why; nothing is left behind."""

    def refused(*arguments: str) -> str:
        result = lipexp("train", "-m", "seed=0,1", EXECUTOR, *arguments)
        assert (result.code, result.out) == (2, "")
        assert len(result.err.splitlines()) == 1
        assert not list(Path().iterdir())
        return result.err

    return refused


@pytest.mark.parametrize(
    ("setting", "allowed"),
    {
        "timeout_min=1": "must be a whole number, at least 2",
        "mem_gb=-1.0": "must be a finite number above 0",
        "cpus_per_task=0": "must be a whole number, at least 1",
        "gpus_per_node=0": "must be a whole number, at least 1",
        "resubmissions=-1": "must be a whole number, at least 0",
        "additional_parameters=3": "must be options of sbatch",
    }.items(),
)
def test_settings_that_are_not_allowed(refused, setting, allowed):
    setting = f"hydra.launcher.slurm.{setting}"
    assert refused(setting).startswith(f"lipexp: {setting}: {allowed}")


def test_a_machine_without_slurm(refused, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert refused() == f"lipexp: {EXECUTOR}: there is no sbatch on this machine (inline, process)\n"


def test_an_installation_without_submitit(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    reason = "needs submitit, which is not installed: pip install 'lipexp[slurm]'"
    assert refused() == f"lipexp: {EXECUTOR}: {reason}\n"


def test_a_stack_may_take_half_of_the_memory_of_its_slurm_job():
    assert LauncherOptions(executor="slurm", slurm=SlurmOptions(mem_gb=3)).memory(free=1) == 1.5 * 2**30
    assert LauncherOptions(executor="slurm", workers=4, memory_gib=0.25).memory(free=1) == 2**28


def test_what_was_submitted_is_believed_only_with_classes_of_lipexp(compose, tmp_path):
    """The submitted configuration replaces today's where conf/ has changed; it may come from elsewhere."""

    def submitted(target: str) -> dict[int, Job]:
        content = OmegaConf.to_container(compose(f"act._target_={target}"), resolve=True)
        write(tmp_path / "slurm" / "submitted.json", {"7_0": [Job(0, ("seed=0",), content, "", {}, Path("s/0"))]})
        return Cluster(tmp_path, tmp_path, SlurmOptions()).submitted_jobs()

    (tmp_path / "slurm").mkdir()
    assert submitted("lipexp.activations.GroupSort")[0].folder == Path("s/0")
    with pytest.raises(ConfigError, match=r"the submitted one has a class of its own, os\.system"):
        submitted("os.system")


@pytest.mark.parametrize(
    "text",
    ["[]", '{"../7": []}', '{"7_0": []}', '{"7_0": [{"index": "0"}]}', '{"7": 3}', "{", '{"7_0": [[]]}'],
)
def test_what_says_nothing_about_submitted_stacks_is_refused(tmp_path, text):
    (tmp_path / "submitted.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^resume=true: "):
        read(tmp_path / "submitted.json")


def test_the_device_of_another_machine_is_not_looked_for_here(compose, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build(compose("device=cuda"), here=False)
    with pytest.raises(ConfigError, match="device=cuda: no CUDA device is available here"):
        build(compose("device=cuda"))
