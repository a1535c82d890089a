"""The rounds of a search: ask for trials, train them as one sweep, tell what came out."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import env_override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, flag_override

from lipexp.callbacks import JobCallbacks
from lipexp.sweep.compose import Composer, Job
from lipexp.config import ConfigError, no_such, plain
from lipexp.display import Screen
from lipexp.imports import quick_imports
from lipexp.interrupts import admit_interrupts, find_lost_interrupts, hold_interrupts
from lipexp.sweep.options import Options as LauncherOptions
from lipexp.runs import RunFolder, SweepFailed, flat, write_csv
from lipexp.sweep.slurm import check_machine
from lipexp.sweep.search.options import Options
from lipexp.sweep.search.outcome import best_line, show, write_best, write_picture
from lipexp.sweep.search.space import Space
from lipexp.sweep.launch import LOCK, MULTIRUN, End, Sweep, exclusive, write_record
from lipexp.workers import prepare_workers

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

DATABASE = "study.db"
NAME = "lipexp"  # of the study in the database
ROUNDS, DEFINITION, REASONS = "rounds", "definition", "reasons"  # what the database is told besides


@admit_interrupts()
@find_lost_interrupts()
def search(
    context: HydraContext,
    task: TaskFunction,
    master: DictConfig,
    arguments: Sequence[str],
    options: Mapping[str, Any],
) -> list[End]:
    """Carry out a search for Hydra's sweeper.

    Args:
        context: Hydra's configuration loader and callbacks.
        task: what Hydra runs as a job, for its callbacks.
        master: the configuration of the search itself; its flat key `resume` continues an interrupted one.
        arguments: the overrides of the command line.
        options: the settings of the sweeper.

    Returns:
        How each run ended, in the order of the trials.

    Raises:
        HydraException: a configuration that composition refuses; nothing is written then.
        ConfigError: options, a space or a folder that cannot be used.
        SweepFailed: no trial has a value.
    """
    chosen = Options.of(options)
    _check_optuna()
    launcher = _launcher(master)
    loader = cast(ConfigLoaderImpl, context.config_loader)
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    space = Space.of([line for line in overrides if line.key_or_group != "resume"])
    composer = Composer(loader, master)
    probes = [composer.job(number, lines) for number, lines in enumerate(space.probes())]
    metric, direction = _goal(chosen, composer, space, probes[0])
    folder = Path(master.hydra.sweep.dir)
    definition = {
        "axes": [repr(axis) for axis in space.axes],
        "settings": list(space.settings),
        "seeds": list(space.seeds),
        "goal": [metric, direction],
        "sampler": [chosen.sampler, chosen.seed, chosen.stack],
    }
    resume = bool(OmegaConf.select(master, "resume"))
    shared = shared_axes(composer, space)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_use(folder, resume)
        if launcher.executor == "process":
            prepare_workers()
        with exclusive(folder):
            study = _study(folder, direction, definition)
            write_record(folder, master)
            callbacks = JobCallbacks(context.callbacks, task, master)
            rounds = Search(loader, master, space, chosen, metric, shared, launcher, folder, study, callbacks)
            with callbacks.whole_sweep():
                return rounds.run()
    except OSError as error:
        raise ConfigError("hydra.sweep.dir", folder, f"cannot be written: {error.strerror}") from None


class Search:
    """One search and the folder that it fills."""

    def __init__(
        self,
        loader: Any,
        master: DictConfig,
        space: Space,
        options: Options,
        metric: str,
        shared: Sequence[str],
        launcher: LauncherOptions,
        folder: Path,
        study: Study,
        callbacks: JobCallbacks,
    ) -> None:
        self.callbacks = callbacks
        self.loader, self.master, self.space, self.options = loader, master, space, options
        self.metric, self.shared, self.launcher, self.folder, self.study = metric, shared, launcher, folder, study
        self.console = Screen(highlight=False)
        self.rows: list[dict[str, Any]] = []
        self.ends: list[End] = []

    def run(self) -> list[End]:
        """Train what is missing; writes sweep.csv after each round, and the outcome at the end."""
        rounds = self._rounds()
        for number, (first, end) in enumerate(rounds):
            self._ask(first, end)
            trials = self.study.trials[first:end]
            self._tell(trials, self._train(number, trials))
            write_csv(self.folder / "sweep.csv", self.rows)
            line = f"round {number + 1} of {len(rounds)}: {end} trials, {best_line(self.study, self.metric)}"
            self.console.print(line, soft_wrap=True)
        if not _completed(self.study):
            reasons = sorted(set(self.study.user_attrs[REASONS].values()))
            raise SweepFailed([f"no trial has a value: {'; '.join(reasons[:3])}"])
        group_exists = Composer(self.loader, self.master).is_group
        best = write_best(self.folder, self.study, self.space, self.metric, group_exists)
        picture = write_picture(self.folder, self.study, self.space, self.metric)
        show(self.console, self.study, self.space, self.metric, [best, picture, self.folder / "sweep.csv"])
        return self.ends

    def _rounds(self) -> list[tuple[int, int]]:
        """(first, end) of the trials of each round. Those that were begun stay as they are."""
        known = [(int(first), int(end)) for first, end in self.study.user_attrs.get(ROUNDS, [])]
        done = known[-1][1] if known else 0
        starts = range(done, self.options.trials, self.options.round)
        rounds = known + [(start, min(start + self.options.round, self.options.trials)) for start in starts]
        self.study.set_user_attr(ROUNDS, rounds)
        return rounds

    def _ask(self, first: int, end: int) -> None:
        """Ask for the trials of a round. Each has a random stream of its own, so resuming asks for the same.

        A few at a time follow the first of them in what cannot differ within a stack; in the first round, which
        knows nothing yet, all are free.
        """
        for number in range(max(first, len(self.study.trials)), end):
            leader = number - (number - first) % self.options.stack if first else number
            leading = self.study.trials[leader].params if leader < number else None
            fixed = {} if leading is None else {key: leading[key] for key in self.shared}
            self.study.sampler = _sampler(self.options, number, fixed)
            self.study.ask(self.space.distributions())

    def _train(self, number: int, trials: Sequence[FrozenTrial]) -> list[list[End]]:
        """Train the runs of a round as one sweep; how they ended, trial by trial."""
        folder = self.folder / f"round-{number}"
        composer = Composer(self.loader, _in_folder(self.master, folder))
        lines = [job for trial in trials for job in self.space.jobs(trial.params)]
        jobs = [composer.job(index, overrides) for index, overrides in enumerate(lines)]
        launcher = replace(self.launcher, table=False)
        sweep = Sweep(jobs, folder, launcher, resume=True, callbacks=self.callbacks, resumed_in=self.folder)
        try:
            ends = sweep.run()
        except SweepFailed:  # such trials are ordinary; what is missing is not
            ends = [End.of(RunFolder(job.folder)) for job in jobs]
            if any(end.status == "missing" for end in ends):
                raise
        per_trial = len(lines) // len(trials)
        for index, (job, end) in enumerate(zip(jobs, ends, strict=True)):
            row = {"trial": trials[index // per_trial].number, "round": number, **Sweep.row(job, end)}
            self.rows.append(row)
        self.ends += ends
        return [list(ends[i : i + per_trial]) for i in range(0, len(ends), per_trial)]

    def _tell(self, trials: Sequence[FrozenTrial], ends: Sequence[Sequence[End]]) -> None:
        """Tell the study the mean over the seeds of each trial, or that it has none.

        Such a trial is "pruned" to optuna, for which the estimator takes it as worse than all that have a value; a
        "failed" one it would ignore, and ask for the likes of it again.
        """
        from optuna.trial import TrialState

        for trial, own in zip(trials, ends, strict=True):
            if trial.state.is_finished():  # in an earlier call
                continue
            values = [value_of(end, self.metric) for end in own]
            reasons = [value for value in values if isinstance(value, str)]
            if reasons:
                known = self.study.user_attrs.get(REASONS, {})
                self.study.set_user_attr(REASONS, {**known, str(trial.number): reasons[0]})
                self.study.tell(trial.number, state=TrialState.PRUNED)
            else:
                self.study.tell(trial.number, math.fsum(map(float, values)) / len(values))


def value_of(end: End, metric: str) -> float | str:
    """The metric of a run, or why it has none."""
    if end.status != "ok":
        return end.reason or end.status
    value = flat(end.metrics).get(metric)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return f"{metric} is {value}"
    return float(value)


def _completed(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.trials if trial.value is not None]


def _check_optuna() -> None:
    try:
        with quick_imports():
            import optuna
    except ImportError:
        allowed = "needs optuna: pip install 'lipexp[search]'"
        raise ConfigError("hydra/sweeper", "search", allowed) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _launcher(master: DictConfig) -> LauncherOptions:
    """The settings of lipexp's launcher.

    Raises:
        ConfigError: it is another one, or would not wait for its results.
    """
    settings = plain(master.hydra.launcher)
    if not str(settings.pop("_target_")).startswith("hydra_plugins.lipexp_stack"):
        option = master.hydra.runtime.choices["hydra/launcher"]
        raise ConfigError("hydra/launcher", option, "cannot train a search; hydra/launcher=stack does")
    options = LauncherOptions.of(settings)
    if options.executor == "slurm":
        if not options.slurm.wait:
            allowed = "does not suit a search: each round is asked for with the results of those before"
            raise ConfigError("hydra.launcher.slurm.wait", "false", allowed)
        check_machine()
    return options


def _goal(options: Options, composer: Composer, space: Space, probe: Job) -> tuple[str, str]:
    """The metric and its direction. A run of no steps, which is thrown away, shows whether there is such a metric.

    Raises:
        ConfigError: there is none, or the direction is not known.
    """
    with quick_imports():
        from lipexp.display import StackDisplay
        from lipexp.train import build, train_many

    with env_override(probe.env), tempfile.TemporaryDirectory() as folder:
        member = build(probe.resolved, probe.choices, here=False)
        metric = options.metric_for(member.parts["dataset"].task)
        lines = [*space.probes()[0], "steps=0", "device=cpu"]
        member = build(composer.job(0, lines).resolved, probe.choices)
        quiet = StackDisplay(lambda *message: None, 0)
        (outcome,) = train_many([member], [RunFolder(Path(folder))], quiet, figures=False)
    if outcome.metrics is not None:
        values = flat(outcome.metrics)
        names = [name for name, value in values.items() if isinstance(value, int | float)]
        if metric not in names and metric not in values:  # null so far, perhaps not later
            allowed = no_such("number in metrics.json", metric, names)
            raise ConfigError("hydra.sweeper.metric", metric, allowed)
    return metric, options.direction_of(metric)


def shared_axes(composer: Composer, space: Space) -> list[str]:
    """The axes along which the signature of a run changes: trials that differ there cannot share a stack."""
    with quick_imports():
        from lipexp.train import build, signature

    def found(values: Mapping[str, str]) -> str | None:
        job = composer.job(0, space.probe(values))
        try:
            with env_override(job.env):
                return signature(build(job.resolved, job.choices, here=False))
        except ConfigError:  # these values do not suit each other
            return None

    own = found({})
    return [axis.key for axis in space.axes if any(found({axis.key: value}) != own for value in axis.others())]


def _check_use(folder: Path, resume: bool) -> None:
    """Refuse a folder that holds something which is not to be continued, or cannot be.

    Raises:
        ConfigError.
    """
    used = {entry.name for entry in folder.iterdir()} - {LOCK, MULTIRUN}
    if used and not resume:
        allowed = "is not empty; results are never overwritten (resume=true continues a search)"
        raise ConfigError("hydra.sweep.dir", folder, allowed)
    if used and DATABASE not in used:
        raise ConfigError("resume", "true", f"{folder} holds no search that could be continued")


def _study(folder: Path, direction: str, definition: Mapping[str, Any]) -> Study:
    """The study in the folder's database, made or found there.

    Raises:
        ConfigError: the database holds another search, or is none.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    file = folder / DATABASE
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{file}",
            study_name=NAME,
            direction="maximize" if direction == "maximize" else "minimize",
            load_if_exists=True,
        )
        known = study.user_attrs.get(DEFINITION)
    except SQLAlchemyError:
        raise ConfigError("resume", "true", f"{file} cannot be read") from None
    if known is None:
        study.set_user_attr(DEFINITION, definition)
    elif known != definition:
        differing = ", ".join(key for key in definition if known.get(key) != definition[key])
        raise ConfigError("resume", "true", f"{folder} holds another search: its {differing} are others")
    return study


def _sampler(options: Options, number: int, fixed: Mapping[str, Any]) -> BaseSampler:
    """The sampler for trial `number`, some of whose parameters are fixed."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import PartialFixedSampler, RandomSampler, TPESampler

    seed = int(np.random.SeedSequence([options.seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # The others of a round have no value yet; they are taken for bad ones, so that a round spreads out.
        random = options.sampler == "random"
        free = RandomSampler(seed=seed) if random else TPESampler(seed=seed, constant_liar=True)
        return PartialFixedSampler(dict(fixed), free) if fixed else free


@hold_interrupts()
def _in_folder(master: DictConfig, folder: Path) -> DictConfig:
    """The configuration of a search as that of a sweep in `folder`."""
    own = copy.deepcopy(master)
    OmegaConf.copy_cache(from_config=master, to_config=own)
    with flag_override(own, ["readonly", "struct"], [False, False]):
        lines = [line for line in own.hydra.overrides.hydra if not line.startswith("hydra.sweep.dir=")]
        quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        own.hydra.overrides.hydra = [*lines, f"hydra.sweep.dir='{quoted}'"]
        own.hydra.sweep.dir = str(folder)
    return own
