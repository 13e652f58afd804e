"""Neuronpedia's ids. Names that it would refuse are refused here, before anything is written or sent."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable

from jsae.settings import require

CREATOR = "clkht01d40000jv08hvalcvly"
"""Owner of imported rows: the only user that exists in every Neuronpedia and whose texts are public."""

HOOK_KINDS = {
    "hook_resid_post": ("res", "Residual Stream"),
    "hook_attn_out": ("att", "Attention Out"),
    "hook_mlp_out": ("mlp", "MLP Out"),
}
"""Short and long names of the kinds of hooks, for names and descriptions of source sets."""

_MODEL = re.compile(r"[a-z][a-z0-9-]*[a-z0-9]")
_SOURCE_SET = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?")
_RELEASE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?")
_HOOK = re.compile(r"blocks\.(?:\d|[1-9]\d|1[01]\d|12[0-7])\.(\w+)", re.ASCII)
_SUFFIX = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Ids:
    """Ids of one SAE: model, source set, release and hook.

    Raises:
      ConfigError: the site, its upload or its importer would refuse a name; says which rule it breaks.
    """

    model: str
    source_set: str
    release: str
    hook: str
    """TransformerLens's name: `blocks.6.hook_resid_post`."""
    suffix: str | None = None
    """Distinguishes variants of one source: `6-res-8k__l0-40`."""

    def __post_init__(self) -> None:
        check_model(self.model)
        check_source_set(self.source_set)
        check_release(self.release)
        hook_kind(self.hook)
        require(
            self.suffix is None or bool(_SUFFIX.fullmatch(self.suffix)),
            f"the suffix {self.suffix!r} would be refused: give letters, digits, '.', '_' and '-', with a letter or "
            "digit at both ends",
        )

    @property
    def layer(self) -> int:
        """The block whose activations the SAE reads."""
        return int(self.hook.split(".")[1])

    @property
    def source(self) -> str:
        """Id of the source, which contains the latents of one SAE: `LAYER-SET` or `LAYER-SET__SUFFIX`."""
        return f"{self.layer}-{self.source_set}" + (f"__{self.suffix}" if self.suffix else "")

    @property
    def link(self) -> str:
        """The value of SAELens's `metadata.neuronpedia_id`."""
        return f"{self.model}/{self.source}"

    def activation(self, latent: int, rank: int) -> str:
        """Return the primary key of a latent's text, unique and the same for the same run."""
        return self._key("activation", latent, rank)

    def explanation(self, latent: int, rank: int = 0) -> str:
        """Return the primary key of a latent's explanation."""
        return self._key("explanation", latent, rank)

    def _key(self, *parts: object) -> str:
        text = "|".join(map(str, (self.model, self.source, *parts)))
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def check_model(name: str) -> None:
    """Raise ConfigError for a model id that Neuronpedia would refuse.

    The upload allows dots, the importer capitals and underscores; an id must be valid for both.
    """
    valid = bool(_MODEL.fullmatch(name)) and "--" not in name and len(name) <= 32
    require(
        valid,
        f"the model id {name!r} would be refused: 2 to 32 lower-case letters, digits and '-', beginning with a letter, "
        "ending with a letter or digit, without '--'; give another --model_id",
    )


def check_source_set(name: str) -> None:
    """Raise ConfigError for a source set that Neuronpedia would refuse."""
    valid = bool(_SOURCE_SET.fullmatch(name)) and "--" not in name and name != "neurons" and len(name) < 32
    require(
        valid,
        f"the source set {name!r} would be refused: at most 31 lower-case letters, digits and '-', beginning with a "
        "letter, ending with a letter or digit, without '--', and not 'neurons'; give another --source_set",
    )


def check_release(name: str) -> None:
    """Raise ConfigError for a release that Neuronpedia would refuse."""
    require(
        bool(_RELEASE.fullmatch(name)) and len(name) <= 128,
        f"the release {name!r} would be refused: at most 128 letters, digits and '-', no '-' at either end; "
        "give another --release",
    )


# ---- defaults -----------------------------------------------------------------------------------------------------


def default_model(n_layer: int, fingerprint: str) -> str:
    """Return a default model id, `nanochat-d6-3a0fb378`: depth and weights, because two nanochats are two models."""
    return f"nanochat-d{n_layer}-{fingerprint[:8]}"


def default_source_set(hook: str, d_sae: int, digests: Iterable[str]) -> str:
    """Return a default source set, `res-1k-41fe07`: kind of hook, width, and a digest that differs between runs.

    Args:
      hook: the hook of the SAE.
      d_sae: number of latents.
      digests: `jsae.records.store.digest` of all SAEs of the run; SAEs of the same kind and width share the set.

    Raises:
      ConfigError: Neuronpedia has no name for the kind of hook.
    """
    return f"{hook_kind(hook)[0]}-{width(d_sae)}-{_short(digests)}"


def default_transcoder_set(d_sae: int, digests: Iterable[str]) -> str:
    """Return a default source set of transcoders of all layers, `transcoder-1k-41fe07`; see `default_source_set`."""
    return f"transcoder-{width(d_sae)}-{_short(digests)}"


def default_release(model: str, digests: Iterable[str]) -> str:
    """Return a default release, `nanochat-d6-3a0fb378-41fe07`: the model and a digest of the run's SAEs."""
    return f"{model}-{_short(digests)}"


def describe(hook: str, d_sae: int) -> str:
    """Return the description of a source set, such as `Residual Stream - 1k`."""
    return f"{hook_kind(hook)[1]} - {width(d_sae)}"


def hook_kind(hook: str) -> tuple[str, str]:
    """Return the short and the long name of a hook's kind. Raises ConfigError if Neuronpedia has no name for it."""
    match = _HOOK.fullmatch(hook)
    require(
        match is not None and match[1] in HOOK_KINDS,
        f"Neuronpedia does not show the hook {hook!r}: expected blocks.LAYER. and one of {', '.join(HOOK_KINDS)}",
    )
    assert match is not None
    return HOOK_KINDS[match[1]]


def width(d_sae: int) -> str:
    """Return a width as text: 1024 as `1k`, 65536 as `65k`, 1000 as `1000`."""
    return f"{d_sae // 1000}k" if d_sae >= 1024 and d_sae & (d_sae - 1) == 0 else str(d_sae)


def _short(digests: Iterable[str]) -> str:
    return hashlib.sha256("|".join(sorted(digests)).encode()).hexdigest()[:6]
