"""The pipelines in `examples/pipelines` give the answers of the bundle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from head_helpers import bundle as classifier

from edgetune.bulk import Answerer

ROOT = Path(__file__).parents[2]
TEXTS = [f"lights {word}" for word in ("on", "off", "up", "down", "on please")]


@pytest.mark.parametrize(
    ("name", "package"),
    [("ray_data", "ray.data"), ("dask_frames", "dask.dataframe"), ("spark_udf", "pyspark")],
)
def test_a_pipeline_of_ones_own_gives_the_same_answers(
    name: str, package: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package, reason=f"needs {package.split('.')[0]}")
    if package == "pyspark" and shutil.which("java") is None:
        pytest.skip("Spark needs java")
    bundle, source, out = classifier(tiny_encoder), tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "pipelines" / f"{name}.py",
            bundle,
            source,
            out,
            "intent",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        json.loads(line)
        for path in sorted(out.iterdir())
        if path.suffix == ".json" or path.name.endswith(".part")
        for line in path.read_text().splitlines()
    ]
    found: list[Any] = [row.get("answer", row) for row in rows]
    wanted = Answerer(bundle, adapter="intent").rows([{"text": text} for text in TEXTS])
    assert [row["text"] for row in rows] == TEXTS, rows
    assert [row["label"] for row in found] == [row["label"] for row in wanted]
    assert [row["score"] for row in found] == pytest.approx(
        [row["score"] for row in wanted], abs=1e-5
    )
