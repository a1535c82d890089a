"""The laws of the rooms: what must hold of every activation, constraint, loss, dataset, model and optimiser.

A law is a function of a `Subject`, which builds small runs of one configuration. The first line of its docstring
is the law. It returns None where the law holds, a reason where it does not apply, and raises `Broken` with a
counterexample. The tests call every law for every file of conf/, and `lipexp check` calls them for a user's class.
"""

from lipexp.laws.activations import ACTIVATION_LAWS
from lipexp.laws.constraints import CONSTRAINT_LAWS
from lipexp.laws.rooms import DATASET_LAWS, LOSS_LAWS, MODEL_LAWS, OPTIMISER_LAWS
from lipexp.laws.runs import RUN_LAWS
from lipexp.laws.subject import Broken, Law, Subject, statement

LAWS: dict[str, tuple[Law, ...]] = {
    "act": ACTIVATION_LAWS,
    "constraint": CONSTRAINT_LAWS,
    "loss": LOSS_LAWS,
    "dataset": DATASET_LAWS,
    "model": MODEL_LAWS,
    "optim": OPTIMISER_LAWS,
    "run": RUN_LAWS,  # of all of them together
}

__all__ = ["LAWS", "Broken", "Law", "Subject", "statement"]
