"""A nanochat with its exported SAEs: see which features fire, push them, ask what they did. No jax."""

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
from bridge.passes import base
from bridge.run.saes import load_saes
from bridge.steering import LENGTHS, Reading, Steer, edit_of, feature, mask, masked
from bridge.torch_sae import TorchSAE
from bridge.tracking import Features, Token, Trace, narrate, watch

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat

__all__ = ["Features", "InterpretableModel", "Steer", "Token", "load_saes"]


class InterpretableModel:
    """A nanochat, this project's or upstream's own `GPT`, with SAEs at some of its hooks. The model is not changed.

    It may be compiled or wrapped; within contexts it then runs eagerly, so that hooks fire (`bridge.hooks`).

    Hooks are on the model only within a context or a call, also if it ends by an exception; contexts may be nested,
    the inner one then reads what the outer one made. One thread at a time may run the model.

    Args:
      model: any module with transformer.wte and transformer.h[i].attn and .mlp.
      saes: hook names to SAEs, on the model's device; `load_saes` reads them.
      tokenizer: the model's; needed for prompts of text and for the positions "not_special".
      fingerprint: of the model (`Nanochat.fingerprint`); SAEs that say they were trained on another are refused.

    Raises:
      ValueError: no SAE, one for a layer, width, device or model that is not this one's, a transcoder or a crosscoder.
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Mapping[str, TorchSAE],
        tokenizer: Any = None,
        fingerprint: str | None = None,
    ):
        compatibility.check(model, saes, fingerprint)
        self.model = model
        self.saes = {name: saes[name] for name in sorted(saes, key=depth)}
        self.tokenizer = tokenizer
        self._traces: dict[str, Trace] = {}  # of the context at hand, or else of the last one
        self._tracking = False

    @classmethod
    def of(cls, nano: "Nanochat", saes: Mapping[str, TorchSAE]) -> "InterpretableModel":
        """Of a loaded checkpoint: with its tokenizer, and refusing SAEs that were trained on another checkpoint."""
        return cls(nano.model, saes, nano.tokenizer, compatibility.known_fingerprint(nano, saes))

    @property
    def hooks(self) -> tuple[str, ...]:
        """The names of the hooks that have an SAE, in the order of a forward pass."""
        return tuple(self.saes)

    def __call__(self, tokens: Int[Tensor, "B T"], *args: Any, **kwargs: Any) -> Float[Tensor, "B T V"]:
        """The model's own forward, with what the contexts around it do."""
        return self.model(tokens, *args, **kwargs)

    def sae(self, hook: str | None = None) -> TorchSAE:
        """The SAE of a hook, or the only one there is.

        Raises:
          ValueError: no SAE at that hook, or several and no name; says which hooks there are.
        """
        return self.saes[self._hook(hook, self.hooks)]

    # ---- seeing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def interpretation_enabled(self, names: Sequence[str] | None = None) -> Iterator[None]:
        """Within the context, forward passes leave what `get_active_features` reads, at all hooks or those named.

        Nothing is encoded until it is asked for: decoding a text and reading its features at the end costs one
        matrix product, reading them after every token one pass over the encoder's weights per token.
        """
        reading = Reading()
        names = self.hooks if names is None else [self._hook(name, self.hooks) for name in names]
        traces = {name: Trace(self.saes[name], reading) for name in names}
        outer = self._traces if self._tracking else None
        self._traces, self._tracking = traces, True
        try:
            with watch(self.model, reading), edit(self.model, _keeping(traces)):
                yield
        finally:
            self._tracking = outer is not None
            self._traces = traces if outer is None else outer

    def get_active_features(
        self, hook: str | None = None, top_k: int | None = None, whole_text: bool = False
    ) -> Features:
        """The features at every position of the last forward pass: values and indices, (B, T, k), largest first.

        They can be read within the context, and after it until the next one.

        Args:
          hook: which; may be left out where one hook is tracked.
          top_k: features per position; unless given all that are active. Values of 0 are padding.
          whole_text: of cached decoding, all positions since the text (or the context, if later) began.

        Raises:
          ValueError: no forward pass within interpretation_enabled yet, or a hook that is not tracked.
        """
        if not self._traces:
            raise ValueError("nothing has been read yet: run the model within interpretation_enabled() first")
        return self._traces[self._hook(hook, tuple(self._traces))].features(top_k, whole_text)

    def attribution(
        self, tokens: Int[Tensor, "B T"], hook: str | None, target: Target, top_k: int | None = None
    ) -> Features:
        """Activation times gradient of every active feature at every position, the strongest first.

        To first order it is what the target would lose were the feature ablated there: with the SAE's error kept,
        the gradient with respect to an activation is that of the stream along the feature's decoder row.

        Args:
          tokens: the text.
          hook: whose features; may be None where one hook has an SAE.
          target: a position and a token id, whose logit (summed over the rows) it is; or a scalar of all logits.
          top_k: features considered per position, the most active ones; unless given all that are active.

        Raises:
          ValueError: a target beyond the text or the vocabulary, not a scalar, or not depending on the hook.
        """
        name = self._hook(hook, self.hooks)
        return attribute(self.model, self.saes[name], name, tokens, target, top_k)

    # ---- steering --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def steering_enabled(
        self, steers: Sequence[Steer], *, strength_multiplier: float | int = 1.0, prompt_length: int | None = None
    ) -> Iterator[None]:
        """Within the context, every forward pass is steered: requests of one hook in order, each reading the last.

        Args:
          steers: the requests.
          strength_multiplier: factor on the strengths of Neuronpedia's modes, see `Steer`.
          prompt_length: how many tokens of the text are its prompt; the positions "prompt" and "generated" ask for it.

        Raises:
          ValueError: a hook without SAE, a feature it does not have, or positions that cannot be told.
        """
        reading = Reading()
        edits = self._edits(steers, strength_multiplier, prompt_length, reading)
        with watch(self.model, reading), edit(self.model, edits):
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
        """The logits of tokens while one feature, (hook name, index), is pushed; see `Steer`."""
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
    ) -> Iterator[Token]:
        """Continues a prompt under steering, a token at a time, each with the features that fire on it.

        A token comes when the model has read it, so one forward pass after it was sampled: its features are those
        at its own position, after steering. The model is free of hooks whenever the caller has the word, so several
        generations may go on by turns.

        Args:
          prompt: text, which gets a BOS in front, or token ids.
          steer: what is pushed; positions "prompt" and "generated" mean this prompt.
          max_tokens: tokens at most.
          temperature: divides the logits; 0 takes the likeliest token.
          seed: of the sampling.
          top_k: sample among the k likeliest tokens only.
          strength_multiplier: see `Steer`.
          stop_tokens: ids that end the text; they are not part of it.
          features: per hook and token at most; unless given all that are active.
          echo: whether the tokens of the prompt come too.

        Raises:
          ValueError: before anything is computed, for an empty prompt, one beyond the model's positions, text
            without a tokenizer, and whatever `steering_enabled` refuses.
        """
        ids = self._ids(prompt)
        reading = Reading()
        edits = self._edits(steer, strength_multiplier, len(ids), reading)
        traces = {name: Trace(sae, reading) for name, sae in self.saes.items()}

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            with watch(self.model, reading), edit(self.model, edits), edit(self.model, _keeping(traces)):
                return self.model(*args, **kwargs)

        columns = engine.generate(
            base(self.model),
            ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            stop_tokens=stop_tokens,
            forward=forward,
            read_last=True,
        )
        return narrate(ids, columns, traces, self.tokenizer, features, echo)

    def relative_strength(
        self, steer: Steer, tokens: Int[Tensor, "B T"], strength_multiplier: float | int = 1.0
    ) -> float | None:
        """How long a push is next to the activations of a text, special tokens left out: c |d| / mean |h|.

        About one half is a good start ("The Eiffel Tower Llama", 2025). None for modes whose c is a factor.
        """
        name, special = self._hook(steer.hook, self.hooks), self._special_tokens
        if steer.mode not in LENGTHS:
            return None
        with torch.no_grad(), capture(self.model, [name], stop=True) as acts:
            self.model(tokens)
        norms = acts[name].float().norm(dim=-1)
        ordinary = torch.ones_like(tokens, dtype=torch.bool) if special is None else ~torch.isin(tokens, special)
        mean = norms[ordinary if ordinary.any() else ~ordinary].mean()
        length = feature(self.saes[name], steer.feature).direction.norm()
        return float(steer.c(strength_multiplier) * length / mean)

    # ---- the small print -------------------------------------------------------------------------------------------

    @property
    def _embedding(self) -> Float[Tensor, "V C"]:
        """What tells the width, dtype and device of the stream."""
        return base(self.model).transformer.wte.weight

    def _hook(self, name: str | None, known: tuple[str, ...]) -> str:
        if name is None and len(known) == 1:
            return known[0]
        if name not in known:
            told = "several hooks have an SAE" if name is None else f"no SAE at {name!r}"
            raise ValueError(f"{told}: choose one of {', '.join(known)}")
        return name

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not len(prompt):
            raise ValueError("the prompt is empty: give at least one character or token")
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer: give one to InterpretableModel, or token ids")
        return self.tokenizer.encode(prompt, prepend_bos=True)

    def _edits(
        self, steers: Sequence[Steer], multiplier: float | int, prompt_length: int | None, reading: Reading
    ) -> dict[str, Edit]:
        """Return what the requests do at each hook, bound to the forward pass that `reading` will tell of."""
        chains: dict[str, list[Edit]] = {}
        special = self._special_tokens
        for request in steers:
            name = self._hook(request.hook, self.hooks)
            if request.positions == "not_special" and special is None:
                raise ValueError("positions 'not_special' need a tokenizer, which knows the special tokens")
            if request.positions in ("prompt", "generated") and prompt_length is None:
                raise ValueError(f"positions {request.positions!r} need prompt_length: where the prompt ends")
            change = edit_of(self.saes[name], request, multiplier, self._embedding.dtype)
            if request.positions != "all":
                change = masked(change, lambda p=request.positions: mask(p, reading, prompt_length, special))
            chains.setdefault(name, []).append(change)
        ranges.check_product((request.mode, request.c(multiplier)) for request in steers)
        return {name: _in_order(chain) for name, chain in chains.items()}

    @property
    def _special_tokens(self) -> Int[Tensor, " n"] | None:
        if self.tokenizer is None:
            return None
        return torch.tensor(sorted(self.tokenizer.special_tokens.values()), device=self._embedding.device)


def _keeping(traces: Mapping[str, Trace]) -> dict[str, Edit]:
    return {name: trace.keep for name, trace in traces.items()}


def _in_order(chain: Sequence[Edit]) -> Edit:
    def change(h: Acts) -> Acts:
        for link in chain:
            h = link(h)
        return h

    return change
