"""A registry behind TLS with an authority of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from source_helpers import content, docker_registry, small_adapter

from edgetune.core.errors import SourceError
from edgetune.publishing.push import push
from edgetune.runtime.sources.pull import pull
from edgetune.runtime.sources.transport import Transport

HOST = "registry.example"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority's ca.pem, and with cert.pem and key.pem of HOST."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl: apt-get install openssl")
    folder = tmp_path_factory.mktemp("authority")
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    own = f"-CA ca.pem -CAkey ca.key -subj /CN=host -addext subjectAltName=DNS:{HOST}"
    own += " -addext basicConstraints=CA:FALSE"
    for line in (
        f"req -x509 {curve} -keyout ca.key -out ca.pem -days 2 -subj /CN=authority",
        f"req -x509 {curve} -keyout key.pem -out cert.pem -days 2 {own}",
    ):
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)
    return folder


def test_an_authority_of_ones_own_is_trusted_where_it_is_named_and_nowhere_else(
    authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = socket.getaddrinfo

    def here(host: Any, *more: Any, **options: Any) -> Any:
        """The names of this network: all of them are this machine."""
        return found("127.0.0.1" if host in (HOST, "other.example") else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", here)
    adapter = small_adapter(tmp_path / "a")
    tls = authority / "cert.pem", authority / "key.pem"
    with docker_registry(tmp_path / "registry", tls=tls) as url:
        port = url.rpartition(":")[2]
        refused = [f"oci://{HOST}:{port}/a:v1", f"oci://other.example:{port}/a:v1"]
        never = Transport(sleep=lambda seconds: pytest.fail("asked again"))
        with pytest.raises(SourceError, match=r"not trusted: .*SSL_CERT_FILE=") as error:
            pull(refused[0], tmp_path / "b", transport=never)
        assert "\n" not in str(error.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
        push(adapter, refused[0])
        pull(refused[0], tmp_path / "b", store=tmp_path / "store")
        assert content(tmp_path / "b") == content(adapter)
        with pytest.raises(SourceError, match=r"not trusted: Hostname mismatch"):
            pull(refused[1], tmp_path / "c", transport=never)
