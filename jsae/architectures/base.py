"""The abstract SAE that every architecture extends, its settings, and the inputs and results of a forward pass.

An SAE is a `flax.nnx` module used as a plain pytree: `jax.jit`, `jax.grad` and optax take it as it is, and calling it
changes nothing in it. Shapes: n tokens, d = d_in, f = d_sae, o = d_out, which is d_in unless it is a transcoder.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from jsae import jsons
from jsae.architectures.forward import Context, Forward
from jsae.control import Law
from jsae.ops import Codes, Input, Latents, Ops, Reference
from jsae.ops.formulas import Formula, Maps, PerLatent
from jsae.saelens.settings import ENCODERS
from jsae.settings import FACTOR, at_least, check_fields, number, read_fields, require

Arrays = dict[str, Array | np.ndarray]
"""Arrays by name."""

MOST_WEIGHTS = 2**41
"""Of encoder and decoder together: 8 TiB."""
INIT_ROWS = 2048
"""Tokens of the sample that the encoder's factor is fitted on."""
_USUAL_L0 = 32  # where an SAE has neither k nor a target
_RIDGE = 1e-3  # relative to the mean variance of a channel


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """Sizes of an SAE. An architecture's own settings are the fields of its `Config`, a subclass of this one.

    Coefficients are for inputs with a mean squared norm of `d_in`.

    Raises:
      ConfigError: sizes that make no SAE.
    """

    d_in: int = dataclasses.field(metadata={"range": at_least(1, 2**24)})
    d_sae: int = dataclasses.field(metadata={"range": at_least(1, 2**28)})
    d_out: int | None = number(None, at_least(1, 2**24))
    """Width of the target of a transcoder; None is an autoencoder."""
    skip: bool = False
    """Whether a transcoder has a linear path beside its latents."""
    layers: int = number(1, at_least(1, 2**12))
    """Layers that a crosscoder reads side by side: d_in is their widths together."""
    aligned: bool = False
    """Keep the inner product of every latent's encoder and decoder row at 1: aligned training (arXiv 2605.18629)."""
    exclusive: int = number(0, at_least(0, 2**28))
    """Latents of every layer of a crosscoder that read and write this layer alone (arXiv 2602.11729): latent j is of
    layer j // exclusive while there is such a layer, and of all layers otherwise."""
    decoder_rate: float = number(1.0, FACTOR)
    """Factor on the learning rate of decoder rows, which keep unit norm and so turn by little more than the rate."""
    encoder_start: float = number(1.0, FACTOR)
    """Factor on the scale at which the encoder starts; at 1 the first reconstruction fits best. Adam moves weights by
    the rate, so that the rows of a smaller encoder turn faster."""

    sae: ClassVar[type["SAE"]]
    """The architecture that the settings are of."""
    rate_scale: ClassVar[float] = 1.0
    """Factor on the default learning rate (`TrainConfig.default_rate`), measured in sweeps."""
    tail_exponent: ClassVar[float] = 1 / 3
    """Power of the heaviness of the activations' tails by which the default rate is divided (`TrainConfig`)."""
    length_exponent: ClassVar[float] = 0.0
    """Power of a run's length by which the default rate falls less than with the root of the steps (`TrainConfig`)."""
    width_exponent: ClassVar[float] = 0.0
    """Power of d_in by which the default rate falls faster than with the root of d_in (`TrainConfig`)."""
    density_exponent: ClassVar[float] = 0.0
    """Power of k / d_sae by which the default rate rises less than with its cube root (`TrainConfig`)."""
    remainder_exponent: ClassVar[float] = 0.0
    """Power of the share of variance outside k principal components by which the default rate falls (`TrainConfig`)."""
    k: ClassVar[int | None] = None
    """Active latents per token, of architectures that select so many."""
    target_l0: ClassVar[float | None] = None
    """Active latents per token that a controller of the penalty aims at, of architectures that have one."""
    target_l0_fraction: ClassVar[float | None] = None
    """Fraction of the run over which it lets L0 fall to the target; None is that of `SAE.control_law`."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.d_sae * (self.d_in + self.width_out) <= MOST_WEIGHTS,
            f"d_sae={self.d_sae} latents of d_in={self.d_in} are more than {MOST_WEIGHTS} weights: lower d_sae",
        )
        require(self.d_in % self.layers == 0, f"d_in={self.d_in} cannot be {self.layers} layers of one width")
        require(
            not (self.aligned and self.is_transcoder), "a transcoder's encoder and decoder rows have no inner product"
        )
        require(not self.skip or self.is_transcoder, "only a transcoder has a skip path: give a target hook")
        require(not self.exclusive or self.layers > 1, "only a crosscoder has exclusive latents: give several layers")
        require(
            not self.exclusive or self.exclusive * self.layers < self.d_sae,
            f"{self.exclusive} exclusive latents for each of {self.layers} layers leave none of d_sae={self.d_sae} "
            "for all layers: lower their number",
        )

    @property
    def architecture(self) -> str:
        """Name of the architecture: that of the registry, or `module:Class`."""
        return self.sae.name

    @property
    def expected_l0(self) -> float:
        """The active latents per token: k, or the target L0; 32, but at most d_sae, where neither is given."""
        return float(self.k or self.target_l0 or min(_USUAL_L0, self.d_sae))

    @property
    def is_transcoder(self) -> bool:
        """True if the target is another activation than the input."""
        return self.d_out is not None

    @property
    def width_out(self) -> int:
        """Width of the target."""
        return self.d_in if self.d_out is None else self.d_out

    def allowed(self, like: Float[Array, "f d"]) -> Bool[Array, "f d"]:
        """Return which weights of an encoder or decoder may differ from 0, given their exclusive latents."""
        owner = jnp.arange(like.shape[0])[:, None] // max(self.exclusive, 1)
        layer = jnp.arange(like.shape[1]) // (like.shape[1] // self.layers)
        return (owner >= self.layers) | (owner == layer)

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the architecture's name as plain JSON values."""
        return {"architecture": self.architecture} | dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any] | str) -> "SAEConfig":
        """Return the inverse of `to_json`; the architecture's name may be left out.

        Raises:
          ConfigError: another architecture's name, a name that is no setting, or one that is missing.
        """
        values = dict(jsons.loads(values) if isinstance(values, str) else values)
        own = cls.sae.name if hasattr(cls, "sae") else None
        name = values.pop("architecture", own)
        require(
            name == own is not None,
            f"these settings are of {name!r}: read them with jsae.architectures.config_from_json",
        )
        return read_fields(cls, {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


class Statistic(nnx.Variable):
    """A number that training updates but no gradient changes."""


class SAE(nnx.Module):
    """An architecture: its settings, encoder and penalty. A subclass is final and declares everything about itself.

    `W_enc` is (f, d), `W_dec` (f, o), `b_dec` (o,), arrays of latents (f,), a transcoder's `W_skip` (o, d) if it has a
    skip path. Decoder rows have unit norm. A subclass has

    - `Config`: a frozen dataclass of its settings, a subclass of `SAEConfig`;
    - `form`: the architecture that SAELens knows its inference form by;
    - `sparse`: whether `activate` returns `Codes`;
    - `initial_latents`, `activate`, `penalty`, `inference_arrays`: what these methods say;

    and where they differ from the defaults `biases`, `maps`, `rate_factors`, `control_law`, `initialize_latents`,
    `own_arrays`, `initial_statistics` and `batch_statistics`. No other method is overridden.

    Raises:
      TypeError: at the definition of a subclass with a `Config` that lacks one of these, that shares its `Config`,
        or whose `form` SAELens does not know.
    """

    Config: ClassVar[type[SAEConfig]]
    name: ClassVar[str]
    """Name in the registry; `module:Class` of a class that is not in it."""
    form: ClassVar[str]
    sparse: ClassVar[bool]
    maps: ClassVar[int] = 0
    """Number of arrays of latents, (n, f), that `activate` gets from `map_latents`, from which memory is predicted."""
    biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Arrays of latents that are added to x W_enc^T."""
    rate_factors: ClassVar[Mapping[str, float]] = {}
    """Factors on the learning rate by the name of the array."""
    control_law: ClassVar[Law] = Law()
    """Law by which the controller of the penalty leads L0 to its target (`jsae.control`)."""

    W_enc: nnx.Param[Float[Array, "f d"]]
    W_dec: nnx.Param[Float[Array, "f o"]]
    b_dec: nnx.Param[Float[Array, " o"]]
    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in vars(cls):
            _check_declared(cls)
            cls.Config.sae = cls
            cls.name = vars(cls).get("name", f"{cls.__module__}:{cls.__qualname__}")

    def __init__(self, config: SAEConfig, *, key: Key[Array, ""], b_dec: Float[Array, " o"] | None = None):
        """Initialise decoder rows at random on the unit sphere, `W_enc` as their copy, biases at their start.

        A transcoder's encoder has random rows of its own until `initialize`; `W_skip` starts at zero.
        """
        self.config = config
        rows = _unit_rows(key, config.d_sae, config.width_out)
        self.W_dec = nnx.Param(rows)
        own = _unit_rows(jax.random.fold_in(key, 1), config.d_sae, config.d_in) if config.is_transcoder else rows
        self.W_enc = nnx.Param(jnp.array(own))
        self.b_dec = nnx.Param(jnp.zeros(config.width_out) if b_dec is None else b_dec)
        if config.skip:
            self.W_skip = nnx.Param(jnp.zeros((config.width_out, config.d_in)))
        if config.exclusive:
            self.separate()
        for name, value in self.initial_latents(config).items():
            setattr(self, name, nnx.Param(jnp.full(config.d_sae, value, jnp.float32)))
        for name, value in self.initial_statistics(config).items():
            setattr(self, name, Statistic(jnp.full((), value, jnp.float32)))

    # ---- what a subclass declares ---------------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def initial_latents(cls, config: SAEConfig) -> dict[str, float]:
        """Return the trained arrays with one number per latent, by name, and where they start."""

    @classmethod
    def initial_statistics(cls, config: SAEConfig) -> dict[str, float]:
        """Return the running statistics, one number each, by name, and where they start. None by default."""
        return {}

    @abc.abstractmethod
    def activate(self, x: Float[Array, "n d"], context: Context) -> tuple[Latents, Any]:
        """Return the latents of x, and whatever of the computation `penalty` needs again.

        x is scaled as in training, unless the context has a scale. Codes where the class is `sparse`, else (n, f).
        """

    @abc.abstractmethod
    def penalty(self, forward: Forward) -> Float[Array, ""]:
        """Return what the loss adds to the squared error."""

    def loss_of_dead(self, forward: Forward) -> Float[Array, ""] | None:
        """Return a term of the loss for dead latents that is no mean over tokens. A hook of dense architectures.

        It is computed on a part of the batch, and only while a latent is dead. None is no such term.
        """
        return None

    @abc.abstractmethod
    def inference_arrays(self) -> Arrays:
        """Return the arrays of latents that the inference form `form` has, (f,) each, by SAELens's names."""

    def initialize_latents(self, x: Float[Array, "n d"], ops: Ops) -> None:
        """Set arrays of latents from scaled activations, after the encoder has been initialised. A hook."""

    def own_arrays(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return arrays of latents and statistics from those of the inference form: undo `inference_arrays`.

        Args:
          arrays: by SAELens's names, (f,) each, in the units of training. They are the SAE's own by default.
        """
        return arrays

    def batch_statistics(self, forward: Forward) -> dict[str, Float[Array, ""]]:
        """Return the value of every running statistic in one batch, by name; training averages them over batches.

        An SAE that is not `sparse` sees a batch in parts, whose values are averaged. None by default.
        """
        return {}

    # ---- what all share -------------------------------------------------------------------------------------------

    def encode(self, x: Float[Array, "n d"], ops: Ops = Reference()) -> Latents:  # noqa: B008 - frozen
        """Return the latents of x as the exported SAE gives them; x is scaled as in training."""
        return self.activate(x, Context(ops))[0]

    def decode(
        self,
        latents: Latents,
        x: Float[Array, "n d"],
        ops: Ops = Reference(),  # noqa: B008 - frozen
        minus: Float[Array, "n o"] | None = None,
    ) -> Float[Array, "n o"]:
        """Return y_hat = f W_dec + b_dec (+ x W_skip^T), minus the target where one is given."""
        start = self.b_dec[...] if minus is None else self.b_dec - minus
        if self.config.skip:
            start = start + ops.matmul(x, self.W_skip.T)
        return self._add_latents(latents, jnp.broadcast_to(start, (len(x), self.config.width_out)), ops)

    def initialize(self, x: Float[Array, "n d"], target: Float[Array, "n o"], ops: Ops) -> None:
        """Scale the encoder by the one factor with which the first reconstruction fits a sample best.

        Every encoder is homogeneous, so that scaling weights and biases scales the reconstruction. A transcoder's
        encoder first reads the decoder's directions in the linear prediction of its target.

        Args:
          x: scaled activations.
          target: scaled targets, less `b_dec`.
          ops: the implementation.
        """
        if self.config.is_transcoder:
            self._read_prediction(x, target)
        few, wanted = x[:INIT_ROWS], target[:INIT_ROWS]
        latents = self.activate(few, Context(ops, training=True))[0]
        made = self._add_latents(latents, jnp.zeros_like(wanted), ops)
        square = jnp.square(made).sum()
        # Where no latent is active on these rows there is nothing to scale by.
        factor = (made * wanted).sum() / jnp.where(square > 0, square, 1)
        self._scale_encoder(jnp.where(square > 0, self.config.encoder_start * factor, 1))
        self.initialize_latents(few, ops)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the inference form by name, in the layout of `jsae.axes.AXES`."""
        shared = ("W_enc", "W_dec", "b_dec", *(("W_skip",) if self.config.skip else ()))
        arrays = {name: getattr(self, name)[...] for name in shared} | self.inference_arrays()
        return {name: np.asarray(array) for name, array in arrays.items()}

    def set_inference_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Set arrays of latents and statistics from those of the inference form.

        Args:
          arrays: by SAELens's names, (f,) each, in the units of training.

        Raises:
          ConfigError: the class has no such array, and no `own_arrays` that makes another of it.
        """
        known = self.initial_latents(self.config) | self.initial_statistics(self.config)
        for name, array in self.own_arrays(arrays).items():
            require(name in known, f"{self.name} has no array {name} to continue from: it must define own_arrays")
            getattr(self, name)[...] = array

    @property
    def b_in(self) -> Array | None:
        """The bias that is subtracted from the input: `b_dec`; None in a transcoder."""
        return None if self.config.is_transcoder else self.b_dec[...]

    def inputs(self, x: Float[Array, "n d"], context: Context) -> Input:
        """Return the input of the encoder: x, scaled, less `b_in`."""
        return Input(x, context.scale, self.b_in)

    def pre_activations(
        self, x: Float[Array, "n d"], context: Context, bias: str | None = "b_enc"
    ) -> Float[Array, "n f"]:
        """Return (x - b_in) W_enc^T plus the named bias."""
        b = jnp.zeros(self.config.d_sae) if bias is None else getattr(self, bias)[...]
        return context.ops.pre_activations(self.inputs(x, context), self.W_enc[...], b)

    def map_latents(
        self, x: Float[Array, "n d"], context: Context, formula: Formula, *arrays: Array, bias: str | None = "b_enc"
    ) -> tuple[Maps, PerLatent]:
        """Return the maps and sums of a formula of the pre-activations (`jsae.ops.Ops.map_latents`)."""
        b = jnp.zeros(self.config.d_sae) if bias is None else getattr(self, bias)[...]
        return context.ops.map_latents(self.inputs(x, context), self.W_enc[...], b, formula, arrays)

    def _add_latents(self, latents: Latents, start: Float[Array, "n o"], ops: Ops) -> Float[Array, "n o"]:
        """Return start + f W_dec."""
        W_dec = self.W_dec[...]
        return ops.decode(latents, W_dec, start) if isinstance(latents, Codes) else start + ops.matmul(latents, W_dec)

    def _read_prediction(self, x: Float[Array, "n d"], target: Float[Array, "n o"]) -> None:
        """W_enc = W_dec A^T, biases -W_enc mean(x), where (x - mean(x)) A is the ridge regression of the target."""
        mean = x.mean(0)
        centred = x - mean
        gram = centred.T @ centred
        ridge = _RIDGE * jnp.trace(gram) / len(gram) * jnp.eye(len(gram))
        A = jnp.linalg.solve(gram + ridge, centred.T @ target)
        self.W_enc[...] = self.W_dec @ A.T
        for name in self.biases:
            getattr(self, name)[...] = -self.W_enc @ mean

    def align(self) -> None:
        """Add to every encoder row a multiple of its decoder row, so that their inner product is 1.

        The reparametrisation of aligned training (arXiv 2605.18629), for decoder rows of norm 1: a latent that is the
        only one to fire then reconstructs its share of the input without shrinking it.
        """
        products = (self.W_enc[...] * self.W_dec[...]).sum(1, keepdims=True)
        self.W_enc[...] = self.W_enc[...] + (1 - products) * self.W_dec[...]

    def separate(self) -> None:
        """Set what exclusive latents may not read or write to 0, and the norms of decoder rows to 1."""
        allowed = self.config.allowed(self.W_dec[...])
        self.W_enc[...] = jnp.where(allowed, self.W_enc[...], 0)
        rows = jnp.where(allowed, self.W_dec[...], 0)
        self.W_dec[...] = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)

    def _scale_encoder(self, factor: Float[Array, ""]) -> None:
        if self.config.aligned:
            return  # encoder rows are copies of decoder rows, so the product is 1
        for name in ("W_enc", *self.biases):
            getattr(self, name)[...] = getattr(self, name) * factor


def _check_declared(cls: type[SAE]) -> None:
    """Raise TypeError unless a class declares what an architecture must, with a Config of its own."""
    missing = [name for name in ("form", "sparse") if not hasattr(cls, name)]
    missing += [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]
    if missing:
        raise TypeError(f"{cls.__qualname__} is no whole architecture: it lacks {', '.join(missing)}")
    if cls.form not in ENCODERS:
        raise TypeError(f"{cls.__qualname__}.form is {cls.form!r}: SAELens knows {', '.join(ENCODERS)}")
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, SAEConfig)) or "sae" in vars(cls.Config):
        raise TypeError(f"{cls.__qualname__}.Config must be a class of its own, derived from SAEConfig")
    if "name" in vars(cls) and not cls.__module__.startswith(__package__ + "."):
        raise TypeError(f"{cls.__qualname__} is called {cls.__module__}:{cls.__qualname__}: leave out its name")


def _unit_rows(key: Key[Array, ""], f: int, d: int) -> Float[Array, "f d"]:
    rows = jax.random.normal(key, (f, d))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
