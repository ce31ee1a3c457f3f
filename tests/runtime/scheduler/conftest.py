"""What the scheduler's tests open: a bundle, by every engine there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import decoder_bundle, engines_here

from edgetune.runtime import Runtime


@pytest.fixture(scope="module", params=engines_here())
def runtime(request: Any, tiny_decoder: Path) -> Iterator[Runtime]:
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1, engine=request.param) as opened:
        yield opened
