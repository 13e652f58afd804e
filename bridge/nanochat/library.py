"""Documents that every Python installation has: the standard library's source and the documentation in `help`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import pydoc
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bridge.nanochat.contents import DataChangedError
from bridge.nanochat.documents import Document, Unit, digest


def units() -> list[Unit]:
    """Return a unit per document of the running interpreter's library: Python source, docs, the language reference.

    Exact copies are dropped, and so are files without text (the test package contains broken ones).

    Raises:
        OSError: an existing file cannot be opened, for example for lack of file descriptors.
    """
    entries: list[tuple[str, bytes, Callable[[], str]]] = []
    seen: set[bytes] = set()
    for name, text, read in (*_files(), *_documentation()):
        content = digest(text)
        if text and content not in seen:
            seen.add(content)
            entries.append((f"text {name} {content.hex()[:12]}", content, read))
    source = ("stdlib", hashlib.sha256("\n".join(name for name, *_ in entries).encode()).hexdigest()[:12])
    return [
        Unit(name, functools.partial(_read_checked, name, content, read), source, content=content, where=_title(name))
        for name, content, read in entries
    ]


def _title(name: str) -> str:
    """Return the name of a document without its kind and digest."""
    return name.split(" ", 1)[1].rsplit(" ", 1)[0]


def _read_checked(name: str, expected: bytes, read: Callable[[], str]) -> list[Document]:
    """Read a document again. Raises `DataChangedError` if its digest is not the expected one."""
    text = read()
    if digest(text) != expected:
        raise DataChangedError(f"{name.split()[1]} of the standard library", "has changed")
    return [text]


def sources() -> Iterator[tuple[str, str]]:
    """Yield path, relative to the library, and text of every Python source file of the library."""
    for name, text, _ in _files():
        yield name, text


def _files() -> Iterator[tuple[str, str, Callable[[], str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(_python_files(root)):
        name = file.relative_to(root).as_posix()
        # Third-party packages; settings of the build; the language reference, which `_documentation` yields as text.
        if "-packages/" in name or name.startswith("_sysconfigdata") or name == "pydoc_data/topics.py":
            continue
        yield name, _read_source(file), functools.partial(_read_source, file)


def _python_files(root: Path) -> Iterator[Path]:
    """Yield all .py files. Raises OSError for a directory that cannot be listed, where `Path.rglob` skips it."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error

    for folder, _, names in os.walk(root, onerror=refuse):
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _read_source(file: Path) -> str:
    """Return a source file decoded with its declared encoding; '' if it is not text or reading is not permitted."""
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (SyntaxError, ValueError, LookupError, FileNotFoundError, PermissionError, IsADirectoryError):
        return ""


@functools.cache
def _documentation() -> tuple[tuple[str, str, Callable[[], str]], ...]:
    """Return (name, text, read) of the `help` texts of modules written in C and of the language reference."""
    entries = [(f"help({name})", text) for name, text in _compiled_module_docs()]
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}  # type: ignore[misc]
    entries += [(f"topic {name}", text) for name, text in sorted(topics.items())]
    return tuple((name, text, functools.partial(str, text)) for name, text in entries)


def _compiled_module_docs() -> Iterator[tuple[str, str]]:
    for name in sorted(sys.stdlib_module_names | set(sys.builtin_module_names)):
        if name.startswith(("_test", "_xx", "xx", "_ctypes_test")):
            continue
        try:
            spec = importlib.util.find_spec(name)
            if spec is None or not spec.loader or (spec.origin or "").endswith((".py", ".pyc")):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some are deprecated
                text = _module_doc(importlib.import_module(name), name)
        except Exception:  # this build lacks the module, or it cannot be imported on this platform
            continue
        yield name, text


def _module_doc(module: Any, name: str) -> str:
    """Return the docstring of a module and the `help` of its functions and classes, but no machine-dependent data."""
    parts = [f"Help on module {name}:", inspect.getdoc(module) or ""]
    for key, member in sorted(vars(module).items()):
        # Hooks of sys may have been replaced by this process.
        own = getattr(member, "__module__", name) in (name, None) and not key.endswith("hook")
        if own and not key.startswith("_") and (inspect.isclass(member) or inspect.isroutine(member)):
            parts.append(pydoc.plaintext.document(member, key))  # type: ignore[attr-defined]
    text = re.sub(r".\x08", "", "\n\n".join(parts))
    # Remove what differs between processes: the subclasses loaded so far, and memory addresses.
    text = re.sub(r"^ *\|  Built-in subclasses:\n(?: *\|   +\S.*\n)+ *\| *\n", "", text, flags=re.MULTILINE)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
