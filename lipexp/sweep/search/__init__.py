"""Search over configurations, `hydra/sweeper=search`: trials are asked for in rounds, and each round is a sweep.

Trials come from optuna, which stores them in study.db in the folder of the search; the sweep of a round lies in a
folder of its own, round-0, round-1, …. So a search that was killed goes on with what is missing of its round.
"""
