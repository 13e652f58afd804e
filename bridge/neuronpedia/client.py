"""A client of Neuronpedia's public API, which retries with care: a failed request may have arrived. Needs httpx."""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import json
import random
import re
import time
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bridge.neuronpedia.payload import Target, dump
from jsae import extras

if TYPE_CHECKING:
    import httpx

SITE = "https://www.neuronpedia.org"
_LARGEST_ANSWER = 64 * 2**20
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


class ApiError(OSError):
    """The server cannot be reached, or its answer is invalid."""


class RefusedError(ApiError):
    """The server refused the request, so a retry would not help.

    Attributes:
      status: the HTTP status.
      reason: the server's message.
    """

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclasses.dataclass(frozen=True)
class Patience:
    """Limits of retries, in seconds. Waits double from `first` to `longest`, each randomly shortened by up to half."""

    attempts: int = 8
    """Consecutive failures of one request; rate limits (429) do not count."""
    first: float = 2.0
    longest: float = 120.0
    total: float = 7200.0
    """Total waiting time of one client."""
    recheck: float = 20.0
    """Shortest wait after a request that may have arrived, because the server may still be processing it."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """An explanation of a feature by a person or a program."""

    text: str
    method: str | None
    """Neuronpedia's name of the method; None if a person wrote it."""
    model: str | None
    scores: tuple[tuple[str, float], ...]
    """Pairs (kind of score, value)."""


@dataclasses.dataclass(frozen=True)
class _Failure:
    """A failed attempt."""

    reason: str
    uncertain: bool
    """Whether the server may have processed the request."""
    wait: float = 0.0
    """Seconds to wait that the server demands."""
    limited: bool = False
    """Whether the failure is a rate limit."""


class Client:
    """A client of Neuronpedia. A context manager, because it keeps connections open.

    Args:
      api_key: sent in the header `x-api-key`, never written to logs or errors. None: read only.
      base_url: the public site, or a local one such as `http://localhost:3000`.
      patience: how long to retry.
      sleep: waits for some seconds; replaced in tests.
      jitter: returns a random number from 0 to 1; replaced in tests.
      transport: a transport for requests, such as a proxy; None: the network.

    Raises:
      ImportError: httpx is not installed.
      ValueError: base_url is invalid or would send the key unencrypted, or the key is malformed.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str = SITE,
        patience: Patience = Patience(),
        *,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
        transport: httpx.BaseTransport | None = None,
    ):
        try:
            import httpx
        except ImportError as error:
            raise ImportError(f"httpx is not installed: {extras.advice('neuronpedia')}") from error
        self._httpx = httpx
        self.base_url = site(base_url)
        if api_key is not None:
            _require_encryption(self.base_url)
        self._key = _checked_key(api_key)
        self.patience = patience
        self._sleep, self._jitter = sleep, jitter
        self._waited = 0.0
        headers = {"user-agent": "jsae", "accept": "application/json"}
        if self._key:
            headers["x-api-key"] = self._key
        # The site ends requests after 300 seconds, so a longer silence means that the connection is dead.
        timeout = httpx.Timeout(30.0, read=330.0, write=120.0)
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, as at the end of a `with` block."""
        self._http.close()

    # ---- reading ----------------------------------------------------------------------------------------------

    def feature(self, model: str, source: str, index: int) -> dict[str, Any] | None:
        """Return a feature with its activations and explanations, or None if it does not exist.

        Raises:
          ApiError: the server cannot be reached or refuses the request.
        """
        return self._read("feature", model, source, str(index))

    def explanations(self, model: str, source: str, index: int) -> list[Explanation]:
        """Return the explanations of a feature, the best score first.

        Raises:
          ApiError: there is no such feature, or the server cannot be reached or refuses the request.
        """
        feature = self.feature(model, source, index)
        if feature is None:
            raise ApiError(f"{self.base_url} has no feature {model}/{source}/{index}: check the three names")
        try:
            return [_explanation(item) for item in feature.get("explanations") or ()]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ApiError(f"{self.base_url} returned explanations in an unknown format ({error!r})") from error

    def source_set(self, model: str, name: str) -> dict[str, Any] | None:
        """Return a source set with its sources, or None if it does not exist. Raises ApiError."""
        return self._read("source-set", model, name)

    def _read(self, *parts: str) -> dict[str, Any] | None:
        path = "/api/" + "/".join(urllib.parse.quote(part, safe="") for part in parts)
        try:
            answer = self.request("GET", path)
        except RefusedError as error:
            if error.status == 404:
                return None
            raise
        if answer is not None and not isinstance(answer, dict):
            raise ApiError(f"{self.base_url}{path} returned {type(answer).__name__}, expected an object")
        return answer

    # ---- writing ----------------------------------------------------------------------------------------------

    def create_model(self, target: Target) -> bool:
        """Create the model, unlisted. Return False if the id exists. The public API cannot delete models."""
        fields = {
            "id": target.ids.model,
            "layers": target.layers,
            "displayName": target.display_name,
            "url": target.url,
        }
        return self._create("model", fields)

    def create_source_set(self, target: Target) -> bool:
        """Create the source set with one source per layer, unlisted. Return False if the name exists."""
        fields = {
            "name": target.ids.source_set,
            "modelId": target.ids.model,
            "description": target.description,
            "url": target.url,
        }
        return self._create("source-set", fields)

    def _create(self, kind: str, fields: dict[str, Any]) -> bool:
        try:
            self.request("POST", f"/api/{kind}/new", dump({k: v for k, v in fields.items() if v is not None}))
        except RefusedError as error:
            if error.status == 400 and "already exists" in error.reason:
                return False
            raise
        return True

    def upload(self, body: bytes, remaining: Callable[[], bytes | None]) -> None:
        """Upload one batch of features.

        Args:
          body: the body of the request.
          remaining: called before a retry; returns the body of the features that have not arrived, or None.

        Raises:
          ApiError: the server refuses the request, or cannot be reached for too long.
        """
        self.request("POST", "/api/feature/upload-batch", body, remaining)

    # ---- one request ------------------------------------------------------------------------------------------

    def request(
        self, method: str, path: str, body: bytes | None = None, remaining: Callable[[], bytes | None] | None = None
    ) -> Any:
        """Send a request, with retries, and return the JSON of the answer.

        Args:
          method: the HTTP method.
          path: the path on the site.
          body: the body.
          remaining: see `upload`.

        Raises:
          RefusedError: the status is 3xx, or 4xx other than 408 and 429.
          ApiError: the limits of `patience` are exceeded.
        """
        failures = 0
        while True:
            result = self._try(method, path, body)
            if not isinstance(result, _Failure):
                return result
            failures += not result.limited
            self._wait(result, failures, f"{method} {self.base_url}{path}")
            if result.uncertain and remaining is not None:
                body = remaining()
                if body is None:
                    return None

    def pause(self, seconds: float) -> None:
        """Wait; the time counts towards the total of `patience`."""
        self._waited += seconds
        if seconds > 0:
            self._sleep(seconds)

    def _try(self, method: str, path: str, body: bytes | None) -> Any:
        httpx = self._httpx
        headers = {} if body is None else {"content-type": "application/json"}
        try:
            with self._http.stream(method, path, content=body, headers=headers) as response:
                data = bytearray()
                for part in response.iter_bytes():
                    data += part
                    if len(data) > _LARGEST_ANSWER:
                        return _Failure(f"the answer has more than {_LARGEST_ANSWER} bytes", uncertain=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return _Failure(f"could not be reached ({self._clean(str(error))})", uncertain=False)
        except (httpx.TransportError, httpx.DecodingError) as error:
            return _Failure(f"was interrupted ({type(error).__name__} {self._clean(str(error))})", uncertain=True)
        return self._evaluate(response, bytes(data), f"{method} {self.base_url}{path}")

    def _evaluate(self, response: httpx.Response, data: bytes, request: str) -> Any:
        """Return the JSON of a successful answer, or a failure to retry. Raises RefusedError."""
        status, answer = response.status_code, _json(data)
        reason = self._clean(_error_text(answer) or data.decode("utf-8", "replace"))
        if status == 429:
            return _Failure(f"429 {reason}", uncertain=False, wait=_demanded_wait(response, answer), limited=True)
        if status >= 500 or status == 408:
            return _Failure(f"{status} {reason}", uncertain=True)
        if status >= 300:
            message = f"{request} was refused: {status} {reason}".rstrip()
            raise RefusedError(status, reason, message + _advice(response, self.base_url))
        if answer is _NO_JSON:
            return _Failure(f"status {status} without JSON; is this a Neuronpedia?", uncertain=True)
        return answer

    def _wait(self, failure: _Failure, failures: int, request: str) -> None:
        """Wait before a retry. Raises ApiError if the limits of `patience` are exceeded."""
        patience = self.patience
        if failures >= patience.attempts:
            raise ApiError(f"{request} failed {failures} times, the last time: {failure.reason}; try again later")
        doubled = min(patience.longest, patience.first * 2 ** min(failures, 30))
        seconds = max(doubled * (1 - self._jitter() / 2), failure.wait, patience.recheck if failure.uncertain else 0.0)
        if self._waited + seconds > patience.total:
            raise ApiError(
                f"{request}: {failure.reason}; another wait of {seconds:.0f} s would exceed the total of "
                f"{patience.total:.0f} s: try again later"
            )
        self.pause(seconds)

    def _clean(self, text: str) -> str:
        """Return a server's text short, on one line and without the key, which it might repeat."""
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return (text.replace(self._key, "[key]") if self._key else text)[:300]


_NO_JSON = object()


def site(base_url: str) -> str:
    """Return the address of a site without `/api` or a slash at its end.

    Raises:
      ValueError: it is not an http or https address.
    """
    parts = urllib.parse.urlsplit(base_url)
    valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
    if not valid or parts.username is not None:
        raise ValueError(f"the base url is not the address of a site: give one such as {SITE}")
    return base_url.rstrip("/").removesuffix("/api")


def _require_encryption(base_url: str) -> None:
    """Raise ValueError for an address to which the key would be sent unencrypted."""
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"{base_url} would send the API key unencrypted: give https://…")


def _checked_key(api_key: str | None) -> str | None:
    """Return the key without surrounding white space. Raises ValueError for characters that no key has."""
    key = (api_key or "").strip()
    if not all("!" <= c <= "~" for c in key):
        raise ValueError("the API key has invalid characters: copy it again from the site's account page")
    return key or None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return _NO_JSON


def _error_text(answer: Any) -> str:
    """Return the message in the JSON of an error, or ''."""
    if not isinstance(answer, dict):
        return ""
    return ": ".join(str(answer[key]) for key in ("path", "error", "message") if answer.get(key))


def _demanded_wait(response: httpx.Response, answer: Any) -> float:
    """Return the seconds to wait after a 429: Retry-After, or a twentieth of the sliding window in the body."""
    after = response.headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", after):
        return float(after)
    try:
        when = email.utils.parsedate_to_datetime(after)
        return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError):  # not a date, or one without a time zone
        pass
    window = answer.get("requestWindow") if isinstance(answer, dict) else None
    match = re.fullmatch(r"(\d{1,9}) ?(ms|s|m|h|d)", window) if isinstance(window, str) else None
    return int(match[1]) * _UNITS[match[2]] / 20 if match else 0.0


def _advice(response: httpx.Response, base_url: str) -> str:
    status = response.status_code
    if status < 400:
        return f"; it redirects to {response.headers.get('location', '')[:200]!r}: give that site as the base url"
    if status in (401, 403):
        return "; check that NEURONPEDIA_API_KEY is the key of the source set's creator on this site"
    if status == 413:
        return "; prepare smaller batches"
    return ""


def _explanation(item: dict[str, Any]) -> Explanation:
    """Return an explanation from its JSON. Raises KeyError, TypeError or ValueError for an unknown format."""
    scores = [(score["explanationScoreTypeName"], float(score["value"])) for score in item.get("scores") or ()]
    text = item["description"]
    if not isinstance(text, str):
        raise TypeError(f"description {text!r}")
    return Explanation(text, item.get("typeName"), item.get("explanationModelName"), tuple(scores))
