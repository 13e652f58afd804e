"""Draw the film of a crosscoder's latents over its checkpoints as an animated SVG, which plays in any README."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from bridge.run.timelines import Timeline, counted

_WIDE, _TALL, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 420, 56, 20, 64, 62
_SECONDS = 1.1  # per checkpoint
_STILL = 0.45  # share of these in which nothing moves
_PALE, _SEEN = 0.25, 0.9
_COLOURS = ((38, 70, 140), (200, 72, 112), (246, 164, 40))  # a direction at a right angle to the last one, halfway, it
_INK, _SOFT, _LINE, _PAPER = "#211d18", "#6a635a", "#e6e1d9", "#fffefc"


def svg(timeline: Timeline, title: str) -> str:
    """Return the film: every living latent a dot, to the right its density, upwards its contribution, both on a log.

    The contribution is `Timeline.contribution`. The colour is the cosine of the latent's corrected row to that of the
    last checkpoint; it is pale until it appears and after it dies. A latent that never fires in a checkpoint's own SAE
    is not drawn there. The same timeline gives the same bytes.

    Raises:
      ValueError: no latent fires.
    """
    alive = np.flatnonzero([kind != "dead" for kind in timeline.kinds])
    density, writes = timeline.measures["own_density"][alive], timeline.contribution[alive]
    fires = (density > 0) & (writes > 0)
    alive, density, writes, fires = (part[fires.any(1)] for part in (alive, density, writes, fires))
    if not len(alive):
        raise ValueError("no latent fires in any checkpoint: there is nothing to draw")
    x, x_ticks = _axis(density, fires, _LEFT, _WIDE - _RIGHT)
    y, y_ticks = _axis(writes, fires, _TALL - _BOTTOM, _TOP)
    seen = np.where(fires, np.where(_there(timeline)[alive], _SEEN, _PALE), 0)
    final = timeline.measures["final"][alive].clip(0, 1)
    times = _times(len(timeline.names))
    length = f"{_SECONDS * (len(timeline.names) + 1):.2f}s"
    dots = [_dot(x[i], y[i], seen[i], final[i], times, length) for i in range(len(alive))]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {_TALL}" role="img" '
        f'font-family="sans-serif" font-size="12">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{_WIDE}" height="{_TALL}" rx="12" fill="{_PAPER}"/>',
        *(f'<path d="M{at:.0f} {_TOP}V{_TALL - _BOTTOM}" stroke="{_LINE}"/>' for at, _ in x_ticks),
        *(f'<path d="M{_LEFT} {at:.0f}H{_WIDE - _RIGHT}" stroke="{_LINE}"/>' for at, _ in y_ticks),
        *(_text(at, _TALL - _BOTTOM + 16, f"{100 * value:g} %", "middle") for at, value in x_ticks),
        *(_text(_LEFT - 8, at + 4, f"{100 * value:g} %", "end") for at, value in y_ticks),
        _text(_WIDE - _RIGHT, _TALL - 30, "share of tokens on which a latent fires", "end"),
        _text(_LEFT, _TOP - 14, "what it writes there, in percent of the norm of typical activations", "start"),
        *_legend(timeline.names[-1]),
        *_said(timeline, times, length),
        f'<g stroke="{_PAPER}" stroke-width="0.7">',
        *dots,
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _there(timeline: Timeline) -> Bool[np.ndarray, "f m"]:
    """Return in which checkpoints every latent has appeared and not died since."""
    there = np.zeros((len(timeline.kinds), len(timeline.names)), bool)
    first = {latent: stage for latent, kind, stage in reversed(timeline.events) if kind == "appears"}
    for latent in range(len(there)):
        there[latent, first.get(latent, 0) :] = True
    for latent, kind, stage in timeline.events:
        if kind in ("appears", "dies"):
            there[latent, stage:] = kind == "appears"
    return there


def _axis(
    values: Float[np.ndarray, "f m"], known: Bool[np.ndarray, "f m"], start: int, end: int
) -> tuple[Float[np.ndarray, "f m"], list[tuple[float, float]]]:
    """Return the places of values on a logarithmic axis, and places and values of its ticks.

    An unknown value is where the known one before it is, or else the one after it.
    """
    logs = np.log10(np.where(known, values, np.nan))
    for stage in range(1, logs.shape[1]):
        logs[:, stage] = np.where(np.isnan(logs[:, stage]), logs[:, stage - 1], logs[:, stage])
    for stage in range(logs.shape[1] - 2, -1, -1):
        logs[:, stage] = np.where(np.isnan(logs[:, stage]), logs[:, stage + 1], logs[:, stage])
    low, high = float(logs.min()) - 0.05, float(logs.max()) + 0.05
    fine = (1, 2, 5) if high - low < 3 else (1,)
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    ticks = [part * 10.0**power for power in powers for part in fine if low <= np.log10(part * 10.0**power) <= high]
    share = (logs - low) / (high - low)
    places = [(start + (np.log10(tick) - low) / (high - low) * (end - start), tick) for tick in ticks]
    return start + share * (end - start), [(float(at), tick) for at, tick in places]


def _times(checkpoints: int) -> list[float]:
    """Return when a picture begins to hold and when it ends, of every checkpoint, in shares of the film.

    The last one holds for one checkpoint longer, before the film begins anew.
    """
    whole = checkpoints + 1
    times = [(stage + hold) / whole for stage in range(checkpoints) for hold in (0, _STILL)]
    return [*times[:-1], 1.0]


def _animate(name: str, values: Sequence[str], times: Sequence[float], length: str) -> str:
    """Return the animation of an attribute that holds each of some values, and moves to the next one."""
    if len(set(values)) == 1:
        return ""
    return _animation(name, [value for value in values for _ in range(2)], times, length)


def _animation(name: str, values: Sequence[str], times: Sequence[float], length: str, more: str = "") -> str:
    steps = ";".join(f"{time:.4f}".rstrip("0").rstrip(".") for time in times)
    return (
        f'<animate attributeName="{name}" values="{";".join(values)}" keyTimes="{steps}" dur="{length}" '
        f'repeatCount="indefinite"{more}/>'
    )


def _dot(x: np.ndarray, y: np.ndarray, seen: np.ndarray, final: np.ndarray, times: Sequence[float], length: str) -> str:
    """Return the circle of a latent, which stands still in its last place where nothing plays."""
    columns = {
        "cx": [f"{value:.0f}" for value in x],
        "cy": [f"{value:.0f}" for value in y],
        "opacity": [f"{value:.2g}" for value in seen],
        "fill": [_colour(cosine) for cosine in final],
    }
    last = " ".join(f'{name}="{values[-1]}"' for name, values in columns.items())
    moves = "".join(_animate(name, values, times, length) for name, values in columns.items())
    return f'<circle r="4" {last}>{moves}</circle>'


def _colour(cosine: float) -> str:
    """Return the colour of a cosine from 0 to 1."""
    ends = np.linspace(0, 1, len(_COLOURS))
    return "#" + "".join(f"{round(float(np.interp(cosine, ends, part))):02x}" for part in zip(*_COLOURS, strict=True))


def _legend(last: str) -> list[str]:
    """Return what colours and pale dots mean."""
    stops = "".join(f'<stop offset="{share:g}" stop-color="{_colour(share)}"/>' for share in (0.0, 0.5, 1.0))
    return [
        f'<linearGradient id="turn">{stops}</linearGradient>',
        f'<rect x="{_LEFT}" y="{_TALL - 19}" width="72" height="8" rx="4" fill="url(#turn)"/>',
        _text(
            _LEFT + 80, _TALL - 11, f"its direction, from right-angled to that in {_short(last)} to the same", "start"
        ),
        _text(_WIDE - _RIGHT, _TALL - 11, "pale: not there, or gone", "end"),
    ]


def _said(timeline: Timeline, times: Sequence[float], length: str) -> list[str]:
    """Return the name of every checkpoint, and what happens in it, each shown in its time."""
    shown = []
    switches = [0.0, *((end + start) / 2 for end, start in zip(times[1:-1:2], times[2::2], strict=True))]
    for stage, name in enumerate(timeline.names):
        values = [str(int(other == stage)) for other in range(len(timeline.names))]
        moves = _animation("opacity", values, switches, length, ' calcMode="discrete"')
        happens = counted([kind for _, kind, at in timeline.events if at == stage])
        place = f'x="{_WIDE - _RIGHT}" text-anchor="end" opacity="{values[-1]}"'
        shown += [
            f'<text {place} y="32" font-size="18" font-weight="600" fill="{_INK}">'
            f"{html.escape(_short(name))}{moves}</text>",
            f'<text {place} y="50" fill="{_SOFT}">{happens}{moves}</text>' if happens else "",
        ]
    return [text for text in shown if text]


def _short(name: str) -> str:
    return name[:40]


def _text(x: float | int, y: float | int, text: str, anchor: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{_SOFT}">{html.escape(text)}</text>'
