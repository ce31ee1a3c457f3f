"""What the tests of several of the runtime's rooms open: a bundle, its engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle, encoder_bundle

from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.engine.decoder import DecoderEngine
from edgetune.runtime.engine.encoder import EncoderEngine


@pytest.fixture(scope="module")
def runtime(tiny_decoder: Path) -> Iterator[Runtime]:
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def decoder(tiny_decoder: Path) -> DecoderEngine:
    folder = decoder_bundle(tiny_decoder)
    return DecoderEngine(folder, read_manifest(folder), threads=2)


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> EncoderEngine:
    folder = encoder_bundle(tiny_encoder)
    return EncoderEngine(folder, read_manifest(folder), threads=2)
