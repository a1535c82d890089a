"""What the tests share: the options of conf/, objects made from them, small trained stacks, and exact oracles.

A test of a room takes an argument such as `act_option` and then runs over every file of conf/act, so an option is
tested by being there. `constraint_case` stands for the overrides of every constraint, and of each input norm p of
one that has a choice; `bounded_case` for those that set a bound.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from omegaconf import DictConfig, OmegaConf

from lipexp import cli, config, loop, members
from lipexp.hydra_app import register_schemas
from lipexp.process import cpu_threads

settings.register_profile("lipexp", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("lipexp")

CONF = config.conf_dir()
SIZES = ("dataset.n_train=64", "dataset.n_val=32", "dataset.n_test=32")
SMALL = ("model.width=8", *SIZES, "batch_size=32", "steps=30", "eval_every=0")

Choice = tuple[str, ...]  # an option as overrides, such as ("constraint=linf", "constraint.p=1")

# The settings that an option has no default for.
NEEDED: dict[str, Choice] = {
    "dataset=table": (f"dataset.path='{Path(__file__).with_name('table.csv')}'", "dataset.target=ill"),
    "dataset=npz": (f"dataset.path='{Path(__file__).with_name('arrays.npz')}'",),
    "dataset=mnist": (
        f"dataset.path='{Path(__file__).with_name('images.npz')}'",
        "dataset.n_train=80",
        "dataset.n_val=30",
        "dataset.n_test=40",
    ),
}


def options(group: str) -> list[str]:
    """The options of a group: the files of its folder."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def leaf(group: str, option: str) -> DictConfig:
    """What conf/ says of an option, at L = 1, apart from what a dataset brings along."""
    content = OmegaConf.load(CONF / group / f"{option}.yaml")
    return OmegaConf.create({"lipschitz": 1.0, group: content.get(group, content)})[group]


def choice_of(group: str, option: str) -> Choice:
    """An option, with what it needs."""
    return (f"{group}={option}", *NEEDED.get(f"{group}={option}", ()))


def choices_in(group: str) -> list[Choice]:
    """Every option of a group, and each input norm p of a constraint that has a choice."""
    found: list[Choice] = []
    for option in options(group):
        choice = choice_of(group, option)
        norms = ("1", "2", "inf") if group == "constraint" and "p" in leaf(group, option) else ()
        found += [(*choice, f"constraint.p={p}") for p in norms] or [choice]
    return found


def constraint_cases(*, bounded: bool) -> dict[str, Choice]:
    """Their overrides, by a name."""
    cases = {",".join(choice): choice for choice in choices_in("constraint")}
    return {name: choice for name, choice in cases.items() if not bounded or part(choice).lipschitz is not None}


@functools.cache
def part(choice: Choice) -> Any:
    """The object of an option."""
    group, _, option = choice[0].partition("=")
    node = leaf(group, option)
    node.merge_with_dotlist([change.removeprefix(f"{group}.") for change in choice[1:]])
    return members.part(node, group, option)


@functools.cache
def suits(act: Choice, constraint: Choice) -> bool:
    """Whether an activation can be trained under a constraint."""
    try:
        part(constraint).check(part(act), act[0])
    except config.ConfigError:
        return False
    return True


def act_for(constraint: Choice, place: int = 0) -> Choice:
    """An activation for a constraint: the default one, or one of those that suit and are linear between rays."""
    found = [act for act in choices_in("act") if suits(act, constraint)]
    found = [act for act in found if part(act).is_piecewise_linear and part(act).is_homogeneous]
    default = ("act=groupsort",)
    return default if default in found and not place else found[place % len(found)]


def defaults_of(kind: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a class that have a default in code."""
    return {p.name: p.default for p in inspect.signature(kind).parameters.values() if p.default is not p.empty}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for group in (*config.GROUPS, "experiment"):
        if f"{group}_option" in metafunc.fixturenames:
            metafunc.parametrize(f"{group}_option", options(group))
    for name, bounded in (("constraint_case", False), ("bounded_case", True)):
        if name in metafunc.fixturenames:
            cases = constraint_cases(bounded=bounded)
            metafunc.parametrize(name, list(cases.values()), ids=list(cases))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from threads, and a busy machine makes them slower."""
    with cpu_threads(1):
        yield


@pytest.fixture(scope="session")
def compose() -> Callable[..., DictConfig]:
    """compose("act=relu", "steps=7") -> the configuration of `lipexp train act=relu steps=7`."""

    @functools.cache
    def composed(*overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        register_schemas()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", overrides=list(overrides))

    return lambda *overrides: composed(*overrides).copy()


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    """make("constraint", "constraint=linf", "constraint.p=1") -> the object of a group under these overrides."""
    return lambda group, *choice: part(choice)


@pytest.fixture(scope="session")
def trained(compose: Callable[..., DictConfig]) -> Callable[..., SimpleNamespace]:
    """A small stack trained for some 30 steps: `stack`, its last `checkpoint`, and the checkpoints `seen`.

    trained("act=relu", runs=("seed=0", "seed=0 lipschitz=3")) trains two runs together, a string of settings each.
    """

    @functools.cache
    def trained(*overrides: str, runs: Sequence[str] = ("seed=0", "seed=1")) -> SimpleNamespace:
        common = compose(*SMALL, *overrides)
        built = [members.build(OmegaConf.merge(common, OmegaConf.from_dotlist(run.split()))) for run in runs]
        stack = members.stack(built)
        seen: list[loop.Checkpoint] = []
        return SimpleNamespace(stack=stack, checkpoint=loop.fit(stack, seen.append), seen=seen)

    return trained


class Exact:
    """Norms decided in rational arithmetic, with no code of lipexp's. Matrices are nested sequences of numbers."""

    @staticmethod
    def fractions(matrix: Any) -> list[list[Fraction]]:
        """(out, in) as exact rational numbers."""
        return [[v if isinstance(v, Fraction) else Fraction(float(v)) for v in row] for row in matrix]

    @classmethod
    def row_power(cls, matrix: Any, q: float) -> Fraction:
        """The largest ||row||_q, for q = 2 its square."""
        size = {1: lambda row: sum(map(abs, row)), 2: lambda row: sum(v * v for v in row)}
        return max(Fraction(size.get(q, lambda row: max(map(abs, row)))(row)) for row in cls.fractions(matrix))

    @classmethod
    def rows_within(cls, matrix: Any, q: float, bound: float) -> bool:
        """max ||row||_q <= bound."""
        return cls.row_power(matrix, q) <= Fraction(bound) ** (2 if q == 2 else 1)

    @classmethod
    def spectral_within(cls, matrix: Any, bound: float) -> bool:
        """||W||_2 <= bound: bound^2 I - W W^T, or the same of the transpose, is positive semidefinite."""
        rows = cls.fractions(matrix)
        rows = rows if len(rows) <= len(rows[0]) else [list(column) for column in zip(*rows, strict=True)]
        gram = [[-sum(a * b for a, b in zip(u, v, strict=True)) for v in rows] for u in rows]
        for i, row in enumerate(gram):
            row[i] += Fraction(bound) ** 2
        return cls.semidefinite(gram)

    @staticmethod
    def semidefinite(rest: list[list[Fraction]]) -> bool:
        """Whether a symmetric matrix is positive semidefinite, by LDL^T: a zero pivot needs a zero row."""
        while rest:
            (pivot, *row), *below = rest
            if pivot < 0 or (pivot == 0 and any(row)):
                return False
            rest = [
                [entry - (head * other / pivot if pivot else 0) for entry, other in zip(tail, row, strict=True)]
                for head, *tail in below
            ]
        return True

    @classmethod
    def within(cls, norm: Any, matrix: Any, bound: float) -> bool:
        """What `norm` is called is at most `bound`."""
        if norm.name == "spectral norm":
            return cls.spectral_within(matrix, bound)
        if norm.name == "Frobenius norm":
            return cls.rows_within([[v for row in matrix for v in row]], 2, bound)
        if norm.name == "column 1-norm":
            return cls.rows_within(list(zip(*matrix, strict=True)), 1, bound)
        return cls.rows_within(matrix, norm.q, bound)


@pytest.fixture(scope="session")
def exact() -> type[Exact]:
    return Exact


# The command line ------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    code: int
    out: str
    err: str


def _call(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    patch.setattr(sys, "path", list(sys.path))
    patch.setattr(sys, "argv", ["lipexp", *arguments])
    try:
        return cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)


def call_command(*arguments: str) -> int:
    """The exit status of the command, called in this process."""
    with pytest.MonkeyPatch.context() as patch:
        return _call(patch, *arguments)


@pytest.fixture
def lipexp(tmp_path, monkeypatch, capfd):
    """Calls the command in this process, in an empty folder: lipexp("train", "loss=bce") -> Result."""

    def call(*arguments: str) -> Result:
        capfd.readouterr()
        return Result(_call(monkeypatch, *arguments), *capfd.readouterr())

    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """trained_run("act=relu") -> the folder of a small run that the command trained. Not to be written to."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def train(*overrides: str) -> Path:
        folder = root / str(len(list(root.iterdir())))
        command = ("train", "experiment=debug", "device=cpu", *overrides, f"hydra.run.dir={folder}")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            assert _call(patch, *command) == 0
        return folder

    return train


@pytest.fixture
def run(trained_run: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """run("act=relu") -> a copy of that run, to be changed at will."""
    return lambda *overrides, name="run": Path(shutil.copytree(trained_run(*overrides), tmp_path / name))


@pytest.fixture
def run_folders() -> Callable[[], list[Path]]:
    """run_folders() -> the finished runs under outputs/, in the order of their paths."""
    return lambda: sorted(path.parent for path in Path("outputs").glob("*/*/metrics.json"))
