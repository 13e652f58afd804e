"""The local replacement model: a frozen nanochat whose MLPs are transcoders, their errors and their biases."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.circuits.frozen import Acts, Frozen
from bridge.hooks import hook_name
from bridge.selection import among
from bridge.torch_sae import TorchSAE


class Replacement:
    """A nanochat at one prompt, with the MLP of every layer l written as

        mlp_l = sum_f a_f d_f + b_dec + W_skip u + error_l,    a_f = relu(u . W_enc[:, f] + b_enc[f]) where f is active

    where u is what the MLP reads. The error makes it exact. With attention patterns, norms and the set of active
    features held at their values, everything that follows is linear in the features, errors, biases and embeddings.

    Args:
      model: see `Frozen`.
      transcoders: by hook of their input, one for every layer (`bridge.compatibility.check_transcoders`).
      tokens: the prompt, (T,), on the model's device.
      untrained: ids of tokens on which the transcoders were not trained, such as BOS; where they stand, the error
        takes in the features.

    Raises:
      ValueError: as `Frozen`, or a layer has no transcoder, or one of another precision.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        transcoders: Mapping[str, TorchSAE],
        tokens: Int[Tensor, " T"],
        untrained: tuple[int, ...] = (),
    ):
        count = len(transcoders)
        self.transcoders = [transcoders[hook_name(i, "mlp_in")] for i in range(count)]
        self.skip = [getattr(t, "W_skip", None) for t in self.transcoders]
        self.frozen = Frozen(model, tokens, self.skip)
        if self.frozen.config.n_layer != count:
            raise ValueError(f"the model has {self.frozen.config.n_layer} layers, but {count} have a transcoder")
        self._check_precision()
        found, values, self.base = [], [], []
        with torch.inference_mode(False), torch.no_grad():
            for i, transcoder in enumerate(self.transcoders):
                read = self.frozen.mlp_in[i]
                self.base.append(self.frozen.mlp[i] - (0 if self.skip[i] is None else read @ self.skip[i].T))
                latents = transcoder.encode(read)
                latents[among(tokens, untrained)] = 0
                places = latents.nonzero()
                values.append(latents[places[:, 0], places[:, 1]])
                found.append(torch.cat([torch.full_like(places[:, :1], i), places], dim=1))
        self.features: Int[Tensor, "F 3"] = torch.cat(found)
        """Layer, position and latent of the active features, in this order."""
        self.activations: Float[Tensor, " F"] = torch.cat(values)
        self._gather()

    def _check_precision(self) -> None:
        dtype = self.frozen.embedding.dtype
        for i, transcoder in enumerate(self.transcoders):
            if transcoder.W_enc.dtype != dtype:
                raise ValueError(
                    f"the transcoder of layer {i} is in {transcoder.W_enc.dtype}, the model in {dtype}: convert one "
                    "of them with .to(dtype)"
                )

    def keep(self, kept: Bool[Tensor, " F"]) -> None:
        """Let the errors take in all features but these."""
        self.features, self.activations = self.features[kept], self.activations[kept]
        self._gather()

    @torch.no_grad()
    def _gather(self) -> None:
        """Derive errors and the vectors that features write from the list of features."""
        self.writes: list[Float[Tensor, "T K C"]] = []
        """By layer and position: what the features write, padded with zeros to the same number."""
        self.slots: list[Int[Tensor, " n"]] = []
        """By layer: the places of its features in the flattened first two axes of `writes`."""
        self.errors: list[Acts] = []
        for i, transcoder in enumerate(self.transcoders):
            _, positions, latents = self.features[self.of_layer(i)].T
            counts = torch.bincount(positions, minlength=self.length)
            width = int(counts.max())
            ranks = torch.arange(len(positions), device=positions.device) - (counts.cumsum(0) - counts)[positions]
            self.slots.append(positions * width + ranks)
            writes = transcoder.W_dec.new_zeros(self.length * width, transcoder.d_out)
            writes[self.slots[i]] = self.activations[self.of_layer(i), None] * transcoder.W_dec[latents]
            self.writes.append(writes.view(self.length, width, transcoder.d_out))
            self.errors.append(self.base[i] - self.writes[i].sum(1) - transcoder.b_dec)

    @property
    def length(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.frozen.tokens)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.transcoders)

    @property
    def sources(self) -> int:
        """Number of sources: features, errors (layers times tokens) and tokens, in this order."""
        return len(self.features) + (self.depth + 1) * self.length

    @property
    def tokens(self) -> slice:
        """The columns of the tokens."""
        return slice(self.sources - self.length, self.sources)

    def of_layer(self, layer: int) -> slice:
        """Return where the features of a layer are in `features`."""
        return self.columns(layer, self.length)[0]

    def columns(self, layer: int, length: int) -> tuple[slice, slice]:
        """Return the columns of a layer's features and errors at the first `length` positions."""
        layers, positions = self.features[:, 0], self.features[:, 1]
        start = int((layers < layer).sum())
        count = int(((layers == layer) & (positions < length)).sum())
        first_error = len(self.features) + layer * self.length
        return slice(start, start + count), slice(first_error, first_error + length)

    def encoders(self, layer: int, latents: Int[Tensor, " n"]) -> Float[Tensor, "n C"]:
        """Return what latents of a layer read: rows u with pre-activation u . mlp_in + b_enc."""
        return self.transcoders[layer].W_enc.T[latents]

    def column(self, layer: int, position: int, latent: int | None) -> int:
        """Return the column of a feature, or of an error if `latent` is None, in the matrix of the graph.

        Raises:
          ValueError: there is no such node.
        """
        if not 0 <= layer < self.depth or not 0 <= position < self.length:
            raise ValueError(
                f"layer {layer}, position {position} is outside {self.depth} layers and {self.length} tokens"
            )
        if latent is None:
            return len(self.features) + layer * self.length + position
        wanted = torch.tensor([layer, position, latent], device=self.features.device)
        (places,) = (self.features == wanted).all(1).nonzero(as_tuple=True)
        if not len(places):
            raise ValueError(f"latent {latent} of layer {layer} is not a node at position {position}: it is not active")
        return int(places[0])

    def written(self, column: int) -> tuple[int, int, Float[Tensor, " C"]]:
        """Return layer, position and vector of what a feature or error, given by its column, writes."""
        if column < len(self.features):
            layer, position, latent = self.features[column].tolist()
            return layer, position, self.activations[column] * self.transcoders[layer].W_dec[latent]
        layer, position = divmod(column - len(self.features), self.length)
        return layer, position, self.errors[layer][position]
