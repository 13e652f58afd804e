"""Architectures whose latents are sparse by a penalty: ReLU, Gated and JumpReLU."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jsae import formulas, losses
from jsae.architectures.base import Arrays, Context, Forward, SAEConfig
from jsae.architectures.reviving import Reviving
from jsae.control import Law
from jsae.ops import Ops, selection
from jsae.ops.formulas import PerLatent
from jsae.settings import FACTOR, FRACTION, WEIGHT, Range, number, require

_TARGET = Range(1e-6, 2**28, "lie between 0 and d_sae, and be at least 1e-6")
_LEAST_THRESHOLD = 1e-6  # of an SAE that training continues, in units where inputs have a mean square of 1
_MANY_DEAD = 0.05  # share of dead latents from which on the pull of Gated is whole
_RARE = 32.0  # tokens per firing of an average latent above which AuxK may be heavier
_THRESHOLD = Range(1e-30, 1e30, "be finite and positive, from 1e-30 to 1e30")


@dataclasses.dataclass(frozen=True)
class PenalisedConfig(SAEConfig):
    """Settings of architectures with a penalty on sparsity.

    Raises:
      ConfigError: target_l0 is not between 0 and d_sae, or target_l0_fraction is given without it.
    """

    target_l0: float | None = number(None, _TARGET)  # type: ignore[misc]  # a class variable of other architectures
    """A controller moves the sparsity penalty until this many latents are active per token."""
    target_l0_fraction: float | None = number(None, FRACTION)  # type: ignore[misc]
    """Fraction of the run after which L0 is `target_l0`; None is 0.85, 0.6 for JumpReLU."""
    decoder_rate: float = number(3.0, FACTOR)
    revival_coefficient: float = number(2e-2, WEIGHT)
    """Weight of the loss that pulls the pre-activations of dead latents up to their thresholds."""
    aux_coefficient: float = number(1 / 8, WEIGHT)
    """Weight of AuxK (`jsae.auxk`), by which dead latents learn a direction before they fire again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.target_l0 is None or 0 < self.target_l0 <= self.d_sae,
            f"target_l0 is {self.target_l0}: it must lie between 0 and d_sae={self.d_sae}",
        )
        require(
            self.target_l0_fraction is None or self.target_l0 is not None,
            f"target_l0_fraction={self.target_l0_fraction} means nothing without a target_l0: give one",
        )


class Penalised(Reviving):
    """The losses of dead latents, shared by the architectures with a penalty. Abstract."""

    sparse = False
    gate_bias: ClassVar[str] = "b_enc"
    """The bias of the pre-activations that decide whether a latent fires."""
    heaviest_auxk: ClassVar[float] = 1.0
    """Largest factor on AuxK, which grows where an average latent fires on less than 1/32 of all tokens."""

    @property
    def norms(self) -> Float[Array, " f"]:
        """The norms of the decoder rows."""
        return jnp.linalg.norm(self.W_dec[...], axis=1)

    def loss_of_dead(self, forward: Forward) -> Float[Array, ""]:
        """Return AuxK of values without a gradient to the bias, which the pull up to thresholds moves."""
        bias, l0 = jax.lax.stop_gradient(getattr(self, self.gate_bias)[...]), self.config.expected_l0
        weight = min(max(self.config.d_sae / (_RARE * l0), 1.0), self.heaviest_auxk)
        return weight * self.auxk(forward, bias, l0, lifted=True)


class ReLU(Penalised):
    """f = ReLU((x - b_dec) W_enc^T + b_enc), penalty  l1 * sum_i phi(f_i |W_dec,i|).

    Bricken et al. 2023, "Towards monosemanticity"; the weighting by decoder norms from Conerly et al. 2024 (Anthropic,
    April update), where it makes the penalty blind to how a latent's size is shared between encoder and decoder.

    phi(a) is a for `sparsity_penalty` `l1`, and s log(1 + a / s) for `log`: the log-sum penalty of Candès, Wakin and
    Boyd 2008, "Enhancing sparsity by reweighted l1 minimization". Both have a slope of 1 at 0. Under L1 an active
    latent costs in proportion to its size, so that latents shrink and many small ones take the place of a large one;
    the logarithm hardly charges what exceeds s.
    """

    name = "relu"
    form = "standard"
    maps = 1
    # Of 4,096 latents with an L0 of 32, 1.5 % died on a nanochat's middle layer at the weight that suffices for 1,024.
    heaviest_auxk = 4.0

    b_enc: nnx.Param[Float[Array, " f"]]

    @dataclasses.dataclass(frozen=True)
    class Config(PenalisedConfig):
        """Settings of ReLU."""

        rate_scale = 1.3
        tail_exponent = 0.62
        length_exponent = 0.1
        width_exponent = 0.25
        density_exponent = 1 / 6

        l1_coefficient: float = number(5.0, WEIGHT)
        """Weight of the sparsity penalty."""
        sparsity_penalty: Literal["log", "l1"] = "log"
        """The function phi of the penalty."""
        log_scale: float = number(0.01, FACTOR)
        """The scale s of `log`, as a fraction of the root mean square norm of the targets."""

        @property
        def scale(self) -> float:
            """The scale s, in units in which a target has a mean squared norm of its width."""
            return self.log_scale * math.sqrt(self.width_out)

    @classmethod
    def initial_latents(cls, config: SAEConfig) -> dict[str, float]:
        """Return the encoder bias."""
        return {"b_enc": 0.0}

    def activate(self, x: Float[Array, "n d"], context: Context) -> tuple[Float[Array, "n f"], PerLatent]:
        """Return every latent that is above zero, and the sums over tokens that the penalty needs."""
        if self.config.sparsity_penalty == "l1":
            (latents,), sums = self.map_latents(x, context, formulas.Rectified())
        else:
            weights = self.norms / self.config.scale
            (latents,), sums = self.map_latents(x, context, formulas.LogRectified(), weights)
        return latents, sums

    def penalty(self, forward: Forward) -> Float[Array, ""]:
        """Return the penalty on the latents, each weighted by its decoder norm, and the revival of the dead."""
        active, below = (sums / len(forward.x) for sums in forward.extra)
        if self.config.sparsity_penalty == "l1":
            total = losses.l1(active, self.W_dec[...])
        else:
            total = self.config.scale * active.sum()
        sparsity = forward.context.strength * self.config.l1_coefficient * total
        return sparsity + revival(self.config, forward.context, below)

    def inference_arrays(self) -> Arrays:
        """Return the encoder bias."""
        return {"b_enc": self.b_enc[...]}


class Gated(Penalised):
    """f = 1[pi > 0] * ReLU(h exp(r_mag) + b_mag)  with  h = (x - b_dec) W_enc^T  and  pi = h + b_gate.

    Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (arXiv 2404.16014),
    equations 3 to 8: the gate is trained by an L1 penalty on ReLU(pi) and by reconstructing x from ReLU(pi) through a
    frozen copy of the decoder.
    """

    name = "gated"
    form = "gated"
    maps = 2
    biases = ("b_gate", "b_mag")
    gate_bias = "b_gate"

    b_gate: nnx.Param[Float[Array, " f"]]
    b_mag: nnx.Param[Float[Array, " f"]]
    r_mag: nnx.Param[Float[Array, " f"]]

    @dataclasses.dataclass(frozen=True)
    class Config(PenalisedConfig):
        """Settings of Gated."""

        rate_scale = 1.5
        tail_exponent = 0.65

        aux_coefficient: float = number(0.3, WEIGHT)
        """Weight of AuxK: with 1/8 more latents died on a synthetic world, with 1 on a nanochat's last layer."""
        revival_coefficient: float = number(6e-2, WEIGHT)
        """Weight of the pull on dead latents: with 0.02 most latents died at rates 1.5 to 2 times the default."""
        revival_floor: float = number(0.3, FRACTION)
        """Fraction of the pull that is left where few are dead: below a share of 5 % it falls with the share.

        A weaker pull leaves AuxK time to find a direction that is worth firing for, so fewer latents die again.
        """
        l1_coefficient: float = number(5.0, WEIGHT)
        """Weight of the L1 penalty."""

    @classmethod
    def initial_latents(cls, config: SAEConfig) -> dict[str, float]:
        """Return the biases of gate and magnitude, and the log of the ratio of their weights."""
        return {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0}

    def activate(
        self, x: Float[Array, "n d"], context: Context
    ) -> tuple[Float[Array, "n f"], tuple[Float[Array, "n f"], PerLatent]]:
        """Return the gated magnitudes; for the penalty ReLU(pi), and the sums of ReLU(pi) and ReLU(-pi) over tokens."""
        arrays = (self.b_gate[...], self.b_mag[...], self.r_mag[...])
        (latents, gate), sums = self.map_latents(x, context, formulas.GatedMagnitude(), *arrays, bias=None)
        return latents, (gate, sums)

    def penalty(self, forward: Forward) -> Float[Array, ""]:
        """Return the L1 of the gate, the error of its reconstruction by a frozen decoder, and the revival term."""
        context, (gate, sums) = forward.context, forward.extra
        opened, below = (total / len(gate) for total in sums)
        W_dec, b_dec = jax.lax.stop_gradient((self.W_dec[...], self.b_dec[...]))
        sparsity = context.strength * self.config.l1_coefficient * losses.l1(opened, W_dec)
        sparsity += _share_of_pull(self.config, context) * revival(self.config, context, below)
        return sparsity + losses.squared_error(forward.y, context.ops.matmul(gate, W_dec) + b_dec)

    def inference_arrays(self) -> Arrays:
        """Return the biases and the log of the ratio of the weights."""
        return {name: getattr(self, name)[...] for name in ("b_gate", "b_mag", "r_mag")}


class JumpReLU(Penalised):
    """f = p * 1[p > theta]  with  p = (x - b_dec) W_enc^T + b_enc  and a learned threshold theta = exp(log_threshold).

    Two recipes. `tanh` (Anthropic, January 2025 update): penalty  l0 sum_i tanh(4 f_i |W_dec,i|), gradients of the jump
    reach the pre-activations too, and latents below their threshold are pulled up by a small pre-activation loss.
    `l0` (Rajamanoharan et al. 2024, arXiv 2407.14435, and Gemma Scope): penalty  l0 sum_i 1[p_i > theta_i].
    """

    name = "jumprelu"
    form = "jumprelu"
    maps = 1
    control_law = Law(proportional=2.0, exponent=1.0, fraction=0.6, growth=0.5)
    # Adam moves the logarithm of a threshold by at most the learning rate a step, far less than a direction turns.
    rate_factors: ClassVar = {"log_threshold": 10.0}
    # Of 4,096 latents with an L0 of 32 more than a third died on a nanochat's middle layer at the weight that leaves
    # none of 1,024 dead. With an L0 of 80 of 1,024, a larger weight killed half of them.
    heaviest_auxk = 4.0

    b_enc: nnx.Param[Float[Array, " f"]]
    log_threshold: nnx.Param[Float[Array, " f"]]

    @dataclasses.dataclass(frozen=True)
    class Config(PenalisedConfig):
        """Settings of JumpReLU."""

        width_exponent = 0.25

        l0_coefficient: float = number(5.0, WEIGHT)
        """Weight of the sparsity penalty."""
        jump_recipe: Literal["tanh", "l0"] = "tanh"
        bandwidth: float | None = number(None, FACTOR)
        """Width of the window around a threshold through which gradients reach it; None is 1 for tanh, 0.5 for l0.

        Anthropic has 2, at which a nanochat's activations are reconstructed worse (`bench ablations`).
        """
        initial_threshold: float = number(0.1, _THRESHOLD)
        """Where thresholds start, unless L0 has a target."""
        pre_act_coefficient: float = number(3e-6, WEIGHT)
        """Weight of the pre-activation loss of the tanh recipe, which all latents have."""

        @property
        def rate_scale(self) -> float:  # type: ignore[override]
            """Factor on the default learning rate: thresholds of the l0 recipe kill latents at higher rates."""
            return 0.7 if self.jump_recipe == "l0" else 1.1

        @property
        def tail_exponent(self) -> float:  # type: ignore[override]
            """Power of the heaviness of tails by which the default learning rate is divided."""
            return 0.4 if self.jump_recipe == "l0" else 0.5

        @property
        def length_exponent(self) -> float:  # type: ignore[override]
            """Power of a run's length by which the default rate falls less than with the root of the steps."""
            return 0.0 if self.jump_recipe == "l0" else 0.2

        @property
        def width(self) -> float:
            """`bandwidth`, or its default."""
            return self.bandwidth or (0.5 if self.jump_recipe == "l0" else 1.0)

    @classmethod
    def initial_latents(cls, config: SAEConfig) -> dict[str, float]:
        """Return the encoder bias, and the log of the threshold."""
        return {"b_enc": 0.0, "log_threshold": math.log(config.initial_threshold)}  # type: ignore[attr-defined]

    def activate(self, x: Float[Array, "n d"], context: Context) -> tuple[Float[Array, "n f"], PerLatent]:
        """Return every latent above its threshold, and for the penalty the sums of its recipe over tokens."""
        if self.config.jump_recipe == "l0":
            (latents,), sums = self.map_latents(x, context, formulas.CountedJump(self.config.width), self.threshold)
        else:
            (latents,), sums = self.map_latents(
                x, context, formulas.TanhJump(self.config.width), self.threshold, self.norms
            )
        return latents, sums

    def penalty(self, forward: Forward) -> Float[Array, ""]:
        """Return the recipe's penalty on sparsity, for `tanh` the pre-activation loss, and the revival of the dead."""
        active, below = (sums / len(forward.x) for sums in forward.extra)
        sparsity = forward.context.strength * self.config.l0_coefficient * active.sum()
        sparsity += revival(self.config, forward.context, below)
        if self.config.jump_recipe == "l0":
            return sparsity
        return sparsity + self.config.pre_act_coefficient * (below @ self.norms)

    def initialize_latents(self, x: Float[Array, "n d"], ops: Ops) -> None:
        """Start thresholds where L0 is four times its target, if it has one.

        Thresholds move slowly, by a factor per step that the learning rate bounds: from theta_0 a short run would
        never get there.
        """
        target = self.config.target_l0
        if target is not None:
            count = min(max(round(4 * target * len(x)), 1), len(x) * self.config.d_sae // 2)
            start = selection.kth_largest(self.pre_activations(x, Context(ops)), count)
            start = jnp.where(start > 0, start, self.config.initial_threshold)  # where fewer than that are positive
            self.log_threshold[...] = jnp.full(self.config.d_sae, jnp.log(start))

    @property
    def threshold(self) -> Float[Array, " f"]:
        """The thresholds theta."""
        return jnp.exp(self.log_threshold[...])

    def inference_arrays(self) -> Arrays:
        """Return the encoder bias and the thresholds."""
        return {"b_enc": self.b_enc[...], "threshold": self.threshold}

    def own_arrays(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the encoder bias and the log of thresholds of at least 1e-6: smaller ones might have no logarithm."""
        thresholds = jnp.maximum(arrays["threshold"], _LEAST_THRESHOLD)
        return {"b_enc": arrays["b_enc"], "log_threshold": jnp.log(thresholds)}


def _share_of_pull(config: Gated.Config, context: Context) -> Float[Array, ""] | float:
    """Return min(share of dead latents / 0.05, 1), but at least `revival_floor`; 1 where none is dead."""
    if context.dead is None:
        return 1.0
    return jnp.clip(context.dead.mean() / _MANY_DEAD, config.revival_floor, 1)


def revival(config: PenalisedConfig, context: Context, below: Float[Array, " f"]) -> Float[Array, ""]:
    """Return revival_coefficient * sum over dead latents of mean_n ReLU(theta_i - p_i); 0 where none is dead.

    A dead latent is below its threshold on every token, so no other gradient reaches it. The pre-activation loss of
    Anthropic's update of January 2025, here for the dead only, so that it does not change what the others learn.

    Args:
      config: the SAE's settings.
      context: of the forward pass, with the mask of the dead latents.
      below: means over tokens of ReLU(theta - p), (f,).
    """
    if context.dead is None:
        return jnp.zeros(())
    return config.revival_coefficient * jnp.where(context.dead, below, 0).sum()
