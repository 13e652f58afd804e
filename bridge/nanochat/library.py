"""Documents that every interpreter has: the standard library's source, and what `help` says of its compiled modules."""

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

    Each document once: exact copies are dropped, as are files that hold no text (the test package has broken ones).

    Raises:
        OSError: a file that is there cannot be opened, for want of file descriptors for example.
    """
    names: list[tuple[str, bytes, Callable[[], str]]] = []
    seen: set[bytes] = set()
    for name, text, read in (*_files(), *_documentation()):
        found = digest(text)
        if text and found not in seen:
            seen.add(found)
            names.append((f"text {name} {found.hex()[:12]}", found, read))
    source = ("stdlib", hashlib.sha256("\n".join(name for name, *_ in names).encode()).hexdigest()[:12])
    return [
        Unit(name, functools.partial(_alone, name, found, read), source, content=found) for name, found, read in names
    ]


def _alone(name: str, expected: bytes, read: Callable[[], str]) -> list[Document]:
    """A document that is read again when its turn comes, and must be what it was."""
    text = read()
    if digest(text) != expected:
        raise DataChangedError(f"{name.split()[1]} of the standard library", "has changed")
    return [text]


def _files() -> Iterator[tuple[str, str, Callable[[], str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(_python_files(root)):
        name = file.relative_to(root).as_posix()
        # Third parties' packages; what the machine was built with; the reference, which comes as text below.
        if "-packages/" in name or name.startswith("_sysconfigdata") or name == "pydoc_data/topics.py":
            continue
        yield name, _read_source(file), functools.partial(_read_source, file)


def _python_files(root: Path) -> Iterator[Path]:
    """All .py files; unlike `Path.rglob`, it does not leave out silently what it cannot list."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error

    for folder, _, names in os.walk(root, onerror=refuse):
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _read_source(file: Path) -> str:
    """A source file in the encoding it declares; '' if it holds no text, or must not be read."""
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (SyntaxError, ValueError, LookupError, FileNotFoundError, PermissionError, IsADirectoryError):
        return ""


@functools.cache
def _documentation() -> tuple[tuple[str, str, Callable[[], str]], ...]:
    """What `help` says of the modules written in C, whose docstrings are in no source file, and of the language."""
    found = [(f"help({name})", text) for name, text in _compiled_module_docs()]
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}  # type: ignore[misc]
    found += [(f"topic {name}", text) for name, text in sorted(topics.items())]
    return tuple((name, text, functools.partial(str, text)) for name, text in found)


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
        except Exception:  # a module that this build lacks or that does not import here has nothing to say
            continue
        yield name, text


def _module_doc(module: Any, name: str) -> str:
    """The module's docstring and `help` of its own functions and classes; its data are the machine's, not Python's."""
    parts = [f"Help on module {name}:", inspect.getdoc(module) or ""]
    for key, member in sorted(vars(module).items()):
        # Hooks of sys are there to be replaced: what hangs there is the process's own.
        own = getattr(member, "__module__", name) in (name, None) and not key.endswith("hook")
        if own and not key.startswith("_") and (inspect.isclass(member) or inspect.isroutine(member)):
            parts.append(pydoc.plaintext.document(member, key))  # type: ignore[attr-defined]
    text = re.sub(r".\x08", "", "\n\n".join(parts))
    # What differs from process to process: the types that happen to be loaded, and addresses.
    text = re.sub(r"^ *\|  Built-in subclasses:\n(?: *\|   +\S.*\n)+ *\| *\n", "", text, flags=re.MULTILINE)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
