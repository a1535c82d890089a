"""lipexp: experiments with Lipschitz neural networks.

The rule of the house: configuration group (singular) = module (plural) = test file.

    conf/dataset/     -> lipexp/datasets/        what a run learns
    conf/act/         -> lipexp/activations/     1-Lipschitz maps between layers
    conf/constraint/  -> lipexp/constraints/    operator norms that bound each layer
    conf/loss/        -> lipexp/losses/
    conf/model/       -> lipexp/models.py
    conf/optim/       -> lipexp/optim.py

The road of a command: cli -> hydra_app -> members (configurations -> objects) -> loop (K stacked runs) ->
evaluate, with measured (lower bounds) and proven (upper bounds) -> record and runs (the folder of a run). A sweep
takes the side road sweep -> training. What is finished is read back by loading, for certify, predict, export,
report and figures. A network from elsewhere is read by foreign, and certified as a run is (finding). From Python
the same road begins at `lipexp.train` (python), or at a scikit-learn estimator (estimators, fitting).
"""

from __future__ import annotations

import sys
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lipexp.config import ConfigError as ConfigError
    from lipexp.estimators import LipschitzClassifier as LipschitzClassifier
    from lipexp.estimators import LipschitzRegressor as LipschitzRegressor
    from lipexp.foreign.certificates import Certified
    from lipexp.loading import LoadedRun, LoadedRuns
    from lipexp.runs import RunFailed as RunFailed

# Hydra finds launchers in the namespace package `hydra_plugins` only, which must therefore be on the path.
_plugins = __file__.rpartition("__init__")[0] + "_plugins"
if _plugins not in sys.path:
    sys.path.append(_plugins)

__version__ = "0.1.0"


def train(
    *overrides: str, config_dir: str | PathLike[str] | None = None, progress: bool = True, **settings: Any
) -> LoadedRun | LoadedRuns:
    """Train a network, or sweep over configurations, as `lipexp train` does.

    >>> run = lipexp.train("act=groupsort", "loss=hinge", "model.width=16", steps=100, progress=False)
    >>> run.metrics.lipschitz.certified <= 1
    True
    >>> runs = lipexp.train("act=relu,groupsort", "model.width=16", seed=range(2), steps=100, progress=False)
    >>> len(runs), runs.table["act"].unique().tolist()
    (4, ['relu', 'groupsort'])

    Args:
        overrides: as on the command line, "group=option" or "key=value"; "key=a,b" is a sweep.
        config_dir: a folder with options of your own, as --config-dir.
        progress: show a progress bar, on a terminal or in a notebook with ipywidgets; elsewhere a line now and
            then. False: nothing is printed.
        settings: overrides of keys without a dot. Several values (a list, tuple, range or array) are a sweep.

    Returns:
        The run, or of a sweep the runs, as `lipexp.load` returns them from the folder that they were written to:
        outputs/<date>/<time>, or hydra.run.dir, of a sweep hydra.sweep.dir.

    Raises:
        ConfigError: bad input; nothing is written.
        RunFailed: a run ended without a result, or runs of a sweep did; what has finished lies in its folder.

    The runs of a sweep train as stacked models in this process. With "hydra.launcher.executor=process" they train
    in several ones; a script then needs `if __name__ == "__main__":`, since each of them imports it.
    """
    from lipexp.python import train  # torch takes a second to import

    return train(overrides, settings, config_dir, progress)


def load(run: str | PathLike[str], trust: bool = False) -> LoadedRun | LoadedRuns:
    """A finished run: its baked network as a torch module, its configuration and its metrics.

        run = lipexp.load("outputs/2026-01-31/12-00-00-000000")
        run.network(points), run.config["lipschitz"], run.metrics.lipschitz.certified, run.table("gradients")
        run.predict(pd.read_csv("new.csv"))  # as lipexp predict: classes with certified radii, or values

    Of a folder that holds runs, such as a sweep's, all: `runs.table` has a row for each, which `runs[i]` is.

    Args:
        run: the run's folder, or one that holds runs.
        trust: allow classes from outside lipexp, which a configuration may name; loading them runs their code.

    Raises:
        ConfigError: no finished run there, a class that is not trusted, or a file that cannot be used.
    """
    from lipexp.loading import load  # torch takes a second to import

    return load(run, trust=trust)


def certify(
    net: Any,
    x: Any,
    y: Any = None,
    *,
    p: float | str = 2,
    act: Any = None,
    task: str | None = None,
    method: str | None = None,
    attack: bool = False,
    gap: float = 1e-3,
    max_seconds: float = 60.0,
    max_regions: int | None = None,
    radii: Sequence[float] | None = None,
    around: Sequence[float] | None = None,
    within: float | None = None,
) -> Certified:
    """Bounds on the Lipschitz constant of any fully connected network, and certified radii of points.

    >>> from torch import nn
    >>> import numpy as np
    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = lipexp.certify(net, np.random.default_rng(0).normal(size=(50, 2)))
    >>> found.lipschitz.measured <= found.lipschitz.certified
    True

    Args:
        net: a torch module, whose operators must be those of `lipexp certify --help` (torch.export finds them, in
            evaluation mode); an MLPClassifier or MLPRegressor of scikit-learn, or a pipeline of scalers that ends
            in one; an ONNX model; a network, run or fitted estimator of lipexp; or the path of a file.
        x: points (N, D), or (N, ...) for a module that flattens them: radii are theirs, and the constant is
            measured over their box.
        y: their classes (N,); None: the radii are those of the predicted classes.
        p: the norm in which inputs move: 1, 2 or inf.
        act: for the path of a state dict: its activation, "relu" or {"option": "leaky_relu", "slope": 0.2}.
        task: "regression" for the constant alone; None: one output decides by its sign, several by the largest.
        method, attack, gap, max_seconds, max_regions, radii, around, within: as for `lipexp certify`; `radii` and
            `around` are lists.

    Returns:
        What metrics.json says: `lipschitz`, `bounds` and `robustness`. The table `radii` has a row for each point.
        The bounds hold for the network in real arithmetic, with its numbers in float32. `rounding` says by how
        much that has changed one of them, as float64 weights or a division by a constant make it necessary.

    Raises:
        ConfigError: (a ValueError) the network has something that is not read, which is named, or does not fit.
    """
    from lipexp.finding import Request  # torch takes a second to import
    from lipexp.foreign.certificates import certify

    request = Request(p, method, attack, gap, max_seconds, max_regions, radii, around, within)
    return certify(net, x, y, act, task, request)


# Imported when they are asked for: torch and scikit-learn take seconds.
_LATER = {
    "ConfigError": "config",
    "LipschitzClassifier": "estimators",
    "LipschitzRegressor": "estimators",
    "RunFailed": "runs",
}


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lipexp.{_LATER[name]}"), name)
