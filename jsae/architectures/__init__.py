"""The architectures, and the one list of them. A user's own class needs no entry: it is named `module:Class`."""

import functools
import importlib
import sys
from collections.abc import Mapping
from typing import Any

from jax import Array
from jaxtyping import Float, Key

from jsae.architectures.base import SAE, Context, Forward, SAEConfig, Statistic
from jsae.architectures.penalised import Gated, JumpReLU, ReLU
from jsae.architectures.selecting import AbsTopK, BatchTopK, Matryoshka, TopK
from jsae.settings import ConfigError, require

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "AbsTopK",
    "BatchTopK",
    "Context",
    "Forward",
    "Gated",
    "JumpReLU",
    "Matryoshka",
    "ReLU",
    "SAEConfig",
    "Statistic",
    "TopK",
    "config_from_json",
    "find",
    "make",
    "sae_config",
]

ARCHITECTURES: Mapping[str, type[SAE]] = {
    sae.name: sae for sae in (TopK, BatchTopK, Matryoshka, AbsTopK, ReLU, Gated, JumpReLU)
}
"""Every architecture of this package, by name."""


def find(name: str, *, load: bool = True) -> type[SAE]:
    """Return an architecture by its name, or by `module:Class` where it is not of this package.

    Args:
      name: the name.
      load: whether a module that is not imported yet may be, which runs its code.

    Raises:
      ConfigError: there is no such name, module or class, or the class is no architecture.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    known = f"choose one of {', '.join(ARCHITECTURES)}, or give your own as module:Class"
    require(":" in name, f"unknown activation {name!r}: {known}")
    module, _, path = name.partition(":")
    require(load or module in sys.modules, f"activation {name!r} is of a module that is not loaded: import {module}")
    try:
        found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # another's module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"activation {name!r} cannot be imported ({reason}): {known}") from error
    require(
        isinstance(found, type) and issubclass(found, SAE) and "Config" in vars(found),
        f"{name} is no architecture: it must be a subclass of jsae.architectures.SAE with a Config of its own",
    )
    return found


def sae_config(architecture: str, d_in: int, d_sae: int, **settings: Any) -> SAEConfig:
    """Return the config of an architecture by its name, with these sizes and settings.

    Raises:
      ConfigError: no such architecture, a setting that it does not have, or a value out of range.
    """
    return find(architecture).Config.from_json({"d_in": d_in, "d_sae": d_sae} | settings)


def config_from_json(values: dict[str, Any]) -> SAEConfig:
    """Return the inverse of `SAEConfig.to_json`.

    Nothing is imported: the module of an architecture `module:Class` must have been.

    Raises:
      ConfigError: no such architecture, a name that is no setting of it, or a value out of range.
    """
    name = values.get("architecture")
    require(isinstance(name, str), f"an SAE's config needs an architecture: {', '.join(ARCHITECTURES)}")
    return find(name, load=False).Config.from_json(values)


def make(config: SAEConfig, *, key: Key[Array, ""], b_dec: Float[Array, " o"] | None = None) -> SAE:
    """Return a freshly initialised SAE of the config's architecture."""
    return config.sae(config, key=key, b_dec=b_dec)
