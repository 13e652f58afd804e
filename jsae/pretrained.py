"""Exported SAEs that training continues: what they are, whether an architecture can continue them, their weights."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsae import saelens
from jsae.architectures import ARCHITECTURES, SAE, SAEConfig
from jsae.architectures.selecting import BatchSelecting
from jsae.saelens import Plain
from jsae.saelens.settings import ENCODERS, RANKED, TRANSCODERS
from jsae.settings import Json, check_fields, require

_SAME_THRESHOLD = 0.1  # relative standard deviation of thresholds that one threshold may stand for
_SAME_NORM = 0.01  # relative difference of decoder norms that is not worth a note


@dataclasses.dataclass(frozen=True)
class Description(Json):
    """Properties of an exported SAE that training which continues it depends on, without its weights."""

    path: str
    """Where it was read from."""
    digest: str
    """SHA-256 of its weights in plain form, and of k."""
    form: str
    """SAELens's name of its encoder's form, a key of `jsae.saelens.settings.ENCODERS`."""
    d_in: int
    """Width of the input, of all layers together."""
    d_sae: int
    d_out: int | None
    """Width of a transcoder's target; None of an autoencoder."""
    skip: bool
    layers: int
    k: int | None
    """Active latents per token, where the file says it."""
    nested_widths: tuple[int, ...] = ()
    """Widths of inner SAEs, where the file says them."""
    hierarchical_k: tuple[int, ...] = ()
    """Numbers of largest latents that reconstruct by themselves, where the file says them."""
    threshold_spread: float = 0.0
    """Standard deviation of thresholds over their mean, with unit decoder rows; 0 without thresholds."""
    norm_spread: float = 0.0
    """Largest relative deviation of a decoder norm from their mean, of forms that rank latents; else 0."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def kind(self) -> str:
        """The kind of SAE, for messages."""
        if self.d_out is not None:
            return f"a {self.form} transcoder{' with a skip path' if self.skip else ''}"
        return f"a {self.form} crosscoder of {self.layers} layers" if self.layers > 1 else f"a {self.form} SAE"

    @property
    def architectures(self) -> list[str]:
        """The names of this package's architectures that can continue it."""
        return [name for name, sae in ARCHITECTURES.items() if self._obstacle(sae) is None]

    @property
    def note(self) -> str | None:
        """A change that starting to train makes, or None: training keeps decoder rows at norm 1."""
        if self.norm_spread <= _SAME_NORM:
            return None
        return (
            f"{self.path}: norms of decoder rows differ by up to {self.norm_spread:.0%} from their mean. Training "
            "keeps them at 1, so latents are ranked by what they add to the reconstruction, and others may be selected"
        )

    def check(self, config: SAEConfig) -> None:
        """Check that an SAE with this config can continue it.

        Raises:
          ConfigError: it is of another form, kind or size; says what it is, and which architectures can. Or training
            would align it.
        """
        require(not config.aligned, f"{self.path} would be another SAE once it is aligned: leave out aligned")
        obstacle = self._obstacle(config.sae)
        names = ", ".join(self.architectures) or "none of this package"
        require(
            obstacle is None, f"{self.path} is {self.kind}, {obstacle}: architectures that can continue it are {names}"
        )
        other = f"{self.path} is {self.kind}, and this run trains "
        require(
            (self.d_out is not None) == config.is_transcoder,
            f"{other}{'a transcoder' if config.is_transcoder else 'no transcoder'}",
        )
        require(self.skip == config.skip, f"{other}one {'with' if config.skip else 'without'} a skip path")
        require(self.layers == config.layers, f"{other}one of {config.layers} layer(s)")
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae} | ({} if self.d_out is None else {"d_out": self.d_out})
        wanted = {name: getattr(config, name) for name in sizes}
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        require(
            sizes == wanted,
            f"{self.path} has {text}, and this run {', '.join(f'{name}={size}' for name, size in wanted.items())}: "
            "sizes are those of the SAE that is continued",
        )

    def _obstacle(self, sae: type[SAE]) -> str | None:
        """Return why an architecture cannot continue it; None if it can."""
        if sae.form != self.form:
            return f"which {sae.name}, a {sae.form} SAE in its exported form, cannot continue"
        if self.threshold_spread > _SAME_THRESHOLD and issubclass(sae, BatchSelecting):
            return (
                f"whose thresholds differ by {self.threshold_spread:.0%}, which {sae.name} with one threshold for all "
                "latents cannot continue"
            )
        return None


def description_from_json(values: Any) -> Description:
    """Return the inverse of `Description.to_json`, also from JSON, whose lists stand for tuples.

    Raises:
      ConfigError: no object, a name that is no field, a field that is missing, or a value of another type.
    """
    if isinstance(values, dict):
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Description.from_json(values)


class Pretrained(NamedTuple):
    """An exported SAE that training continues."""

    description: Description
    plain: Plain

    def check(self, config: SAEConfig) -> None:
        """Check that an SAE with this config can continue it (`Description.check`)."""
        self.description.check(config)


def read(path: str | Path) -> Pretrained:
    """Read an exported SAE to continue from.

    Args:
      path: as `jsae.load` takes it.

    Raises:
      FileNotFoundError, ValueError, ImportError: as of `jsae.load`.
      ConfigError: a decoder row of norm 0, which no step could normalise.
    """
    return from_plain(saelens.read(path), str(path))


def from_plain(plain: Plain, path: str) -> Pretrained:
    """Return an SAE in plain form with its description; `path` is its name in messages.

    Raises:
      ConfigError: a decoder row of norm 0, which no step could normalise.
    """
    cfg, weights = plain.cfg, {name: np.asarray(weight) for name, weight in plain.weights.items()}
    architecture = cfg["architecture"]
    norms = np.linalg.norm(weights["W_dec"].astype(np.float64), axis=1)
    zeros = int((norms == 0).sum())
    require(zeros == 0, f"{path}: {zeros} decoder rows have norm 0: training cannot continue this SAE")
    thresholds = weights.get("threshold", np.ones(1)) * (norms if "threshold" in weights else 1)
    mean = float(np.mean(thresholds))
    details = _details(cfg)
    description = Description(
        path=path,
        digest=_digest(weights, cfg.get("k")),
        form=TRANSCODERS.get(architecture, architecture),
        d_in=cfg["d_in"],
        d_sae=cfg["d_sae"],
        d_out=cfg["d_out"] if architecture in TRANSCODERS else None,
        skip="W_skip" in weights,
        layers=plain.layers,
        k=cfg.get("k") or _size(details.get("k"), cfg["d_sae"]),
        nested_widths=_increasing(details.get("nested_widths"), cfg["d_sae"]),
        hierarchical_k=_increasing(details.get("hierarchical_k"), cfg["d_sae"]),
        threshold_spread=float(np.std(thresholds)) / mean if mean > 0 else 0.0,
        norm_spread=float(np.abs(norms / norms.mean() - 1).max()) if architecture in RANKED else 0.0,
    )
    return Pretrained(description, Plain(cfg, weights, plain.layers))


def place(sae: SAE, weights: Mapping[str, Array | np.ndarray], scale: Array, scale_out: Array) -> None:
    """Set the weights of an SAE to those of an exported one, in the units of training: the inverse of the export.

    With y' = scale_out y and n = |scale_out W_dec|, the norm of each row: W_dec' = scale_out W_dec / n,
    W_enc' = n W_enc / scale, and biases and thresholds of latents are multiplied by n (`jsae.export.fold`).

    Args:
      sae: whose weights are set.
      weights: of `jsae.saelens.Plain`.
      scale: the factor on the input in training.
      scale_out: the factor on the target in training.
    """
    exact = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
    rows: Float[Array, "f o"] = exact["W_dec"] * scale_out
    norms = jnp.linalg.norm(rows, axis=1)
    sae.W_dec[...] = rows / norms[:, None]
    sae.W_enc[...] = exact["W_enc"].T / scale * norms[:, None]
    sae.b_dec[...] = exact["b_dec"] * scale_out
    if sae.config.skip:
        sae.W_skip[...] = exact["W_skip"] / scale * jnp.reshape(scale_out, (-1, 1))
    names = ENCODERS[sae.form]
    sae.set_inference_arrays({n: exact[n] if n == "r_mag" else exact[n] * norms for n in names})


def details(config: SAEConfig) -> dict[str, Any]:
    """Return the settings of an SAE that its exported form does not show, and that training which continues it needs.

    SAELens keeps such settings in the metadata, as `training_architecture_details`.
    """
    if config.k is None:
        return {}
    names = ("nested_widths", "hierarchical_k")
    found = {name: list(values) for name in names if (values := getattr(config, name, ()))}
    return found | ({} if config.sae.form in RANKED else {"k": config.k})


def _details(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = cfg.get("metadata")
    found = metadata.get("training_architecture_details") if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


def _size(value: Any, most: int) -> int | None:
    """Return a number of latents from a file; None if it is none."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    return int(value) if whole and 1 <= value <= most else None


def _increasing(value: Any, d_sae: int) -> tuple[int, ...]:
    """Return increasing numbers of latents from a file; () if they are none."""
    sizes = [_size(size, d_sae) for size in value] if isinstance(value, list) and len(value) <= d_sae else []
    increasing = None not in sizes and sizes == sorted(set(sizes))
    return tuple(sizes) if increasing else ()


def _digest(weights: Mapping[str, np.ndarray], k: int | None) -> str:
    digest = hashlib.sha256(str(k).encode())
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name], np.float32)
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
