"""`lipexp bench peers`: constraints and activations that other libraries have too, side by side.

All learn the same two problems from the same batches, with the same widths, steps and learning rates, by Adam; the
networks of other libraries start from their own initial weights. What they are worth is the score on test points
with the Lipschitz constant that they have kept.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lipexp.bench.accuracy import standard_error
from lipexp.bench.libraries import WIDTH, Rival, constant, rivals
from lipexp.bench.steps import BATCH, composed
from lipexp.bench.timing import Case, duration, quartiles, take_turns
from lipexp.loop import Stack, Trainer, batch_indices, fit, generator
from lipexp.members import build, stack
from lipexp.norms import product_bound
from lipexp.optim import SCHEDULES, Adam
from lipexp.screen import Screen, Wide

SEEDS, STEPS = 5, 300
LOOK_EVERY = 10  # steps
STEP_CALLS = 3  # in a round
MOONS, CONE = "two moons", "one cone"
PROBLEMS = {MOONS: ["dataset=two_moons"], CONE: ["dataset=cones", "dataset.n_cones=1"]}


@dataclass(frozen=True)
class Measure:
    """What is compared on test points."""

    name: str
    heading: str
    sign: int  # 1: larger is better; -1: smaller is
    factor: int  # with which it is shown


ACCURACY = Measure("accuracy", f"{MOONS}\naccuracy, %", 1, 100)
LOSS = Measure("loss", f"{MOONS}\n1000 × loss", -1, 1000)
SHARE = Measure("share", f"{CONE}\nshare, %", 1, 100)
MEASURES = (ACCURACY, LOSS, SHARE)

LEGEND = (
    "Means over seeds on test points, ± the standard error. Loss: hinge, margin 0.5. Share: of the optimum, 1, of "
    "the Kantorovich dual. Outputs are divided by the Lipschitz constant where that is above 1. The constant is "
    "the largest of the seeds: for lipexp the proven one, for others the product of their layers' norms in "
    f"float64; in training: the largest at every {LOOK_EVERY}th step, had it been the last. Step: CPU time over "
    "that of the other library, of a run alone and of one in a stack. Missed: what is worse by more than one "
    "standard error of the difference, seed by seed; a step of a run alone above the aim."
)


@dataclass
class Learnt:
    """What training on both problems has led to."""

    scores: dict[Measure, list[float]] = field(default_factory=lambda: {measure: [] for measure in MEASURES})
    constants: list[float] = field(default_factory=list)  # at the end
    in_training: list[float] = field(default_factory=list)

    def note(self, problem: str, runs: Stack, run: int, f: Tensor, bound: float) -> None:
        """The scores of outputs f (N,) at the test points of one run, scaled to keep L = 1; and the constant."""
        self.constants.append(bound)
        f, y = f.double()[None] / max(1.0, bound), torch.from_numpy(runs.data[run].test_y).double()[None]
        score = float(runs.task.scores[runs.task.metric](f, y))
        self.scores[ACCURACY if problem == MOONS else SHARE].append(score)
        if problem == MOONS:
            self.scores[LOSS].append(float(runs.loss(f, y).mean()))


def peers(console: Console, rounds: int) -> None:
    """Every network of other libraries, against lipexp's; takes minutes."""
    found = rivals(console)
    own: dict[str, Learnt] = {}
    out = empty_table(rounds)
    for rival in found:
        for overrides in rival.own:
            if overrides not in own:
                own[overrides] = own_learnt(overrides)
        add_rows(out, rival, learnt(rival), own, timed(rival, rounds))
    Screen().show(out, LEGEND)


def stacked(problem: str, overrides: str, seeds: int) -> Stack:
    """A stack of lipexp's, the runs of which differ in their seed."""
    constraint, *others = overrides.split()
    shape = [*PROBLEMS[problem], f"constraint={constraint}", f"model.width={WIDTH}", f"steps={STEPS}"]
    if problem == CONE:
        shape.append(f"dataset.p={1 if constraint == 'one' else 2}")
    config = composed(*shape, *others)
    members = []
    for seed in range(seeds):
        config.seed = seed
        members.append(build(config.copy()))
    return stack(members)


def own_learnt(overrides: str) -> Learnt:
    """lipexp's networks, all seeds as one stack."""
    found = Learnt()
    for problem in PROBLEMS:
        runs = stacked(problem, overrides, SEEDS)
        network = fit(runs, lambda checkpoint: None).network
        outputs = network.double(torch.stack([torch.from_numpy(data.test_x).double() for data in runs.data]))
        for run in range(SEEDS):
            bound = product_bound([norms[run] for norms in network.norms])
            found.note(problem, runs, run, outputs[run, :, 0], bound)
    return found


def learnt(rival: Rival) -> Learnt:
    """The networks of another library, one for each seed."""
    found = Learnt()
    for problem in PROBLEMS:
        runs = stacked(problem, rival.own[0], SEEDS)
        for run in range(SEEDS):
            network = initial(rival, run)
            step = torch_step(network, runs, run)
            for done in range(1, STEPS + 1):
                step()
                if done % LOOK_EVERY == 0:
                    found.in_training.append(constant(rival, finished(network, runs, run)))
            network = finished(network, runs, run)
            with torch.no_grad():
                f = network(torch.from_numpy(runs.data[run].test_x)).squeeze(-1)
            found.note(problem, runs, run, f, constant(rival, network))
    return found


def initial(rival: Rival, seed: int) -> nn.Sequential:
    """A network of another library before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return rival.network()


def finished(network: nn.Sequential, runs: Stack, run: int) -> nn.Sequential:
    """A copy as it is used after training: some libraries keep weights that only a call in training renews."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        network(torch.from_numpy(runs.data[run].train_x[:BATCH]))
    return network.eval()


def torch_step(network: nn.Module, runs: Stack, run: int) -> Callable[[], object]:
    """A train step in torch, with the data, batches, loss and schedule of one of `runs`."""
    data, optim = runs.data[run], runs.optim
    assert isinstance(optim, Adam)
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    batches = batch_indices(len(x), runs.batch_size, [generator(runs.streams[run].batches)])
    rate = float(torch.as_tensor(optim.lr).reshape(-1)[run])
    first, second = optim.betas
    optimiser = torch.optim.Adam(network.parameters(), rate, (first, second), optim.eps)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda done: SCHEDULES[optim.schedule](done / runs.steps, optim)
    )
    loss = copy.deepcopy(runs.loss)
    for name in loss.per_run:
        setattr(loss, name, getattr(loss, name)[run : run + 1])

    def step() -> None:
        index = next(batches)[0]
        mean = loss(network(x[index]).T, y[index][None]).mean()
        optimiser.zero_grad()
        mean.backward()
        optimiser.step()
        decay.step()

    return step


def timed(rival: Rival, rounds: int) -> list[Case]:
    """Steps on two moons: theirs, then of each of lipexp's by itself and as a stack."""
    single = stacked(MOONS, rival.own[0], 1)
    cases = [Case(rival.name, torch_step(initial(rival, 0), single, 0))]
    for overrides in rival.own:
        for runs in (1, SEEDS):
            cases.append(Case(overrides, Trainer(stacked(MOONS, overrides, runs)).step, rival.aim, runs))
    take_turns(cases, rounds, STEP_CALLS)
    return cases


def worse(own: Learnt, theirs: Learnt) -> list[str]:
    """The measures in which lipexp is worse by more than one standard error of the difference, seed by seed."""
    found = []
    for measure in MEASURES:
        pairs = zip(own.scores[measure], theirs.scores[measure], strict=True)
        differences = [measure.sign * (a - b) for a, b in pairs]
        if statistics.fmean(differences) < -standard_error(differences):
            found.append(measure.name)
    return found


def empty_table(rounds: int) -> Table:
    title = f"2-{WIDTH}-{WIDTH}-1, L = 1, batch {BATCH}, {STEPS} steps of Adam, {SEEDS} seeds, {rounds} rounds"
    out = Wide(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    out.add_column("", no_wrap=True)
    headings = [measure.heading for measure in MEASURES]
    for heading in (*headings, "constant\n− 1", "in\ntraining", "step,\nalone", f"of {SEEDS}"):
        out.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    out.add_column("aims", no_wrap=True)
    return out


def add_rows(out: Table, rival: Rival, theirs: Learnt, own: Mapping[str, Learnt], cases: Sequence[Case]) -> None:
    """One row for the network of another library, and one below it for each of lipexp's."""
    first, *others = cases
    time = duration(statistics.median(first.cpu))
    out.add_row(rival.name, *shown(theirs), excess(max(theirs.in_training)), time, "", "")
    for overrides, alone, of_stack in zip(rival.own, others[::2], others[1::2], strict=True):
        times = [
            quartiles([a / b for a, b in zip(case.cpu, first.cpu, strict=True)])[1] for case in (alone, of_stack)
        ]
        missed = worse(own[overrides], theirs)
        if rival.aim is not None and times[0] > rival.aim:
            missed.append(f"step ≤ {rival.aim:g}")
        name = ", ".join(word.rpartition("=")[2] for word in overrides.split())
        verdict = f"missed: {', '.join(missed)}" if missed else "met"
        out.add_row(f"  {name}", *shown(own[overrides]), "", *(f"{ratio:.2f}" for ratio in times), verdict)


def shown(found: Learnt) -> list[str]:
    """The cells of the measures and of the constant."""
    cells = []
    for measure in MEASURES:
        values = [measure.factor * value for value in found.scores[measure]]
        cells.append(f"{statistics.fmean(values):.1f} ± {standard_error(values):.1f}")
    return [*cells, excess(max(found.constants))]


def excess(value: float) -> str:
    """What is above 1."""
    return f"{value - 1:+.0e}".replace("e-0", "e-")
