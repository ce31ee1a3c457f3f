"""Who asks is shown to the server that wants to know, and to nobody else."""

from __future__ import annotations

import base64
import http.server
import json
from pathlib import Path
from typing import Any

import pytest
from source_helpers import file_server, serving, small_adapter

from edgetune.core.errors import SourceError
from edgetune.publishing.package import package
from edgetune.publishing.push import push
from edgetune.runtime.sources.credentials import registry_login
from edgetune.runtime.sources.pull import pull, resolve
from edgetune.runtime.sources.transport import Transport
from edgetune.runtime.sources.web import WebSource

PASSWORD = "open sesame"


def packed(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without configuration."""
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def configure(home: Path, **config: Any) -> None:
    (home / ".docker").mkdir(exist_ok=True)
    (home / ".docker" / "config.json").write_text(json.dumps(config))


class TokenRegistry(http.server.BaseHTTPRequestHandler):
    """One artifact behind tokens, as registries of the cloud have it."""

    def do_GET(self) -> None:
        server: Any = self.server
        said = self.headers.get("Authorization")
        if self.path.startswith("/token?"):
            ok = said == "Basic " + packed(f"ann:{PASSWORD}")
            return self._answer(200 if ok else 401, b'{"token": "t0ken"}' if ok else b"{}")
        if said != "Bearer t0ken":
            return self._answer(401, b"{}", challenge=True)
        if "/manifests/" in self.path:
            return self._answer(200, server.packed.manifest)
        file = next(f for f in server.packed.artifact.files if self.path.endswith(f.sha256))
        server.asked.append(self.path)
        return self._answer(200, (server.packed.folder / file.path).read_bytes())

    def _answer(self, status: int, body: bytes, *, challenge: bool = False) -> None:
        self.send_response(status)
        if challenge:
            realm = f'realm="{self.server.url}/token",service="s",scope="repository:a:pull"'  # type: ignore[attr-defined]
            self.send_header("WWW-Authenticate", f"Bearer {realm}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_token_is_bought_with_the_password_of_the_container_configuration(
    home: Path, tmp_path: Path
) -> None:
    with serving(TokenRegistry) as server:
        server.packed = package(small_adapter(tmp_path / "home"))
        url = f"oci://127.0.0.1:{server.server_port}/a:v1"
        with pytest.raises(SourceError, match=r"wants to know who asks.*docker login"):
            resolve(url)
        configure(home, auths={f"127.0.0.1:{server.server_port}": {"auth": packed("ann:wrong")}})
        with pytest.raises(SourceError) as refused:
            resolve(url)
        assert "wrong" not in str(refused.value)
        login = {"auth": packed(f"ann:{PASSWORD}")}
        configure(home, auths={f"127.0.0.1:{server.server_port}": login})
        assert pull(url, tmp_path / "here", store=tmp_path / "store").fetched_bytes > 20_000
        assert len(server.asked) == 3


class Stranger(http.server.BaseHTTPRequestHandler):
    """Sends everybody to `to`, or, where there is none, asks for the password itself."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append(self.headers.get("Authorization"))
        to = server.redirects.get("to")
        self.send_response(307 if to else 401)
        if to:
            self.send_header("Location", to + self.path)
        else:
            self.send_header("WWW-Authenticate", f'Bearer realm="{server.url}/token"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_a_host_that_a_registry_leads_to_gets_no_password(home: Path) -> None:
    with serving(Stranger) as first, serving(Stranger) as second:
        first.redirects["to"] = second.url
        login = {"auth": packed(f"ann:{PASSWORD}")}
        configure(home, auths={f"127.0.0.1:{first.server_port}": login})
        with pytest.raises(SourceError):
            resolve(f"oci://127.0.0.1:{first.server_port}/a:v1")
        assert second.asked and not any(second.asked)


@pytest.mark.parametrize("key", ["r.io", "https://r.io/v1/", "r.io/team", "R.IO/team"])
def test_a_login_is_found_by_any_of_its_keys(home: Path, key: str) -> None:
    configure(home, auths={"x.io": {"auth": packed("a:b")}, key: {"auth": packed("ann:p:w")}})
    login = registry_login("r.io", "team/model")
    assert login is not None and (login.name, login.password) == ("ann", "p:w")
    assert PASSWORD not in repr(login) and registry_login("y.io", "team/model") is None


def test_a_credential_helper_is_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = home / "docker-credential-safe"
    helper.write_text(
        '#!/bin/sh\nread -r host\necho "{\\"Username\\":\\"$host\\",\\"Secret\\":\\"s\\"}"\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:/usr/bin:/bin")
    configure(home, credHelpers={"r.io": "safe"}, credsStore="../evil")
    login = registry_login("r.io", "model")
    assert login is not None and (login.name, login.password) == ("r.io", "s")
    with pytest.raises(SourceError, match="names no program"):
        registry_login("x.io", "model")


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_redirect_takes_the_secret_along_only_on_the_same_server(
    tmp_path: Path, elsewhere: bool
) -> None:
    push(small_adapter(tmp_path / "home"), str(tmp_path / "www"))
    with file_server(tmp_path / "www") as first, file_server(tmp_path / "www") as second:
        to = second if elsewhere else first
        first.redirects["/a/artifact.json"] = f"{to.url}/artifact.json"
        source = WebSource(first.url, f"{first.url}/a", Transport(), "Basic c2VjcmV0")
        assert source.artifact().kind == "adapter"
        assert ("Authorization" in to.asked[-1][1]) != elsewhere
        assert first.asked[0][1]["Authorization"] == "Basic c2VjcmV0"


BAD = {
    "http://example.com/x": "without TLS",
    "https://ann:pw@example.com/x": "password in a URL",
    "oci://example.com/UPPER": "not the name of an artifact",
    "oci://example.com/a:b:c": "not the name of an artifact",
    "hf://only": "not the name of a repository",
    "ftp://example.com/x": "no source of this kind",
    "https:///x": "not an http",
    "/nowhere/at/all": "neither a bundle nor an adapter",
    "http://127.0.0.1:1/x": "no answer",
    "oci://Nobody.invalid/x": r"the host 'nobody\.invalid' is not known here",
}


@pytest.mark.parametrize("url", BAD)
def test_a_source_that_cannot_be_is_one_line(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SourceError, match=BAD[url]) as refused:
        pull(url, tmp_path / "here", transport=Transport(attempts=1))
    assert "\n" not in str(refused.value) and "pw@" not in str(refused.value)


def test_no_redirect_leads_from_tls_to_plain_http() -> None:
    with pytest.raises(SourceError, match="without TLS"):
        Transport().check("http://127.0.0.1/x", after="https://example.com/y")
