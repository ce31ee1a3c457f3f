"""What a new version must pass before a request meets it: its identity, its own proof, the budget
of this device.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.errors import AdapterError
from edgetune.core.files import parse_json
from edgetune.devices.budget import Budget
from edgetune.devices.loader import Device
from edgetune.runtime.check.latency import Workload, time_request
from edgetune.runtime.check.verdict import OVER, judge
from edgetune.runtime.signature.folder import check_signature, demand_signed, digests_of
from edgetune.runtime.signature.keys import PublicKey
from edgetune.runtime.tasks.prediction_file import answer_rows, requests_of
from edgetune.runtime.tasks.runtime import Runtime

PROOF_ROWS = "edgetune_proof.jsonl"
"""In an adapter's folder: rows that `edgetune predict` answered where it was made."""
MAX_PROOF_BYTES, MAX_PROOF_ROWS = 1 << 20, 500
ANSWERS = ("completion", "label", "labels", "tags", "value", "score")
TOLERANCE = 0.02
"""By which numbers may differ between two machines, relative, or absolute below 1."""
REQUESTS = 8
"""of each adapter, where the budget is checked"""


@dataclass(frozen=True)
class Identity:
    """What an adapter's files are: one digest of them all and of their number, and the number where
    a key has signed it.
    """

    id: str
    number: int | None
    files: Mapping[str, str]
    """path → sha256 (hex)"""


def identify(folder: Path, key: PublicKey | None) -> Identity:
    """Read every file of an adapter's folder. SignatureError where `key` has not signed them as
    they are.
    """
    signed = None if key is None else check_signature(folder, key)
    files = digests_of(folder) if signed is None else signed.files
    number = None if signed is None else signed.version
    listed = json.dumps([sorted(files.items()), number]).encode()
    return Identity(hashlib.sha256(listed).hexdigest(), number, files)


def check_proof(
    runtime: Runtime, name: str, folder: Path, least: float, *, signed: Mapping[str, str]
) -> int:
    """Answer the rows of the adapter's own proof, where it brings one: how many. AdapterError where
    fewer than `least` (a share) are as they were where it was made. `signed`: of its files.
    """
    path = folder / PROOF_ROWS
    if PROOF_ROWS not in signed:
        return 0
    rows = _rows(path, signed)
    asked = [
        (line, {key: value for key, value in row.items() if key not in (*ANSWERS, "adapter")})
        for line, row in rows
    ]
    requests = requests_of(runtime, asked, path=str(path), adapter=name)
    answers = dict(answer_rows(runtime, requests))
    alike = sum(is_alike(row, answers[at]) for at, (_, row) in enumerate(rows))
    if alike < least * len(rows):
        raise AdapterError(
            "it does not answer here as it did where it was made",
            where=str(path),
            expected=f"{math.ceil(least * len(rows))} of {len(rows)} rows alike",
            got=str(alike),
        )
    return len(rows)


def is_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two answered rows say the same; a score beside a label need not."""
    keys = [key for key in ANSWERS if key in a and (key != "score" or "label" not in a)]
    return bool(keys) and all(_same(a[key], b.get(key)) for key in keys)


def check_times(runtime: Runtime, name: str, budget: Budget, device: Device) -> None:
    """Time some requests with the adapter in this process's engine; AdapterError where a time is
    certainly over the budget. Limits of memory and of opening a bundle are `edgetune check`'s.
    """
    if not budget:
        return
    decoder = runtime.manifest.is_decoder
    workload = Workload(
        str(runtime.folder), (name,), prompt_tokens=256 if decoder else 32, new_tokens=16
    )
    time_request(runtime, name, workload, seed=0)  # the first one warms up
    runs = [time_request(runtime, name, workload, seed=at) for at in range(REQUESTS)]
    samples = {"adapter": name, **{key: [run[key] for run in runs] for key in runs[0]}}
    measured = {"samples": {"runs": [samples], "swap_ms": []}, "adapter_load_ms": {}}
    over = [v for v in judge(measured, budget, device=device) if v.state == OVER]
    if over:
        raise AdapterError(
            f"it is over this device's budget: {over[0].key}",
            expected=f"{over[0].limit:g}",
            got=f"{over[0].value:.4g}",
        )


def _rows(path: Path, signed: Mapping[str, str]) -> list[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        raw = file.read(MAX_PROOF_BYTES + 1)
    if len(raw) <= MAX_PROOF_BYTES:
        read = {PROOF_ROWS: hashlib.sha256(raw).hexdigest()}
        demand_signed(read, signed, read, where=path.parent)
    lines = [line for line in enumerate(raw.split(b"\n"), 1) if line[1].strip()]
    if len(raw) > MAX_PROOF_BYTES or not 0 < len(lines) <= MAX_PROOF_ROWS:
        raise AdapterError(
            "not a proof that is checked here",
            where=str(path),
            expected=f"1 to {MAX_PROOF_ROWS} rows, at most {MAX_PROOF_BYTES} bytes",
        )
    rows = []
    for at, line in lines:
        try:
            row = parse_json(line)
        except ValueError as error:
            raise AdapterError(f"not valid JSON: {error}", where=f"{path}, line {at}") from error
        if not isinstance(row, dict) or not any(key in row for key in ANSWERS):
            raise AdapterError(
                "a row without an answer",
                where=f"{path}, line {at}",
                fix="Write it with `edgetune predict --input … --output …`.",
            )
        rows.append((at, row))
    return rows


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= TOLERANCE * max(1.0, abs(a))
    return bool(a == b)
