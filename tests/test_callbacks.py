"""What Hydra does around each job of a sweep, which stacks do as well: callbacks, environment, multirun.yaml."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

TINY = ("experiment=debug", "device=cpu", "dataset.n_train=64", "dataset.n_test=32", "batch_size=32", "steps=5")
BASIC = ("hydra/launcher=basic", "hydra/sweeper=basic")
ALL_WAYS = [BASIC, ("hydra.launcher.executor=inline",), ("hydra.launcher.executor=process",)]

WITNESS = """
import json
import os
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

class Witness(Callback):
    def __init__(self, file):
        self.file, self.seen = Path(file), []
    def on_multirun_start(self, config, **kwargs):
        self.seen.append(["sweep"])
    def on_job_start(self, config, *, task_function, **kwargs):
        running = HydraConfig.get()
        assert callable(task_function)
        self.environment = os.environ.get("LIPEXP_TEST")
        self.seen.append(["start", config.seed, config.hydra.job.num, running.job.num, running.runtime.output_dir])
    def on_job_end(self, config, job_return, **kwargs):
        have = (Path(config.hydra.runtime.output_dir) / "metrics.json").is_file()
        self.seen.append(["end", config.seed, job_return.cfg.seed, job_return.hydra_cfg.hydra.job.num, have,
                          list(job_return.overrides), job_return.task_name, config.loss.margin,
                          self.environment, os.environ.get("LIPEXP_TEST"), job_return.working_dir == os.getcwd()])
        self.status = job_return.status.name
        try:
            job_return.return_value
        except Exception as error:
            self.seen[-1].append(str(error))
    def on_multirun_end(self, config, **kwargs):
        self.file.write_text(json.dumps(self.seen))
"""


@pytest.fixture
def sweep(lipexp):
    return lambda *arguments: lipexp("train", "-m", *arguments, *TINY)


def witnessed(sweep, name: str, *arguments: str) -> list[list[object]]:
    """What a callback of the user's has seen of a sweep, in the order of the jobs."""
    Path("witness.py").write_text(WITNESS)
    own = ("+hydra.callbacks.w._target_=witness.Witness", f"+hydra.callbacks.w.file={name}.json")
    sweep("hydra.sweep.dir=s", *own, *arguments)
    first, *seen = json.loads(Path(f"{name}.json").read_text())
    assert first == ["sweep"]  # the same instance lives through all of it

    def job(event: list[object]) -> object:
        return event[2] if event[0] == "start" else event[3]

    for number in range(len(seen) // 2):
        assert [event[0] for event in seen if job(event) == number] == ["start", "end"]
    return sorted(seen, key=job)


def test_callbacks_see_the_same_of_every_launcher(sweep, tmp_path, monkeypatch):
    seen = []
    for number, way in enumerate(ALL_WAYS):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        arguments = ("act=relu,abs", "seed=3,4", "loss.margin=0.25", "+hydra.job.env_set.LIPEXP_TEST='7'")
        events = witnessed(sweep, "all", *arguments, *way)
        seen.append([[part for part in event if not str(part).startswith(str(tmp_path))] for event in events])
        assert len(events) == 8
        for event in events:
            if event[0] == "start":
                assert event[4] == str(Path("s").resolve() / str(event[2]))
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_a_callback_is_told_of_a_failure(sweep):
    events = witnessed(sweep, "failed", "seed=0,1", "optim.lr=1e30", "lipschitz=1e30", "constraint=none")
    ends = [event for event in events if event[0] == "end"]
    assert [event[4] for event in ends] == [False, False]
    assert all("no longer finite" in str(event[-1]) for event in ends)


def test_a_callback_sees_a_job_that_its_constructors_refuse(sweep):
    events = witnessed(sweep, "refused", "act=relu,maxmin", "model.width=5")  # MaxMin wants pairs
    ends = [event for event in events if event[0] == "end"]
    assert [event[4] for event in ends] == [True, False]
    assert "model.width=5" in str(ends[1][-1])


def test_jobs_train_in_the_environment_that_they_ask_for(sweep):
    """Jobs of another environment are another stack, and nothing of it stays."""
    asked = (
        "seed=1,2",
        "+hydra.job.env_set.LIPEXP_TEST='0.${hydra:job.num}5'",
        "loss.margin='${oc.decode:${oc.env:LIPEXP_TEST}}'",
    )
    margins = []
    for number, way in enumerate(ALL_WAYS):
        assert sweep(*asked, *way, f"hydra.sweep.dir={number}").code == 0
        metrics = [json.loads(Path(f"{number}/{job}/metrics.json").read_text()) for job in (0, 1)]
        margins.append([one["train"]["loss"] for one in metrics])
        assert "LIPEXP_TEST" not in os.environ
    assert margins[1] == pytest.approx(margins[0], rel=1e-4)
    assert margins[2] == pytest.approx(margins[0], rel=1e-4)
    assert margins[0][0] != margins[0][1]
    assert len(json.loads(Path("1/sweep.json").read_text())["stacks"]) == 2


@pytest.fixture
def moved():
    """A loss of the user's, in the folder, that reads the environment when it is called."""
    Path("moved.py").write_text(
        "import os\n"
        "from lipexp.losses import Hinge\n"
        "class Moved(Hinge):\n"
        "    def forward(self, f, y):\n"
        "        return super().forward(f, y) + float(os.environ['LIPEXP_TEST'])\n"
    )
    return "loss._target_=moved.Moved"


def test_a_users_class_reads_the_environment_while_it_trains(sweep, moved):
    own = (moved, "+hydra.job.env_set.LIPEXP_TEST='${hydra:job.num}7'")
    assert sweep("seed=0,7", "hydra.sweep.dir=s", *own).code == 0
    losses = [json.loads(Path(f"s/{job}/metrics.json").read_text())["train"]["loss"] for job in (0, 1)]
    assert 7 <= losses[0] < 9 < 17 <= losses[1]


def test_a_sweep_is_not_continued_in_another_environment(sweep, moved):
    common = ("seed=0,7", "hydra.sweep.dir=s", moved)
    assert sweep(*common, "+hydra.job.env_set.LIPEXP_TEST='1'").code == 0
    shutil.rmtree("s/1")
    refused = sweep(*common, "+hydra.job.env_set.LIPEXP_TEST='2'", "resume=true")
    assert refused.code == 2
    assert not Path("s/1").exists()
    assert sweep(*common, "+hydra.job.env_set.LIPEXP_TEST='1'", "resume=true").code == 0


def test_a_search_trains_in_the_environment_that_it_asks_for(sweep, moved):
    own = (moved, "+hydra.job.env_set.LIPEXP_TEST='7'", "hydra/sweeper=search", "hydra.sweeper.trials=2")
    assert sweep("optim.lr=interval(0.01,0.02)", "hydra.sweep.dir=s", *own).code == 0
    losses = [json.loads(path.read_text())["train"]["loss"] for path in Path("s").rglob("metrics.json")]
    assert len(losses) == 2
    assert min(losses) >= 7


def test_multirun_yaml_is_that_of_hydras_sweeper(sweep):
    assert sweep("seed=0,1", "hydra.sweep.dir=b", *BASIC).code == 0
    assert sweep("seed=0,1", "hydra.sweep.dir=s").code == 0
    hydras, own = (yaml.safe_load(Path(f"{name}/multirun.yaml").read_text()) for name in "bs")
    for record in (hydras, own):
        for key in ("launcher", "sweeper", "sweep", "overrides"):
            del record["hydra"][key]
        for group in ("hydra/launcher", "hydra/sweeper"):
            del record["hydra"]["runtime"]["choices"][group]
    assert own == hydras
    before = Path("s/multirun.yaml").read_bytes()
    assert sweep("seed=0,1", "hydra.sweep.dir=s", "resume=true").code == 0
    assert Path("s/multirun.yaml").read_bytes() == before


@pytest.mark.parametrize("sweeper", ["stack", "search"])
def test_a_folder_for_each_job_to_work_in_is_refused(sweep, sweeper):
    refused = sweep("optim.lr=0.01,0.02", "hydra.job.chdir=true", "hydra.sweep.dir=s", f"hydra/sweeper={sweeper}")
    assert refused.code == 2
    assert "hydra.job.chdir=true" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not Path("s").exists()


def test_an_experiment_that_wants_such_folders_is_refused(lipexp):
    Path("own/experiment").mkdir(parents=True)
    Path("own/experiment/moves.yaml").write_text("# @package _global_\nhydra:\n  job:\n    chdir: true\n")
    refused = lipexp("train", "-m", "-cd", "own", "experiment=debug,moves", "hydra.sweep.dir=s")
    assert refused.code == 2
    assert "hydra.job.chdir=true" in refused.err
    assert not Path("s").exists()
