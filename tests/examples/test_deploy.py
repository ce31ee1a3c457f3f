"""The container file, the systemd unit and the CI workflow: linted, and true of this repository."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import parse

from edgetune.cli.serve import command as serve

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "examples" / "deploy" / "Containerfile"
UNIT = ROOT / "examples" / "deploy" / "edgetune.service"


def test_the_container_file_is_clean() -> None:
    beside_python = str(Path(sys.executable).parent)
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=beside_python)
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(CONTAINER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_container_file_copies_all_that_a_build_of_the_package_reads() -> None:
    copied = {
        word
        for line in re.findall(r"^COPY (.*)$", CONTAINER.read_text(), re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert [name for name in copied if not (ROOT / name).exists()] == []
    links = {path.resolve().name for path in (ROOT / "edgetune").iterdir() if path.is_symlink()}
    assert copied >= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "edgetune", *links}


def test_the_container_serves_by_options_that_there_are() -> None:
    lists = re.findall(r"^(ENTRYPOINT|CMD) \[(.*)\]$", CONTAINER.read_text(), re.MULTILINE)
    words = [word for _, line in lists for word in re.findall(r'"([^"]*)"', line)]
    assert words[:2] == ["edgetune", "serve"]
    serve.make_context("serve", words[2:])


@pytest.mark.parametrize(
    "name", ["edgetune.service", "edgetune-update.service", "edgetune-update.timer"]
)
def test_the_units_are_ones_that_systemd_accepts(tmp_path: Path, name: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here")
    for unit in UNIT.parent.glob("edgetune*.*"):
        text = unit.read_text().replace("/usr/local/bin/edgetune-update", "/bin/true")
        text = text.replace("/opt/edgetune/bin/edgetune", sys.executable)
        (tmp_path / unit.name).write_text(text)
    unit = tmp_path / name
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_the_unit_waits_for_answers_longer_than_the_server_drains() -> None:
    unit = UNIT.read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    words = shlex.split(start)
    assert words[1] == "serve"
    drain = serve.make_context("serve", words[2:]).params["drain"]
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert float(stop) > drain


def test_the_workflow_gates_by_commands_that_there_are() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / "examples" / "ci" / "edgetune.yml").read_text())
    steps = workflow["jobs"]["bundle"]["steps"]
    script = "\n".join(step["run"] for step in steps if "run" in step)
    found = re.findall(r"^ *(edgetune [^\"|&>\n]*)", script, re.MULTILINE)
    assert [line.split()[1] for line in found] == ["train", "export", "eval", "check"]
    for line in found:
        parse(shlex.split(line)[1:], whole=True)
    assert "--against baseline.json" in script and "exit $code" in script
