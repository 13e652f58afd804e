"""Checkpoints on the Hugging Face hub or in its local cache: `hf://owner/name@revision/folder`."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from bridge.nanochat import locate
from bridge.nanochat.names import few
from jsae import hub
from jsae.hub import Address, is_address, parse

__all__ = ["Address", "find", "is_address", "parse"]


def find(path: str | Path, step: int | None = None) -> locate.Files:
    """Fetch the files of a checkpoint that `load` reads, never code, and return their local paths.

    The local cache is used in offline mode (HF_HUB_OFFLINE=1), or if the hub cannot be reached.

    Args:
        path: hf://owner/name, optionally with a revision (default: main) and a folder.
        step: see `locate.find`.

    Raises:
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: there is no such repository, revision, folder or step, or the cache lacks it.
        ValueError: the address is malformed, or does not identify one model.
    """
    address = parse(path)

    def choose(listing: hub.Listing) -> tuple[PurePosixPath, list[PurePosixPath]]:
        tree = _Tree(listing)
        weights = _choose(tree, address, step)
        return weights, locate.needed_files(tree, weights)

    root, weights = hub.fetch(address, choose)
    return locate.checkpoint_files(root / weights)


def _choose(tree: locate.Tree, address: Address, step: int | None) -> PurePosixPath:
    """Return the weights file that an address identifies, as a folder or as the file itself."""
    if address.folder.name in tree.files(address.folder.parent):
        if step is not None:
            raise ValueError(f"step={step} selects a file in a folder, but {address} is a file: omit the step")
        return address.folder
    return locate.choose(tree, address.folder, step, str(address))


class _Tree:
    """The file tree of a repository, without dates."""

    def __init__(self, listing: hub.Listing):
        self.files, self.folders = listing.files, listing.folders

    def latest(self, folder: PurePosixPath, names: Sequence[str]) -> str:
        """Raise ValueError, because the files have no dates."""
        raise ValueError(f"the repository contains several models, {few(sorted(names), 12)}: name one, {hub.FORM}")
