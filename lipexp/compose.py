"""The configurations of a sweep's jobs: the same as Hydra's, composed once per choice of options.

Hydra composes every job from its files, 0.1 s of CPU each. The jobs of a sweep differ mostly in values, not in
files, so here each set of options is composed once, by Hydra, and a job is a copy of it with its values set, by
Hydra's own functions. What is written into `.hydra/` is what Hydra's launcher writes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf._utils import get_omega_conf_dumper


@dataclass(frozen=True)
class Job:
    """One job of a sweep, composed; it can be sent to another process."""

    index: int
    overrides: tuple[str, ...]  # of the job alone, in the order of the command line
    config: dict[str, Any]  # unresolved
    hydra: str  # .hydra/hydra.yaml
    choices: Mapping[str, str]
    folder: Path

    def composed(self) -> DictConfig:
        """The configuration as the task sees it."""
        return OmegaConf.create(self.config)

    def write_hydra_files(self) -> None:
        """Hydra's own record of the run."""
        record = self.folder / ".hydra"
        record.mkdir(parents=True, exist_ok=True)
        (record / "config.yaml").write_text(dump(self.config))
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
        _ = master.hydra.sweep.dir  # resolved now, its time stamp is the same for all jobs
        self._parser = OverridesParser.create(config_loader=loader)
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    def job(self, index: int, overrides: Sequence[str]) -> Job:
        """The job number `index` of the sweep.

        Raises:
            HydraException: whatever Hydra says of these overrides.
        """
        parsed = [self._parse(override) for override in overrides]
        chooses = [self._chooses_files(override) for override in parsed]
        base = self._base(tuple(line for line, files in zip(overrides, chooses, strict=True) if files))
        config = copy.deepcopy(base)
        OmegaConf.copy_cache(from_config=self.master, to_config=config)
        values = [override for override, files in zip(parsed, chooses, strict=True) if not files]
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        app = [override for override in parsed if not override.is_hydra_override()]
        with flag_override(config, ["readonly", "struct"], [False, False]):
            config.hydra.overrides.task = [override.input_line for override in app]
            style = config.hydra.job.config.override_dirname
            config.hydra.job.override_dirname = get_overrides_dirname(
                overrides=app,
                kv_sep=style.kv_sep,
                item_sep=style.item_sep,
                exclude_keys=style.exclude_keys,
            )
            config.hydra.job.id = config.hydra.job.num = index
        folder = self._folder(config)  # Hydra makes its node read-only here
        with flag_override(config.hydra.runtime, ["readonly", "struct"], [False, False]):
            config.hydra.runtime.output_dir = str(folder.absolute())
        content: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
        record = content.pop("hydra")
        return Job(
            index=index,
            overrides=tuple(config.hydra.overrides.task),
            config=content,
            hydra=dump({"hydra": record}),
            choices={str(k): str(v) for k, v in config.hydra.runtime.choices.items()},
            folder=folder,
        )

    def _parse(self, line: str) -> Override:
        if line not in self._parsed:
            (self._parsed[line],) = self._parser.parse_overrides([line])
        return self._parsed[line]

    def _chooses_files(self, override: Override) -> bool:
        """Whether an override takes part in choosing the files that are composed, or is one of Hydra's own."""
        if override.is_hydra_override() or override.package is not None:
            return True
        return self.loader.repository.group_exists(override.key_or_group) and not isinstance(
            override.value(), dict
        )

    def _base(self, overrides: tuple[str, ...]) -> DictConfig:
        if overrides not in self._bases:
            self._bases[overrides] = self.loader.load_sweep_config(self.master, list(overrides))
        return self._bases[overrides]

    def _folder(self, config: DictConfig) -> Path:
        """hydra.sweep.dir / hydra.sweep.subdir, which may refer to the job through the `hydra:` resolver."""
        running = HydraConfig.instance()
        before = running.cfg
        try:
            running.set_config(config)
            return Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        finally:
            running.cfg = before


class _Dumper(yaml.CDumper):  # in C, five times as fast as OmegaConf's
    """Writes as OmegaConf.to_yaml does."""


_Dumper.add_representer(str, cast(Any, get_omega_conf_dumper().str_representer))


def dump(content: Any) -> str:
    """YAML as OmegaConf.to_yaml writes it, faster."""
    return yaml.dump(content, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=_Dumper)
