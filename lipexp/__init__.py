"""lipexp: experiments with Lipschitz neural networks.

The rule of the house: configuration group (singular) = module (plural) = test file.

    conf/dataset/     -> lipexp/datasets.py      what a run learns
    conf/act/         -> lipexp/activations.py   1-Lipschitz maps between layers
    conf/constraint/  -> lipexp/constraints.py   operator norms that bound each layer
    conf/loss/        -> lipexp/losses.py
    conf/model/       -> lipexp/models.py
    conf/optim/       -> lipexp/optim.py

The road of a command: cli -> hydra_app -> members (configurations -> objects) -> loop (K stacked runs) ->
evaluate, with measured (lower bounds) and proven (upper bounds) -> record and runs (the folder of a run). A sweep
takes the side road sweep -> train. What is finished is read back by loading, for certify, report and figures.
"""

from __future__ import annotations

import sys
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lipexp.estimators import LipschitzClassifier as LipschitzClassifier
    from lipexp.estimators import LipschitzRegressor as LipschitzRegressor
    from lipexp.loading import LoadedRun, LoadedRuns

# Hydra finds launchers in the namespace package `hydra_plugins` only, which must therefore be on the path.
_plugins = __file__.rpartition("__init__")[0] + "_plugins"
if _plugins not in sys.path:
    sys.path.append(_plugins)

__version__ = "0.1.0"


def load(run: str | PathLike[str], trust: bool = False) -> LoadedRun | LoadedRuns:
    """A finished run: its baked network as a torch module, its configuration and its metrics.

        run = lipexp.load("outputs/2026-01-31/12-00-00-000000")
        run.network(points), run.config["lipschitz"], run.metrics.lipschitz.certified, run.table("gradients")

    Of a folder that holds runs, such as a sweep's, all: `runs.table` has a row for each, which `runs[i]` is.

    Args:
        run: the run's folder, or one that holds runs.
        trust: allow classes from outside lipexp, which a configuration may name; loading them runs their code.

    Raises:
        ConfigError: no finished run there, a class that is not trusted, or a file that cannot be used.
    """
    from lipexp.loading import load  # torch takes a second to import

    return load(run, trust=trust)


def __getattr__(name: str) -> Any:
    if name not in ("LipschitzClassifier", "LipschitzRegressor"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lipexp import estimators  # torch and scikit-learn take seconds to import

    return getattr(estimators, name)
