"""The rooms of the house: who may import whom, and that the device needs neither torch nor its
friends.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_helpers import BLOCKED, HEAVY, python
from runtime_helpers import decoder_bundle, encoder_bundle

ROOT = Path(__file__).parent.parent
# The floors of the house, the ground floor first: each room and the rooms it may import, all of
# them higher in this table. A room is a folder; files right in `edgetune/` are the room "edgetune".
FLOORS = {
    "edgetune": "",
    "core": "",
    "quantisation": "core",
    "models": "core quantisation",
    "recipe": "core",
    "data": "core models recipe",
    "devices": "core",
    "adapters": "core edgetune models quantisation recipe",
    "metrics": "core",
    "objectives": "data models",
    "runtime.bundle": "core",
    "runtime.signature": "core",
    "runtime.sources": "core edgetune runtime.bundle",
    "runtime.engine": "core devices runtime.bundle",
    "runtime.engine.native": "core devices runtime.bundle runtime.engine",
    "runtime.generation": "core runtime.bundle",
    "runtime.adapters": (
        "core devices runtime.bundle runtime.engine runtime.generation runtime.signature"
    ),
    "runtime.tasks": (
        "core devices runtime.adapters runtime.bundle runtime.engine runtime.engine.native "
        "runtime.generation runtime.signature"
    ),
    "runtime.scheduler": "core runtime.adapters runtime.engine runtime.generation runtime.tasks",
    "runtime": "runtime.tasks",
    "evaluation.forgetting": "adapters core data metrics models objectives runtime",
    "evaluation": "adapters core data evaluation.forgetting metrics models recipe runtime",
    "export.inputs": ("adapters core data models quantisation recipe runtime.adapters"),
    "export.graph": "core edgetune export.inputs models quantisation runtime.bundle runtime.engine",
    "export.proof": (
        "adapters core data evaluation evaluation.forgetting export.inputs metrics models "
        "quantisation recipe runtime runtime.adapters runtime.bundle runtime.engine "
        "runtime.tasks"
    ),
    "report": "core metrics recipe",
    "runtime.check": "core devices runtime.tasks",
    "runtime.rollout": (
        "core devices runtime.adapters runtime.bundle runtime.check runtime.signature "
        "runtime.sources runtime.tasks"
    ),
    "export": (
        "adapters core edgetune export.graph export.inputs export.proof models quantisation "
        "report runtime.adapters runtime.bundle runtime.check runtime.tasks"
    ),
    "training.fast": "data models objectives",
    "training.parallel": "core data objectives",
    "training.reinforcement": (
        "adapters core data evaluation export export.graph models quantisation recipe "
        "runtime.adapters runtime.tasks training.fast"
    ),
    "training": (
        "adapters core data edgetune evaluation.forgetting metrics models objectives "
        "quantisation recipe runtime.generation training.fast training.parallel "
        "training.reinforcement"
    ),
    "inspection": "core data models recipe training",
    "compression": (
        "core export export.inputs export.proof models recipe runtime.adapters training "
        "training.parallel"
    ),
    "labelling": "core data metrics runtime",
    "bulk": "core data recipe runtime.tasks training",
    "publishing": "core models runtime.bundle runtime.sources",
    "quickstart": (
        "adapters core data devices evaluation export export.proof models quantisation recipe "
        "report runtime runtime.bundle runtime.check training"
    ),
    "runtime.server.http": (
        "core edgetune runtime.generation runtime.rollout runtime.scheduler runtime.tasks"
    ),
    "runtime.server.playground": "",
    "runtime.server.endpoints": (
        "core runtime.adapters runtime.scheduler runtime.server.http "
        "runtime.server.playground runtime.tasks"
    ),
    "runtime.server": (
        "core runtime.rollout runtime.scheduler runtime.server.endpoints runtime.server.http"
    ),
    "cli": (
        "bulk compression core data devices edgetune evaluation evaluation.forgetting export "
        "export.graph export.inputs export.proof inspection labelling metrics models publishing "
        "quantisation quickstart recipe report runtime.bundle runtime.check runtime.engine "
        "runtime.rollout runtime.scheduler runtime.server "
        "runtime.server.http runtime.signature runtime.sources runtime.tasks training "
        "training.parallel"
    ),
    "__main__": "cli",
    "devices.profiles": "",
    "quickstart.data": "",
}
THIRD_PARTY = {
    "runtime": {
        "numpy",
        "onnxruntime",
        "safetensors",
        "tokenizers",
        "jinja2",
        "llguidance",
        "cryptography",
    },  # the last two only where they are asked for
    "devices": {"tomli"},  # tomllib before Python 3.11
    "core": {"numpy", "jinja2"},
}
SERVE_EXTRA = {"starlette", "uvicorn", "prometheus_client"}


def house() -> dict[str, Path]:
    """Module name without `edgetune.` → file; the folders that edgetune/ links to are taken as
    real.
    """
    found = {}
    for folder, _, names in os.walk(ROOT / "edgetune", followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = path.relative_to(ROOT / "edgetune").with_suffix("").parts
                found[".".join(parts).removesuffix("__init__").rstrip(".") or "edgetune"] = path
    return found


HOUSE = house()
PACKAGES = {name for name, path in HOUSE.items() if path.name == "__init__.py"}


def room_of(module: str) -> str:
    """The folder that a module lies in; a folder's own file belongs to it, and `python -m edgetune`
    is a room of its own.
    """
    if module in PACKAGES or module == "__main__":
        return module
    return module.rpartition(".")[0] or "edgetune"


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top, inside functions or for a type checker's eyes; full
    names.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            yield from (
                name if name.removeprefix("edgetune.") in HOUSE else module for name in inner
            )


def arrows(name: str, path: Path) -> set[str]:
    """The other rooms that a file imports from."""
    names = [full for full in imports(path) if full.split(".")[0] == "edgetune"]
    rooms = {room_of(full.removeprefix("edgetune.")) for full in names}
    return rooms - {room_of(name)}


def test_every_folder_is_a_room_with_one_sentence() -> None:
    assert set(FLOORS) == {room_of(name) for name in HOUSE}
    assert not [
        name for name in PACKAGES if not ast.get_docstring(ast.parse(HOUSE[name].read_text()))
    ]


def test_a_room_imports_only_rooms_that_stand_before_it() -> None:
    order = list(FLOORS)
    back_up = [
        (room, to)
        for room, rooms in FLOORS.items()
        for to in rooms.split()
        if order.index(to) >= order.index(room)
    ]
    assert back_up == []


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_the_rooms_that_the_table_names_and_no_others(room: str) -> None:
    found = {
        (name, to)
        for name, path in HOUSE.items()
        if room_of(name) == room
        for to in arrows(name, path)
    }
    allowed = set(FLOORS[room].split())
    assert {(name, to) for name, to in found if to not in allowed} == set()
    assert allowed - {to for _, to in found} == set(), (
        "the table names rooms that nothing here imports"
    )


def test_no_file_imports_itself_by_a_detour() -> None:
    ahead = {
        name: {full.removeprefix("edgetune.") for full in imports(path)} & set(HOUSE)
        for name, path in HOUSE.items()
    }
    while ready := {name for name, others in ahead.items() if not others & set(ahead) - {name}}:
        ahead = {name: others for name, others in ahead.items() if name not in ready}
    assert sorted(ahead) == [], "files in or behind a circle"


def outside(files: list[Path]) -> set[str]:
    """The third-party packages that some files import."""
    tops = {name.split(".")[0] for path in files for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"edgetune"}


def files_in(*rooms: str) -> list[Path]:
    """The files of these rooms and of the rooms inside them."""
    return [path for name, path in HOUSE.items() if name.startswith(rooms)]


@pytest.mark.parametrize("room", THIRD_PARTY)
def test_a_devices_rooms_use_only_what_the_plain_install_brings(room: str) -> None:
    server = set(files_in("runtime.server"))
    assert outside([path for path in files_in(room) if path not in server]) <= THIRD_PARTY[room]


def test_the_server_adds_only_what_its_extra_brings() -> None:
    assert outside(files_in("runtime.server")) <= {"numpy", *SERVE_EXTRA}


@pytest.mark.parametrize("room", ["export", "runtime", "devices"])
def test_a_room_cannot_be_imported_under_its_bare_name(room: str) -> None:
    done = python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {room}")
    assert f"import edgetune.{room}, not {room}" in done.stderr


def loaded_by(code: str) -> set[str]:
    """Top-level modules in memory after some code ran in a fresh interpreter."""
    done = python(f"{code}\nimport sys\nprint(' '.join({{m.split('.')[0] for m in sys.modules}}))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code", ["import edgetune.runtime", "import edgetune.devices", "import edgetune"]
)
def test_importing_a_room_loads_nothing_heavy(code: str) -> None:
    assert not loaded_by(code) & {
        *HEAVY,
        "onnxruntime",
        "numpy",
        "tokenizers",
        "jinja2",
        "llguidance",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        "'--help'",
        "'predict', '--help'",
        "'serve', '--help'",
        "'pull', '--help'",
        "'top', '--help'",
        "'check', '--help'",
        "'diff', '--help'",
        "'devices', '--help'",
    ],
)
def test_help_loads_nothing_heavy(arguments: str) -> None:
    code = f"from edgetune.cli import cli\ncli.main([{arguments}], standalone_mode=False)"
    assert not loaded_by(code) & {*HEAVY, "onnxruntime", "numpy"}


DEVICE = """
from edgetune.runtime import Runtime
from edgetune.runtime.check.latency import Workload, measure_here
decoder, encoder, adapter = sys.argv[1:]
with Runtime.open(decoder) as runtime:
    runtime.load_adapter('hot', adapter)
    answers = runtime.generate(['hello'] * 3, adapters=['a', 'hot', None], max_new_tokens=4)
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
