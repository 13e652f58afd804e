"""Fetch checkpoints from the Hugging Face hub or its local cache: `hf://owner/name@revision/folder`."""

import dataclasses
import glob
import re
import urllib.parse
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from bridge.nanochat import locate
from bridge.nanochat.names import few

SCHEME = "hf://"
_FORM = "hf://owner/name[@revision][/folder]"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_ID = re.compile(rf"({_PART}/{_PART})(?:@(refs/(?:pr/\d+|convert/[^/]+)|[^/@]+))?(?:/(.+))?")
_MAX_FILES = 100_000
_NO_ANSWER = (ConnectionError, TimeoutError)
_HTTP_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3")


@dataclasses.dataclass(frozen=True)
class Address:
    """The parts of an hf:// address."""

    repo: str
    revision: str | None
    folder: PurePosixPath

    @property
    def name(self) -> str:
        """A display name of the model: the last part of the address, without its revision."""
        return self.folder.name or self.repo.partition("/")[2]

    def __str__(self) -> str:
        revision = f"@{urllib.parse.quote(self.revision, safe='')}" if self.revision else ""
        folder = f"/{self.folder}" if self.folder.parts else ""
        return f"{SCHEME}{self.repo}{revision}{folder}"


def is_address(path: object) -> bool:
    """Return whether a path is an address on the hub."""
    return isinstance(path, (str, Path)) and str(path).startswith((SCHEME, "hf:/"))  # Path("hf://x") is hf:/x


def parse(path: str | Path) -> Address:
    """Return the parts of an hf:// address. Raises ValueError, which shows the form, for anything else."""
    text = re.sub(r"^hf:/+", "", str(path)).rstrip("/")
    match = _ID.fullmatch(text)
    if match is None or text.startswith(("datasets/", "spaces/")):
        raise ValueError(f"{str(path)[:200]!r} is not a model address on the Hugging Face hub: give {_FORM}")
    folder = PurePosixPath(match[3] or "")
    if ".." in folder.parts:
        raise ValueError(f"{str(path)[:200]!r} leaves its repository: give {_FORM}")
    return Address(match[1], urllib.parse.unquote(match[2]) if match[2] else None, folder)


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
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise ImportError(f"{address} needs huggingface_hub: pip install 'jsae[hub]'") from error
    if constants.HF_HUB_OFFLINE:
        return _in_cache(address, step, "the hub is in offline mode (HF_HUB_OFFLINE)")
    try:
        return _fetch(address, step)
    except _UnreachableError as error:
        why = f"the hub cannot be reached ({error})"
    files = _in_cache(address, step, why)
    warnings.warn(f"{why}: loaded {address} from the local cache, {files.weights}", stacklevel=3)
    return files


class _UnreachableError(OSError):
    """The hub did not answer."""


def _fetch(address: Address, step: int | None) -> locate.Files:
    """List the repository, choose a checkpoint and fetch its files."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    revision = address.revision or "main"
    try:
        listed = HfApi().model_info(address.repo, revision=revision).siblings or []
        tree = _Listing([sibling.rfilename for sibling in listed[:_MAX_FILES]])
        weights = _choose(tree, address, step)
        patterns = [glob.escape(str(name)) for name in locate.needed_files(tree, weights)]
        root = Path(snapshot_download(address.repo, revision=revision, allow_patterns=patterns))
    except HfHubHTTPError as error:
        raise _explained(address, error) from error
    except Exception as error:
        if isinstance(error, _NO_ANSWER) or type(error).__module__.startswith(_HTTP_LIBRARIES):
            raise _UnreachableError(_first_line(error)) from error
        if isinstance(error, (ValueError, OSError)):
            raise
        raise OSError(f"{address} could not be fetched: {_first_line(error)}") from error
    if not (root / weights).is_file():
        raise _UnreachableError("the download was interrupted")
    return locate.checkpoint_files(root / weights)


def _in_cache(address: Address, step: int | None, why: str) -> locate.Files:
    """Return the files of a checkpoint in the local cache; `why` says in errors why it is used."""
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(address.repo, revision=address.revision, local_files_only=True))
    except OSError as error:
        # A partial snapshot is enough if it has the files of this checkpoint.
        root = Path(getattr(error, "snapshot_path", ""))
        if root.name:
            return _from_snapshot(root, address, step, why)
        raise FileNotFoundError(
            f"{address.repo} at revision {address.revision or 'main'} is not in the local cache, and {why}: download "
            f"it when the hub can be reached (hf download {address.repo}), or give a local directory"
        ) from error
    return _from_snapshot(root, address, step, why)


def _from_snapshot(root: Path, address: Address, step: int | None, why: str) -> locate.Files:
    """Return the files of a checkpoint in a snapshot of the repository."""
    try:
        weights = _choose(_Snapshot(root), address, step)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (in the local cache; {why})") from error
    return locate.checkpoint_files(root / weights)


def _choose(tree: locate.Tree, address: Address, step: int | None) -> PurePosixPath:
    """Return the weights file that an address identifies, as a folder or as the file itself."""
    if address.folder.name in tree.files(address.folder.parent):
        if step is not None:
            raise ValueError(f"step={step} selects a file in a folder, but {address} is a file: omit the step")
        return address.folder
    return locate.choose(tree, address.folder, step, str(address))


class _Listing:
    """The file tree of a repository, from the hub's list of file names."""

    def __init__(self, names: Sequence[str]):
        self._files: dict[PurePosixPath, list[str]] = {}
        self._folders: dict[PurePosixPath, dict[str, None]] = {}
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts:
                continue
            self._files.setdefault(path.parent, []).append(path.name)
            for folder in path.parents[:-1]:
                self._folders.setdefault(folder.parent, {})[folder.name] = None

    def files(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the files in a folder."""
        return self._files.get(folder, [])

    def folders(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the folders in a folder."""
        return list(self._folders.get(folder, {}))

    def latest(self, folder: PurePosixPath, names: Sequence[str]) -> str:
        """Raise ValueError, because the list has no dates."""
        raise _ambiguous(names)


class _Snapshot(locate.Disk):
    """The file tree of a downloaded snapshot. The times of its files are those of the download."""

    def latest(self, folder: PurePosixPath, names: Sequence[str]) -> str:
        """Raise ValueError, because the files have no dates of their own."""
        raise _ambiguous(names)


def _ambiguous(names: Sequence[str]) -> ValueError:
    return ValueError(f"the repository contains several models, {few(sorted(names), 12)}: name one, {_FORM}")


def _explained(address: Address, error: Exception) -> OSError:
    """Return an exception for an error of the hub that names the repository, the revision and the remedy."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    revision = address.revision or "main"
    if isinstance(error, GatedRepoError):
        why = "is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        why = "does not exist on the hub, or is private: check the id, or log in with `hf auth login` or HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        why = f"has no revision {revision}: check its branches and tags"
    else:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None or status >= 500 or status == 429:
            return _UnreachableError(_first_line(error))
        return OSError(f"the hub refused {address.repo} at revision {revision}: {_first_line(error)}")
    return FileNotFoundError(f"{address.repo} (revision {revision}) {why}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
