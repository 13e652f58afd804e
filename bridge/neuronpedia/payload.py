"""Payloads of Neuronpedia's public upload: its rules, checked before anything is sent, and bodies within its limits."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridge.neuronpedia.ids import Ids
from jsae import files, jsons

MAX_FEATURES = 128
"""Features per request; the server's own limit."""
MAX_BYTES = 3_500_000
"""Bytes per body. The site's host refuses bodies above 4.5 MB, which 128 features often exceed."""

_FEATURE_KEYS = {"index", "density", "topLogits", "bottomLogits", "explanations", "activations"}
_ACTIVATION_KEYS = {"tokens", "values", "quantileMax", "quantileMin", "quantileFraction"}
_EXPLANATION_KEYS = {"text", "methodName", "modelName"}


class PayloadError(ValueError):
    """Neuronpedia would refuse the payload; detected before it is sent."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PayloadError(message)


@dataclasses.dataclass(frozen=True)
class Target:
    """The destination of features, and how the model and the source set are described if they are created.

    Raises:
      PayloadError: the server would refuse it; says which rule it breaks.
    """

    ids: Ids
    layers: int
    """Number of layers of the model; the site creates one source per layer."""
    display_name: str | None = None
    description: str | None = None
    """Description of the source set."""
    url: str | None = None

    def __post_init__(self) -> None:
        _require(1 <= self.layers <= 127, f"the model has {self.layers} layers: Neuronpedia accepts 1 to 127")
        layer, suffix = self.ids.layer, self.ids.suffix
        _require(layer < self.layers, f"layer {layer} is not one of the model's {self.layers}")
        _require(suffix is None, f"the upload cannot create the suffix {suffix!r}: put it into the source set's name")
        for name, text, longest in (("display name", self.display_name, 64), ("description", self.description, 128)):
            _require(
                text is None or 1 <= _utf16_length(text) <= longest,
                f"the {name} {text!r} would be refused: Neuronpedia accepts 1 to {longest} characters",
            )
        _require(
            self.url is None or bool(re.fullmatch(r"https?://[^\s/]+\.[^\s/]+(/\S*)?", self.url)),
            f"the url {self.url!r} would be refused: give a full address, https://…",
        )


# ---- one feature --------------------------------------------------------------------------------------------------


def encode(feature: Mapping[str, Any]) -> bytes:
    """Return a feature as JSON for a body. Keys with the value None are left out, because the server refuses null.

    Raises:
      PayloadError: the server would refuse the feature; says where and why.
    """
    index = feature.get("index")
    _require(_is_int(index) and 0 <= index <= 10_000_000, f"feature index {index!r}: expected 0 to 10,000,000")
    where = f"feature {index}"
    _check_keys(feature, _FEATURE_KEYS, where)
    density = feature.get("density")
    _require(
        density is None or (jsons.is_finite(density) and 0 <= density <= 1),
        f"{where}: density is {density!r}, expected a share from 0 to 1",
    )
    for side in ("topLogits", "bottomLogits"):
        _check_logits(feature.get(side) or (), f"{where}, {side}")
    for i, explanation in enumerate(feature.get("explanations") or ()):
        _check_explanation(explanation, f"{where}, explanation {i}")
    activations = feature.get("activations") or ()
    _require(bool(activations), f"{where} has no activations: dead features cannot be uploaded")
    for i, activation in enumerate(activations):
        _check_activation(activation, f"{where}, activation {i}")
    return dump({key: value for key, value in feature.items() if value is not None})


def dump(value: Any) -> bytes:
    """Return a value as compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _check_logits(logits: Sequence[Mapping[str, Any]], where: str) -> None:
    _require(len(logits) <= 20, f"{where}: {len(logits)} tokens, Neuronpedia accepts at most 20")
    for logit in logits:
        _check_keys(logit, {"token", "value"}, where)
        _check_text(logit.get("token"), f"{where}: a token")
        _require(jsons.is_finite(logit.get("value")), f"{where}: value {logit.get('value')!r} is not a finite number")


def _check_explanation(explanation: Mapping[str, Any], where: str) -> None:
    _check_keys(explanation, _EXPLANATION_KEYS, where)
    text = explanation.get("text")
    _check_text(text, f"{where}: the text")
    length = _utf16_length(text)
    _require(length <= 512, f"{where}: {length} characters, Neuronpedia accepts at most 512")
    for key in ("methodName", "modelName"):
        if explanation.get(key) is not None:
            _check_text(explanation[key], f"{where}: {key}")


def _check_activation(activation: Mapping[str, Any], where: str) -> None:
    _check_keys(activation, _ACTIVATION_KEYS, where)
    tokens, values = activation.get("tokens") or (), activation.get("values") or ()
    _require(len(tokens) == len(values), f"{where}: {len(tokens)} tokens but {len(values)} values")
    _require(1 <= len(tokens) <= 1024, f"{where}: {len(tokens)} tokens, Neuronpedia accepts 1 to 1024")
    for position, token in enumerate(tokens):
        _check_text(token, f"{where}: token {position}")
    for position, value in enumerate(values):
        _require(jsons.is_finite(value), f"{where}: value {position} is {value!r}, not a finite number")
    for key, limit in (("quantileMax", 99_999_999), ("quantileMin", 99_999_999), ("quantileFraction", 1)):
        value = activation.get(key)
        _require(
            value is None or (jsons.is_finite(value) and value <= limit), f"{where}: {key} is {value!r}, above {limit}"
        )
    fraction = activation.get("quantileFraction")
    _require(
        fraction is None or fraction >= 0,
        f"{where}: quantileFraction is {fraction!r}: give a share, or null for the group of the strongest",
    )


def _check_text(text: Any, name: str) -> None:
    _require(isinstance(text, str), f"{name} is {text!r}: expected text")
    _require(text != "", f"{name} is empty, which Neuronpedia refuses: give a visible placeholder")
    _require("\0" not in text, f"{name} contains NUL, which its database cannot store: give a visible placeholder")
    _require(
        text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text),
        f"{name} contains half of a surrogate pair: {text!r} is not valid Unicode",
    )


def _check_keys(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(fields) - known)
    _require(not unknown, f"{where}: unknown {', '.join(unknown)}; the upload knows {', '.join(sorted(known))}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _utf16_length(text: str) -> int:
    """Return the length in UTF-16 code units, which the server's JavaScript counts."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


# ---- bodies -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """One request: the file with its body, and the features in it."""

    file: str
    sha256: str
    size: int
    contents: Mapping[int, str]
    """Hash of the JSON of each feature, by index, in the order of the body."""
    texts: Mapping[int, int]
    """Number of activations of each feature, by index."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that an upload will send, checked and stored in `folder`."""

    folder: Path
    target: Target
    batches: tuple[Batch, ...]
    dead: int
    """Number of features without activations, which are left out."""

    @property
    def features(self) -> int:
        """Number of features that will be sent."""
        return sum(len(batch.contents) for batch in self.batches)

    @property
    def size(self) -> int:
        """Total size of the bodies in bytes."""
        return sum(batch.size for batch in self.batches)

    def body(self, batch: Batch, only: set[int] | None = None) -> bytes:
        """Return the body of a request; with `only`, restricted to these features.

        Raises:
          PayloadError: the file has changed since it was written.
        """
        body = (self.folder / batch.file).read_bytes()
        _require(
            hashlib.sha256(body).hexdigest() == batch.sha256,
            f"{self.folder / batch.file} has changed since it was prepared: prepare the upload again",
        )
        if only is None or only == set(batch.contents):
            return body
        request = jsons.loads(body)
        return dump(request | {"features": [feature for feature in request["features"] if feature["index"] in only]})


def prepare(
    features: Iterable[Mapping[str, Any]],
    target: Target,
    folder: Path,
    *,
    d_sae: int | None = None,
    max_features: int = MAX_FEATURES,
    max_bytes: int = MAX_BYTES,
) -> Plan:
    """Check all features, and write the bodies, `batch-N.json`, and their contents, `plan.json`.

    The same features give the same bytes. Only one body is in memory at a time.

    Args:
      features: features in the format of the API, each index once; those without activations are left out.
      target: the destination.
      folder: the folder, created if missing; an earlier plan in it is replaced, other files are kept.
      d_sae: number of latents of the SAE; features that are missing count as dead.
      max_features: features per body, 1 to 128.
      max_bytes: bytes per body.

    Raises:
      PayloadError: the server would refuse a feature; the folder is unchanged.
      OSError: the plan cannot be written, for example because the disk is full; the folder is unchanged.
    """
    _require(1 <= max_features <= MAX_FEATURES, f"{max_features} features per request: the server accepts 1 to 128")
    seen: set[int] = set()
    dead: set[int] = set()

    def alive() -> Iterator[_Encoded]:
        for feature in features:
            if not feature.get("activations"):
                dead.add(feature["index"])
                continue
            encoded = encode(feature)
            index = feature["index"]
            _require(index not in seen, f"feature {index} occurs twice: every index must occur once")
            seen.add(index)
            yield _Encoded(index, encoded, len(feature["activations"]))

    batches = []
    with files.replacing_folder(folder, keep=_is_foreign) as partial:
        for number, (parts, body) in enumerate(_bodies(alive(), target, max_features, max_bytes)):
            file = f"batch-{number}.json"
            (partial / file).write_bytes(body)
            contents = {part.index: hashlib.sha256(part.json).hexdigest()[:16] for part in parts}
            texts = {part.index: part.texts for part in parts}
            batches.append(Batch(file, hashlib.sha256(body).hexdigest(), len(body), contents, texts))
        _require(bool(batches), "there is nothing to upload: all features are dead")
        plan = Plan(folder, target, tuple(batches), len(dead) if d_sae is None else d_sae - len(seen))
        summary = {
            "target": dataclasses.asdict(target),
            "dead": plan.dead,
            "batches": [dataclasses.asdict(b) for b in batches],
        }
        (partial / "plan.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return plan


def _is_foreign(file: Path) -> bool:
    """Return whether a file does not belong to a plan."""
    return len(file.parts) > 1 or not (file.match("batch-*.json") or file.name == "plan.json")


class _Encoded(NamedTuple):
    """A feature encoded for a body."""

    index: int  # type: ignore[assignment]  # a tuple's method of that name is not used
    json: bytes
    texts: int


def _bodies(
    features: Iterator[_Encoded], target: Target, max_features: int, max_bytes: int
) -> Iterator[tuple[list[_Encoded], bytes]]:
    """Yield the features and the body of each request."""
    head = dump({"modelId": target.ids.model, "source": target.ids.source, "features": []})[:-2]
    empty = len(head) + len(b"]}")
    parts: list[_Encoded] = []
    size = empty
    for part in features:
        _require(
            empty + len(part.json) <= max_bytes,
            f"feature {part.index} alone has {len(part.json):,} bytes of JSON; a request may have {max_bytes:,}: "
            "export fewer or shorter texts",
        )
        if parts and (len(parts) == max_features or size + 1 + len(part.json) > max_bytes):
            yield parts, _body(head, parts)
            parts, size = [], empty
        size += len(part.json) + bool(parts)
        parts.append(part)
    if parts:
        yield parts, _body(head, parts)


def _body(head: bytes, parts: list[_Encoded]) -> bytes:
    return head + b",".join(part.json for part in parts) + b"]}"
