"""Names of a package that are imported when they are first used."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def names(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`.

    Args:
      package: its name.
      places: where every name is: "module:attribute", or "module" of a module.
    """

    def get(name: str) -> Any:
        """Import a name; raise AttributeError where there is none."""
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = places[name].partition(":")
        value = importlib.import_module(module)
        value = getattr(value, attribute) if attribute else value
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:
        """Return the names of the package, with those that are not imported yet."""
        return sorted({*vars(sys.modules[package]), *places})

    return get, listing
