"""The architectures. Each is a small final class: its equation, its encoder, its one penalty.

An SAE is a `flax.nnx` module used as a plain pytree: `jax.jit`, `jax.grad`, `jax.vmap` and optax take it as it is, and
nothing in it changes when it is called. What every architecture shares (decoding, loss, metrics, training, export) is
written once, elsewhere. Shapes: n tokens, d = d_in, f = d_sae, o = d_out, which is d_in unless it is a transcoder.
"""

import abc
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jsae import codes, jump, losses, precision, topk
from jsae.codes import Codes
from jsae.config import SAEConfig

Latents = Codes | Float[Array, "n f"]
"""Activations of the latents: sparse codes, or one column per latent."""

_FIT_ROWS = 2048  # of the sample, for the encoder's factor
_RIDGE = 1e-3  # relative to the mean variance of a channel


class Now(NamedTuple):
    """What a training step adds to an SAE's own settings."""

    strength: Float[Array, ""]
    """Factor on sparsity penalties: their warm-up, and the controller's word where L0 has a target."""
    dead: Bool[Array, " f"] | None
    """Which latents are dead; None says that none is."""
    k: int | None = None
    """Room for more codes than the SAE's k, while k comes down from a larger one."""
    limit: Int[Array, ""] | None = None
    """How many of them count."""
    scale: Float[Array, "*d"] | None = None
    """What activations are multiplied with as they are read; None: they are scaled already."""


class Pass(NamedTuple):
    """One training forward, as a penalty sees it."""

    x: Float[Array, "n d"]
    y: Float[Array, "n o"]
    """What is to be reconstructed: x, or a transcoder's target."""
    error: Float[Array, "n o"]
    """What the reconstruction has too much of: y_hat - y."""
    latents: Latents
    seen: Any
    """What `activate` gave besides the latents."""
    now: Now


class Statistic(nnx.Variable):
    """A number that training keeps but no gradient changes."""


class SAE(nnx.Module):
    """What an architecture is: weights by the field's names, an encoder, a penalty.

    `W_enc` is (f, d), `W_dec` (f, o), `b_dec` (o,), other biases (f,), a transcoder's `W_skip` (o, d) if it has one.
    Decoder rows have unit norm.
    """

    W_enc: nnx.Param[Float[Array, "f d"]]
    W_dec: nnx.Param[Float[Array, "f o"]]
    b_dec: nnx.Param[Float[Array, " o"]]
    config: SAEConfig
    biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    """What is added to x W_enc^T."""
    proportional: ClassVar[float] = 1.0
    """How strongly the controller of L0 answers at once, see `jsae.control`: the quicker a penalty acts, the more."""

    def __init__(self, config: SAEConfig, *, key: Key[Array, ""], b_dec: Float[Array, " o"] | None = None):
        """Random unit decoder rows, `W_enc` their copy, every bias zero but `b_dec` where it is given.

        A transcoder's encoder has random rows of its own until `fit`; `W_skip` starts at zero.
        """
        self.config = config
        rows = _unit_rows(key, config.d_sae, config.width_out)
        self.W_dec = nnx.Param(rows)
        own = _unit_rows(jax.random.fold_in(key, 1), config.d_sae, config.d_in) if config.is_transcoder else rows
        self.W_enc = nnx.Param(jnp.array(own))
        self.b_dec = nnx.Param(jnp.zeros(config.width_out) if b_dec is None else b_dec)
        if config.skip:
            self.W_skip = nnx.Param(jnp.zeros((config.width_out, config.d_in)))
        for name, value in self.latent_arrays(config).items():
            setattr(self, name, nnx.Param(jnp.full(config.d_sae, value)))

    @classmethod
    def latent_arrays(cls, config: SAEConfig) -> dict[str, float]:
        """Parameters with one number per latent, and where they start."""
        return {"b_enc": 0.0}

    @abc.abstractmethod
    def activate(self, x: Float[Array, "n d"], now: Now | None = None) -> tuple[Latents, Any]:
        """The latents of x in training, and whatever of the computation `penalty` and `settle` want to see again.

        x is scaled as in training, unless `now` has a scale.
        """

    @abc.abstractmethod
    def penalty(self, at: Pass) -> Float[Array, ""]:
        """What the loss adds to the squared error."""

    def encode(self, x: Float[Array, "n d"]) -> Latents:
        """The latents of x, which is already scaled as in training, as the exported SAE gives them."""
        return self.activate(x)[0]

    def decode(
        self, latents: Latents, x: Float[Array, "n d"], less: Float[Array, "n o"] | None = None
    ) -> Float[Array, "n o"]:
        """y_hat = f W_dec + b_dec (+ x W_skip^T); `less` is taken from it, without a second array of that size."""
        start = self.b_dec[...] if less is None else self.b_dec - less
        if self.config.skip:
            start = start + precision.matmul(x, self.W_skip.T)
        return self.spanned(latents, len(x), jnp.broadcast_to(start, (len(x), self.config.width_out)))

    def spanned(self, latents: Latents, n: int, onto: Float[Array, "n o"] | None = None) -> Float[Array, "n o"]:
        """What the latents of n tokens add up to: f W_dec, without biases, `onto` what is given."""
        W_dec = self.W_dec[...]
        if isinstance(latents, Codes):
            return codes.decode(latents, W_dec, n, onto)
        made = precision.matmul(latents, W_dec)
        return made if onto is None else made + onto

    def fit(self, x: Float[Array, "n d"], wanted: Float[Array, "n o"]) -> None:
        """Before the first step: scales the encoder by the one factor with which the latents fit what is wanted best.

        Every encoder is homogeneous, so that scaling weights and biases scales what is made. A transcoder's encoder is
        first turned to read the decoder's directions in the linear prediction of its target.
        """
        if self.config.is_transcoder:
            self._read_prediction(x, wanted)
        few = x[:_FIT_ROWS]
        made = self.spanned(self.activate(few)[0], len(few))
        square = jnp.square(made).sum()
        # Where no latent is active on these rows there is nothing to scale by.
        factor = (made * wanted[:_FIT_ROWS]).sum() / jnp.where(square > 0, square, 1)
        self._scale_encoder(jnp.where(square > 0, factor, 1))

    def _read_prediction(self, x: Float[Array, "n d"], wanted: Float[Array, "n o"]) -> None:
        """W_enc = W_dec A^T, biases -W_enc mean(x), where (x - mean(x)) A is the ridge regression of what is wanted."""
        mean = x.mean(0)
        centred = x - mean
        gram = centred.T @ centred
        ridge = _RIDGE * jnp.trace(gram) / len(gram) * jnp.eye(len(gram))
        A = jnp.linalg.solve(gram + ridge, centred.T @ wanted)
        self.W_enc[...] = self.W_dec @ A.T
        for name in self.biases:
            getattr(self, name)[...] = -self.W_enc @ mean

    def _scale_encoder(self, factor: Float[Array, ""]) -> None:
        for name in ("W_enc", *self.biases):
            getattr(self, name)[...] = getattr(self, name) * factor

    def settle(self, latents: Latents, rate: Float[Array, ""]) -> None:
        """Takes into the SAE's own state what a training step showed, with a mean's `rate`; runs on the step's copy."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters of the inference form by name, in the layout of `jsae.axes.AXES`."""
        skip = ("W_skip",) if self.config.skip else ()
        names = ("W_enc", "W_dec", "b_dec", *skip, *self.latent_arrays(self.config))
        return {name: np.asarray(getattr(self, name)[...]) for name in names}

    @property
    def b_in(self) -> Array | None:
        """What is subtracted from the input: `b_dec`, but nothing of a transcoder's."""
        return None if self.config.is_transcoder else self.b_dec[...]

    def read(self, x: Float[Array, "n d"], now: Now | None = None) -> codes.Input:
        """What the encoder reads: x, scaled, less `b_in`."""
        return codes.Input(x, None if now is None else now.scale, self.b_in)

    def pre_activations(self, x: Float[Array, "n d"], now: Now | None = None) -> Float[Array, "n f"]:
        """(x - b_dec) W_enc^T + b_enc, for architectures that need all of them."""
        return codes.pre_activations(self.read(x, now), self.W_enc[...], self.b_enc[...])

    def pick(
        self, x: Float[Array, "n d"], select: Callable[..., Codes], now: Now | None, by_token: bool = True
    ) -> Codes:
        """The pre-activations that `select(pre, k, limit)` picks, raw; `by_token` or out of the whole batch."""
        k = self.config.k if now is None or now.k is None else now.k
        limit = None if now is None else now.limit
        parts = (self.read(x, now), self.W_enc[...], self.b_enc[...])
        return codes.encode(*parts, None, limit, functools.partial(select, k=k), by_token)

    def auxk(self, at: Pass) -> Float[Array, ""]:
        """AuxK times its coefficient: dead latents learn what the living left over."""
        if at.now.dead is None:
            return jnp.zeros(())
        parts = (self.read(at.x, at.now), -at.error, self.W_enc[...], self.b_enc[...], self.W_dec[...])
        return self.config.aux_coefficient * losses.auxk(*parts, at.now.dead, self.config.dead_k)


class TopK(SAE):
    """f = ReLU(TopK_k((x - b_dec) W_enc^T + b_enc)), with AuxK against dead latents.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), equations 3 and 4 and section A.2.
    """

    def activate(self, x: Float[Array, "n d"], now: Now | None = None) -> tuple[Codes, None]:
        """Exactly k codes a token; those that are not positive have value 0."""
        picked = self.pick(x, topk.top_k, now)
        return picked._replace(values=jax.nn.relu(picked.values)), None

    def penalty(self, at: Pass) -> Float[Array, ""]:
        """AuxK."""
        return self.auxk(at)


class AbsTopK(SAE):
    """f = the k entries of (x - b_dec) W_enc^T + b_enc with the largest magnitude, with their signs; AuxK.

    Zhu et al. 2025, "AbsTopK: rethinking sparse autoencoders for bidirectional features" (arXiv 2510.00404).
    """

    def activate(self, x: Float[Array, "n d"], now: Now | None = None) -> tuple[Codes, None]:
        """Exactly k codes a token, of either sign."""
        return self.pick(x, topk.abs_top_k, now), None

    def penalty(self, at: Pass) -> Float[Array, ""]:
        """AuxK."""
        return self.auxk(at)


class _BatchWide(SAE):
    """What BatchTopK and Matryoshka share: a batch-wide selection in training, a threshold afterwards."""

    def __init__(self, config: SAEConfig, *, key: Key[Array, ""], b_dec: Float[Array, " o"] | None = None):
        """As every SAE; the threshold starts at 0 and is no trained parameter."""
        super().__init__(config, key=key, b_dec=b_dec)
        self.threshold = Statistic(jnp.zeros(()))

    def activate(self, x: Float[Array, "n d"], now: Now | None = None) -> tuple[Codes, None]:
        """On average k codes a token."""
        return self.pick(x, topk.batch_top_k, now, by_token=False), None

    def encode(self, x: Float[Array, "n d"]) -> Float[Array, "n f"]:
        """Every latent above the threshold, whatever the batch."""
        pre = self.pre_activations(x)
        return jnp.where(pre > self.threshold, jax.nn.relu(pre), 0)

    def settle(self, latents: Codes, rate: Float[Array, ""]) -> None:
        """Moves the threshold's running mean towards the batch's."""
        self.threshold[...] = self.threshold + rate * (topk.least_active(latents) - self.threshold)

    def arrays(self) -> dict[str, np.ndarray]:
        """With the threshold, once per latent."""
        threshold = np.full(self.config.d_sae, np.asarray(self.threshold[...]), np.float32)
        return super().arrays() | {"threshold": threshold}


class BatchTopK(_BatchWide):
    """In training f = ReLU of the n k largest pre-activations of the whole batch; afterwards those above a threshold.

    Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410), equations 4 to 6: the threshold is the
    mean over batches of the smallest value kept. It leaves as JumpReLU. AuxK as for TopK.
    """

    def penalty(self, at: Pass) -> Float[Array, ""]:
        """AuxK."""
        return self.auxk(at)


class Matryoshka(_BatchWide):
    """BatchTopK whose first w latents must reconstruct by themselves, for every nested width w.

    Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders" (arXiv 2503.17547):
    one batch-wide selection serves all widths, and their squared errors count alike.
    """

    def penalty(self, at: Pass) -> Float[Array, ""]:
        """The errors of the inner widths, and AuxK."""
        inner = losses.nested(at.y, at.latents, self.W_dec[...], self.b_dec[...], self.config.all_widths)
        return inner + self.auxk(at)


class ReLU(SAE):
    """f = ReLU((x - b_dec) W_enc^T + b_enc), penalty  l1 * sum_i f_i |W_dec,i|.

    Bricken et al. 2023, "Towards monosemanticity"; the weighting by decoder norms from Conerly et al. 2024 (Anthropic,
    April update), where it makes the penalty blind to how a latent's size is shared between encoder and decoder.
    """

    def activate(self, x: Float[Array, "n d"], now: Now | None = None) -> tuple[Float[Array, "n f"], None]:
        """Every latent that is above zero."""
        return jax.nn.relu(self.pre_activations(x, now)), None

    def penalty(self, at: Pass) -> Float[Array, ""]:
        """L1 of the latents, each weighted by its decoder norm."""
        return at.now.strength * self.config.l1_coefficient * losses.l1(at.latents, self.W_dec[...])


class Gated(SAE):
    """f = 1[pi > 0] * ReLU(h exp(r_mag) + b_mag)  with  h = (x - b_dec) W_enc^T  and  pi = h + b_gate.

    Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (arXiv 2404.16014),
    equations 3 to 8: the gate is trained by an L1 penalty on ReLU(pi) and by reconstructing x from ReLU(pi) through a
    frozen copy of the decoder.
    """

    biases = ("b_gate", "b_mag")

    @classmethod
    def latent_arrays(cls, config: SAEConfig) -> dict[str, float]:
        """Biases of gate and magnitude, and the log of the ratio of their weights."""
        return {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0}

    def activate(
        self, x: Float[Array, "n d"], now: Now | None = None
    ) -> tuple[Float[Array, "n f"], Float[Array, "n f"]]:
        """Gated magnitudes; the penalty sees ReLU(pi)."""
        h = codes.pre_activations(self.read(x, now), self.W_enc[...], jnp.zeros_like(self.b_gate[...]))
        gate = h + self.b_gate
        magnitude = jax.nn.relu(h * jnp.exp(self.r_mag[...]) + self.b_mag)
        return jnp.where(gate > 0, magnitude, 0), jax.nn.relu(gate)

    def penalty(self, at: Pass) -> Float[Array, ""]:
        """L1 of the gate, and the error of the gate's own reconstruction through a frozen decoder."""
        W_dec, b_dec = jax.lax.stop_gradient((self.W_dec[...], self.b_dec[...]))
        sparsity = at.now.strength * self.config.l1_coefficient * losses.l1(at.seen, W_dec)
        return sparsity + losses.squared_error(at.y, precision.matmul(at.seen, W_dec) + b_dec)


class JumpReLU(SAE):
    """f = p * 1[p > theta]  with  p = (x - b_dec) W_enc^T + b_enc  and a learned threshold theta = exp(log_threshold).

    Two recipes. `tanh` (Anthropic, January 2025 update): penalty  l0 sum_i tanh(4 f_i |W_dec,i|), gradients of the jump
    reach the pre-activations too, and latents below their threshold are pulled up by a small pre-activation loss.
    `l0` (Rajamanoharan et al. 2024, arXiv 2407.14435, and Gemma Scope): penalty  l0 sum_i 1[p_i > theta_i].
    """

    proportional = 2.0

    @classmethod
    def latent_arrays(cls, config: SAEConfig) -> dict[str, float]:
        """A bias, and the log of the threshold."""
        return {"b_enc": 0.0, "log_threshold": math.log(config.initial_threshold)}

    def activate(
        self, x: Float[Array, "n d"], now: Now | None = None
    ) -> tuple[Float[Array, "n f"], Float[Array, "n f"]]:
        """Every latent above its threshold; the penalty sees the pre-activations."""
        pre = self.pre_activations(x, now)
        to_input = self.config.jump_recipe == "tanh"
        return jump.jump_relu(pre, self.threshold, self.config.bandwidth, to_input), pre

    def penalty(self, at: Pass) -> Float[Array, ""]:
        """The recipe's sparsity, and for `tanh` the pre-activation loss."""
        norms = jnp.linalg.norm(self.W_dec[...], axis=1)
        if self.config.jump_recipe == "l0":
            active = jump.step(at.seen, self.threshold, self.config.bandwidth)
            return at.now.strength * self.config.l0_coefficient * active.sum(-1).mean()
        sparsity = jnp.tanh(4 * at.latents * norms).sum(-1).mean()
        below = (jax.nn.relu(self.threshold - at.seen) @ norms).mean()
        return at.now.strength * self.config.l0_coefficient * sparsity + self.config.pre_act_coefficient * below

    def fit(self, x: Float[Array, "n d"], wanted: Float[Array, "n o"]) -> None:
        """As every SAE; where L0 has a target the thresholds then start where L0 is four times that, not at theta_0.

        Thresholds move slowly, by a factor per step that the learning rate bounds: from theta_0 a short run would
        never get there.
        """
        super().fit(x, wanted)
        target = self.config.target_l0
        if target is not None:
            few = x[:_FIT_ROWS]
            count = min(max(round(4 * target * len(few)), 1), len(few) * self.config.d_sae // 2)
            start = topk.kth_largest(self.pre_activations(few), count)
            start = jnp.where(start > 0, start, self.config.initial_threshold)  # where fewer than that are positive
            self.log_threshold[...] = jnp.full(self.config.d_sae, jnp.log(start))

    @property
    def threshold(self) -> Float[Array, " f"]:
        """The thresholds theta."""
        return jnp.exp(self.log_threshold[...])

    def arrays(self) -> dict[str, np.ndarray]:
        """With the threshold in the place of its logarithm."""
        arrays = super().arrays()
        threshold = np.exp(arrays.pop("log_threshold"))
        return arrays | {"threshold": threshold}


ARCHITECTURES: Mapping[str, type[SAE]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "abstopk": AbsTopK,
    "relu": ReLU,
    "gated": Gated,
    "jumprelu": JumpReLU,
}


def make(config: SAEConfig, *, key: Key[Array, ""], b_dec: Float[Array, " o"] | None = None) -> SAE:
    """A freshly initialised SAE of `config.architecture`."""
    return ARCHITECTURES[config.architecture](config, key=key, b_dec=b_dec)


def _unit_rows(key: Key[Array, ""], f: int, d: int) -> Float[Array, "f d"]:
    rows = jax.random.normal(key, (f, d))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
