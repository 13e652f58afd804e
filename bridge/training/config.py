"""Settings of a training run, and the configurations of the SAEs that they describe."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridge.settings import settle
from bridge.training.checks import SWEPT, UNSET, check, check_used
from bridge.training.settings import RunSettings, settings_of
from jsae.config import TrainConfig
from jsae.settings import require

if TYPE_CHECKING:
    from jsae.architectures import SAEConfig
    from jsae.pretrained import Description

_WIDEST = 2**20  # stands for the width of a model that is not known yet


@dataclass(frozen=True)
class RunConfig(RunSettings):
    """Settings of a run: one pass over text that trains one SAE, or several where settings have several values.

    The command line has a flag for every field, and error messages name fields as flags (`--k`). `bridge.train` also
    takes the fields as keyword arguments, with single values in the place of tuples.

    Raises:
      ConfigError: settings that cannot work; names the field, what was given and what is allowed.
    """

    def __post_init__(self) -> None:
        settle(self)
        if self.activation is None:  # there is no exported form of a TopK transcoder
            object.__setattr__(self, "activation", "topk" if self.target_hook is None else "batchtopk")
        if self.init_from is None:
            for name, value in UNSET.items():
                object.__setattr__(self, name, getattr(self, name) or value)
        check(self)
        for variant in self.variants():  # before the model is loaded
            variant.train_config()
            variant.check_sae()

    def check_given(self, names: Collection[str]) -> None:
        """Check flags that were given, be it with their defaults: the architecture must have them.

        Raises:
          ConfigError: names the flag, and those that the architecture has.
        """
        check_used(self, names)

    def variants(self) -> Iterator["RunConfig"]:
        """Yield the run with every combination of its values: one value for each setting that takes several."""
        values = [getattr(self, name) or (None,) for name in SWEPT]
        for chosen in itertools.product(*values):
            one: dict[str, Any] = {name: () if v is None else (v,) for name, v in zip(SWEPT, chosen, strict=True)}
            yield self if all(getattr(self, n) == v for n, v in one.items()) else dataclasses.replace(self, **one)

    def variant_name(self, variant: "RunConfig") -> str:
        """Return the folder of a variant in the run: the values that differ, such as k32-seed1, or ""."""
        several = [name for name in SWEPT if len(getattr(self, name)) > 1]
        return "-".join(SWEPT[name] + _shortest(getattr(variant, name)[0]) for name in several)

    def check_sae(self) -> None:
        """Check the settings of a variant's SAE that do not depend on the width of the model.

        Raises:
          ConfigError: a setting that no model's SAE can have.
        """
        # k and what goes with it, and nested widths, are checked later, against the true width of the SAE.
        known = {"hierarchical_k": (), "nested_widths": self._default_widths(_WIDEST)}
        layers = 2 if self.exclusive_latents else 1
        self._sae_config(_WIDEST // layers, _WIDEST, layers, k=1, exclusive=min(self.exclusive_latents, 1), **known)

    def sae_config(self, width: int, layers: int = 1, start: "Description | None" = None) -> "SAEConfig":
        """Return the configuration of a variant's SAE for a model of this width.

        Args:
          width: of the model.
          layers: those of a crosscoder.
          start: the SAE that is continued, which has the settings that were not given.

        Raises:
          ConfigError: settings that no SAE of this size can have, or that contradict those of the SAE to continue.
        """
        if start is None:
            return self._sae_config(width, width * self.expansion_factor, layers)
        d_sae = start.d_sae
        require(
            self.expansion_factor in (None, d_sae / width),
            f"--expansion_factor={self.expansion_factor} of width {width} contradicts {start.path} of {d_sae} latents: "
            "leave it out",
        )
        require(
            "k" not in settings_of(self.architecture) or bool(self.k) or start.k is not None,
            f"{start.path} does not say how many latents were active per token: give --k",
        )
        known: dict[str, Any] = {} if self.k or start.k is None else {"k": start.k}
        known |= {} if self.nested_widths or not start.nested_widths else {"nested_widths": start.nested_widths}
        most = self.k[0] if self.k else start.k or 0
        inner = tuple(size for size in start.hierarchical_k if size <= most)
        known |= {} if self.hierarchical_k or not inner else {"hierarchical_k": inner}
        return self._sae_config(width, d_sae, layers, **known)

    def _sae_config(self, width: int, d_sae: int, layers: int, **replaced: Any) -> "SAEConfig":
        settings: dict[str, Any] = {
            "k": self.k[0] if self.k else None,
            "hierarchical_k": self.hierarchical_k,
            "nested_widths": self.nested_widths or self._default_widths(d_sae),
            "l1_coefficient": self.l1_coefficient[0],
            "sparsity_penalty": self.sparsity_penalty,
            "l0_coefficient": self.l0_coefficient[0],
            "jump_recipe": self.jump_recipe,
            "bandwidth": self.bandwidth,
            "target_l0": self.target_l0[0] if self.target_l0 else None,
        } | replaced
        own = {name: value for name, value in settings.items() if name in settings_of(self.architecture)}
        own = {"exclusive": self.exclusive_latents} | own
        d_out = None if self.target_hook is None else width
        return self.architecture.Config(
            width * layers, d_sae, d_out=d_out, skip=self.skip, layers=layers, aligned=self.aligned, **own
        )

    @staticmethod
    def _default_widths(d_sae: int) -> tuple[int, ...]:
        return tuple(sorted({max(d_sae // part, 1) for part in (16, 8, 4, 2)} - {d_sae}))

    def train_config(self) -> TrainConfig:
        """Return the settings of a variant's training.

        Raises:
          ConfigError: settings that cannot work.
        """
        shared = {
            name: getattr(self, name)
            for name in (
                "num_activations",
                "batch_size",
                "warmup_fraction",
                "decay_fraction",
                "sparsity_warmup_fraction",
                "k_start",
                "k_anneal_fraction",
                "average_fraction",
                "matmul_dtype",
                "resample_every",
            )
        }
        return TrainConfig(
            **shared,
            learning_rate=self.learning_rate[0] if self.learning_rate else None,
            dead_after=self.dead_after,
            seed=self.seed[0],
        )


def _shortest(value: int | float) -> str:
    """Return the shortest text from which the number can be read back."""
    return short if float(short := f"{value:g}") == value else repr(value)
