"""Terminal output of steering: two continuations side by side, tokens coloured by the features that fire on them."""

from collections import defaultdict
from collections.abc import Sequence

from rich.console import Group
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from bridge.runtime import Features, Steer, Token

_DARK, _BRIGHT = (56, 44, 20), (255, 150, 0)
# Control characters are shown as symbols: a model may generate any text.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def side_by_side(texts: Sequence[Sequence[Token]], steers: Sequence[Steer]) -> Table:
    """Return the continuations in panels; the brighter a token, the more the pushed features fire on it."""
    strongest = {s: max((_activation(t, s) for tokens in texts for t in tokens), default=0.0) for s in steers}
    table = Table.grid(expand=True)
    panels = []
    for title, tokens in zip(("default", "steered"), texts, strict=False):
        text = Text()
        for token in tokens:
            share = max((_activation(token, s) / strongest[s] for s in steers if strongest[s]), default=0.0)
            text.append(shown(token.text), _style(token, share))
        table.add_column(ratio=1, overflow="fold")
        panels.append(Panel(text, title=title, title_align="left"))
    table.add_row(*panels)
    return table


def summary(
    steers: Sequence[Steer], relative: Sequence[float | None], default: Sequence[Token], steered: Sequence[Token]
) -> Table:
    """Return a row per pushed feature: its strength relative to the activations, and how often it fired."""
    table = Table("feature", "mode", "strength", "c‖d‖ / mean‖h‖", "fires by default", "fires when steered")
    for steer, ratio in zip(steers, relative, strict=True):
        table.add_row(
            f"{steer.feature}",
            f"{steer.mode} ({steer.positions})",
            f"{steer.strength:g}",
            "a factor" if ratio is None else f"{ratio:.3f}",
            _firing(default, steer),
            _firing(steered, steer),
        )
    return table


def top(tokens: Sequence[Token], hook: str, count: int) -> Group:
    """Return the features with the largest activations on a text."""
    activations: dict[int, list[tuple[float, Token]]] = defaultdict(list)
    for token in tokens:
        for index, value in token.features[hook]:
            activations[index].append((value, token))
    peaks = {index: max(fired, key=lambda pair: pair[0]) for index, fired in activations.items()}
    table = Table("feature", "largest", "on", "tokens")
    for index in sorted(peaks, key=lambda i: -peaks[i][0])[: max(count, 1)]:
        value, token = peaks[index]
        table.add_row(f"{index}", f"{value:.3f}", _quoted(token.text), f"{len(activations[index])}")
    return Group(Text(f"what fires at {hook}"), table)


def why(attributions: Features, texts: Sequence[str], target: str, count: int = 10) -> Group:
    """Return the features and positions that most raise or lower the logit of a token."""
    values, indices = (x[0].flatten().tolist() for x in attributions)
    per_position = attributions.values.shape[-1]
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:count]
    table = Table("feature", "on", "position", "contribution")
    for i in order:
        position = i // per_position
        table.add_row(f"{indices[i]}", _quoted(texts[position]), f"{position}", f"{values[i]:+.4f}")
    return Group(Text.assemble("activation x gradient for ", _quoted(target)), table)


def request(steer: Steer) -> str:
    """Return the description of a steered feature."""
    return f"feature {steer.feature} of {steer.hook}: {steer.mode} {steer.strength:g}, positions {steer.positions}"


def shown(text: str) -> str:
    """Return a text with its control characters replaced by visible symbols."""
    return text.translate(_VISIBLE)


def _activation(token: Token, steer: Steer) -> float:
    return dict(token.features[steer.hook]).get(steer.feature, 0.0)


def _firing(tokens: Sequence[Token], steer: Steer) -> str:
    fired = [value for token in tokens if (value := _activation(token, steer)) != 0]
    return f"{len(fired)} of {len(tokens)} tokens, at most {max(fired, key=abs, default=0.0):.2f}"


def _style(token: Token, share: float) -> Style:
    if share <= 0:
        return Style(dim=not token.generated)
    colour = tuple(round(dark + share * (bright - dark)) for dark, bright in zip(_DARK, _BRIGHT, strict=True))
    return Style(color="black" if share > 0.5 else "white", bgcolor="rgb({},{},{})".format(*colour))


def _quoted(text: str) -> Text:
    return Text(repr(shown(text)))
