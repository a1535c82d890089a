"""Bad input is one clear line on stderr and exit status 2, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import INLINE, TINY, content

BAD_INPUT = {
    "loss=hing": "loss=hing: no such option; did you mean loss=hinge? (bce, ",
    "los=hinge": "los: no such setting; did you mean loss?",
    "lr=0.1": "lr: no such setting; did you mean optim.lr?",
    "loss.margn=1": "loss.margn: no such setting; did you mean loss.margin?",
    "loss=null": "loss=null: needs one option",
    "loss=bce,hinge": "loss=bce,hinge: several values are a sweep, which needs -m",
    "steps=foo": "steps=foo: must be a whole number",
    "steps=-1": "steps=-1: must be a whole number, at least 0",
    "threads=0": "threads=0: must be a whole number, at least 1",
    "threads=100000": "threads=100000: must be a whole number, at least 1, at most 1024",
    "batch_size=null": "batch_size=null: must be set",
    "batch_size=0": "batch_size=0: must be a whole number, at least 1",
    "seed=-1": "seed=-1: must be a whole number, at least 0",
    "eval_every=-1": "eval_every=-1: must be a whole number, at least 0",
    "max_regions=-1": "max_regions=-1: must be a whole number, at least 0",
    "radii=[0.1,-1]": "radii=-1.0: must be a finite number above 0",
    "lipschitz=nan": "lipschitz=nan: must be a finite number above 0",
    "lipschitz=1e100": "lipschitz=1e+100: must be between 1e-30 and 1e+30",
    "act.n_groups=5": "model.width=64: must be a multiple of act.n_groups=5",
    "dataset=absolute_value loss=bce": "has numbers to fit: take loss=huber or loss=mae or loss=mse",
    "dataset=spirals loss=hinge": "has several classes: take loss=certified_radius or loss=cosine or loss=cross",
    "dataset=cones loss=certified_radius": "is for two classes or several classes, but dataset=cones has",
    "loss.margin=wide": "loss.margin=wide: must be a finite number, at least 0",
    "optim.schedule=cosin": "optim.schedule=cosin: no such option; did you mean cosine?",
    "optim.milestones=0.5": "optim.milestones=0.5: must be numbers in [0, 1)",
    "optim=sgd optim.momentum=2": "optim.momentum=2: must be a finite number, at least 0, at most 1",
    "radii=0.1": "radii: must be a list in [brackets]",
    "radii=[wide]": "radii[0]=wide: must be a number",
    "device=tpu": "device=tpu: no such option; did you mean cpu?",
    "act._target_=nowhere.Act": "act._target_=nowhere.Act: cannot be used: No module named 'nowhere'",
    "act._target_=lipexp.activations.Nope": "cannot be used: lipexp.activations has no Nope",
    "+loss.extra=1": "does not take these arguments",
    "experiment=none_such": "experiment=none_such: no such option",
    "resume=true": "resume=true: continues a sweep, which needs -m",
    "-m resume=true hydra/launcher=basic": "resume=true: is for hydra/launcher=stack",
    "a=b=c": "a=b=c: cannot be read as option=value",
    "--multirum": "--multirum: no such flag; did you mean --multirun?",
    "-m --cfg job": "--multirun: cannot be used together with --cfg",
    "--cfg nope": "--cfg=nope: no such option (job, hydra, all)",
    "--cfg": "--cfg: needs a value: job, hydra, all",
    "-cd": "-cd: needs a value",
    "steps=2 -p model": "--package: is for --cfg",
    "--resolve": "--resolve: is for --cfg",
    "-m=3": "-m=3: takes no value",
    "--experimental-rerun x": "--experimental-rerun: no such flag",
    "-m seed=0,1 seed=2": "seed=2: seed is swept, and given twice",
    "-m seed=2 seed=0,1": "seed=0,1: seed is swept, and given twice",
    "-m optim={lr:0.1},{lr:0.01} optim={lr:0.2}": "optim={lr:0.2}: optim is swept, and given twice",
    "act=[relu,groupsort]": "act=[relu,groupsort]: takes one option; a sweep over several is act=a,b with -m",
    "loss=3": "loss=3: must be the name of an option",
    "act=true": "act=true: must be the name of an option",
    "~loss": "~loss: needs one option",
    "-m act=relu,null": "act=relu,null: needs one option",
    "-m act=range(3)": "act=range(3): must be the name of an option",
    "hydra/launcher=null": "hydra/launcher=null: needs one option",
    "-m seed=range(1,2,0)": "seed=range(1,2,0): its step must not be 0",
    "-m seed=range(0,inf)": "seed=range(0,inf): its ends must be finite numbers",
    "-m seed=sort(range(4,-1,-2))": "seed=sort(range(4,-1,-2)): Hydra sorts a range(…) wrongly",
    "-m seed=range(1000) lipschitz=range(1,1001)": "there are 1,000,000 jobs in this sweep; at most 100,000",
    "-m hydra/sweeper=search optim.lr=interval(1,inf)": "its ends must be finite numbers",
    "hydra.verbose=null": "hydra.verbose=null: must be",
    "hydra.mode=MULTIRUN": "hydra.mode=MULTIRUN: is what -m chooses",
    "hydra.output_subdir=record": "hydra.output_subdir=record: must stay .hydra",
    "+foo=1": "foo: no such setting",
    "+hydra.launcher.foo=1 -m": "hydra.launcher.foo: no such setting",
    "+hydra.sweeper.foo=1 -m hydra/sweeper=search seed=1,2": "hydra.sweeper.foo: no such setting",
    "-m hydra.sweeper.max_batch_size=2": "hydra.sweeper.max_batch_size=2: is for hydra/launcher=basic",
    "-m hydra.launcher.memory_gib=1e300": "hydra.launcher.memory_gib=1e+300: must be a finite number above 0",
    "experiment=margins": "experiment=margins: is a sweep, which needs -m",
    "-m experiment=margins,temperature": "experiment=margins: is a sweep of its own; name it alone, with -m",
    "loss.margin=${nope}": "Interpolation key 'nope' not found",
    "-m act=relu,leaky_relu steps=-1": "steps=-1: must be a whole number, at least 0",
    "-m loss=bce,mse loss.temperature=2": "loss.temperature: no such setting",
    "-cd nowhere": "nowhere' not found",
    "-cn nowhere": "nowhere",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(lipexp, command):
    done = lipexp("train", *command.split())
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.err.startswith("lipexp: ")
    assert BAD_INPUT[command] in done.err
    assert not list(Path("outputs").rglob("*"))


def test_cuda_without_a_device_is_refused(lipexp, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = "lipexp: device=cuda: no CUDA device is available here (auto, cpu)\n"
    assert lipexp("train", "device=cuda") == (2, "", refused)


@pytest.mark.parametrize("mode", [(), ("-m", INLINE)])
def test_outputs_that_cannot_be_written_are_refused(lipexp, mode):
    Path("outputs").write_text("a file")
    done = lipexp("train", *mode, *TINY)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "cannot be written: Not a directory" in done.err


def test_a_finished_result_is_never_overwritten(lipexp):
    for command in (("hydra.run.dir=kept/run",), ("-m", INLINE, "hydra.sweep.dir=kept/sweep")):
        assert lipexp("train", *command, *TINY).code == 0
        before = content(Path("kept"))
        again = lipexp("train", *command, *TINY, "seed=1")
        assert again.code == 2
        assert "is not empty; results are never overwritten" in again.err
        assert content(Path("kept")) == before
