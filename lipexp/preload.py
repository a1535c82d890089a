"""Imported by the server of worker processes, before any is forked from it: what they need.

The garbage collector of a worker leaves alone what is there by then: it would find nothing, and copy memory
that all workers share.
"""

from lipexp.imports import quick_imports

with quick_imports(keep=True):
    import sklearn.datasets  # noqa: F401

    import lipexp.executors
    import lipexp.plan
    import lipexp.train  # noqa: F401
