"""What Neuronpedia calls a run's model and SAEs, and what its requests have in common."""

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
    """Finds the SAE that a source id means: `2-res-1k` is the one of `blocks.2.hook_resid_post`.

    The number is the layer. Where it has several SAEs, the source set says whose: a part of its name is res, att or
    mlp, as in the ids that `experiments.export` gives. Any other set means the only SAE of the layer.

    Args:
      session: the model and its SAEs.
      model_id: what Neuronpedia calls the model; requests for another are refused. None takes any.
    """

    def __init__(self, session: Session, model_id: str | None = None):
        self._session, self.model_id = session, model_id
        self._at = {parse(hook): hook for hook in session.im.hooks}

    async def fields(self, request: Request) -> Fields:
        """The body of a request, its names as Neuronpedia writes them now; older clients write source_set.

        Raises:
          Refusal: no such body, or one for another model.
        """
        fields = Fields(camel(await self._session.body(request)))
        self.check_model(fields)
        return fields

    def check_model(self, fields: Fields) -> None:
        """Raises Refusal for a request for another model."""
        model = fields.text("model")
        if self.model_id is not None and model != self.model_id:
            raise Refusal(400, f"Unsupported model {model[:_LONGEST_ID]!r}: this server has {self.model_id}")

    def hook(self, source: str) -> str:
        """The hook of a source.

        Raises:
          Refusal: no source id, or none of this run.
        """
        match = _SOURCE.fullmatch(source)
        if match is None:
            raise Refusal(
                400, f"the source {source[:_LONGEST_ID]!r} is none: expected LAYER-SET, as in {self._known()}"
            )
        hook = self._find(int(match[1]), match[2])
        if hook is None:
            raise Refusal(400, f"there is no SAE of the source {source}: this run has {self._known()}")
        return hook

    def of_set(self, name: str) -> dict[str, str]:
        """The sources of a set, and their hooks.

        Raises:
          Refusal: the run has none.
        """
        layers = sorted({layer for layer, _ in self._at})
        found = {f"{layer}-{name}": self._find(layer, name) for layer in layers}
        if not any(found.values()):
            raise Refusal(400, f"Invalid source set {name[:_LONGEST_ID]!r}: this run has {self._known()}")
        return {source: hook for source, hook in found.items() if hook is not None}

    @property
    def sets(self) -> list[str]:
        """Names of the sets there are; longer ones that begin with them mean the same."""
        return sorted({_SITES[site] for _, site in self._at})

    def _find(self, layer: int, name: str) -> str | None:
        parts = name.lower().split("__")[0].split("-")
        told = [site for site, short in _SITES.items() if short in parts]
        here = [(at, hook) for at, hook in self._at.items() if at[0] == layer]
        if told:
            here = [(at, hook) for at, hook in here if at[1] in told]
        return here[0][1] if len(here) == 1 else None

    def _known(self) -> str:
        return ", ".join(f"{layer}-{_SITES[site]}" for layer, site in self._at)


def camel(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a body, and of the objects in its lists, in camel case.

    Raises:
      Refusal: a field stands in both writings.
    """

    def inner(value: Any) -> Any:
        return [_renamed(v) if isinstance(v, dict) else v for v in value] if isinstance(value, list) else value

    return {name: inner(value) for name, value in _renamed(body).items()}


def _renamed(value: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, field in value.items():
        camel_case = re.sub(r"_([a-z])", lambda m: m[1].upper(), name)
        if camel_case in renamed:
            raise Refusal(400, f"the field {camel_case[:_LONGEST_ID]!r} stands twice, in camel and in snake case")
        renamed[camel_case] = field
    return renamed
