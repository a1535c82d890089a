"""The configurations of a sweep's jobs: the same as Hydra's, composed once per choice of options.

Hydra composes every job from its files, which takes 0.1 s of CPU time each. The jobs of a sweep differ mostly in
values, not in files. So here Hydra composes each set of options once, and a job is a copy of that configuration in
which Hydra's own functions set the values. `.hydra/` holds what a run by itself leaves there.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from lipexp.config import ConfigError, content
from lipexp.gate import check_experiment
from lipexp.runs import RunFolder, dump


@dataclass(frozen=True)
class Job:
    """One job of a sweep, composed; it can be sent to another process."""

    index: int
    overrides: tuple[str, ...]  # of the job alone, in the order of the command line
    resolved: dict[str, Any]  # its configuration, without interpolations
    hydra: str  # .hydra/hydra.yaml
    choices: Mapping[str, str]
    folder: Path  # absolute

    @property
    def settings(self) -> list[tuple[str, str]]:
        """The keys that the job overrides, and their values, as the command line spells them."""
        pairs = (line.partition("=") for line in self.overrides)
        return [(key.lstrip("+"), value) for key, _, value in pairs]

    def write_hydra_files(self) -> None:
        """The configuration, and Hydra's own record of the run."""
        record = self.folder / ".hydra"
        record.mkdir(parents=True, exist_ok=True)
        RunFolder(self.folder).write_config(self.resolved)
        (record / "hydra.yaml").write_text(self.hydra)
        (record / "overrides.yaml").write_text(dump(list(self.overrides)))


class Composer:
    """Composes the jobs of one sweep.

    Args:
        loader: Hydra's configuration loader.
        master: the configuration of the sweep itself.

    """

    def __init__(self, loader: ConfigLoaderImpl, master: DictConfig) -> None:
        self.loader = loader
        self.master = master
        _ = master.hydra.sweep.dir  # resolved now, so that its time stamp is the same for all jobs
        own: Any = OmegaConf.to_container(master.hydra.overrides.hydra)
        # These overrides decide which files Hydra finds (hydra.searchpath).
        name = master.hydra.job.config_name
        self._files = loader._parse_overrides_and_create_caching_repo(name, own)[1]
        self._parser = OverridesParser.create(config_loader=loader)
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        sweeper: Any = OmegaConf.to_container(master.hydra.sweeper, resolve=False)
        self._grid = sweeper.get("params")

    def job(self, index: int, overrides: Sequence[str]) -> Job:
        """Compose job `index` of the sweep.

        Raises:
            HydraException: Hydra refuses these overrides.
            OmegaConfBaseException: an interpolation that cannot be resolved.
        """
        parsed = [self._parse(line) for line in overrides]
        base = self._base(tuple(o.input_line or "" for o in parsed if self._chooses_files(o)))
        config = copy.deepcopy(base)
        OmegaConf.copy_cache(from_config=self.master, to_config=config)
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if not self._chooses_files(o)], config)
        tasks = [override for override in parsed if not override.is_hydra_override()]
        with flag_override(config, ["readonly", "struct"], [False, False]):
            _describe(config, index, tasks)
        record, resolved, folder = self._carry_out(config)
        _check_job_settings(record["job"])
        self._check_experiment(record)
        return Job(
            index=index,
            overrides=tuple(record["overrides"]["task"]),
            resolved=resolved,
            hydra=dump({"hydra": record}),
            choices={str(group): str(option) for group, option in record["runtime"]["choices"].items()},
            folder=folder,
        )

    def _check_experiment(self, record: Mapping[str, Any]) -> None:
        """Refuse an experiment that, swept over, brings a grid or a launcher of its own: a job has none."""
        choices = record["runtime"]["choices"]
        if choices.get("experiment") == self.master.hydra.runtime.choices.get("experiment"):
            return
        check_experiment(choices, self.loader)
        if record["sweeper"].get("params") != self._grid:
            raise ConfigError("experiment", choices["experiment"], "is a sweep of its own; name it alone, with -m")

    def is_group(self, key: str) -> bool:
        """Whether `key` chooses a file."""
        return bool(self._files.group_exists(key))

    def _parse(self, line: str) -> Override:
        """`line`, parsed; Hydra refuses a sweep within a job."""
        if line not in self._parsed:
            (override,) = self._parser.parse_overrides([line])
            self.loader.validate_sweep_overrides_legal([override], RunMode.RUN, from_shell=True)
            self._parsed[line] = override
        return self._parsed[line]

    def _chooses_files(self, override: Override) -> bool:
        """Whether an override decides which files are composed, or is one of Hydra's own."""
        if override.is_hydra_override() or override.package is not None:
            return True
        return self._files.group_exists(override.key_or_group) and not isinstance(override.value(), dict)

    def _base(self, overrides: tuple[str, ...]) -> DictConfig:
        if overrides not in self._bases:
            self._bases[overrides] = self.loader.load_sweep_config(self.master, list(overrides))
        return self._bases[overrides]

    def _carry_out(self, config: DictConfig) -> tuple[dict[str, Any], dict[str, Any], Path]:
        """What Hydra makes of a composed job: its own node, the rest resolved, and the folder."""
        running: Any = HydraConfig.instance()
        before = running.cfg
        running.cfg = config  # for the `hydra:` resolver; HydraConfig.set_config would copy it, which takes 5 ms
        try:
            # Absolute, as a user's class may change the current folder.
            folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
            with flag_override(config.hydra.runtime, ["readonly", "struct"], [False, False]):
                config.hydra.runtime.output_dir = os.path.normpath(folder)
            record: Any = OmegaConf.to_container(config.hydra, resolve=False, enum_to_str=True)
            resolved = content(config)
        finally:
            running.cfg = before
        return record, resolved, folder


def in_folder(folder: Path) -> str:
    """The override that puts a sweep into `folder`."""
    text = str(folder)
    plain = re.fullmatch(r"[\w./-]+", text)
    return f"hydra.sweep.dir={text if plain else QuotedString(text, Quote.single).with_quotes()}"


def _check_job_settings(job: Mapping[str, Any]) -> None:
    """Refuse what the jobs of a stack, which train in one process, cannot have each for itself."""
    for name in ("chdir", "env_set"):
        if job[name]:
            allowed = "is for hydra/launcher=basic: the jobs of a stack train in one process"
            raise ConfigError(f"hydra.job.{name}", "true" if job[name] is True else job[name], allowed)


def _describe(config: DictConfig, index: int, overrides: Sequence[Override]) -> None:
    """Hydra's own settings that depend on the job."""
    config.hydra.overrides.task = [override.input_line for override in overrides]
    style = config.hydra.job.config.override_dirname
    config.hydra.job.override_dirname = get_overrides_dirname(
        overrides=list(overrides),
        kv_sep=style.kv_sep,
        item_sep=style.item_sep,
        exclude_keys=style.exclude_keys,
    )
    config.hydra.job.id = config.hydra.job.num = index
