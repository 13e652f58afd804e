"""Checkpoints on the Hugging Face hub, or in its local cache: `hf://owner/name@revision/folder`."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from bridge.nanochat import locate
from bridge.nanochat.names import few
from jsae import hub
from jsae.hub import Address, is_address, parse

__all__ = ["Address", "find", "is_address", "parse"]


def find(path: str | Path, step: int | None = None) -> locate.Files:
    """Return the files of a checkpoint on the hub, having fetched those that a load of it reads, and no code.

    Where the hub is switched off (HF_HUB_OFFLINE=1) or out of reach, the local cache is taken.

    Args:
        path: hf://owner/name, with a revision (@main is the default) and a folder if wanted.
        step: as of `locate.find`.

    Raises:
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: there is no such repository, revision, folder or step, or it is not in the cache.
        ValueError: the address is none.
    """
    address = parse(path)

    def choose(listing: hub.Listing) -> tuple[PurePosixPath, list[PurePosixPath]]:
        tree = _Tree(listing)
        weights = _choose(tree, address, step)
        return weights, locate.needed_files(tree, weights)

    root, weights = hub.fetch(address, choose)
    return locate.beside(root / weights)


def _choose(tree: locate.Tree, address: Address, step: int | None) -> PurePosixPath:
    """Return the file of weights that an address means; it may be the file itself."""
    if address.folder.name in tree.files(address.folder.parent):
        if step is not None:
            raise ValueError(f"step={step} chooses a file in a folder, but {address} is a file: leave the step out")
        return address.folder
    return locate.choose(tree, address.folder, step, str(address))


class _Tree:
    """A repository as `locate` walks it. When files changed is not known."""

    def __init__(self, listing: hub.Listing):
        self.files, self.folders = listing.files, listing.folders

    def latest(self, folder: PurePosixPath, names: Sequence[str]) -> str:
        """Raise ValueError: nothing says which folder changed last."""
        raise ValueError(f"the repository holds several models, {few(sorted(names), 12)}: name one, {hub.FORM}")
