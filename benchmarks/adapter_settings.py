"""Which adapter for how many bytes: one recipe, trained with an adapter of every setting; a table,
then one JSON line.

    python benchmarks/adapter_settings.py RECIPE [--set KEY=VALUE]… [--seeds 0,1] [--only PART]
                                          [--out FOLDER]

The recipe's own [parameters] are empty.

LoRA of rank 1 to 32 on all linear layers, with an alpha of 16 and of twice the rank; with 16, rank
8 on the attention's or the MLP's alone, rsLoRA and DoRA; and all weights. Rates and epochs are the
same for all adapters, all weights learn at a tenth of the rate. The metric is the last stage's on
the recipe's validation rows, at its end, or what `edgetune eval` says of them. `[forgetting]` of
the recipe is measured with it. Runs that are there are taken as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from edgetune.core.layout import ADAPTER, ADAPTER_WEIGHTS, MODEL, MODEL_WEIGHTS
from edgetune.core.progress import Progress
from edgetune.evaluation.evaluate import evaluate
from edgetune.recipe.read import load_recipe
from edgetune.recipe.runs import PlannedRun
from edgetune.report.run_page import write_report
from edgetune.training.many import TrainedRun, train_here

ATTENTION = '".*(attention|self_attn).*"'
MLP = '".*(intermediate|layer\\\\.\\\\d+\\\\.output\\\\.|mlp).*"'
SETTINGS: dict[str, dict[str, str]] = {
    **{f"LoRA, r = {rank}": {"rank": str(rank)} for rank in (1, 2, 4, 8, 16, 32)},
    "LoRA, r = 8, attention": {"rank": "8", "target_modules": ATTENTION},
    "LoRA, r = 8, MLP": {"rank": "8", "target_modules": MLP},
    "rsLoRA, r = 8": {"rank": "8", "rslora": "true"},
    "rsLoRA, r = 32": {"rank": "32", "rslora": "true"},
    "DoRA, r = 8": {"rank": "8", "dora": "true"},
    "all weights": {"train": '"full"'},
    **{
        f"LoRA, r = {rank}, alpha = 2 r": {"rank": str(rank), "alpha": str(2 * rank)}
        for rank in (1, 2, 4, 16, 32)
    },
}


def variants(
    path: Path, out: Path, seeds: list[str], overrides: list[str], only: str
) -> list[PlannedRun]:
    """The recipe with every setting whose name holds `only`, and every seed."""
    plain = load_recipe(path, overrides)
    made = []
    for seed in seeds:
        for number, (setting, chosen) in enumerate(SETTINGS.items()):
            if only not in setting:
                continue
            settings = {f"parameters.{key}": value for key, value in chosen.items()}
            if chosen.get("train") == '"full"':
                rates = {"learning_rate": plain.stage[-1].learning_rate}
                for key, rate in rates.items():
                    settings[f"stage.{len(plain.stage) - 1}.{key}"] = str(float(rate) / 10)
            else:
                settings.setdefault("parameters.alpha", "16")
            settings["seed"] = seed
            recipe = load_recipe(path, [*overrides, *(f"{k}={v}" for k, v in settings.items())])
            name = f"{number:02}-{seed}"
            made.append(PlannedRun(name, recipe, out / name, settings))
    return made


def facts(outcome: TrainedRun, metric: str) -> dict[str, Any]:
    """What the table says of a run."""
    summary = outcome.summary
    if summary is None:
        return {"error": str(outcome.error)}
    weights = outcome.run.out / ADAPTER / ADAPTER_WEIGHTS
    if outcome.run.settings.get("parameters.train") == '"full"':
        weights = outcome.run.out / MODEL / MODEL_WEIGHTS
    return {
        "seed": int(outcome.run.settings["seed"]),
        "metric": _measured(outcome, summary.metrics, metric),
        "loss": float(summary.metrics["loss"]),
        "parameters": summary.trainable_parameters,
        "mb": weights.stat().st_size / 1e6 if weights.is_file() else None,
        "forgetting": summary.forgetting,
    }


def _measured(outcome: TrainedRun, found: Mapping[str, Any], metric: str) -> float:
    """The metric of the run's validation, else what `edgetune eval` says of its rows: text that is
    generated, for one.
    """
    if metric not in found:
        rows = outcome.run.recipe.stage[-1].data.validation
        if rows is None:
            raise SystemExit(f"{metric}: no validation, and the recipe names no file to measure on")
        found = evaluate(outcome.run.out, Path(rows)).metrics
    return float(found[metric])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--metric", default="exact_match")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--out", type=Path, default=Path("runs/adapter-settings"))
    options = parser.parse_args()
    made = variants(
        options.recipe, options.out, options.seeds.split(","), options.set, options.only
    )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for outcome in train_here(made, progress=Progress(), write_more=write_report):
        name = list(SETTINGS)[int(outcome.run.name.split("-")[0])]
        found[name].append(facts(outcome, options.metric))
        print(name, json.dumps(found[name][-1]), flush=True)
    for name, runs in found.items():
        done = [one for one in runs if "error" not in one]
        cells = [f"{one['metric']:.4f}" for one in done]
        mean = f"{fmean(one['metric'] for one in done):.4f}" if done else "failed"
        loss = f"loss {fmean(one['loss'] for one in done):.4f}" if done else ""
        size = f"{done[0]['mb']:.2f} MB" if done and done[0]["mb"] is not None else "a base"
        print(f"{name:24} {mean} ({', '.join(cells)})  {loss}  {size}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
