"""Settings of an exported SAE: architectures by SAELens's names, checked settings, and their arrays."""

import dataclasses
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from jsae.files import is_system_error

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
"""How often latents fire."""
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
"""Statistics that scale the input; training checkpoints of SAELens have them."""


def is_complete(folder: Path) -> bool:
    """Return whether a folder has the two files that every exported SAE has."""
    return all((folder / name).is_file() for name in (CFG, WEIGHTS))


ENCODERS: Mapping[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
"""The forms of an encoder, by SAELens's names, and the arrays of latents of each."""
TRANSCODERS: Mapping[str, str] = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
CHECKPOINTS = ("batchtopk", "matryoshka_batchtopk")
"""Forms that occur only in SAELens's training checkpoints; their inference form is jumprelu."""
RANKED = ("topk", "abstopk")
"""Architectures that keep the k largest latents: `cfg["k"]`."""
DTYPES = ("float32", "float64", "float16", "bfloat16")

_STORED = {"F32", "F64", "F16", "BF16"}
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


@dataclasses.dataclass(frozen=True)
class Settings:
    """The checked settings of a SAELens directory's `cfg.json` that change the computation.

    `architecture` is SAELens's name; for a crosscoder, whose layout is jsae's own, the name of its encoder's form.
    `d_in` and `d_out` are widths of one layer.
    """

    folder: Path
    written: dict[str, Any]
    """The contents of the file."""
    legacy: bool
    """Whether SAELens reads the file as one from before version 6."""
    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    layers: int | None
    """Of a crosscoder; None for everything else."""
    k: int | None
    """Of `RANKED` architectures."""
    dtype: str
    subtracts_b_dec: bool
    rescales: bool
    """Whether latents are ranked and scaled by the norms of their decoder rows."""
    normalization: str
    """"none", or the kind of input scaling whose statistics a training checkpoint stores."""
    finetuned: bool
    """Whether each latent is multiplied by a factor before decoding."""
    metadata: dict[str, Any]

    @property
    def is_transcoder(self) -> bool:
        """True if the target is a different activation from the input."""
        return self.architecture in TRANSCODERS

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array that the weights must contain, by name."""
        d: tuple[int, ...] = (self.d_in,)
        o: tuple[int, ...] = (self.d_out,)
        f = (self.d_sae,)
        if self.layers is not None:
            d = o = (self.layers, *d)
        shapes: dict[str, tuple[int, ...]] = {"W_enc": d + f, "W_dec": f + o, "b_dec": o}
        if "skip" in self.architecture:
            shapes["W_skip"] = o + d
        form = TRANSCODERS.get(self.architecture, self.architecture)
        if form in CHECKPOINTS:
            return shapes | {"b_enc": f, "topk_threshold": ()}
        return shapes | dict.fromkeys(ENCODERS[form], f)

    def checked(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the arrays of `sae_weights.safetensors`, from its header alone.

        Besides `shapes` a file may contain `scaling_factor` or `finetuning_scaling_factor` (d_sae,), and
        `log_threshold` instead of `threshold`, as earlier versions of SAELens wrote them.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: a broken file, missing or unexpected arrays, another shape, or a type other than float32, float64,
            float16 and bfloat16.
        """
        file = self.folder / WEIGHTS
        require_file(file)
        try:
            file.open("rb").close()  # safetensors reports every file that it cannot open as missing
            with safe_open(file, framework="numpy") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                types = {name: part.get_dtype() for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            if is_system_error(error):
                raise
            raise ValueError(f"{self.folder} holds a broken export: {WEIGHTS} is broken: {error}") from error
        expected = self.shapes()
        if "threshold" in expected and "threshold" not in shapes and "log_threshold" in shapes:
            expected = {"log_threshold" if name == "threshold" else name: s for name, s in expected.items()}
        expected |= {name: (self.d_sae,) for name in FACTORS if name in shapes}
        if shapes != expected:
            actual = {name: shapes.get(name) for name in expected} | shapes
            kind = f"a {self.architecture} SAE of d_in {self.d_in}, d_sae {self.d_sae} and d_out {self.d_out} has"
            if self.layers is not None:
                kind = f"a crosscoder of {self.layers} layers of width {self.d_in} has"
            has = " has" * (self.layers is None)
            raise ValueError(f"{self.folder}: {kind} {expected}, but the file{has} {_few(actual)} ({WEIGHTS})")
        for name, kind in types.items():
            if kind not in _STORED:
                raise ValueError(
                    f"{file}: {name} is stored as {kind}, expected float32, float64, float16 or bfloat16: give "
                    "weights that are not quantised"
                )
        return shapes


FACTORS = ("scaling_factor", "finetuning_scaling_factor")
"""What earlier versions of SAELens called the factors on latents that finetuning learned."""


def require_file(file: Path) -> None:
    """Raise FileNotFoundError where a file of an export is missing."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is not an exported SAE: it has no {file.name}")


def shown(value: Any) -> str:
    """Return the repr of a value, shortened to fit a line."""
    return _BRIEF.repr(value)


def shown_key(name: str) -> str:
    """Return a name from a file, shortened to fit a line."""
    return name if len(name) <= 80 else name[:80] + "…"


def _few(shapes: dict[str, Any]) -> str:
    """Return the first shapes of a file as a text: a hostile file has millions of names."""
    more = len(shapes) - 12
    first = ", ".join(f"{shown_key(name)!r}: {shape}" for name, shape in list(shapes.items())[:12])
    return f"{{{first}{f' and {more} more' if more > 0 else ''}}}"


def check_pursuit(is_transcoder: bool, k: int) -> None:
    """Check that matching pursuit is defined.

    Raises:
      ValueError: a transcoder, or k below 1.
    """
    if is_transcoder:
        raise ValueError("matching pursuit needs decoder rows in the space of the input, and a transcoder has none")
    if k < 1:
        raise ValueError(f"k is {k}: matching pursuit takes at least 1 latent per token")
