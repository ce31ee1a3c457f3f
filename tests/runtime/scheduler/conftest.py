"""An open bundle for the tests of the scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle

from edgetune.runtime import Runtime


@pytest.fixture(scope="module")
def runtime(tiny_decoder: Path) -> Iterator[Runtime]:
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as opened:
        yield opened
