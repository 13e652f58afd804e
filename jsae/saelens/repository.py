"""SAEs in SAELens's layout on the Hugging Face hub: `hf://owner/name[@revision]/folder`."""

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from jsae import hub
from jsae.hub import is_address
from jsae.saelens import config
from jsae.saelens.settings import CFG, SCALER, WEIGHTS, WHITENING, Settings

__all__ = ["is_address", "local_folder"]

_NUMBER = 8  # bytes of the widest type that is read
_HEADER = 16 * 2**20  # bytes beside the numbers
_SHOWN = 12  # names in a message


def local_folder(path: str | Path) -> Path:
    """Download an SAE from the hub, its settings first, then the files that they need; return its local folder.

    Weights larger than the settings imply are not downloaded.

    Raises:
      ImportError: huggingface_hub is not installed.
      FileNotFoundError: there is no such repository, revision or SAE, or it is not in the local cache.
      ValueError: an invalid address, or a file that is too large.
    """
    address = hub.parse(path)

    def only_settings(listing: hub.Listing) -> tuple[PurePosixPath, list[PurePosixPath]]:
        folder = _sae_folder(address, listing)
        return folder, _within(address, listing, {folder / CFG: config.MAX_BYTES})

    def everything(listing: hub.Listing) -> tuple[PurePosixPath, list[PurePosixPath]]:
        folder = _sae_folder(address, listing)
        limits = {folder / name: limit for name, limit in _limits(settings).items()}
        return folder, _within(address, listing, limits)

    root, folder = hub.fetch(address, only_settings)
    settings = config.read(root / folder)
    root, folder = hub.fetch(address, everything)
    return root / folder


def _sae_folder(address: hub.Address, listing: hub.Listing) -> PurePosixPath:
    """Return the folder of the SAE that an address names."""
    saes = listing.holding(CFG, WEIGHTS)
    if address.folder in saes:
        return address.folder
    names = [str(folder) for folder in saes if folder.parts]
    others = f"it has {_few(names)}: name one, {hub.FORM}" if names else "the repository has none"
    raise FileNotFoundError(f"{address} is not an exported SAE, which has {CFG} and {WEIGHTS}; {others}")


def _within(address: hub.Address, listing: hub.Listing, limits: dict[PurePosixPath, int]) -> list[PurePosixPath]:
    """Return the files that exist in the repository.

    Raises:
      ValueError: one of them is larger than its limit.
    """
    names = [path for path in limits if path.name in listing.files(path.parent)]
    for path in names:
        size = listing.size(path)
        if size is not None and size > limits[path]:
            raise ValueError(
                f"{address}: {path.name} has {size:,} bytes, and at most {limits[path]:,} are fetched of what its "
                f"{CFG} describes"
            )
    return names


def _limits(settings: Settings) -> dict[str, int]:
    """Return the files of an SAE that are read, and the maximum size of each in bytes."""
    numbers = sum(math.prod(shape) for shape in settings.shapes().values()) + settings.d_sae
    return {
        CFG: config.MAX_BYTES,
        WEIGHTS: _NUMBER * numbers + _HEADER,
        SCALER: 2**16,
        WHITENING: _NUMBER * (2 * settings.d_in**2 + settings.d_in) + _HEADER,
    }


def _few(names: Sequence[str]) -> str:
    """Return the first names of a long list as a text."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
