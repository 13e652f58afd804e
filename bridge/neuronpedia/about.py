"""Descriptive metadata of an export: creator, title, data, time."""

import dataclasses
import re
from datetime import UTC, datetime
from pathlib import PurePath

from jsae.records.store import Store
from jsae.settings import require

CREATED_AT = "2026-01-01T00:00:00Z"
"""Default creation time in exports. It is constant, so that a run always gives the same bytes."""


@dataclasses.dataclass(frozen=True)
class About:
    """The description of an export for its readers.

    Raises:
      ConfigError: a text that Neuronpedia does not accept, or an invalid time.
    """

    n_layer: int
    """Number of layers of the model."""
    title: str
    """Title of the release."""
    description: str
    """Description of the source set, such as `Residual Stream - 16k`."""
    creator: str = "jsae"
    url: str | None = None
    """URL of the release: a paper or a repository."""
    created_at: str = CREATED_AT
    hub_repo: str | None = None
    """Repository of the weights on the Hugging Face hub, `owner/name`."""

    def __post_init__(self) -> None:
        require(1 <= self.n_layer <= 127, f"the model has {self.n_layer} layers: Neuronpedia accepts 1 to 127")
        for name, longest in (("title", 256), ("description", 128), ("creator", 128)):
            _check_text(name, getattr(self, name), longest)
        require(
            self.url is None or bool(re.fullmatch(r"https?://[^\s\x00-\x1f\ud800-\udfff]+", self.url)),
            f"url is {self.url!r}: expected a full address, https://…",
        )
        require(
            self.hub_repo is None or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub_repo, re.ASCII)),
            f"hub_repo is {self.hub_repo!r}: expected owner/name",
        )
        self.time  # noqa: B018 - raises for an invalid time

    @property
    def time(self) -> str:
        """`created_at` as Neuronpedia's own exports write it: UTC, milliseconds, Z."""
        try:
            time = datetime.fromisoformat(self.created_at)
        except ValueError:
            time = None
        require(time is not None, f"created_at is {self.created_at!r}: expected a time such as {CREATED_AT}")
        assert time is not None
        utc = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
        return utc.strftime("%Y-%m-%dT%H:%M:%S.") + f"{utc.microsecond // 1000:03d}Z"


def dataset(store: Store) -> str:
    """Return the name of the text of the records; local paths are reduced to their last part."""
    parts = (part.strip() for part in store.texts.header.dataset.split(","))
    return ",".join(PurePath(part).name if part.startswith(("/", "~", ".")) else part for part in parts)


def _check_text(name: str, text: str, longest: int) -> None:
    require(len(text.strip()) >= 1 and len(text) <= longest, f"{name} is {text!r}: expected 1 to {longest} characters")
    invalid = next((c for c in text if c < " " or "\ud800" <= c <= "\udfff"), None)
    require(invalid is None, f"{name} is {text!r}: control characters and lone surrogates are not allowed")
