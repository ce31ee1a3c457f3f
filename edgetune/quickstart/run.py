"""The whole road once: train → measure → export with proof → call → check → table and report."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from edgetune.core.errors import OutputError
from edgetune.core.files import output_errors, write_json, write_text
from edgetune.core.layout import JOURNAL, REPORT
from edgetune.core.memory import peak_rss_mb
from edgetune.core.progress import Progress
from edgetune.data.rows import read_rows, spread
from edgetune.devices import load_device
from edgetune.evaluation.evaluate import measure
from edgetune.evaluation.measures import Evaluation
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.export.bundle import export_bundle
from edgetune.export.proof.task_metric import TaskPlan
from edgetune.export.proof.verdict import ProofVerdict
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.quickstart.fewshot import FewShotBase
from edgetune.quickstart.outcome import (
    AdapterOutcome,
    Outcome,
    ShipmentOutcome,
    Step,
    TimedCall,
    counted,
    percent,
)
from edgetune.quickstart.page import render_quickstart
from edgetune.quickstart.plan import QuickstartPlan, QuickstartTask, Shipment
from edgetune.report.run_page import write_report
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.check.latency import Workload, measure_latency
from edgetune.runtime.check.projection import project
from edgetune.runtime.check.verdict import judge, overall
from edgetune.training import RunSummary, run_recipe

RUNS, BUNDLES, RESULTS = "runs", "bundles", "results.json"
ENCODER_TOKENS = 32  # of a request in the latency check, as the profiles' budgets say
PROBE = "frozen encoder + logistic regression"
ALL_ROWS = 10_000  # more than a test file has


class Scores(NamedTuple):
    """One adapter on its held-out rows, in torch."""

    metric: str
    rows: int
    base_how: str
    base: float
    torch: float
    answers: Evaluation


class Road:
    """Says and times the steps."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.steps = stream, list[Step]()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step; its seconds are kept when it is done."""
        self.say(f"\n── {name}")
        started = time.perf_counter()
        yield
        self.steps.append(Step(name, time.perf_counter() - started))

    def say(self, line: str) -> None:
        """A line for people."""
        self.stream.write(line + "\n")
        self.stream.flush()


def run_quickstart(plan: QuickstartPlan, out: Path, *, stream: TextIO | None = None) -> Outcome:
    """Go the whole road and write runs, bundles, results.json and report.html into `out`.

    ProofError when a bundle does not answer as what was trained; budgets that are exceeded are in
    `Outcome.failures`.
    """
    road = Road(sys.stderr if stream is None else stream)
    _open_folder(out)
    preparation = _prepare(plan, road)
    scores: dict[str, Scores] = {}
    for task in plan.tasks:
        with road.step(f"train {task.name}: {task.title}"):
            summary = run_recipe(
                task.recipe,
                out=out / RUNS / task.name,
                progress=Progress(road.stream),
                write_more=write_report,
            )
        with road.step(f"measure {task.name} in torch"):
            scores[task.name] = _measure_in_torch(task, out / RUNS / task.name, summary)
            road.say(
                f"{scores[task.name].base_how} {percent(scores[task.name].base)}, adapted"
                f" {percent(scores[task.name].torch)}"
            )
    shipments = tuple(_ship(shipment, plan, out, scores, road) for shipment in plan.shipments)
    versions = summary.versions
    outcome = Outcome(
        shipments, tuple(road.steps), preparation, peak_rss_mb(), torch.get_num_threads(), versions
    )
    write_json(
        out / RESULTS,
        {"schema": 1, "seconds": outcome.seconds, "failures": outcome.failures, **asdict(outcome)},
    )
    write_text(out / REPORT, render_quickstart(outcome))
    return outcome


def _open_folder(out: Path) -> None:
    """A new or empty folder, or an older quickstart's; never one with other files in it."""
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if foreign := sorted(
        path.name for path in out.iterdir() if path.name not in {RUNS, BUNDLES, REPORT, RESULTS}
    ):
        raise OutputError(
            "the output folder holds other files",
            where=str(out),
            expected="a new folder, or an older quickstart's",
            got=", ".join(foreign[:5]),
            fix="Choose another --out.",
        )


def _prepare(plan: QuickstartPlan, road: Road) -> float:
    """Have every base in the cache; seconds."""
    started = time.perf_counter()
    for name in plan.bases:
        base = resolve_base(name)
        road.say(f"base {base.name} ({base.model_type}, {base.kind})")
    return time.perf_counter() - started


def _measure_in_torch(task: QuickstartTask, run: Path, summary: RunSummary) -> Scores:
    """The base's score and the adapted model's, on the held-out rows."""
    adapted = TorchAnswers.open(run)
    found = measure(adapted, run, task.test)
    metric = next(
        name for name in ("accuracy", "json_exact_match", "exact_match") if name in found.metrics
    )
    if (
        metric == "accuracy"
    ):  # the trainer measured the frozen encoder with the head as it was before training
        base = (summary.base_metrics or {}).get("accuracy", 0.0)
        return Scores(metric, found.rows, PROBE, base, found.metrics[metric], found)
    shots = spread(read_rows(task.recipe.stage[0].data.train).rows, task.shots)
    alone = measure(FewShotBase(adapted, shots), run, task.test)
    return Scores(
        metric,
        found.rows,
        f"no adapter, {counted(len(shots), 'example')} in the prompt",
        alone.metrics[metric],
        found.metrics[metric],
        found,
    )


def _ship(
    shipment: Shipment, plan: QuickstartPlan, out: Path, scores: Mapping[str, Scores], road: Road
) -> ShipmentOutcome:
    """Export, prove, measure, call and check one bundle."""
    folder, names = out / BUNDLES / shipment.name, tuple(task.name for task in shipment.tasks)
    with road.step(
        f"export {shipment.name} ({shipment.precision}) with {', '.join(names)}, and prove it"
    ):
        manifest = export_bundle(
            [(name, out / RUNS / name) for name in names],
            folder,
            precision=Precision(shipment.precision, overrides=shipment.overrides),
            say=road.say,
            task=TaskPlan(
                rows=ALL_ROWS,
                data={task.name: task.test for task in shipment.tasks},
                known={name: scores[name].answers for name in names},
            ),
        )
        for name, verdict in manifest.proof["verdict"].items():
            road.say(f"verdict {name}: {ProofVerdict(**verdict).line()}")
    with road.step(f"call {shipment.name}"), Runtime.open(folder) as runtime:
        calls = {task.name: _call(task, runtime, road) for task in shipment.tasks}
    with road.step(f"check {shipment.name} on {plan.device}"):
        checked = _check(plan, folder, manifest, road)
    adapters = tuple(
        _adapter_outcome(task, out, manifest, scores[task.name], calls[task.name])
        for task in shipment.tasks
    )
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    return ShipmentOutcome(
        shipment.name,
        str(folder),
        shipment.precision,
        size,
        adapters,
        device=plan.device,
        **checked,
    )


def _call(task: QuickstartTask, runtime: Runtime, road: Road) -> list[TimedCall]:
    """The adapter's answers to new requests; beside a decoder's, in the same batch, those of the
    base.
    """
    requests = list(task.calls)
    if runtime.labels(task.name) is not None:
        found = runtime.classify(requests, task.name)
        calls = [
            TimedCall(r, c.likeliest, c.score, None) for r, c in zip(requests, found, strict=True)
        ]
    else:
        adapters = [task.name] * len(requests) + [None] * len(requests)
        limit = (runtime.adapter(task.name).generation or {}).get("max_new_tokens", 32)
        texts = [
            c.text.strip()
            for c in runtime.generate(requests * 2, adapters=adapters, max_new_tokens=limit)
        ]
        pairs = zip(requests, texts[: len(requests)], texts[len(requests) :], strict=True)
        calls = [
            TimedCall(request, with_adapter, None, without)
            for request, with_adapter, without in pairs
        ]
    for call in calls:
        road.say(
            f'  {task.name}: "{call.request}" → {call.answer}'
            + (f" ({call.score:.0%})" if call.score else "")
        )
    return calls


def _check(plan: QuickstartPlan, folder: Path, manifest: Manifest, road: Road) -> dict[str, Any]:
    """What `edgetune check` measures, against the device's budget."""
    device = load_device(plan.device)
    kind = "decoder" if manifest.is_decoder else "encoder"
    tokens = plan.prompt_tokens if manifest.is_decoder else ENCODER_TOKENS
    threads = min(device.threads, load_device("host").threads)
    names = tuple(entry.name for entry in manifest.adapters)
    workload = Workload(str(folder), names, threads, plan.requests, tokens, plan.new_tokens)
    measured = measure_latency(workload)
    projection = None if device.is_host else project(workload, measured)
    limits = device.budget.get(kind, {})
    verdicts = judge(measured, limits, device=device, projection=projection)
    for verdict in verdicts:
        who = f" ({verdict.adapter})" if verdict.adapter else ""
        road.say(f"  {verdict.key}{who}: {verdict.value:.4g} of {verdict.limit:g}, {verdict.state}")
    return {
        "state": overall(verdicts),
        "verdicts": [v.to_dict() for v in verdicts],
        "measured": measured,
    }


def _adapter_outcome(
    task: QuickstartTask,
    out: Path,
    manifest: Manifest,
    scores: Scores,
    calls: Sequence[TimedCall],
) -> AdapterOutcome:
    journal = (out / RUNS / task.name / JOURNAL).read_text(encoding="utf-8").splitlines()
    entry = f"adapters/{task.name}/adapter_model.safetensors"
    return AdapterOutcome(
        name=task.name,
        title=task.title,
        base=task.recipe.base,
        metric=scores.metric,
        rows=scores.rows,
        base_how=scores.base_how,
        base_score=scores.base,
        torch_score=scores.torch,
        bundle_score=manifest.proof["task"][task.name]["bundle"][scores.metric],
        adapter_mb=manifest.files[entry].bytes / 1e6,
        proof=manifest.proof["adapters"][task.name],
        verdict=manifest.proof["verdict"][task.name],
        records=[json.loads(line) for line in journal],
        calls=calls,
    )
