"""Names in files of attribution graphs: features as numbers, tokens as text. circuit-tracer chose both."""

import math
import re

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
"""Names of graphs and models that an upload to Neuronpedia takes, and that are safe as names of files."""
_NODE_ID = re.compile(r"(\d{1,6})_(-1|\d{1,9})_(\d{1,9})", re.ASCII)
_WHITE_SPACE = str.maketrans({"\n": "⏎", "\t": "→", "\r": "↵"})
"""circuit-tracer's symbols for white space that would break a line."""


def pairing(layer: int, latent: int) -> int:
    """Return the Cantor pairing of layer and latent, which identifies a feature in a graph."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def unpairing(number: int) -> tuple[int, int]:
    """Return layer and latent of a Cantor pairing."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    latent = number - diagonal * (diagonal + 1) // 2
    return diagonal - latent, latent


def token_text(piece: bytes) -> str:
    r"""Return a token's text; the bytes of a partial character as \xNN, which the pages join to a character again."""
    try:
        return piece.decode("utf-8").translate(_WHITE_SPACE)
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 0x80 else f"\\x{byte:02x}" for byte in piece).translate(_WHITE_SPACE)


def parse_writer(node_id: str) -> tuple[int, int, int | None]:
    """Return layer, position and latent of a feature, or None for an error, from its id `LAYER_LATENT_POSITION`.

    Raises:
      ValueError: it is no such id.
    """
    match = _NODE_ID.fullmatch(node_id)
    if match is None:
        raise ValueError(
            f"{node_id[:60]!r} is no feature or error: give LAYER_LATENT_POSITION, such as 3_12_2, or LAYER_-1_POSITION"
        )
    layer, latent, position = map(int, match.groups())
    return layer, position, None if latent < 0 else latent


def check_slug(slug: str) -> None:
    """Raise ValueError for a name that no graph can have."""
    if not NAME.fullmatch(slug):
        raise ValueError(
            f"slug is {slug[:60]!r}: give 1 to 128 letters, digits, '_', '.' and '-', beginning with a letter, a digit "
            "or '_'"
        )
