"""A nanochat with its exported SAEs: track active features, steer them, attribute outputs to them. No jax."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge import compatibility, ranges
from bridge.attribution import Target, attribute
from bridge.hooks import Acts, Edit, capture, depth, edit
from bridge.nanochat import engine
from bridge.passes import unwrapped
from bridge.run.saes import load_saes
from bridge.steering import LENGTHS, PassInput, Steer, feature, mask, masked, steering_edit
from bridge.torch_sae import TorchSAE
from bridge.tracking import Features, Token, Trace, stream_tokens, watch

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat

__all__ = ["Features", "InterpretableModel", "Steer", "Token", "load_saes"]


class InterpretableModel:
    """A nanochat, this project's or upstream's own `GPT`, with SAEs at some of its hooks. The model is not modified.

    It may be compiled or wrapped; within contexts it runs eagerly, so that hooks fire (`bridge.hooks`).

    Hooks are on the model only within a context or a call, and are removed after exceptions too. Contexts may be
    nested: the inner one reads the result of the outer one. Only one thread at a time may run the model.

    Args:
      model: a module with transformer.wte and transformer.h[i].attn and .mlp.
      saes: SAEs by hook name, on the model's device; see `load_saes`.
      tokenizer: the model's tokenizer; required for text prompts and for the positions "not_special".
      fingerprint: fingerprint of the model (`Nanochat.fingerprint`); SAEs of other models are refused.
      transcoders: whether transcoders are allowed: their features are tracked, but cannot be steered or attributed to.

    Raises:
      ValueError: there is no SAE, or one does not fit the model's layers, width, device or fingerprint, or is a
        crosscoder, or a transcoder where these are not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Mapping[str, TorchSAE],
        tokenizer: Any = None,
        fingerprint: str | None = None,
        *,
        transcoders: bool = False,
    ):
        compatibility.check(model, saes, fingerprint, transcoders=transcoders)
        self.model = model
        self.saes = {name: saes[name] for name in sorted(saes, key=depth)}
        self.tokenizer = tokenizer
        self._traces: dict[str, Trace] = {}  # of the current context, otherwise of the last one
        self._tracking = False

    @classmethod
    def from_nanochat(
        cls, nano: "Nanochat", saes: Mapping[str, TorchSAE], *, transcoders: bool = False
    ) -> "InterpretableModel":
        """Return a loaded checkpoint with its SAEs and its tokenizer.

        Raises ValueError as the constructor, also for SAEs that were trained on another checkpoint.
        """
        fingerprint = compatibility.known_fingerprint(nano, saes)
        return cls(nano.model, saes, nano.tokenizer, fingerprint, transcoders=transcoders)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the hooks that have an SAE, in the order of a forward pass."""
        return tuple(self.saes)

    def __call__(self, tokens: Int[Tensor, "B T"], *args: Any, **kwargs: Any) -> Float[Tensor, "B T V"]:
        """Run the model's own forward, under the open contexts."""
        return self.model(tokens, *args, **kwargs)

    def sae(self, hook: str | None = None) -> TorchSAE:
        """Return the SAE of a hook, or the only SAE.

        Raises:
          ValueError: the hook has no SAE, or there are several SAEs and no hook is given; lists the hooks.
        """
        return self.saes[self._hook(hook, self.hooks)]

    # ---- tracking --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def interpretation_enabled(self, names: Sequence[str] | None = None) -> Iterator[None]:
        """Track the activations of forward passes within the context, for `get_active_features`.

        Activations are encoded on demand: reading the features of a whole generation at its end takes one matrix
        product; reading them after every token takes one pass over the encoder's weights per token.

        Args:
          names: hooks to track; None: all.
        """
        pass_input = PassInput()
        names = self.hooks if names is None else [self._hook(name, self.hooks) for name in names]
        traces = {name: Trace(self.saes[name], pass_input) for name in names}
        outer = self._traces if self._tracking else None
        self._traces, self._tracking = traces, True
        try:
            with watch(self.model, pass_input), edit(self.model, _keeping(traces)):
                yield
        finally:
            self._tracking = outer is not None
            self._traces = traces if outer is None else outer

    def get_active_features(
        self, hook: str | None = None, top_k: int | None = None, whole_text: bool = False
    ) -> Features:
        """Return the features at every position of the last forward pass: values and indices, (B, T, k), largest first.

        They are available within the context, and after it until the next one.

        Args:
          hook: the hook name; optional if only one hook is tracked.
          top_k: number of features per position; None: all active ones. Values of 0 are padding.
          whole_text: with cached decoding, return all positions of the text since the start of the context.

        Raises:
          ValueError: there was no forward pass within interpretation_enabled, or the hook is not tracked.
        """
        if not self._traces:
            raise ValueError("no forward pass has been tracked: run the model within interpretation_enabled() first")
        return self._traces[self._hook(hook, tuple(self._traces))].features(top_k, whole_text)

    def attribution(
        self, tokens: Int[Tensor, "B T"], hook: str | None, target: Target, top_k: int | None = None
    ) -> Features:
        """Return activation times gradient of the active features at every position, by descending magnitude.

        To first order, this is the decrease of the target if the feature is ablated at the position. The SAE's error is
        kept, so the gradient of a feature is that of the activation along its decoder row.

        Args:
          tokens: token ids, (B, T).
          hook: the hook name; None if only one hook has an SAE.
          target: a position and a token id, whose logit is summed over rows; or a function from logits to a scalar.
          top_k: number of the most active features per position; None: all active features.

        Raises:
          ValueError: the target is outside the text or the vocabulary, is not a scalar, or does not depend on the hook.
        """
        name = self._own(hook)
        return attribute(self.model, self.saes[name], name, tokens, target, top_k)

    # ---- steering --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def steering_enabled(
        self, steers: Sequence[Steer], *, strength_multiplier: float | int = 1.0, prompt_length: int | None = None
    ) -> Iterator[None]:
        """Steer every forward pass within the context. Requests of one hook are applied in order.

        Args:
          steers: the requests.
          strength_multiplier: factor on the strengths of Neuronpedia's modes, see `Steer`.
          prompt_length: number of tokens of the prompt; required for the positions "prompt" and "generated".

        Raises:
          ValueError: a hook has no SAE, a feature does not exist, a strength is out of range, or positions need a
            prompt_length or a tokenizer that is missing.
        """
        pass_input = PassInput()
        edits = self._edits(steers, strength_multiplier, prompt_length, pass_input)
        with watch(self.model, pass_input), edit(self.model, edits):
            yield

    def steer(
        self,
        tokens: Int[Tensor, "B T"],
        feature_id: tuple[str, int],
        strength: float | int,
        mode: str = "additive",
        positions: str = "all",
        *,
        strength_multiplier: float | int = 1.0,
        prompt_length: int | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of tokens while one feature is steered.

        Args:
          tokens: token ids, (B, T).
          feature_id: hook name and index of the feature.
          strength: see `Steer`, as for `mode` and `positions`.
          mode: the steering mode.
          positions: the tokens to steer.
          strength_multiplier: see `steering_enabled`, as for `prompt_length`.
          prompt_length: number of tokens of the prompt.

        Raises ValueError as `Steer` and `steering_enabled`.
        """
        request = Steer(*feature_id, mode, strength, positions)
        with self.steering_enabled([request], strength_multiplier=strength_multiplier, prompt_length=prompt_length):
            return self.model(tokens)

    def generate(
        self,
        prompt: str | Sequence[int],
        steer: Sequence[Steer] = (),
        *,
        max_tokens: int = 64,
        temperature: float | int = 1.0,
        seed: int = 42,
        top_k: int | None = None,
        strength_multiplier: float | int = 1.0,
        stop_tokens: Collection[int] = (),
        features: int | None = None,
        echo: bool = False,
        graphs: bool | None = None,
    ) -> Iterator[Token]:
        """Continue a prompt with steering; yield each token with the features that are active on it.

        A token is yielded after the model has read it, one forward pass after it was sampled. Its features are those at
        its own position, after steering. Between tokens no hooks are on the model, so several generations may be
        interleaved.

        Args:
          prompt: text, which is encoded with a leading BOS, or token ids.
          steer: the requests; their positions "prompt" and "generated" refer to this prompt.
          max_tokens: largest number of new tokens.
          temperature: divides the logits; 0 selects the most likely token.
          seed: random seed of the sampling.
          top_k: sample among the k most likely tokens only.
          strength_multiplier: see `Steer`.
          stop_tokens: ids that end the text; they are not yielded.
          features: largest number of features per hook and token; None: all active ones.
          echo: whether to yield the tokens of the prompt too.
          graphs: see `engine.generate`: steps are recorded with steering and tracking in them.

        Raises:
          ValueError: before any computation: the prompt is empty or too long, it is text and there is no tokenizer, or
            as in `steering_enabled`.
        """
        ids = self._ids(prompt)
        pass_input = PassInput()
        edits = self._edits(steer, strength_multiplier, len(ids), pass_input)
        traces = {name: Trace(sae, pass_input, features, encodes=True) for name, sae in self.saes.items()}

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            with watch(self.model, pass_input), edit(self.model, edits), edit(self.model, _keeping(traces)):
                return self.model(*args, **kwargs)

        columns = engine.generate(
            unwrapped(self.model),
            ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            stop_tokens=stop_tokens,
            forward=forward,
            read_last=True,
            is_static=True,
            graphs=graphs,
        )
        return stream_tokens(ids, columns, traces, self.tokenizer, features, echo)

    def relative_strength(
        self, steer: Steer, tokens: Int[Tensor, "B T"], strength_multiplier: float | int = 1.0
    ) -> float | None:
        """Return the length of a steering vector relative to activations: c |d| / mean |h| over a text.

        About 0.5 is a good start ("The Eiffel Tower Llama", 2025).

        Args:
          steer: the request.
          tokens: token ids, (B, T); special tokens are left out.
          strength_multiplier: see `Steer`.

        Returns:
          The relative length; None for modes whose c is a factor.
        """
        name, special = self._own(steer.hook), self._special_tokens
        if steer.mode not in LENGTHS:
            return None
        with torch.no_grad(), capture(self.model, [name], stop=True) as acts:
            self.model(tokens)
        norms = acts[name].float().norm(dim=-1)
        ordinary = torch.ones_like(tokens, dtype=torch.bool) if special is None else ~torch.isin(tokens, special)
        mean = norms[ordinary if ordinary.any() else ~ordinary].mean()
        length = feature(self.saes[name], steer.feature).direction.norm()
        return float(steer.c(strength_multiplier) * length / mean)

    # ---- checks and helpers ----------------------------------------------------------------------------------------

    @property
    def _embedding(self) -> Float[Tensor, "V C"]:
        """The token embedding, which has the width, dtype and device of the residual stream."""
        return unwrapped(self.model).transformer.wte.weight

    def _hook(self, name: str | None, known: tuple[str, ...]) -> str:
        if name is None and len(known) == 1:
            return known[0]
        if name not in known:
            problem = "several hooks have an SAE" if name is None else f"no SAE at {name!r}"
            raise ValueError(f"{problem}: choose one of {', '.join(known)}")
        return name

    def _own(self, hook: str | None) -> str:
        """Return the hook of an SAE, or raise ValueError: a transcoder does not write where it reads."""
        name = self._hook(hook, self.hooks)
        compatibility.check_kind(f"the SAE of {name}", self.saes[name])
        return name

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not len(prompt):
            raise ValueError("the prompt is empty: give at least one character or token")
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer: pass one to InterpretableModel, or give token ids")
        return self.tokenizer.encode(prompt, prepend_bos=True)

    def _edits(
        self, steers: Sequence[Steer], multiplier: float | int, prompt_length: int | None, pass_input: PassInput
    ) -> dict[str, Edit]:
        """Return the edits of the requests by hook; `pass_input` has the input of the forward pass they apply to."""
        chains: dict[str, list[Edit]] = {}
        special = self._special_tokens
        for request in steers:
            name = self._own(request.hook)
            if request.positions == "not_special" and special is None:
                raise ValueError("the positions 'not_special' need a tokenizer, which knows the special tokens")
            if request.positions in ("prompt", "generated") and prompt_length is None:
                raise ValueError(f"the positions {request.positions!r} need prompt_length")
            change = steering_edit(self.saes[name], request, multiplier, self._embedding.dtype)
            if request.positions != "all":
                change = masked(change, lambda p=request.positions: mask(p, pass_input, prompt_length, special))  # type: ignore[misc]
            chains.setdefault(name, []).append(change)
        ranges.check_product((request.mode, request.c(multiplier)) for request in steers)
        return {name: _composed(chain) for name, chain in chains.items()}

    @property
    def _special_tokens(self) -> Int[Tensor, " n"] | None:
        if self.tokenizer is None:
            return None
        return torch.tensor(sorted(self.tokenizer.special_tokens.values()), device=self._embedding.device)


def _keeping(traces: Mapping[str, Trace]) -> dict[str, Edit]:
    return {name: trace.keep for name, trace in traces.items()}


def _composed(chain: Sequence[Edit]) -> Edit:
    def composed(h: Acts) -> Acts:
        for change in chain:
            h = change(h)
        return h

    return composed
