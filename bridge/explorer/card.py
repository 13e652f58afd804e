"""Show a latent's records in a notebook as a small HTML card, without scripts, page or server."""

import dataclasses
import html
from collections.abc import Iterator

import numpy as np

from jsae.records.store import TOP, Store

_COLOUR = "234, 88, 12"  # of an activation, as on the explorer's page
_BARS, _HEIGHT = 160, 36  # pixels of the histogram
_SHOWN = {"\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclasses.dataclass(frozen=True)
class Card:
    """The dashboard of one latent. A notebook displays it as the last value of a cell.

    Args:
      store: the records of its SAE, from `bridge.Run(…).records(hook)`.
      latent: its number.
      label: its label.
      texts: the maximal number of texts to show, those with the strongest activations.
      around: tokens to show on each side of the strongest one.

    Raises:
      IndexError: the SAE has no such latent.
    """

    store: Store
    latent: int
    label: str = ""
    texts: int = 6
    around: int = 12

    def __post_init__(self) -> None:
        if not 0 <= self.latent < self.store.header.d_sae:
            raise IndexError(f"latent {self.latent}: {self.store.header.hook} has 0 to {self.store.header.d_sae - 1}")

    @property
    def density(self) -> float:
        """The share of tokens on which the latent fires."""
        return float(self.store["count"][self.latent]) / self.store.header.tokens

    @property
    def examples(self) -> list[list[tuple[str, float]]]:
        """The strongest texts, each a list of (token, activation); the activation is 0 where the latent is silent."""
        return list(self._examples())

    def tokens(self, column: str) -> list[str]:
        """Return the tokens of "top_logits", which the latent raises most, or "bottom_logits", its lowered ones."""
        words = self.store.texts.words
        return [words[token] for token in self.store[column][self.latent][:8]]

    def __str__(self) -> str:
        lines = [f"latent {self.latent}  {self.label}".rstrip(), f"fires on {self.density:.2%} of the tokens"]
        for example in self.examples:
            lines.append("".join(f"«{word}»" if value > 0 else word for word, value in example).replace("\n", "↵"))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the card as HTML; every token is escaped."""
        largest = float(self.store["max"][self.latent]) or 1.0
        rows = "".join(f"<div>{_text(example, largest)}</div>" for example in self.examples)
        raised, lowered = (
            " ".join(f"<code>{_escape(word)}</code>" for word in self.tokens(column))
            for column in ("top_logits", "bottom_logits")
        )
        return (
            '<div style="border:1px solid #8884;border-radius:6px;padding:10px 14px;max-width:760px;overflow-x:auto">'
            f"<b>latent {self.latent}</b> {_escape(self.label)}"
            f'<div style="display:flex;flex-wrap:wrap;gap:18px;align-items:end;margin:6px 0">'
            f"<span>fires on {self.density:.2%} of the tokens, at most {largest:.1f}</span>{self._histogram()}</div>"
            f'<div style="font-family:monospace;font-size:13px;line-height:1.7;white-space:nowrap">{rows}</div>'
            f'<div style="margin-top:6px">raises {raised}</div><div>lowers {lowered}</div></div>'
        )

    def _examples(self) -> Iterator[list[tuple[str, float]]]:
        store = self.store
        chosen = [i for i in store.examples(self.latent) if store["example_group"][i] == TOP]
        chosen.sort(key=lambda i: -float(store["example_value"][i]))
        for example in chosen[: self.texts]:
            row, strongest = int(store["example_row"][example]), int(store["example_position"][example])
            first = max(strongest - self.around, 0)
            ids = store.texts.tokens[row, first : strongest + self.around + 1]
            values = np.zeros(store.texts.header.row_length)
            positions, activations = store.activations(example)
            values[positions] = activations
            yield list(zip(store.texts.spell(ids.tolist()), values[first:].tolist(), strict=False))

    def _histogram(self) -> str:
        """Return the distribution of the activations above 0 as inline SVG."""
        counts = np.asarray(self.store["hist"][self.latent], float)
        if not counts.any():
            return ""
        width = _BARS / len(counts)
        bars = "".join(
            f'<rect x="{i * width:.1f}" y="{_HEIGHT * (1 - height):.1f}" width="{width:.1f}" '
            f'height="{_HEIGHT * height:.1f}"/>'
            for i, height in enumerate(counts / counts.max())
        )
        return f'<svg width="{_BARS}" height="{_HEIGHT}" fill="rgb({_COLOUR})">{bars}</svg>'


def _text(example: list[tuple[str, float]], largest: float) -> str:
    """Return the tokens of a text as HTML, each with a background as strong as its activation."""
    spans = []
    for word, value in example:
        style = f' style="background:rgba({_COLOUR},{value / largest:.2f})" title="{value:.2f}"' if value > 0 else ""
        spans.append(f"<span{style}>{_escape(word)}</span>")
    return "".join(spans)


def _escape(text: str) -> str:
    """Return text escaped for HTML, with visible line breaks and other control characters."""
    shown = "".join(_SHOWN.get(c, c if c.isprintable() else "�") for c in text)
    return html.escape(shown).replace(" ", "&nbsp;")
