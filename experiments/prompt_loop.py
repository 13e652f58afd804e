"""Interactive steering: continue prompts with and without steering, and change the steered features by commands."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from rich.console import Console
from rich.live import Live

from bridge.nanochat.engine import chat_prompt
from bridge.runtime import InterpretableModel, Steer, Token
from experiments import signals
from experiments import steer_view as view
from experiments.flags import EXPECTED_ERRORS

_Number = TypeVar("_Number", int, float)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the continuations, and the defaults of /steer."""

    strength: tuple[float, ...]
    """The first is the default of /steer."""
    mode: str
    positions: str
    strength_multiplier: float
    max_tokens: int
    temperature: float
    top_k: int | None
    seed: int
    chat: bool
    """Whether a prompt is a user's message to a chat checkpoint."""
    device: str


class Session:
    """The steered features and the last prompt. `prompt` and the commands print their results.

    Args:
      im: the model with its SAEs.
      hook: the SAE whose features are steered.
      settings: of the continuations.
      steers: the features to steer at first.

    Raises:
      ValueError: features that cannot be steered.
    """

    def __init__(self, im: InterpretableModel, hook: str, settings: Settings, steers: list[Steer]):
        self.im, self.hook, self.settings, self.steers = im, hook, settings, steers
        self.console = Console(highlight=False)
        self._ids: list[int] = []
        self._default: list[Token] = []
        self._check(steers)

    def prompt(self, text: str) -> None:
        """Continue a text, without steering and, if features are steered, with it, side by side."""
        ids, stop_tokens = self._render(text)
        columns = [self._continue(ids, stop_tokens, steers) for steers in ([], self.steers)[: 1 + bool(self.steers)]]
        texts: list[list[Token]] = [[] for _ in columns]
        with self._live() as show:
            for row in itertools.zip_longest(*columns):
                for tokens, token in zip(texts, row, strict=True):
                    tokens.extend([] if token is None else [token])
                show(view.side_by_side(texts, self.steers))
        if not self.console.is_terminal:
            self.console.print(view.side_by_side(texts, self.steers))
        self._ids, self._default = ids, texts[0]
        if self.steers:
            self.console.print(view.summary(self.steers, self._relative(ids), *texts))
        else:
            self.top()

    def top(self, argument: str = "") -> None:
        """Print the features that fired most on the last prompt and its default continuation."""
        self._require_prompt()
        count = _number(argument or "10", int)
        if count < 1:
            raise ValueError(f"/top {count}: give how many features to show, at least 1")
        self.console.print(view.top(self._default, self.hook, count))

    def why(self, argument: str = "") -> None:
        """Print which features raise the logit of a token after the last prompt, by default of the likeliest token."""
        self._require_prompt()
        tokenizer, tokens = self.im.tokenizer, torch.tensor([self._ids], device=self.settings.device)
        if argument:
            target = tokenizer.encode(argument)[0]
        else:
            with torch.no_grad():
                target = int(self.im(tokens)[0, -1].argmax())
        attributions = self.im.attribution(tokens, self.hook, (-1, target))
        texts = [tokenizer.token_text(token) for token in self._ids]
        self.console.print(view.why(attributions, texts, tokenizer.token_text(target)))

    def steer(self, argument: str = "") -> None:
        """Steer one more feature, if one is named, and print which are steered."""
        words = argument.split()
        if len(words) > 3:
            raise ValueError(f"/steer takes FEATURE [STRENGTH [MODE]], not {len(words)} words")
        if words:
            strength = _number(words[1], float) if len(words) > 1 else self.settings.strength[0]
            mode = words[2] if len(words) > 2 else self.settings.mode
            request = Steer(self.hook, _number(words[0], int), mode, strength, self.settings.positions)
            self._check([*self.steers, request])
            self.steers = [*self.steers, request]
        for request in self.steers:
            self.console.print(view.request(request))
        if not self.steers:
            self.console.print("nothing is pushed")

    def clear(self, argument: str = "") -> None:
        """Stop steering."""
        self.steers = []

    def help(self, argument: str = "") -> None:
        """Print the commands."""
        self.console.print(_HELP, markup=False)

    def _check(self, steers: list[Steer]) -> None:
        """Raise ValueError for steering that the model would refuse when it runs."""
        with self.im.steering_enabled(steers, strength_multiplier=self.settings.strength_multiplier, prompt_length=0):
            pass

    def _require_prompt(self) -> None:
        if not self._ids:
            raise ValueError("there is no prompt yet: type a text to continue")

    def _render(self, text: str) -> tuple[list[int], tuple[int, ...]]:
        """Return the tokens of a prompt, and the ids that end its continuation."""
        tokenizer = self.im.tokenizer
        if self.settings.chat:
            return chat_prompt(self.im.model, tokenizer, [{"role": "user", "content": text}])
        return tokenizer.encode(text, prepend_bos=True), (tokenizer.bos_token_id,)

    def _continue(self, ids: list[int], stop_tokens: tuple[int, ...], steers: list[Steer]) -> Iterator[Token]:
        return self.im.generate(
            ids,
            steers,
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            seed=self.settings.seed,
            top_k=self.settings.top_k,
            strength_multiplier=self.settings.strength_multiplier,
            stop_tokens=stop_tokens,
            echo=True,
        )

    def _relative(self, ids: list[int]) -> list[float | None]:
        tokens = torch.tensor([ids], device=self.settings.device)
        return [self.im.relative_strength(s, tokens, self.settings.strength_multiplier) for s in self.steers]

    @contextlib.contextmanager
    def _live(self) -> Iterator[Callable[[object], None]]:
        """Yield a function that displays a table as it changes; without a terminal it does nothing."""
        if not self.console.is_terminal:
            yield lambda table: None
            return
        with Live(console=self.console, refresh_per_second=8, vertical_overflow="visible") as live:
            yield lambda table: live.update(table)  # type: ignore[arg-type]


_HELP = """\
/steer FEATURE [STRENGTH [MODE]]   push one more feature
/steer                             show the pushed features
/clear                             stop pushing features
/top [N]                           show what fired most on the last prompt and its default continuation
/why [TOKEN]                       show which features raise TOKEN, or the likeliest token, after the last prompt
/help                              show this help
/quit                              quit, as the end of the input does
Any other line is a prompt to continue; \\n in it is a line break."""

COMMANDS: Mapping[str, Callable[..., None]] = {
    "steer": Session.steer,
    "clear": Session.clear,
    "top": Session.top,
    "why": Session.why,
    "help": Session.help,
}


def ask(session: Session) -> None:
    """Read lines until /quit or the end of the input; print errors and continue."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - editing and history for input()
    session.console.print("Type a prompt to continue; /help lists the commands, /quit ends.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        try:
            _execute(session, line)
        except KeyboardInterrupt:
            signals.answered()
            session.console.print("stopped")
        except EXPECTED_ERRORS as error:
            session.console.print(f"{error}", style="red", markup=False)


def _execute(session: Session, line: str) -> None:
    if not line.startswith("/"):
        if line:
            session.prompt(line.replace("\\n", "\n"))
        return
    # Only the first space separates: in "/why  self" the token is " self".
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        raise ValueError(f"no command /{name}: there are {', '.join('/' + known for known in COMMANDS)} and /quit")
    COMMANDS[name](session, argument)


def _number(text: str, kind: Callable[[str], _Number]) -> _Number:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a {'whole number' if kind is int else 'number'}; /help lists the commands"
        ) from None
