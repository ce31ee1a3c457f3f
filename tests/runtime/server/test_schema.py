"""Schemathesis over `/openapi.json`: whatever fits the document or does not, the server answers as
the document says.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import decoder_bundle, encoder_bundle
from server_helpers import Running, serve

from edgetune.runtime.server.http.openapi import document

hypothesis = pytest.importorskip("hypothesis")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

CASES = [
    *((path, GenerationMode.POSITIVE) for path in document()["paths"]),
    *(
        (path, GenerationMode.NEGATIVE)
        for path, methods in document()["paths"].items()
        if "post" in methods
    ),
]


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def server(
    request: Any, tiny_decoder: Path, tiny_encoder: Path, tmp_path_factory: Any
) -> Iterator[Running]:
    kind = request.param
    bundle = decoder_bundle(tiny_decoder) if kind == "decoder" else encoder_bundle(tiny_encoder)
    allowed = tmp_path_factory.mktemp("allowed")
    shutil.copytree(next((bundle / "adapters").iterdir()), allowed / "more")
    with serve(bundle, adapter_folders=(allowed,), deadline_s=5.0) as running:
        yield running


@pytest.fixture(scope="module")
def operations(server: Running) -> dict[str, Any]:
    found = schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations()
    return {operation.path: operation for operation in (result.ok() for result in found)}


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_every_answer_is_one_the_document_names(
    path: str, mode: Any, operations: dict[str, Any]
) -> None:
    """Requests that fit may still be refused (a prompt too long, a token that is none), but never
    by a 5xx.
    """
    limits = hypothesis.settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @limits
    @hypothesis.given(case=operations[path].as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        case.call_and_validate(timeout=120, excluded_checks=[positive_data_acceptance])

    call()
