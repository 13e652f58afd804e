"""Watch a training of a nanochat: SAEs learn from the batches that it is trained on anyway.

watcher = Watcher(model, checkpoint=checkpoint_dir, layer=6, output_dir="runs/watch")   # before the first step
...
watcher.step(step)                                                                      # at the top of the loop
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bridge import launch
from bridge.hooks import hook_name
from bridge.live.budget import Budget
from bridge.live.capture import Capture
from bridge.live.config import Sizes, WatchConfig
from bridge.passes import unwrapped
from bridge.settings import from_keywords
from bridge.training import device
from jsae.settings import require

if TYPE_CHECKING:
    from bridge.live.learner import Learner
    from bridge.live.remote import Remote

_UNHEARD = 3  # steps in a row without an activation, after which it is reported


class Watcher:
    """SAEs that learn from the activations of a training while it goes on, and never disturb it.

    Make it after the model and before the model's first step: code that was compiled earlier does not call it. Call
    `step` once per optimiser step. Whenever the training takes the model's `state_dict`, the SAEs are saved too, as
    those of that step, and exported; a training that goes on from the step (`resume_from`) continues them exactly.
    Afterwards, errors end the watching, not the training, and are printed. Of several processes the first one watches,
    its own part of the batch; in the others nothing happens.

    Args:
      model: a nanochat of any generation, upstream's or this project's, possibly compiled or wrapped.
      config: all settings.
      settings: fields of `WatchConfig` instead, as `bridge.train` takes them.

    Raises:
      ConfigError: settings that cannot work, or a directory that holds something else.
      ValueError: the model has no such layer, or is no nanochat.
      LockedError: another process writes to the directory.
    """

    def __init__(self, model: nn.Module, config: WatchConfig | None = None, **settings: Any):
        require(config is None or not settings, f"give a config or settings, not both: {', '.join(settings)}")
        config = from_keywords(WatchConfig, settings) if config is None else config
        self._config = config
        self.active = _is_first()
        """True while this process watches and nothing has ended it."""
        self._start = self._step = self._saved = max(config.resume_from, 0)
        self._budget = Budget(config.share)
        self._unheard, self._heard_once, self._called = 0, False, False
        self._wanted, self._allowed, self._decided = 0, False, -1
        self._saved_before = False
        self._learner: Learner | Remote | None = None
        if not self.active:
            return
        sizes = sizes_of(model)
        hooks = [hook_name(layer, config.hook_type) for layer in config.run_config().layers(sizes.n_layer)]
        self._width = sizes.n_embd
        self._capture = Capture(
            model,
            hooks,
            excluded=sizes.excluded(config.exclude_tokens),
            drop_sinks=config.drop_sinks,
            seed=config.seed,
        )
        try:
            self._learner = _learner(config, sizes, _say)
        except BaseException:
            self._capture.detach()
            raise
        self._finalizer = weakref.finalize(self, self._learner.close)
        self._saving = _on_state_dict(model, self)
        self._listen()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @property
    def budget(self) -> Budget:
        """The account of the training's time that watching has taken."""
        return self._budget

    @property
    def batches(self) -> int:
        """Number of batches that the SAEs were trained on; in a sidecar, as far as it has reported them."""
        return 0 if self._learner is None else self._learner.batches

    def step(self, step: int) -> None:
        """Train on what the last step of the training computed, and decide whether to listen to the next one.

        Args:
          step: steps that the training has taken, the number under which it would save its model now.
        """
        if not self.active:
            return
        with self._unharmed():
            self._budget.begin()
            self._learn()
            self._step = int(step)
            if not self._called and self._step - self._start not in (0, 1):
                _say(
                    f"the training goes on from step {self._step}, and the SAEs from {self._start}: give that step as "
                    "resume_from"
                )
            self._called = True
            self._listen()

    def save(self) -> None:
        """Save the SAEs as those of the last step; the training's call of `model.state_dict()` does so by itself."""
        if not self.active or self._saved == self._step:
            return
        first, self._saved_before = not self._saved_before, True
        with self._unharmed(), self._budget.measuring(lambda: first):
            self._saved = self._step
            if not self._learner.save(self._step, self._figures()):
                _say(f"nothing to save at step {self._step}: no batch has been trained on yet")

    def attach(self, model: nn.Module) -> None:
        """Watch another model in the place of the first, of the same sizes: one that replaced it in the training."""
        if not self.active:
            return
        with self._unharmed():
            sizes = sizes_of(model)
            require(sizes.n_embd == self._width, f"the new model has the width {sizes.n_embd}, not {self._width}")
            self._capture.attach(model)
            self._saving.remove()
            self._saving = _on_state_dict(model, self)
            self._unheard = 0
            self._listen()

    def close(self) -> None:
        """End the watching, and say what it took. What was learned after the last checkpoint is dropped."""
        if not self.active:
            return
        with self._unharmed():
            figures = self._figures()
            self._end()
            _say(
                f"{self.batches} batches in {figures['watch_seconds']:.1f} s, {figures['watch_share']:.1%} of the "
                f"training's time, after {figures['setup_seconds']:.1f} s of preparations; skipped "
                f"{self._budget.skipped} of {self._budget.due} due steps"
            )

    def _learn(self) -> None:
        """Train on what was heard since the last call."""
        if not self._wanted:
            return
        prepared, before = self._learner.prepared, self._budget.spent
        with self._budget.measuring(lambda: not prepared):
            parts, self._wanted = self._capture.take(), 0
            if self._capture.error is not None:
                raise self._capture.error
            self._note_hearing(parts is not None)
            if parts is not None and len(parts[0]):
                self._check(parts)
                self._learner.push(parts, self._step + 1, self._figures())
        self._budget.add(self._capture.seconds(), not prepared)
        if prepared and parts is not None:
            self._budget.batch(self._budget.spent - before)

    def _listen(self) -> None:
        """Listen to the next step if it is due and within the budget, as is decided once for every step."""
        if self._decided != self._step:
            due = self._step % self._config.every == 0
            self._allowed, self._decided = due and self._budget.allows(), self._step
            if (problem := self._budget.too_slow()) is not None:
                _say(problem)
        self._wanted = self._config.tokens if self._allowed else 0
        self._capture.arm(self._wanted, self._step)

    def _check(self, parts: list[Any]) -> None:
        """Drop activations that are not finite, and refuse those of another width."""
        width = parts[0].shape[1]
        require(
            width == self._width,
            f"the activations have the width {width} now, and had {self._width}: the model was replaced by another",
        )
        finite = [part for part in parts if bool((abs(part) < float("inf")).all())]
        if len(finite) < len(parts):
            _say(f"the activations of step {self._step} hold numbers that are not finite: they are left out")
            parts[:] = [part[:0] for part in parts]

    def _note_hearing(self, heard: bool) -> None:
        """Say where several steps in a row had no activations."""
        self._unheard = 0 if heard else self._unheard + 1
        self._heard_once |= heard
        if self._unheard == _UNHEARD + (not self._heard_once):  # the first call may come before the first step
            _say(
                f"nothing was heard in the last {_UNHEARD} steps of the training, which goes on. Either the model, or "
                "another of its class, was compiled and ran before it was watched: make the watcher before the first "
                "step, or call torch._dynamo.reset() then; or it was replaced: call attach(model); or step() is called "
                "more often than once per step"
            )

    def _figures(self) -> dict[str, float]:
        budget = self._budget
        return {
            "watch_share": round(budget.ratio, 6),
            "watch_seconds": round(budget.spent, 3),
            "setup_seconds": round(budget.setup, 3),
            "due": budget.due,
            "skipped": budget.skipped,
        }

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        """End the watching at an error, and say so; the training goes on."""
        try:
            yield
        except Exception as error:
            self.active = False
            with contextlib.suppress(Exception):
                self._capture.arm(0, 0)  # compiled code keeps its calls, and would be compiled anew without the hooks
            with contextlib.suppress(Exception):
                self._finalizer()
            kind = "" if isinstance(error, ValueError | FloatingPointError) else f"{type(error).__name__}: "
            _say(
                f"watching ended at step {self._step}, and the training goes on. {kind}{error}. What was saved before "
                f"is in {self._config.output_dir}"
            )

    def _end(self) -> None:
        self.active = False
        self._capture.detach()
        self._saving.remove()
        self._finalizer()


def _say(text: str) -> None:
    print(f"watch: {text}", file=sys.stderr, flush=True)


def sizes_of(model: nn.Module) -> Sizes:
    """Return the sizes of a nanochat, possibly wrapped.

    Raises:
      ValueError: it is no nanochat.
    """
    inner = unwrapped(model)
    transformer = getattr(inner, "transformer", None)
    embedding = getattr(transformer, "wte", None)
    if embedding is None or not hasattr(transformer, "h"):
        raise ValueError(f"a {type(inner).__name__} has no transformer.wte and transformer.h: only a nanochat has them")
    vocab = getattr(getattr(inner, "config", None), "vocab_size", embedding.weight.size(0))
    return Sizes(len(transformer.h), embedding.weight.size(1), int(vocab))


def _is_first() -> bool:
    """Return whether this is the only or first process of the training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return launch.is_first()


def _learner(config: WatchConfig, sizes: Sizes, say: Any) -> Learner | Remote:
    """Return the SAEs, in this process or beside it."""
    if config.place == "sidecar":
        from bridge.live.remote import Remote

        return Remote(config, sizes, say)
    if config.device != "cpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the training needs the memory
    device.jax_alone(config.device)
    from bridge.live.learner import Learner

    return Learner(config, sizes, say)


def _on_state_dict(model: nn.Module, watcher: Watcher) -> Any:
    """Have the SAEs saved whenever the state of a model is taken. Copies of the model do not save them."""
    inner, reference = weakref.ref(unwrapped(model)), weakref.ref(watcher)

    def save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if module is inner() and (alive := reference()) is not None:
            alive.save()

    return unwrapped(model).register_state_dict_pre_hook(save)
