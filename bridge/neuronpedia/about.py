"""What an export says of itself beside its ids: who made it, what of, when."""

import dataclasses
import re
from datetime import UTC, datetime
from pathlib import PurePath

from jsae.records.store import Store
from jsae.settings import require

CREATED_AT = "2026-01-01T00:00:00Z"
"""When an export says it was made unless told otherwise. No clock: the same run gives the same bytes on any day."""


@dataclasses.dataclass(frozen=True)
class About:
    """What people read about an export.

    Raises:
      ConfigError: a text that Neuronpedia cannot take, a time that is none.
    """

    n_layer: int
    """Of the whole model."""
    title: str
    """Of the release."""
    description: str
    """Of the source set, as in `Residual Stream - 16k`."""
    creator: str = "jsae"
    url: str | None = None
    """Of the release: a paper, a repository."""
    created_at: str = CREATED_AT
    hub_repo: str | None = None
    """Where the weights are on the Hugging Face hub, `owner/name`."""

    def __post_init__(self) -> None:
        require(1 <= self.n_layer <= 127, f"the model has {self.n_layer} layers: Neuronpedia takes 1 to 127")
        for name, longest in (("title", 256), ("description", 128), ("creator", 128)):
            _check_text(name, getattr(self, name), longest)
        require(
            self.url is None or bool(re.fullmatch(r"https?://[^\s\x00-\x1f\ud800-\udfff]+", self.url)),
            f"url is {self.url!r}: expected a whole one, https://…",
        )
        require(
            self.hub_repo is None or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub_repo, re.ASCII)),
            f"hub_repo is {self.hub_repo!r}: expected owner/name",
        )
        self.time  # noqa: B018 - refuses what is no time

    @property
    def time(self) -> str:
        """`created_at` as Neuronpedia's own exports write it: UTC, milliseconds, Z."""
        try:
            found = datetime.fromisoformat(self.created_at)
        except ValueError:
            found = None
        require(found is not None, f"created_at is {self.created_at!r}: expected a time as in {CREATED_AT}")
        assert found is not None
        utc = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
        return utc.strftime("%Y-%m-%dT%H:%M:%S.") + f"{utc.microsecond // 1000:03d}Z"


def dataset(store: Store) -> str:
    """What text the records are of; of a path on this machine only the name."""
    parts = (part.strip() for part in store.texts.header.dataset.split(","))
    return ",".join(PurePath(part).name if part.startswith(("/", "~", ".")) else part for part in parts)


def _check_text(name: str, text: str, longest: int) -> None:
    require(len(text.strip()) >= 1 and len(text) <= longest, f"{name} is {text!r}: expected 1 to {longest} characters")
    odd = next((c for c in text if c < " " or "\ud800" <= c <= "\udfff"), None)
    require(odd is None, f"{name} is {text!r}: control characters and lone surrogates are refused")
