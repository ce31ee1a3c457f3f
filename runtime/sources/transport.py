"""HTTP as a device on a bad line needs it: timeouts, retries, redirects that carry no credentials.

Plain HTTP goes to this machine alone, unless it is asked for. Proxies are those of the environment.
"""

from __future__ import annotations

import http.client
import ipaddress
import random
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgetune import __version__
from edgetune.core.errors import SourceError

TIMEOUT_S, ATTEMPTS, LONGEST_PAUSE_S, REDIRECTS = 30.0, 5, 60.0, 5
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not meet."""
BROKEN = (OSError, http.client.HTTPException)
"""What a connection raises that fails or ends early; urllib's errors are among them."""
AUTHORIZATION = "Authorization"
T = TypeVar("T")


class StatusError(Exception):
    """A server said no: the status, its headers, and the start of what it wrote."""

    def __init__(self, url: str, status: int, headers: Mapping[str, str], text: str) -> None:
        super().__init__(f"{shown_url(url)}: HTTP {status}")
        self.url, self.status, self.headers, self.text = url, status, headers, text


@dataclass
class Transport:
    """Sends requests. `plain_http`: also to other machines without TLS. `sleep`: between tries."""

    plain_http: bool = False
    timeout_s: float = TIMEOUT_S
    attempts: int = ATTEMPTS
    sleep: Callable[[float], None] = time.sleep
    _openers: dict[bool, urllib.request.OpenerDirector] = field(default_factory=dict)

    def open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        attempts: int | None = None,
    ) -> Any:
        """The response (status, headers, `read`), to be closed by a `with`; StatusError for a
        status of 400 and more, SourceError where nobody answers. `attempts`: instead of the
        transport's own.
        """
        most = self.attempts if attempts is None else attempts
        for attempt in range(1, most + 1):
            try:
                return self._once(method, url, dict(headers or {}), body)
            except StatusError as error:
                if error.status not in PASSING or attempt == most:
                    raise
                self.pause(attempt, error.headers.get("Retry-After"))
            except BROKEN as error:
                if attempt == most or is_untrusted(error):
                    raise unreachable(url, error) from error
                self.pause(attempt)
            except ValueError:  # whose text may hold the token
                raise SourceError(
                    "the address or the credential has a letter that HTTP cannot carry",
                    where=shown_url(url),
                ) from None
        raise AssertionError("at least one attempt")

    def patiently(self, answer: Callable[[], T], url: str) -> T:
        """What `answer` returns; asked again where the line breaks while an answer is read."""
        for attempt in range(1, self.attempts + 1):
            try:
                return answer()
            except BROKEN as error:
                if attempt == self.attempts:
                    raise unreachable(url, error) from error
                self.pause(attempt)
        raise AssertionError("at least one attempt")

    def pause(self, attempt: int, retry_after: str | None = None) -> None:
        """Wait before the next try: what the server asks for, else twice as long each time, by
        chance a little more or less, so that many devices do not come back at once.
        """
        wait = 0.5 * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
        if retry_after is not None and retry_after.isdecimal():
            wait = max(wait, float(retry_after[:6]))
        self.sleep(min(wait, LONGEST_PAUSE_S))

    def check(self, url: str, *, after: str | None = None) -> None:
        """SourceError where a URL is no http(s) URL, has a password in it, or goes without TLS to
        another machine; `after`: the URL that named it, which it may not be less safe than.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise SourceError(f"not a URL: {error}", where=shown_url(url)) from error
        if parts.scheme not in ("http", "https") or not host or not url.isprintable():
            raise SourceError("not an http(s) URL", where=shown_url(url))
        if parts.username is not None:
            raise SourceError(
                "a password in a URL ends up in logs",
                where=shown_url(url),
                fix="Put it into ~/.netrc, or log in to the registry.",
            )
        if parts.scheme == "https" or self.plain_http:
            return
        if not is_loopback(host) or (after is not None and after.startswith("https:")):
            raise SourceError(
                "without TLS anybody on the way can read and change it",
                where=shown_url(url),
                fix="Use https, or --plain-http where the network is your own.",
            )

    def _once(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> Any:
        self.check(url)
        request = urllib.request.Request(url, data=body, method=method)
        request.add_header("User-Agent", f"edgetune/{__version__}")
        for name, value in headers.items():
            if name == AUTHORIZATION:
                request.add_unredirected_header(name, value)
            else:
                request.add_header(name, value)
        local = is_loopback(urllib.parse.urlsplit(url).hostname or "")
        try:
            return self._opener(local).open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(2000).decode("utf-8", "replace")
            raise StatusError(
                error.url or url, error.code, dict(error.headers.items()), text
            ) from error

    def _opener(self, local: bool) -> urllib.request.OpenerDirector:
        """Of http and https alone, where urllib's own also reads files; no proxy to this
        machine.
        """
        if local not in self._openers:
            opener = urllib.request.OpenerDirector()
            for handler in (
                urllib.request.ProxyHandler({} if local else None),
                urllib.request.HTTPHandler(),
                urllib.request.HTTPSHandler(),
                urllib.request.HTTPDefaultErrorHandler(),
                _Redirects(self),
                urllib.request.HTTPErrorProcessor(),
            ):
                opener.add_handler(handler)
            self._openers[local] = opener
        return self._openers[local]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to the same or a safer place; what a server is told for itself goes nowhere else."""

    max_redirections = REDIRECTS
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 has none

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.get_method() not in ("GET", "HEAD"):
            return None
        self._transport.check(newurl, after=req.full_url)
        new = urllib.request.Request(newurl, headers=dict(req.headers), method=req.get_method())
        own = req.unredirected_hdrs.get(AUTHORIZATION)
        if own is not None and origin(newurl) == origin(req.full_url):
            new.add_unredirected_header(AUTHORIZATION, own)
        return new


def read_at_most(response: Any, most: int, url: str) -> bytes:
    """A response's bytes; SourceError where there are more than `most`."""
    raw: bytes = response.read(most + 1)
    if len(raw) > most:
        raise SourceError("the answer is too large", where=shown_url(url), expected=f"{most} bytes")
    length = response.headers.get("Content-Length")
    if length is not None and length.isdecimal() and len(raw) != int(length):
        raise http.client.IncompleteRead(raw, int(length) - len(raw))
    return raw


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def shown_url(url: str) -> str:
    """A URL for people and logs: without a password and without a query, which may hold a key."""
    return "".join(_without_secrets(url.partition("?")[0].partition("#")[0]))[:300]


def _without_secrets(url: str) -> Iterable[str]:
    scheme, slashes, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return scheme, slashes, place.rpartition("@")[2], slash, path


def is_untrusted(error: Exception) -> bool:
    """Whether the server is not the one that its certificate is for, or nobody known signed it."""
    reason = getattr(error, "reason", None) or error
    return isinstance(reason, ssl.SSLCertVerificationError)


def unreachable(url: str, error: Exception) -> SourceError:
    """One line for a connection that failed."""
    reason: Any = getattr(error, "reason", None) or error
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    if is_untrusted(error):
        return SourceError(
            f"the server's certificate is not trusted: {reason.verify_message}",
            where=shown_url(url),
            fix="For an authority of your own: SSL_CERT_FILE=its-certificate.pem.",
        )
    if isinstance(reason, socket.gaierror):
        text = f"the host {urllib.parse.urlsplit(url).hostname!r} is not known here ({text})"
    return SourceError(
        f"no answer: {text}",
        where=shown_url(url),
        fix="Check the address and the network; the same command goes on from here.",
    )
