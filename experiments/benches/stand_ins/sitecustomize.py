"""Stand-ins for packages that the other trainers import at load and do not use in a training step.

Python imports this module at its start where its folder is on PYTHONPATH. A package that is installed is used; one of
`ABSENT` that is not becomes a module whose every attribute exists. Calling what it holds gives an object of the same
kind, so that decorators and settings at module level work. A measurement thus needs wheels of the trainers alone.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

ABSENT = frozenset(
    {
        *("babe", "circuitsvis", "datasets", "dill", "dotenv", "multiprocess", "nltk", "nnsight", "plotly"),
        *("plotly_express", "transformers_stream_generator", "umap", "wandb", "zstandard"),
    }
)


class Anything:
    """Accepts every call and has every attribute."""

    def __init__(self, *args: object, **settings: object):
        """Take anything."""

    def __call__(self, *args: object, **settings: object) -> "Anything":
        """Return another of its kind."""
        return Anything()

    def __getattr__(self, name: str) -> "Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __iter__(self) -> "Anything":
        raise TypeError("a stand-in for a package that is not installed holds nothing")


class StandIn(types.ModuleType):
    """A module whose classes, the names with a capital, and functions are made when they are asked for."""

    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Anything,), {"__module__": self.__name__}) if name[:1].isupper() else Anything()
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of `ABSENT` that nothing before it has found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for a stand-in."""
        if fullname.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return the stand-in."""
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: there is no code to run."""


sys.meta_path.append(Finder())
