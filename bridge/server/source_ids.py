"""Translate Neuronpedia's names of a run's model and SAEs, and read the common fields of its requests."""

import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from bridge.hooks import parse
from bridge.server.bodies import Fields, Refusal
from bridge.server.session import Session

_SITES: Mapping[str, str] = {"resid_post": "res", "attn": "att", "mlp": "mlp"}
_SOURCE = re.compile(r"(\d{1,4})-([A-Za-z0-9_.-]{1,128})", re.ASCII)
_LONGEST_ID = 128


class Sources:
    """Finds the SAE of a source id: `2-res-1k` is the SAE of `blocks.2.hook_resid_post`.

    The number is the layer. If the layer has several SAEs, the source set distinguishes them: a part of its name is
    res, att or mlp, as in the ids from `experiments.export`. Any other set means the only SAE of the layer.

    Args:
      session: the model and its SAEs.
      model_id: Neuronpedia's name for the model; requests for another are refused. None accepts any.
    """

    def __init__(self, session: Session, model_id: str | None = None):
        self._session, self.model_id = session, model_id
        self._at = {parse(hook): hook for hook in session.im.hooks}

    async def fields(self, request: Request) -> Fields:
        """Return the body of a request with field names in camel case; older clients use snake case.

        Raises:
          Refusal: the body is invalid, or for another model.
        """
        fields = Fields(camel(await self._session.body(request)))
        self.check_model(fields)
        return fields

    def check_model(self, fields: Fields) -> None:
        """Raise Refusal for a request for another model."""
        model = fields.text("model")
        if self.model_id is not None and model != self.model_id:
            raise Refusal(400, f"Unsupported model {model[:_LONGEST_ID]!r}: this server has {self.model_id}")

    def hook(self, source: str) -> str:
        """Return the hook of a source.

        Raises:
          Refusal: the source id is invalid, or not of this run.
        """
        match = _SOURCE.fullmatch(source)
        if match is None:
            raise Refusal(400, f"{source[:_LONGEST_ID]!r} is not a source: expected LAYER-SET, such as {self._known()}")
        hook = self._find(int(match[1]), match[2])
        if hook is None:
            raise Refusal(400, f"this run has no SAE of the source {source}: it has {self._known()}")
        return hook

    def sources_in_set(self, name: str) -> dict[str, str]:
        """Return the hooks of the sources in a set, by source id.

        Raises:
          Refusal: the run has no source in the set.
        """
        layers = sorted({layer for layer, _ in self._at})
        hooks = {f"{layer}-{name}": self._find(layer, name) for layer in layers}
        if not any(hooks.values()):
            raise Refusal(400, f"Invalid source set {name[:_LONGEST_ID]!r}: this run has {self._known()}")
        return {source: hook for source, hook in hooks.items() if hook is not None}

    @property
    def sets(self) -> list[str]:
        """The short names of the run's sets; longer names that begin with one mean the same set."""
        return sorted({_SITES[site] for _, site in self._at})

    def _find(self, layer: int, name: str) -> str | None:
        """Return the hook of a layer and a source set; None if there is none, or several."""
        parts = name.lower().split("__")[0].split("-")
        named_sites = [site for site, short in _SITES.items() if short in parts]
        candidates = [(at, hook) for at, hook in self._at.items() if at[0] == layer]
        if named_sites:
            candidates = [(at, hook) for at, hook in candidates if at[1] in named_sites]
        return candidates[0][1] if len(candidates) == 1 else None

    def _known(self) -> str:
        return ", ".join(f"{layer}-{_SITES[site]}" for layer, site in self._at)


def camel(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a body, and of the objects in its lists, in camel case.

    Raises:
      Refusal: a field appears in both camel and snake case.
    """

    def inner(value: Any) -> Any:
        return [_renamed(v) if isinstance(v, dict) else v for v in value] if isinstance(value, list) else value

    return {name: inner(value) for name, value in _renamed(body).items()}


def _renamed(value: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, field in value.items():
        camel_case = re.sub(r"_([a-z])", lambda m: m[1].upper(), name)
        if camel_case in renamed:
            raise Refusal(400, f"the field {camel_case[:_LONGEST_ID]!r} appears twice, in camel and in snake case")
        renamed[camel_case] = field
    return renamed
