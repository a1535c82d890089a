"""Search over configurations, `hydra/sweeper=search`: trials from optuna, in rounds, each of which is a sweep."""
