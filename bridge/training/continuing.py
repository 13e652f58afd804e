"""The exported SAEs that a run continues (`--init_from`), one a site; a resumed run knows them from its record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.run import Run
from bridge.training.config import RunConfig
from jsae import jsons, pretrained
from jsae.pretrained import Description, Pretrained
from jsae.saelens.repository import is_address
from jsae.saelens.settings import CFG
from jsae.settings import ConfigError, require

if TYPE_CHECKING:
    from jsae.architectures import SAEConfig


class Starts:
    """The exported SAEs of `--init_from`. Each is read when it is first needed.

    Args:
      path: an export, a run, a folder of exports, or an address on the hub.
      recorded: descriptions by the names of sites, of a run that is resumed; None reads them from the exports.
    """

    def __init__(self, path: str, recorded: Mapping[str, Description] | None = None):
        self._path, self._recorded = path, recorded
        self._read: dict[str, Pretrained] = {}
        self._folders = self._find() if recorded is None else []

    def description(self, site: str) -> Description:
        """Return what the SAE of a site is.

        Raises:
          ConfigError: there is none for this site; lists those that there are.
          FileNotFoundError, ValueError, ImportError: it cannot be read.
        """
        if self._recorded is None:
            return self.read(site).description
        require(site in self._recorded, f"the run did not continue an SAE at {site}: resume it with its own flags")
        return self._recorded[site]

    def read(self, site: str) -> Pretrained:
        """Return the SAE of a site.

        Raises:
          ConfigError: there is none for this site, or it is not the one that the run began with.
          FileNotFoundError, ValueError, ImportError: it cannot be read.
        """
        folders = self._folders or self._find()
        path = folders[0] if len(folders) == 1 else self._of_site(folders, site)
        if path not in self._read:
            self._read[path] = pretrained.read(path)
        found = self._read[path]
        require(
            self._recorded is None or self._recorded[site].digest == found.description.digest,
            f"{path} has other weights than when the run began, and there is no checkpoint yet: start a new run",
        )
        return found

    def facts(self, sites: Iterable[str]) -> dict[str, Any]:
        """Return what a run records, by the names of its sites."""
        starts = {site: self.description(site).to_json() for site in dict.fromkeys(sites)}
        return {"init_from": json.loads(json.dumps(starts))}  # lists for tuples, as a record gives them back

    def _find(self) -> list[str]:
        """Return the paths of the exports."""
        if is_address(self._path):
            return [self._path]
        from bridge.run.saes import exports_at

        return [str(folder) for folder in exports_at(Path(self._path).absolute())]

    def _of_site(self, folders: list[str], site: str) -> str:
        """Return the export of a site among several: by the name of its folder, or the hook in its metadata."""
        for folder in folders:
            if Path(folder).name == site or _hook(folder) == site:
                return folder
        names = ", ".join(Path(folder).name for folder in folders[:12])
        raise ConfigError(
            f"--init_from={self._path} has no SAE of {site}: it has {names}. Give the directory of one of them to "
            "continue from it everywhere"
        )


def find(run: Run, config: RunConfig) -> Starts | None:
    """Return what a run continues, of a resumed run as it is recorded; None if its SAEs are new.

    Raises:
      ConfigError: a record that is no run's.
      FileNotFoundError: there is no export.
    """
    if config.init_from is None:
        return None
    if not (config.resume and run.config_file.is_file()):
        return Starts(config.init_from)
    recorded = run.facts.get("init_from")
    require(
        isinstance(recorded, dict) and all(isinstance(value, dict) for value in recorded.values()),
        f"{run.config_file} does not say which SAEs the run continued",
    )
    return Starts(config.init_from, {site: pretrained.description_from_json(value) for site, value in recorded.items()})


def check(start: Description, sae: SAEConfig) -> None:
    """Check that an SAE can continue another, and name the flag that would help.

    Raises:
      ConfigError: it is of another form, kind or size.
    """
    try:
        start.check(sae)
    except ConfigError as error:
        raise ConfigError(
            f"--init_from: {error} (--activation, --target_hook, --skip and --crosscoder choose)"
        ) from None


def _hook(folder: str) -> str | None:
    """Return the hook that an export names; None where its settings cannot be read, which loading it reports."""
    try:
        metadata = jsons.read(Path(folder) / CFG).get("metadata")
    except (OSError, ValueError, AttributeError):
        return None
    return metadata.get("hook_name") if isinstance(metadata, dict) else None
