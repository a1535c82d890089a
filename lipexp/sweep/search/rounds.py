"""The rounds of a search: ask for trials, train them as one sweep, tell their values."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from lipexp.config import ConfigError

try:
    import optuna
    import sqlalchemy
    from optuna.trial import FrozenTrial
except ImportError:
    raise ConfigError("hydra/sweeper", "search", "needs optuna: pip install 'lipexp[search]'") from None

from lipexp.gate import LOCK, exclusive
from lipexp.process import begin_work, holding_interrupts
from lipexp.reading import LARGE_BYTES, Missing, Unreadable, plain_file, refuse_links_out
from lipexp.record import Outcome
from lipexp.runs import RunFolder, SweepFailed, write_csv
from lipexp.screen import Screen
from lipexp.sweep import executors
from lipexp.sweep.compose import Composer, in_folder
from lipexp.sweep.launch import MANY, Sweep, refuse_callbacks, row
from lipexp.sweep.options import LauncherOptions
from lipexp.sweep.search.options import WARNING, SearchOptions, is_of_test
from lipexp.sweep.search.outcome import ranked, show, write_best, write_picture
from lipexp.sweep.search.space import Space
from lipexp.wording import count


def search(context: HydraContext, master: DictConfig, arguments: Sequence[str]) -> None:
    """Carry out a search for Hydra's sweeper; `master` is the configuration of the search itself.

    Raises HydraException or ConfigError for bad input, and SweepFailed if no trial has a value or a worker died.
    """
    options, launcher = SearchOptions.of(master.hydra.sweeper), _launcher(master)
    refuse_callbacks(context)
    loader: Any = context.config_loader
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    space = Space.of([override for override in overrides if override.key_or_group != "resume"])
    several = launcher.executor == "auto" and launcher.processes > 1
    if launcher.executor == "process" or (several and options.round * max(1, len(space.seeds)) > MANY):
        executors.start_server()
    composer = Composer(loader, master)
    first, *_ = [composer.job(0, space.jobs(values)[0]) for values in space.examples()]
    from lipexp.members import build  # imports torch, as the server does meanwhile

    member = build(first.resolved, first.choices, here=launcher.executor != "slurm")
    metric, direction = options.goal(member.parts["dataset"].task, member.config.radii)
    if is_of_test(metric):
        Screen(stderr=True).show(f"lipexp: hydra.sweeper.metric={metric}: {WARNING}; default: validation")
    definition = vars(space) | vars(options) | {"metric": metric, "direction": direction}
    folder = Path(master.hydra.sweep.dir)
    begin_work()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = {entry.name for entry in folder.iterdir()} - {LOCK}
        if used and not (OmegaConf.select(master, "resume") and "study.db" in used):
            allowed = "is not empty; results are never overwritten (resume=true continues a search from study.db)"
            raise ConfigError("hydra.sweep.dir", folder, allowed)
        with exclusive(folder):
            study = _study(folder, definition, space)
            Search(space, options, launcher, composer, metric, folder, study).run()
    except OSError as error:
        raise ConfigError("hydra.sweep.dir", folder, f"cannot be written: {error.strerror}") from None


def _launcher(master: DictConfig) -> LauncherOptions:
    """The settings of lipexp's launcher; raises ConfigError for another one, or one that does not wait."""
    if not master.hydra.launcher._target_.startswith("hydra_plugins.lipexp_stack"):
        option = master.hydra.runtime.choices["hydra/launcher"]
        raise ConfigError("hydra/launcher", option, "cannot train a search; hydra/launcher=stack does")
    options = LauncherOptions.of(master.hydra.launcher)
    if options.executor == "slurm":
        from lipexp.sweep.slurm import check_machine

        if not options.slurm.wait:
            allowed = "does not suit a search: each round is asked for with the results of those before"
            raise ConfigError("hydra.launcher.slurm.wait", "false", allowed)
        check_machine()
    return replace(options, table=False)


@holding_interrupts()  # a library would turn a KeyboardInterrupt into an error of its own
def _study(folder: Path, definition: Mapping[str, Any], space: Space) -> optuna.Study:
    """The study in the folder's database, made or found there; raises ConfigError for another one, or for none.

    What its trials say goes into command lines, so they must be of this space.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file, direction = folder / "study.db", definition["direction"]
    # Not by a URL, in which some characters of a path have a meaning of their own.
    engine = {"creator": lambda: sqlite3.connect(file.absolute()), "poolclass": sqlalchemy.NullPool}
    own = {key: repr(value) for key, value in definition.items() if key not in ("trials", "round")}
    try:
        refuse_links_out(folder)
        with suppress(Missing):
            plain_file(folder, file.name, LARGE_BYTES)
        storage = optuna.storages.RDBStorage("sqlite://", engine)
        study = optuna.create_study(storage=storage, study_name="lipexp", direction=direction, load_if_exists=True)
        known, ends = study.user_attrs.get("definition", own), study.user_attrs.get("ends", [0])
        trials = study.trials
        if not (isinstance(known, dict) and ends[0] == 0 and all(a < b for a, b in pairwise(ends))):
            raise ValueError("it holds no search")
    except Unreadable as error:
        raise ConfigError("resume", "true", f"{folder}: {error}") from None
    except Exception:  # optuna and the database raise anything
        raise ConfigError("resume", "true", f"{file} cannot be read") from None
    if known != own or any(trial.distributions != space.axes for trial in trials):
        differing = ", ".join(key for key in own if known.get(key) != own[key]) or "trials"
        raise ConfigError("resume", "true", f"{folder} holds another search, which differs in: {differing}")
    study.set_user_attr("definition", own)
    return study


@dataclass
class Search:
    """One search and the folder that it fills."""

    space: Space
    options: SearchOptions
    launcher: LauncherOptions
    composer: Composer
    metric: str
    folder: Path
    study: optuna.Study
    rows: list[Mapping[str, Any]] = field(default_factory=list)  # of sweep.csv

    def run(self) -> None:
        """Train what is missing; writes sweep.csv after each round, and the outcome at the end."""
        ends = self._rounds()
        for number, (first, end) in enumerate(pairwise(ends)):
            trials = self._ask(first, end)
            self._tell(trials, self._train(number, trials))
            Screen().tell(f"round {number + 1} of {len(ends) - 1}: {count(end, 'trial')}, {self._best()}")
        self._finish()

    @holding_interrupts()
    def _rounds(self) -> list[int]:
        """The number of trials after each round, from 0 on; the rounds of an earlier call stay."""
        ends = [*self.study.user_attrs.get("ends", [0])]
        starts = range(ends[-1], self.options.trials, self.options.round)
        ends += [min(start + self.options.round, self.options.trials) for start in starts]
        self.study.set_user_attr("ends", ends)
        return ends

    @holding_interrupts()
    def _best(self) -> str:
        best = ranked(self.study)[:1]
        return "".join(f"best {self.metric} {t.value:.6g} (trial {t.number})" for t in best) or "none has a value"

    @holding_interrupts()
    def _finish(self) -> None:
        """Write and show the outcome; raises SweepFailed if no trial has a value."""
        if not ranked(self.study):
            reasons = sorted({run["reason"] for run in self.rows} - {""})
            raise SweepFailed([f"no trial has a value: {'; '.join(reasons[:3])}"])
        result = (self.folder, self.study, self.space, self.metric)
        write_best(*result, self.composer)
        write_picture(*result)
        show(*result)

    @holding_interrupts()
    def _ask(self, first: int, end: int) -> list[FrozenTrial]:
        """The trials of a round; those that an earlier call has not asked for are asked for now.

        Each has a random stream of its own, so that a search that is resumed asks for the same trials. After the
        first round, which knows nothing yet, `stack` trials at a time differ in real numbers alone.
        """
        # Asked in memory and then stored whole, so that a kill leaves no trial that lacks some of its values.
        study = optuna.create_study(direction=self.study.direction)
        study.add_trials(self.study.trials)
        real = [k for k, a in self.space.axes.items() if isinstance(a, optuna.distributions.FloatDistribution)]
        for number in range(len(study.trials), end):
            place = (number - first) % self.options.stack
            if first and place and real:
                values = study.trials[number - place].params
                study.enqueue_trial({key: value for key, value in values.items() if key not in real})
            seed = int(np.random.SeedSequence([self.options.seed, number]).generate_state(1)[0])
            # Trials of the same round have no value yet and count as bad ones, so that a round spreads out.
            tpe = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            study.sampler = tpe if self.options.sampler == "tpe" else optuna.samplers.RandomSampler(seed=seed)
            study.ask(self.space.axes)
            self.study.add_trial(study.trials[number])
        return self.study.trials[first:end]

    def _train(self, number: int, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
        """The rows of a round's runs in sweep.csv, with the number of their trial; what is missing is trained."""
        folder = self.folder / f"round-{number}"
        runs = [(trial.number, lines) for trial in trials for lines in self.space.jobs(trial.params)]
        jobs = [self.composer.job(index, [*lines, in_folder(folder)]) for index, (_, lines) in enumerate(runs)]
        try:
            outcomes = Sweep(jobs, folder, self.launcher, resume=True, resumed_in=self.folder).run()
        except SweepFailed:  # trials that fail are ordinary, runs that are missing are not
            outcomes = [Outcome.of(RunFolder(job.folder)) for job in jobs]
            if any(outcome.status == "missing" for outcome in outcomes):
                raise
        rows = []
        for (trial, _), job, outcome in zip(runs, jobs, outcomes, strict=True):
            run = {"trial": trial, "round": number, **row(job, outcome)}
            if run.get(self.metric) is None:
                run["reason"] = run["reason"] or f"{self.metric} is null"
            rows.append(run)
        return rows

    @holding_interrupts()
    def _tell(self, trials: Sequence[FrozenTrial], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write down the runs of a round, and tell the study the mean over each trial's seeds."""
        self.rows += rows
        write_csv(self.folder / "sweep.csv", self.rows)
        for told in trials:
            own = [run for run in rows if run["trial"] == told.number]
            value = None if any(run["reason"] for run in own) else fmean(run[self.metric] for run in own)
            # The sampler ranks "pruned" trials below all others; "failed" ones it would ignore, and repeat.
            state = optuna.trial.TrialState.PRUNED if value is None else None
            self.study.tell(told.number, value, state, skip_if_finished=True)
