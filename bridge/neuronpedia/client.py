"""Neuronpedia's public API over HTTP: patient with a busy server, exact about what may have arrived. Needs httpx."""

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

if TYPE_CHECKING:
    import httpx

SITE = "https://www.neuronpedia.org"
_LARGEST_ANSWER = 64 * 2**20
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


class ApiError(OSError):
    """The server could not be reached, or what it said is no answer."""


class RefusedError(ApiError):
    """The server understood and said no: asking again would not help."""

    def __init__(self, status: int, said: str, message: str):
        super().__init__(message)
        self.status, self.said = status, said


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long to try. Seconds; waits double from `first` to `longest`, each shortened by up to half at random."""

    attempts: int = 8
    """Failures in a row of one request; being told to wait (429) is none."""
    first: float = 2.0
    longest: float = 120.0
    total: float = 7200.0
    """Waited in all by one client."""
    settle: float = 20.0
    """At least waited after a request that may have arrived: the server may be at work on it still."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What somebody or something says that a feature means."""

    text: str
    method: str | None
    """Neuronpedia's name of how it came about; None for one written by a person."""
    model: str | None
    scores: tuple[tuple[str, float], ...]
    """Kind of score and value."""


@dataclasses.dataclass(frozen=True)
class _Failure:
    """A try that came to nothing."""

    why: str
    uncertain: bool
    """Whether the server may have acted on it."""
    wait: float = 0.0
    """Seconds that the server asks for."""
    limited: bool = False


class Client:
    """Asks and tells Neuronpedia; a context manager, as it holds connections.

    Args:
      api_key: goes into the header `x-api-key` and nowhere else: into no log, no error. None reads only.
      base_url: the site, or a local one, `http://localhost:3000`.
      patience: how long to try.
      sleep, jitter: of the waiting; for tests.
      transport: how requests travel, a proxy for example; None is the network.

    Raises:
      ImportError: httpx is missing.
      ValueError: a base_url that is none, that would carry the key readably, or a key that cannot be one.
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
            raise ImportError("httpx is not installed: pip install 'jsae[neuronpedia]'") from error
        self._httpx = httpx
        self.base_url = site(base_url)
        if api_key is not None:
            _refuse_readable(self.base_url)
        self._key = _checked(api_key)
        self.patience = patience
        self._sleep, self._jitter = sleep, jitter
        self._waited = 0.0
        headers = {"user-agent": "jsae", "accept": "application/json"}
        if self._key:
            headers["x-api-key"] = self._key
        # The site ends a request after 300 seconds at most: longer silence means that it is over.
        timeout = httpx.Timeout(30.0, read=330.0, write=120.0)
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections; leaving a `with` block does so too."""
        self._http.close()

    # ---- reading ----------------------------------------------------------------------------------------------

    def feature(self, model: str, source: str, index: int) -> dict[str, Any] | None:
        """A feature with its activations and explanations, or None where there is none.

        Raises:
          ApiError: the server cannot be reached or refuses.
        """
        return self._read("feature", model, source, str(index))

    def explanations(self, model: str, source: str, index: int) -> list[Explanation]:
        """What people and programs say a feature means, the best scored first.

        Raises:
          ApiError: there is no such feature, or the server cannot be reached or refuses.
        """
        found = self.feature(model, source, index)
        if found is None:
            raise ApiError(f"{self.base_url} has no feature {model}/{source}/{index}: check the three names")
        try:
            return [_explanation(told) for told in found.get("explanations") or ()]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ApiError(f"{self.base_url} answered with explanations of another form ({error!r})") from error

    def source_set(self, model: str, name: str) -> dict[str, Any] | None:
        """A source set with its sources, or None where there is none."""
        return self._read("source-set", model, name)

    def _read(self, *path: str) -> dict[str, Any] | None:
        where = "/api/" + "/".join(urllib.parse.quote(part, safe="") for part in path)
        try:
            found = self.request("GET", where)
        except RefusedError as refused:
            if refused.status == 404:
                return None
            raise
        if found is not None and not isinstance(found, dict):
            raise ApiError(f"{self.base_url}{where} answered {type(found).__name__}, expected an object")
        return found

    # ---- telling ----------------------------------------------------------------------------------------------

    def create_model(self, target: Target) -> bool:
        """Makes the model, unlisted; False when there is one of that id. The public API cannot take it back."""
        told = {"id": target.ids.model, "layers": target.layers, "displayName": target.display_name, "url": target.url}
        return self._create("model", told)

    def create_source_set(self, target: Target) -> bool:
        """Makes the source set with one source per layer, unlisted; False when there is one of that name."""
        told = {
            "name": target.ids.source_set,
            "modelId": target.ids.model,
            "description": target.description,
            "url": target.url,
        }
        return self._create("source-set", told)

    def _create(self, what: str, told: dict[str, Any]) -> bool:
        try:
            self.request("POST", f"/api/{what}/new", dump({k: v for k, v in told.items() if v is not None}))
        except RefusedError as refused:
            if refused.status == 400 and "already exists" in refused.said:
                return False
            raise
        return True

    def upload(self, body: bytes, again: Callable[[], bytes | None]) -> None:
        """Sends one batch of features.

        Args:
          body: of the request.
          again: asked, before anything is sent a second time, what is still missing: the body for that, or None.

        Raises:
          ApiError: the server refuses it, or cannot be reached for too long.
        """
        self.request("POST", "/api/feature/upload-batch", body, again)

    # ---- one request ------------------------------------------------------------------------------------------

    def request(
        self, method: str, path: str, body: bytes | None = None, again: Callable[[], bytes | None] | None = None
    ) -> Any:
        """Sends a request until it is answered; what the answer's JSON says.

        Raises:
          RefusedError: a 3xx or 4xx other than 429.
          ApiError: patience is at its end.
        """
        failures = 0
        while True:
            found = self._try(method, path, body)
            if not isinstance(found, _Failure):
                return found
            failures += not found.limited
            self._wait(found, failures, f"{method} {self.base_url}{path}")
            if found.uncertain and again is not None:
                body = again()
                if body is None:
                    return None

    def pause(self, seconds: float) -> None:
        """Waits for the server."""
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
                        return _Failure(f"answered with over {_LARGEST_ANSWER} bytes", uncertain=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return _Failure(f"could not be reached ({self._clean(str(error))})", uncertain=False)
        except (httpx.TransportError, httpx.DecodingError) as error:
            return _Failure(f"broke off ({type(error).__name__} {self._clean(str(error))})", uncertain=True)
        return self._judge(response, bytes(data), f"{method} {self.base_url}{path}")

    def _judge(self, response: httpx.Response, data: bytes, what: str) -> Any:
        status, told = response.status_code, _json(data)
        said = self._clean(_said(told) or data.decode("utf-8", "replace"))
        if status == 429:
            return _Failure(f"429 {said}", uncertain=False, wait=_asked_wait(response, told), limited=True)
        if status >= 500 or status == 408:
            return _Failure(f"{status} {said}", uncertain=True)
        if status >= 300:
            message = f"{what} was refused: {status} {said}".rstrip()
            raise RefusedError(status, said, message + _advice(response, self.base_url))
        if told is _NO_JSON:
            return _Failure(f"answered {status}, but no JSON: is this a Neuronpedia?", uncertain=True)
        return told

    def _wait(self, failure: _Failure, failures: int, what: str) -> None:
        patience = self.patience
        if failures >= patience.attempts:
            raise ApiError(f"{what} failed {failures} times, at last: {failure.why}; try again later")
        doubled = min(patience.longest, patience.first * 2 ** min(failures, 30))
        seconds = max(doubled * (1 - self._jitter() / 2), failure.wait, patience.settle if failure.uncertain else 0.0)
        if self._waited + seconds > patience.total:
            raise ApiError(
                f"{what}: {failure.why}; waiting another {seconds:.0f} s would make more than {patience.total:.0f} s "
                "in all: try again later"
            )
        self.pause(seconds)

    def _clean(self, text: str) -> str:
        """A server's words, short, on one line, without the key should it repeat it."""
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return (text.replace(self._key, "[key]") if self._key else text)[:300]


_NO_JSON = object()


def site(base_url: str) -> str:
    """The address of a site as it is called by; `/api` or a slash at its end are left out.

    Raises:
      ValueError: it is none.
    """
    parts = urllib.parse.urlsplit(base_url)
    well = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
    if not well or parts.username is not None:
        raise ValueError(f"the base url is no address of a site: give one such as {SITE}")
    return base_url.rstrip("/").removesuffix("/api")


def _refuse_readable(base_url: str) -> None:
    """Raises ValueError for an address to which the key would travel readably."""
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"{base_url} would carry the API key readably: give https://…")


def _checked(api_key: str | None) -> str | None:
    """The key without the blanks of a copied line."""
    key = (api_key or "").strip()
    if not all("!" <= c <= "~" for c in key):
        raise ValueError("the API key holds characters that no key has: copy it again from the site's account page")
    return key or None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return _NO_JSON


def _said(told: Any) -> str:
    """What an error's JSON says."""
    if not isinstance(told, dict):
        return ""
    return ": ".join(str(told[key]) for key in ("path", "error", "message") if told.get(key))


def _asked_wait(response: httpx.Response, told: Any) -> float:
    """Seconds to wait on a 429: what Retry-After says, or a twentieth of the sliding window that the body names."""
    after = response.headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", after):
        return float(after)
    try:
        when = email.utils.parsedate_to_datetime(after)
        return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        pass
    window = told.get("requestWindow") if isinstance(told, dict) else None
    found = re.fullmatch(r"(\d{1,9}) ?(ms|s|m|h|d)", window) if isinstance(window, str) else None
    return int(found[1]) * _UNITS[found[2]] / 20 if found else 0.0


def _advice(response: httpx.Response, base_url: str) -> str:
    status = response.status_code
    if status < 400:
        return f"; it sends on to {response.headers.get('location', '')[:200]!r}: give that site as the base url"
    if status in (401, 403):
        return "; is NEURONPEDIA_API_KEY the key of an account on this site, and of the source set's creator?"
    if status == 413:
        return "; prepare smaller batches"
    return ""


def _explanation(told: dict[str, Any]) -> Explanation:
    scores = [(score["explanationScoreTypeName"], float(score["value"])) for score in told.get("scores") or ()]
    text = told["description"]
    if not isinstance(text, str):
        raise TypeError(f"description {text!r}")
    return Explanation(text, told.get("typeName"), told.get("explanationModelName"), tuple(scores))
