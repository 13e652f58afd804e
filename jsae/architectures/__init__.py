"""The architectures, and the one list of them. A user's own class needs no entry: it is named `module:Class`."""

import importlib
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


def find(name: str) -> type[SAE]:
    """Return an architecture by its name, or by `module:Class` where it is not of this package.

    Importing the module runs its code.

    Raises:
      ConfigError: there is no such name, module or class, or the class is no architecture.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    known = f"choose one of {', '.join(ARCHITECTURES)}, or give your own as module:Class"
    require(":" in name, f"unknown activation {name!r}: {known}")
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"activation {name!r} cannot be imported ({error}): {known}") from error
    require(
        isinstance(found, type) and issubclass(found, SAE) and "Config" in vars(found),
        f"{name} is no architecture: it must be a subclass of jsae.SAE with a Config of its own",
    )
    return found


def sae_config(architecture: str, d_in: int, d_sae: int, **settings: Any) -> SAEConfig:
    """Return the config of an architecture by its name, with these sizes and settings.

    Raises:
      ConfigError: no such architecture, a setting that it does not have, or a value out of range.
    """
    return config_from_json({"architecture": architecture, "d_in": d_in, "d_sae": d_sae} | settings)


def config_from_json(values: dict[str, Any]) -> SAEConfig:
    """Return the inverse of `SAEConfig.to_json`.

    Raises:
      ConfigError: no such architecture, a name that is no setting of it, or a value out of range.
    """
    require("architecture" in values, f"an SAE's config needs an architecture: {', '.join(ARCHITECTURES)}")
    rest = {name: value for name, value in values.items() if name != "architecture"}
    return find(values["architecture"]).Config.from_json(rest)


def make(config: SAEConfig, *, key: Key[Array, ""], b_dec: Float[Array, " o"] | None = None) -> SAE:
    """Return a freshly initialised SAE of the config's architecture."""
    return config.sae(config, key=key, b_dec=b_dec)
