"""Files of repositories on the Hugging Face hub, `hf://owner/name@revision/folder`, downloaded or from the local cache.

Only files that a caller chooses are downloaded, and no code of a repository is executed. Needs the extra [hub].
"""

import dataclasses
import glob
import re
import urllib.parse
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from jsae import extras

SCHEME = "hf://"
FORM = "hf://owner/name[@revision][/folder]"
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
    """Return the parts of an hf:// address.

    Raises:
      ValueError: it is not an hf:// address; shows the form.
    """
    text = re.sub(r"^hf:/+", "", str(path)).rstrip("/")
    match = _ID.fullmatch(text)
    if match is None or text.startswith(("datasets/", "spaces/")):
        raise ValueError(f"{str(path)[:200]!r} is not a model address on the Hugging Face hub: give {FORM}")
    folder = PurePosixPath(match[3] or "")
    if ".." in folder.parts:
        raise ValueError(f"{str(path)[:200]!r} leaves its repository: give {FORM}")
    return Address(match[1], urllib.parse.unquote(match[2]) if match[2] else None, folder)


class Listing:
    """The files of a repository.

    Args:
      sizes: bytes by path; None if the size is unknown. Paths that leave the repository are left out.
    """

    def __init__(self, sizes: Mapping[str, int | None]):
        self._sizes: dict[PurePosixPath, int | None] = {}
        self._files: dict[PurePosixPath, list[str]] = {}
        self._folders: dict[PurePosixPath, dict[str, None]] = {}
        for name, size in sizes.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts:
                continue
            self._sizes[path] = size
            self._files.setdefault(path.parent, []).append(path.name)
            for folder in path.parents[:-1]:
                self._folders.setdefault(folder.parent, {})[folder.name] = None

    def files(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the files in a folder."""
        return self._files.get(folder, [])

    def folders(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the folders in a folder."""
        return list(self._folders.get(folder, {}))

    def holding(self, *names: str) -> list[PurePosixPath]:
        """Return the folders that contain files of all these names."""
        return sorted(folder for folder, files in self._files.items() if set(names) <= set(files))

    def size(self, path: PurePosixPath) -> int | None:
        """Return the size of a file in bytes; None if it is unknown."""
        return self._sizes.get(path)


Chosen = TypeVar("Chosen")
Choose = Callable[[Listing], tuple[Chosen, Sequence[PurePosixPath]]]
"""A function from the files of a repository to a choice, and the files to fetch for it."""


def fetch(address: Address, choose: Choose[Chosen]) -> tuple[Path, Chosen]:
    """Fetch the chosen files of a repository; return its local folder and the choice.

    The local cache is used in offline mode (HF_HUB_OFFLINE=1), or if the hub cannot be reached.

    Raises:
      ImportError: huggingface_hub is not installed.
      FileNotFoundError: there is no such repository or revision, or the cache lacks it; also raised by `choose`.
      OSError: the hub refuses the request.
    """
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise ImportError(f"{address} needs huggingface_hub: {extras.advice('hub')}") from error
    if constants.HF_HUB_OFFLINE:
        return _cached(address, choose, "the hub is in offline mode (HF_HUB_OFFLINE)")
    try:
        return _download(address, choose)
    except _UnreachableError as error:
        reason = f"the hub cannot be reached ({error})"
    root, chosen = _cached(address, choose, reason)
    warnings.warn(f"{reason}: loaded {address} from the local cache, {root}", stacklevel=3)
    return root, chosen


class _UnreachableError(OSError):
    """The hub did not answer."""


def _download(address: Address, choose: Choose[Chosen]) -> tuple[Path, Chosen]:
    """List the repository and download the chosen files."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    revision = address.revision or "main"
    try:
        siblings = HfApi().model_info(address.repo, revision=revision, files_metadata=True).siblings or []
        chosen, names = choose(Listing({sibling.rfilename: sibling.size for sibling in siblings[:_MAX_FILES]}))
        patterns = [glob.escape(str(name)) for name in names]
        root = Path(snapshot_download(address.repo, revision=revision, allow_patterns=patterns))
    except HfHubHTTPError as error:
        raise _explained(address, error) from error
    except Exception as error:
        if isinstance(error, _NO_ANSWER) or type(error).__module__.startswith(_HTTP_LIBRARIES):
            raise _UnreachableError(_first_line(error)) from error
        if isinstance(error, (ValueError, OSError)):
            raise
        raise OSError(f"{address} could not be fetched: {_first_line(error)}") from error
    if not all((root / name).is_file() for name in names):
        raise _UnreachableError("the download was interrupted")
    return root, chosen


def _cached(address: Address, choose: Choose[Chosen], reason: str) -> tuple[Path, Chosen]:
    """Choose among the files that were downloaded earlier."""
    root = _snapshot(address, reason)
    files = sorted(path for path in root.rglob("*") if path.is_file())[:_MAX_FILES]
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
    try:
        return root, choose(Listing(sizes))[0]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (in the local cache; {reason})") from error


def _snapshot(address: Address, reason: str) -> Path:
    """Return the folder of a repository in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(address.repo, revision=address.revision, local_files_only=True))
    except OSError as error:
        # A partial snapshot is enough if it has the chosen files.
        root = Path(getattr(error, "snapshot_path", ""))
        if root.name:
            return root
        raise FileNotFoundError(
            f"{address.repo} at revision {address.revision or 'main'} is not in the local cache, and {reason}: "
            f"download it when the hub can be reached (hf download {address.repo}), or give a local directory"
        ) from error


def _explained(address: Address, error: Exception) -> OSError:
    """Return an exception for an error of the hub that names the repository, the revision and the remedy."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    revision = address.revision or "main"
    if isinstance(error, GatedRepoError):
        problem = "is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        problem = "does not exist on the hub, or is private: check the id, or log in with `hf auth login` or HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        problem = f"has no revision {revision}: check its branches and tags"
    else:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None or status >= 500 or status == 429:
            return _UnreachableError(_first_line(error))
        return OSError(f"the hub refused {address.repo} at revision {revision}: {_first_line(error)}")
    return FileNotFoundError(f"{address.repo} (revision {revision}) {problem}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
