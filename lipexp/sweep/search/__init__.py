"""Search: trials of a space of configurations, a round at a time, each round trained as a few stacks.

`hydra/sweeper=search` comes here. The trials are asked from optuna, which also keeps them, in study.db in the
folder of the search; a round is an ordinary sweep in a folder of its own (round-0, round-1, …). So a search that
was killed goes on with what is missing of its round, whatever executor trains it.

Members of a stack that are hopeless are trained to the end, because ending them early saves little: the time of a
stack of a few runs depends far more on its steps than on its number of runs.
"""

