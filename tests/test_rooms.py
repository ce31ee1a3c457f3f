"""The rooms of the house: who may import whom, and that the device needs neither torch nor its friends."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle, encoder_bundle

ROOT = Path(__file__).parent.parent
LEAVES = {"edgetune.errors", "edgetune.files", "edgetune.text_pairs", "edgetune.words"}
ROOMS = {
    "edgetune": ROOT / "edgetune",
    "export": ROOT / "export",
    "runtime": ROOT / "runtime",
    "devices": ROOT / "devices",
}
THIRD_PARTY = {
    "runtime": {"numpy", "onnxruntime", "safetensors", "tokenizers", "jinja2", "llguidance"},  # the last only where it is asked for
    "devices": {"tomli"},  # tomllib before Python 3.11
}
SERVER, SERVE_EXTRA = ROOT / "runtime" / "server", {"starlette", "uvicorn", "prometheus_client"}
MAY_CROSS = ("cli", "evaluate", "quickstart", "training/engine_rollout")  # parts of edgetune/ that may import export and runtime
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "optimum",
    "accelerate",
    "datasets",
)


def modules(room: str) -> list[Path]:
    """The room's own files; edgetune/ holds links to the other three."""
    files = ROOMS[room].rglob("*.py")
    return [path for path in files if not any(parent.is_symlink() for parent in path.parents)]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside functions; for a type checker's eyes only does not count."""
    tree = ast.parse(path.read_text())
    unseen = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and _only_types(node.test)
        for n in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" if module == "edgetune" else module for alias in node.names)


def _only_types(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def room_of(module: str) -> str | None:
    """The room an import leads to; None outside the house and for the leaves."""
    parts = module.split(".")
    if parts[0] != "edgetune" or ".".join(parts[:2]) in LEAVES or parts[1:2] == ["__version__"]:
        return None
    return parts[1] if parts[1:2] and parts[1] in ROOMS else "edgetune"


def crossings(room: str) -> set[tuple[str, str]]:
    """(file, room) of every import that leaves the room."""
    found = {(str(path.relative_to(ROOT)), room_of(name)) for path in modules(room) for name in imports(path)}
    return {(path, to) for path, to in found if to not in (None, room)}  # type: ignore[misc]


def test_devices_imports_nobody() -> None:
    assert crossings("devices") == set()


def test_runtime_imports_only_devices() -> None:
    assert {to for _, to in crossings("runtime")} <= {"devices"}


def test_export_imports_edgetune_and_runtime_but_not_the_command_line() -> None:
    assert {to for _, to in crossings("export")} <= {"edgetune", "runtime"}
    names = {name for path in modules("export") for name in imports(path)}
    assert not any(name.startswith("edgetune.cli") for name in names)


def test_edgetune_reaches_the_other_rooms_only_from_its_edges() -> None:
    strays = {path for path, _ in crossings("edgetune") if not path.removeprefix("edgetune/").startswith(MAY_CROSS)}
    assert strays == set()


def test_leaves_import_nothing_of_the_house_but_errors() -> None:
    names = {name for leaf in ("errors", "files", "text_pairs", "words") for name in imports(ROOT / "edgetune" / f"{leaf}.py")}
    assert {name for name in names if name.startswith("edgetune")} <= {"edgetune.errors"}


def outside(files: list[Path]) -> set[str]:
    """The third-party packages that some files import."""
    tops = {name.split(".")[0] for path in files for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"edgetune"}


@pytest.mark.parametrize("room", THIRD_PARTY)
def test_a_devices_rooms_use_only_what_the_plain_install_brings(room: str) -> None:
    assert outside([path for path in modules(room) if SERVER not in path.parents]) <= THIRD_PARTY[room]


def test_the_server_adds_only_what_its_extra_brings() -> None:
    assert outside([path for path in modules("runtime") if SERVER in path.parents]) <= {"numpy", *SERVE_EXTRA}
    names = {name for path in modules("runtime") if SERVER not in path.parents for name in imports(path)}
    assert not any(name.startswith("edgetune.runtime.server") for name in names)


@pytest.mark.parametrize("room", ["export", "runtime", "devices"])
def test_a_room_cannot_be_imported_under_its_bare_name(room: str) -> None:
    done = python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {room}")
    assert f"import edgetune.{room}, not {room}" in done.stderr


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def loaded_by(code: str) -> set[str]:
    """Top-level modules in memory after some code ran in a fresh interpreter."""
    done = python(f"{code}\nimport sys\nprint(' '.join({{m.split('.')[0] for m in sys.modules}}))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("code", ["import edgetune.runtime", "import edgetune.devices", "import edgetune"])
def test_importing_a_room_loads_nothing_heavy(code: str) -> None:
    assert not loaded_by(code) & {*HEAVY, "onnxruntime", "numpy", "tokenizers", "jinja2", "llguidance"}


@pytest.mark.parametrize(
    "arguments", ["'--help'", "'predict', '--help'", "'serve', '--help'", "'top', '--help'", "'check', '--help'", "'diff', '--help'", "'devices', '--help'"]
)
def test_help_loads_nothing_heavy(arguments: str) -> None:
    code = f"from edgetune.cli import cli\ncli.main([{arguments}], standalone_mode=False)"
    assert not loaded_by(code) & {*HEAVY, "onnxruntime", "numpy"}


BLOCKED = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f'{{name}} is not on this machine', name=name)
sys.meta_path.insert(0, Block())
"""
DEVICE = """
from edgetune.runtime import Runtime
from edgetune.runtime.latency import Workload, measure_here
decoder, encoder, adapter = sys.argv[1:]
with Runtime.open(decoder) as runtime:
    runtime.load_adapter('hot', adapter)
    answers = runtime.generate(['hello', 'hello', 'hello'], adapters=['a', 'hot', None], max_new_tokens=4)
    assert answers[0].text == answers[1].text != answers[2].text
    assert ''.join(runtime.stream('hello', 'b', max_new_tokens=4))
with Runtime.open(encoder) as runtime:
    assert runtime.classify(['hello'], 'mood')[0].label in ('calm', 'upset')
assert measure_here(Workload(decoder, ('a',), 2, 3, 8, 3))['load_ms'] > 0
print('done')
"""


def test_the_device_answers_without_torch_transformers_peft_and_onnx(
    tiny_decoder: Path, tiny_encoder: Path
) -> None:
    decoder, encoder = decoder_bundle(tiny_decoder), encoder_bundle(tiny_encoder)
    adapter = decoder / "adapters" / "a"
    command = [sys.executable, "-c", BLOCKED + DEVICE, str(decoder), str(encoder), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_the_blocker_blocks() -> None:
    assert "torch is not on this machine" in python(BLOCKED + "import torch").stderr
