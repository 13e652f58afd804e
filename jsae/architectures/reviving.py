"""AuxK for the latents of an SAE, shared by all architectures."""

from typing import ClassVar

from jaxtyping import Array, Float

from jsae import auxk
from jsae.architectures.base import SAE, Forward


class Reviving(SAE):
    """An SAE whose `Config` has an `aux_coefficient`. Abstract."""

    norm_power: ClassVar[float] = 1.0
    """As of `jsae.auxk.decode_dead`: 1 where a token's latents compete with each other alone."""

    def auxk(self, forward: Forward, b_enc: Float[Array, " f"], l0: float, *, lifted: bool = False) -> Float[Array, ""]:
        """Return AuxK (`jsae.auxk`) times its coefficient: dead latents learn what the living left over.

        Args:
          forward: a pass in training, whose context has the mask of the dead latents.
          b_enc: the bias of their pre-activations.
          l0: active latents per token, from which follows on how many tokens a latent fires.
          lifted: as of `jsae.auxk.decode_dead`.
        """
        context = forward.context
        parts = auxk.decode_dead(
            context.ops,
            self.inputs(forward.x, context),
            self.W_enc[...],
            b_enc,
            self.W_dec[...],
            context.dead,
            auxk.tokens_of(len(forward.y), l0, self.config.d_sae, lifted=lifted),
            context.step,
            norm_power=self.norm_power,
            lifted=lifted,
        )
        return self.config.aux_coefficient * auxk.loss(forward.y, -forward.error, parts, context.dead)
