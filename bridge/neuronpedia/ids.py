"""The names Neuronpedia knows things by. What it would refuse is refused here, before anything is written or sent."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable

from jsae.settings import require

CREATOR = "clkht01d40000jv08hvalcvly"
"""The user who owns what is imported: the only id that exists in every Neuronpedia and whose texts are public."""

SITES = {
    "hook_resid_post": ("res", "Residual Stream"),
    "hook_attn_out": ("att", "Attention Out"),
    "hook_mlp_out": ("mlp", "MLP Out"),
}
"""Kinds of hooks: how a source set says them, and how it describes them."""

_MODEL = re.compile(r"[a-z][a-z0-9-]*[a-z0-9]")
_SOURCE_SET = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?")
_RELEASE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?")
_HOOK = re.compile(r"blocks\.(?:\d|[1-9]\d|1[01]\d|12[0-7])\.(\w+)", re.ASCII)
_SUFFIX = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Ids:
    """Where the latents of one SAE stand: model, source set and hook, and the release they belong to.

    Raises:
      ConfigError: a name that the site, its upload or its importer would refuse; says which rule it breaks.
    """

    model: str
    source_set: str
    release: str
    hook: str
    """As TransformerLens says it: `blocks.6.hook_resid_post`."""
    suffix: str | None = None
    """Tells variants of one source apart: `6-res-8k__l0-40`."""

    def __post_init__(self) -> None:
        check_model(self.model)
        check_source_set(self.source_set)
        check_release(self.release)
        site(self.hook)
        require(
            self.suffix is None or bool(_SUFFIX.fullmatch(self.suffix)),
            f"the suffix {self.suffix!r} would be refused: letters, digits, '.', '_' and '-', no sign at either end",
        )

    @property
    def layer(self) -> int:
        """The block whose activations the SAE reads."""
        return int(self.hook.split(".")[1])

    @property
    def source(self) -> str:
        """Id of the source, which holds the latents of one SAE: `LAYER-SET`, or `LAYER-SET__SUFFIX`."""
        return f"{self.layer}-{self.source_set}" + (f"__{self.suffix}" if self.suffix else "")

    @property
    def link(self) -> str:
        """What SAELens keeps as `metadata.neuronpedia_id`."""
        return f"{self.model}/{self.source}"

    def activation(self, latent: int, rank: int) -> str:
        """Primary key of a latent's text: the same for the same run, and never another's."""
        return self._key("activation", latent, rank)

    def explanation(self, latent: int, rank: int = 0) -> str:
        """Primary key of a latent's explanation."""
        return self._key("explanation", latent, rank)

    def _key(self, *parts: object) -> str:
        told = "|".join(map(str, (self.model, self.source, *parts)))
        return "c" + hashlib.sha256(told.encode()).hexdigest()[:24]


def check_model(name: str) -> None:
    """Raises ConfigError for a model id that Neuronpedia would refuse.

    The upload takes dots and the importer takes capitals and underscores; what both take is less.
    """
    well = bool(_MODEL.fullmatch(name)) and "--" not in name and len(name) <= 32
    require(
        well,
        f"the model id {name!r} would be refused: 2 to 32 lower-case letters, digits and '-', beginning with a letter, "
        "ending with a letter or digit, without '--'; give another --model_id",
    )


def check_source_set(name: str) -> None:
    """Raises ConfigError for a source set that Neuronpedia would refuse."""
    well = bool(_SOURCE_SET.fullmatch(name)) and "--" not in name and name != "neurons" and len(name) < 32
    require(
        well,
        f"the source set {name!r} would be refused: at most 31 lower-case letters, digits and '-', beginning with a "
        "letter, ending with a letter or digit, without '--', and not 'neurons'; give another --source_set",
    )


def check_release(name: str) -> None:
    """Raises ConfigError for a release that Neuronpedia would refuse."""
    require(
        bool(_RELEASE.fullmatch(name)) and len(name) <= 128,
        f"the release {name!r} would be refused: at most 128 letters, digits and '-', no '-' at either end; "
        "give another --release",
    )


# ---- what they are unless given -----------------------------------------------------------------------------------


def default_model(n_layer: int, fingerprint: str) -> str:
    """`nanochat-d6-3a0fb378`: depth and weights, as two runs of nanochat are two models."""
    return f"nanochat-d{n_layer}-{fingerprint[:8]}"


def default_source_set(hook: str, d_sae: int, digests: Iterable[str]) -> str:
    """`res-1k-41fe07`: site, width, and the run's SAEs, as a second run on the same model must not meet the first.

    Args:
      hook: which the SAE reads.
      d_sae: its latents.
      digests: `jsae.records.store.digest` of all SAEs of the run, which then share the set where site and width agree.

    Raises:
      ConfigError: a hook of a kind that Neuronpedia has no name for.
    """
    return f"{site(hook)[0]}-{width(d_sae)}-{_short(digests)}"


def default_release(model: str, digests: Iterable[str]) -> str:
    """`nanochat-d6-3a0fb378-41fe07`: the model and the run's SAEs."""
    return f"{model}-{_short(digests)}"


def describe(hook: str, d_sae: int) -> str:
    """`Residual Stream - 1k`, as source sets are described."""
    return f"{site(hook)[1]} - {width(d_sae)}"


def site(hook: str) -> tuple[str, str]:
    """Short and long name of the kind of a hook. Raises ConfigError for one that Neuronpedia has no name for."""
    match = _HOOK.fullmatch(hook)
    require(
        match is not None and match[1] in SITES,
        f"hook {hook!r} is none that Neuronpedia shows: expected blocks.LAYER. and one of {', '.join(SITES)}",
    )
    assert match is not None
    return SITES[match[1]]


def width(d_sae: int) -> str:
    """1024 as `1k`, 65536 as `65k`, 1000 as `1000`."""
    return f"{d_sae // 1000}k" if d_sae >= 1024 and d_sae & (d_sae - 1) == 0 else str(d_sae)


def _short(digests: Iterable[str]) -> str:
    return hashlib.sha256("|".join(sorted(digests)).encode()).hexdigest()[:6]
