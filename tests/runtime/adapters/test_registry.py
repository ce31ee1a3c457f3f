"""Adapters are read when they are needed, kept while they are used, and forgotten by least recent
use.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from runtime_helpers import decoder_bundle, peft_adapter

from edgetune.core.errors import AdapterError
from edgetune.runtime import Runtime
from edgetune.runtime.adapters.registry import AdapterRegistry
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.engine.session import BoundTensors

Open = Callable[..., AdapterRegistry]


@pytest.fixture(scope="module")
def folders(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five adapters of rank 4, `m0` … `m4`, and something else."""
    folder = tmp_path_factory.mktemp("many")
    peft_adapter(tiny_decoder, folder / "m0", target_modules=["q_proj"])
    for i in range(1, 5):
        shutil.copytree(folder / "m0", folder / f"m{i}")
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def registry(tiny_decoder: Path, folders: Path) -> Open:
    bundle = decoder_bundle(tiny_decoder)
    return lambda **options: AdapterRegistry(
        bundle, read_manifest(bundle), bind=BoundTensors, adapter_folder=folders, **options
    )


def resident(registry: AdapterRegistry) -> list[str]:
    return [status.name for status in registry.statuses() if status.resident]


def test_a_folder_of_adapters_is_known_and_not_read(registry: Open) -> None:
    known = registry()
    assert known.names() == ("a", "b", "m0", "m1", "m2", "m3", "m4")
    assert (resident(known), known.nbytes) == ([], 0)
    assert known.get("m3").packed.name == "m3"
    assert resident(known) == ["m3"]


def test_a_name_that_is_a_path_finds_nothing(registry: Open, folders: Path) -> None:
    for name in ("../many/m0", "m0/", "..", ".", "notes", str(folders / "m0")):
        with pytest.raises(AdapterError, match="unknown adapter"):
            registry().get(name)


def test_the_least_recently_used_is_evicted_when_memory_ends(registry: Open) -> None:
    size = registry().get("m0").packed.nbytes
    known = registry(memory_mb=2.5 * size / 1e6)
    for name in ("m0", "m1", "m0", "m2"):
        known.get(name)
    assert (resident(known), known.evictions) == (["m0", "m2"], 1)
    assert known.get("m1").packed.name == "m1"  # read again
    assert known.nbytes <= 2.5 * size


def test_nobody_changes_an_adapter_between_its_look_up_and_its_count(
    registry: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = registry()
    find, free = known._entry, []

    def entry(name: str) -> object:
        found = find(name)
        with ThreadPoolExecutor(1) as other:
            free.append(other.submit(known._change.acquire, False).result())
        return found

    monkeypatch.setattr(known, "_entry", entry)
    known.acquire("m0")
    with pytest.raises(AdapterError, match="in use"):
        known.unload("m0", in_use="refuse")
    assert free == [False, False]


def test_a_pin_made_while_the_successor_is_read_is_kept(
    registry: Open, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = registry()
    read = known._sources.read

    def read_and_pin(name: str, source: object) -> object:
        known.pin("m0") if source != folders / "m0" else None
        return read(name, source)  # type: ignore[arg-type]

    monkeypatch.setattr(known._sources, "read", read_and_pin)
    known.replace("m0", folders / "m1")
    assert known.statuses()[2].pinned


def test_what_is_pinned_or_in_use_is_not_evicted(registry: Open) -> None:
    size = registry().get("m0").packed.nbytes
    known = registry(memory_mb=1.5 * size / 1e6)
    known.pin("m0")
    lease = known.acquire("m1")
    known.get("m2")
    known.get("m3")
    assert resident(known) == ["m0", "m1", "m3"]
    lease.release()
    lease.release()
    assert resident(known) == ["m0"]
    assert known.statuses()[2].pinned


def test_an_adapter_read_again_must_be_the_same(
    registry: Open, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "m0", tmp_path / "x")
    known = registry(memory_mb=1e-6)
    known.load("x", tmp_path / "x")
    known.get("m1")  # x is evicted
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    with pytest.raises(AdapterError, match="'x' have changed since it was loaded"):
        known.get("x")


def test_an_adapter_in_use_is_not_unloaded_unless_asked(registry: Open) -> None:
    known = registry()
    lease = known.acquire("a")
    with pytest.raises(
        AdapterError, match=r"'a' is in use \(expected no request that uses it, got 1\)"
    ):
        known.unload("a", in_use="refuse")
    with pytest.raises(AdapterError, match="is in use"):
        known.unload("a", in_use="wait", timeout_s=0.01)
    assert "a" in known.names()
    known.unload("a", in_use="forget")
    assert "a" not in known.names()
    assert lease.resident.bound.tensors
    with pytest.raises(AdapterError, match="unknown adapter 'a'"):
        known.acquire("a")


def test_unloading_waits_for_the_last_user_and_lets_nobody_new_in(registry: Open) -> None:
    known = registry()
    lease = known.acquire("m0")
    waiting = threading.Thread(target=known.unload, args=("m0",), kwargs={"in_use": "wait"})
    waiting.start()
    while "m0" in known.names():
        time.sleep(0.001)
    with pytest.raises(AdapterError, match="unknown adapter 'm0'"):
        known.acquire("m0")
    assert waiting.is_alive()
    lease.release()
    waiting.join(10)
    assert not waiting.is_alive()


def test_an_unload_that_gives_up_leaves_alone_who_took_its_name(
    registry: Open, folders: Path
) -> None:
    for then in ("loaded", "unloaded"):
        known = registry()
        lease = known.acquire("a")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(known.unload, "a", in_use="wait", timeout_s=0.3)
            while "a" in known.names():
                time.sleep(0.001)
            packed = known.load("a", folders / "m0")
            if then == "unloaded":
                known.unload("a")
            waiting.result(10)
        assert ("a" in known.names()) == (then == "loaded")
        if then == "loaded":
            assert known.get("a").packed is packed
        lease.release()


def test_a_name_can_be_loaded_again_after_it_was_unloaded(registry: Open, folders: Path) -> None:
    known = registry()
    first = known.get("m0").serial
    known.unload("m0")
    known.load("m0", folders / "m1")
    assert known.get("m0").serial != first
    with pytest.raises(AdapterError, match="the name 'm0' is taken"):
        known.load("m0", folders / "m2")


def test_an_adapter_that_does_not_fit_is_not_counted(
    registry: Open, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "m0", tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"damaged")
    known = registry()
    with pytest.raises(AdapterError, match="nothing was loaded"):
        known.load("bad", tmp_path / "bad")
    assert "bad" not in known.names()


def test_many_threads_read_an_adapter_once(registry: Open) -> None:
    known, got = registry(), []
    threads = [threading.Thread(target=lambda: got.append(known.get("m2"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(found) for found in got}) == 1


def test_a_stream_holds_its_adapter_until_it_ends_or_is_dropped(tiny_decoder: Path) -> None:
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as runtime:
        stream = runtime.stream("hello", "a", max_new_tokens=4)
        dropped = runtime.stream("hello", "b", max_new_tokens=4)
        for name in ("a", "b"):
            with pytest.raises(AdapterError, match="is in use"):
                runtime.unload_adapter(name, in_use="refuse")
        "".join(stream)
        del dropped
        for name in ("a", "b"):
            runtime.unload_adapter(name, in_use="refuse")


def test_memory_is_given_back_while_adapters_come_and_go_but_not_for_each(
    registry: Open, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, clock = list[float](), [0.0]
    module = "edgetune.runtime.adapters.registry"
    monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(f"{module}.release_free_memory", lambda: released.append(clock[0]))
    known = registry()
    for clock[0] in (1.0, 11.0, 12.0, 13.0, 22.0):
        for name in ("x", "y"):
            known.load(name, folders / "m1")
            known.unload(name)
    assert released == [1.0, 11.0, 22.0]


def test_an_adapter_put_out_of_memory_right_after_it_was_read_is_still_given(
    registry: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = registry()

    def another_thread_makes_room() -> None:
        for entry in known._known.values():
            entry.resident = None

    monkeypatch.setattr(known, "_release_memory", another_thread_makes_room)
    name = known.names()[0]
    assert known.get(name).packed.name == name
