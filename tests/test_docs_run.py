"""Every command that README, docs and the examples' headers show is run, once, on tiny models, or
stands in `NOT_RUN` with its reason.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_helpers import ROOT, World
from process_helpers import free_port
from test_docs import FENCE, PAGES

NOT_RUN = {
    r"\[OPTIONS\]|[ =/](BUNDLE\w*|NAME|RUN|FAMILY|FILE|DATA|PYTHON|URL)\b|\[--|…": (
        "a form whose words are the reader's own"
    ),
    r"^python benchmarks/|^make (quickstart|test|bench|peers)": "minutes on real models",
    r"^edgetune models ": "fetches a base",
    r"device=cuda|--multi_gpu": "needs GPUs",
    r"^torchrun": "several processes: tests/training/test_distributed.py starts them",
    r"--resume": "needs a run that was killed: tests/training/test_resume.py has them",
    r"--migrate": "needs a recipe of version 0.1: tests/recipe has them",
    r"--search 10m": "takes the ten minutes that it says: tests/training has short ones",
    r"^(pip|python3|npm|cibuildwheel|CXX=\S+|sudo|docker|journalctl) ?": "installs or needs root",
    r"^(node|c\+\+|\./|llama-cli|python genai.py|cd |engine=|export )": (
        "tools of their own: tests/examples/test_clients.py runs them where they are"
    ),
    r"^(eval|_EDGETUNE_COMPLETE)": "a shell's completion: tests/cli/test_completion.py",
    r"^edgetune bench": "compares files of make bench: tests/cli/test_bench.py",
    r"^edgetune (init|data|label|compress|decompress) |(few|more|shop/\w+)\.toml|\btickets\b": (
        "written or read by a command that looks at its base or its rows: each has tests of its own"
    ),
    r"^curl|^edgetune top": "asks a server: below",
    r"^edgetune (push|pull) ": "needs a registry or the hub: tests/runtime/sources",
    r"\.pem\b|--follow|@v1|edgetune_proof": "needs keys or versions: tests/runtime/rollout",
}
SLOW = {"train", "export", "check", "sweep", "serve", "--parity", "--latency", "--forgetting"}
ANY_VERDICT = {"check": {0, 1, 3}, "diff": {0, 1}}  # it depends on the machine and on the bundles
COMMAND = re.compile(
    r"^(edgetune|python3?|make|torchrun|accelerate|pip|mkdir|cp|sed|cat|curl|sudo|docker|npm|node"
    r"|cibuildwheel|llama-cli|eval|for|CXX=\S+|journalctl|_EDGETUNE_COMPLETE=\S+) "
)


def shown(path: Path) -> Iterator[str]:
    """The command lines of a page's indented blocks, or of an example's header."""
    text = FENCE.sub("", path.read_text())
    mark = " {4}" if path.suffix == ".md" else "# +"
    lines = "\n".join(re.findall(f"^{mark}(.*)$", text, re.MULTILINE)).replace("\\\n", " ")
    lines = re.sub(r"^for .*; do$(?:\n.*)*?\n *done", joined, lines, flags=re.MULTILINE)
    for line in lines.splitlines():
        if COMMAND.match(line):
            yield " ".join(re.sub(r"\s+#.*$", "", line).split())


def joined(loop: re.Match[str]) -> str:
    first, *between, last = loop[0].splitlines()
    return f"{first} {'; '.join(between)}; {last}"


def reason(line: str) -> str | None:
    return next((why for form, why in NOT_RUN.items() if re.search(form, line)), None)


HEADERS = sorted((ROOT / "examples").glob("*.toml"))
LINES = list(dict.fromkeys(line for path in [*PAGES, *HEADERS] for line in shown(path)))
EXAMPLES = {line for path in HEADERS for line in shown(path)}
RUN = [line for line in LINES if reason(line) is None]
SERVE = [line for line in RUN if line.startswith("edgetune serve")]


def marked(line: str) -> object:
    words = line.split()
    slow = (words[0] == "edgetune" and SLOW & {*words}) or line in EXAMPLES
    slow = slow or re.search(r"(runs|bundles)/(home|a|old)\b|builtin:", line)  # a decoder's export
    return pytest.param(line, marks=[pytest.mark.slow] if slow else [], id=line)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Path, tiny_encoder: Path
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("shown")
    bases = {"decoder": tiny_decoder, "encoder": tiny_encoder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_DATASETS", str(folder / "datasets"))
        yield World(folder, bases, edgetune(folder))


class edgetune:  # noqa: N801
    """`edgetune …` in this process and in a folder: its exit code; `expected` ones pass."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, *words: object, expected: frozenset[int] = frozenset({0})) -> None:
        from edgetune.cli import main

        before = Path.cwd()
        os.chdir(self._folder)
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            assert (stop.code or 0) in expected
        finally:
            os.chdir(before)


@pytest.mark.parametrize("line", [marked(x) for x in RUN if x not in SERVE])
def test_a_command_that_is_shown_runs(line: str, world: World) -> None:
    words = shlex.split(os.path.expandvars(world.here(line).replace("$PWD", str(world.folder))))
    if words[0] == "edgetune" and not {">", "chat"} & {*words}:  # else a shell writes or asks
        out = words[words.index("--out") + 1] if "--out" in words else None
        world.need([word for word in words[1:] if word != out])
        if words[1] == "train":
            out = out or re.search(r'^out = "(.*)"', (world.folder / words[2]).read_text(), re.M)[1]
            words.append("--replace")
        elif words[1] == "export":
            words += ["--replace", "--allow-metric-loss"] if "gguf-adapter" not in words else []
        edgetune(world.folder)(*words[1:], expected=frozenset(ANY_VERDICT.get(words[1], {0})))
        assert out is None or (world.folder / out).exists()
        return
    world.need([word for word in words if word.startswith("bundles/")])
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = world.here(line).replace("mkdir ", "mkdir -p ")
    done = subprocess.run(
        ["bash", "-ec", f'edgetune() {{ {sys.executable} -m edgetune "$@"; }}\n{shell}'],
        cwd=world.folder,
        env={**os.environ, "PATH": beside, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", SERVE)
def test_a_server_that_is_shown_answers_and_is_watched(line: str, world: World) -> None:
    port = free_port()
    words = shlex.split(world.here(line))
    world.need(words)
    if not (world.folder / "srv/adapters/support").exists():
        world.need(["runs/support"])
    process = subprocess.Popen(
        [sys.executable, "-m", *words, "--port", str(port)],
        cwd=world.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                assert urllib.request.urlopen(f"{url}/ready").status == 200
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.2)
        if "--api-key-file" not in words:
            edgetune(world.folder)("top", url, "--once")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_reason_not_to_run_a_command_has_a_command() -> None:
    unused = [form for form in NOT_RUN if not any(re.search(form, line) for line in LINES)]
    assert unused == []


def test_what_is_not_run_is_less_than_half_of_edgetunes_own_commands() -> None:
    own = [x for x in LINES if x.startswith("edgetune ") and "[OPTIONS]" not in x]
    assert shutil.which("bash") is not None
    assert sum(reason(line) is None for line in own) > len(own) / 2
