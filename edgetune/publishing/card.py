"""The model card of the hub: task, data, metrics, proof, forgetting and licence, as recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from edgetune.publishing.package import Package

PIPELINES = {
    "text-generation": "text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "embedding": "feature-extraction",
}
"""edgetune's tasks that the hub has a name for."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(packed: Package, name: str, *, licence: str | None) -> str:
    """README.md for the hub: metadata for its search, then what people ask first. What was not
    measured is said to be so. `licence`: SPDX identifier of the base's, None where nobody said.
    """
    known, base = packed.metadata, packed.metadata.get("base") or {}
    return "\n".join(
        [
            *_front(packed, base, licence),
            f"# {name}",
            "",
            _first_sentence(packed, base),
            "",
            *_use(packed, name),
            "## Licence",
            "",
            f"The base, {_code(base.get('name', 'unknown'))}, is under {licence}."
            if licence
            else "Not said by the publisher; look at the base's own.",
            "",
            "## Data",
            "",
            *(_data(packed.summary) or ["Not recorded here."]),
            "",
            "## Metrics",
            "",
            *(_metrics(packed) or ["Not measured."]),
            "",
            "## Proof",
            "",
            *(_proof(known) or ["An adapter alone has none: it is proven when it is exported."]),
            "",
            "## Forgetting",
            "",
            *(_forgetting(packed.summary) or ["Not measured."]),
            "",
        ]
    )


def _front(packed: Package, base: Mapping[str, Any], licence: str | None) -> Iterator[str]:
    """YAML, of which JSON is a part, so that no value can leave its place."""
    name = str(base.get("name", ""))
    is_bundle = packed.artifact.kind == "bundle"
    facts: dict[str, Any] = {
        "license": (licence or "other").lower(),
        "library_name": "edgetune",
        "base_model": name if HUB_ID.fullmatch(name) else None,
        "pipeline_tag": PIPELINES.get(str(packed.metadata.get("task"))),
        "tags": ["edgetune", "onnx" if is_bundle else "lora"],
    }
    yield "---"
    yield from (f"{key}: {json.dumps(value)}" for key, value in facts.items() if value is not None)
    yield "---"
    yield ""


def _first_sentence(packed: Package, base: Mapping[str, Any]) -> str:
    task, name = _code(packed.metadata.get("task", "unknown task")), _code(base.get("name", "?"))
    if packed.artifact.kind == "adapter":
        return f"A LoRA adapter for {task} on {name}, `{packed.artifact.base or 'digest unknown'}`."
    adapters = [_code(entry["name"]) for entry in packed.metadata.get("adapters", ())]
    weights = packed.metadata["precision"]["weights"]
    more = f" with the adapters {', '.join(adapters)}" if adapters else ""
    return f"A bundle of edgetune: {name} in {weights}, {task},{more or ' without adapters'}."


def _use(packed: Package, name: str) -> list[str]:
    folder = name.rpartition("/")[2]
    if packed.artifact.kind == "bundle":
        then = f"edgetune verify {folder}"
    else:
        then = f"edgetune serve BUNDLE --adapter {folder}={folder}"
    return [f"    edgetune pull hf://{name} {folder}", f"    {then}", ""]


def _data(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for stage in summary.get("data") or ():
        for part, digest in (stage.get("digests") or {}).items():
            rows = (stage.get("rows") or {}).get(part)
            lines.append(f"- {_code(part)}: {rows} rows, `{digest}`")
    return lines


def _metrics(packed: Package) -> list[str]:
    """Of a run on its validation rows, of a bundle's adapters in the real engine."""
    if packed.artifact.kind == "bundle":
        measured = (packed.metadata.get("proof") or {}).get("task") or {}
        rows = [
            f"| {_code(name)} | {_code(one['metric'])} | {_number(one['torch'][one['metric']])} |"
            f" {_number(one['bundle'][one['metric']])} | {one['rows']} |"
            for name, one in measured.items()
            if one.get("metric") in (one.get("torch") or {})
        ]
        head = ["| adapter | metric | in torch | in this bundle | rows |", "|---|---|---|---|---|"]
        return [*head, *rows] if rows else []
    after = packed.summary.get("metrics") or packed.metadata.get("metrics") or {}
    before = packed.summary.get("base_metrics") or {}
    rows = [
        f"| {_code(key)} | {_number(before.get(key))} | {_number(value)} |"
        for key, value in after.items()
        if isinstance(value, (int, float))
    ]
    return ["| metric | base | adapter |", "|---|---|---|", *rows] if rows else []


def _proof(known: Mapping[str, Any]) -> list[str]:
    found = (known.get("proof") or {}).get("adapters") or {}
    rows = [
        f"| {_code(name)} | {'passed' if one.get('passed') else 'not passed'} |"
        f" {_number(one.get('mean_kl'))} | {_number(one.get('top1'))} |"
        for name, one in found.items()
    ]
    head = [
        "The real engine against torch as trained, at export:",
        "",
        "| adapter | proof | mean KL, nats | same first choice |",
        "|---|---|---|---|",
    ]
    return [*head, *rows] if rows else []


def _forgetting(summary: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {_code(one.get('task'))} | {_code(one.get('metric'))} | {_number(one.get('before'))} |"
        f" {_number(one.get('after'))} | {_number(one.get('low'))} to {_number(one.get('high'))} |"
        for one in summary.get("forgetting") or ()
    ]
    head = ["| general task | metric | before | after | change, 95 % |", "|---|---|---|---|---|"]
    return [*head, *rows] if rows else []


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"


def _code(value: Any) -> str:
    """A name from elsewhere as code, which no markup of its own can leave."""
    text = "".join(letter for letter in str(value) if letter.isprintable())[:200]
    return "`" + text.replace("`", "'").replace("|", "/") + "`"
