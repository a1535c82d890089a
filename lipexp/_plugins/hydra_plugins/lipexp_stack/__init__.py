"""lipexp's launcher and sweeper for Hydra, which accepts such classes from the namespace `hydra_plugins` only."""
