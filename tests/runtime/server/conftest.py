"""The server that a test file talks to unless it asks for one of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle
from server_helpers import Running, serve


@pytest.fixture(scope="module")
def server(tiny_decoder: Path) -> Iterator[Running]:
    with serve(decoder_bundle(tiny_decoder)) as running:
        yield running
