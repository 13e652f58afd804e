"""Fields of the settings that commands and runs have in common: their help, their ranges, their paths."""

import dataclasses
from typing import Any, Literal

from bridge import locations
from jsae.settings import Range, check_fields

STEP = Range(0, 2**31 - 1, "be a step from 0")
CONTEXT = Range(2, 2**24, f"be 2 to {2**24} tokens, or less where the model takes less")
LONG_SEED = Range(0, 2**63 - 1, "lie in [0, 2**63)")
ExcludeTokens = Literal["bos", "special", "nothing"]
"""As in `bridge.selection`, which takes torch to import."""


def flag(default: Any, text: str, range: Range | None = None) -> Any:
    """Return a dataclass field with a default, the help that its flag shows and the range that `settle` holds it to."""
    return dataclasses.field(default=default, metadata={"help": text, "range": range})


def settle(config: Any) -> None:
    """Expand the paths of a frozen config in place and check its numbers: what every `__post_init__` begins with.

    Raises:
      ConfigError: a path with an unknown user or variable, a number out of its range; names the field.
    """
    locations.expand_fields(config)
    check_fields(config)
