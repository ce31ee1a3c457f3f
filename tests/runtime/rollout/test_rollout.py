"""An alias follows a source: what is tried, kept, rolled back and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rollout_helpers import Device, publish, spoil
from runtime_helpers import encoder_bundle
from signature_helpers import Keys, make_keys

from edgetune.core.errors import OutputError
from edgetune.devices import load_device
from edgetune.runtime import Runtime
from edgetune.runtime.rollout.rollout import MOST_ATTEMPTS
from edgetune.runtime.rollout.state import MOST_SEEN, RolloutFolder, RolloutState, SeenVersion
from edgetune.runtime.signature.keys import PrivateKey, read_private_key, read_public_key


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def key(keys: Keys) -> PrivateKey:
    return read_private_key(keys.private)


@pytest.fixture(scope="module")
def runtime(tiny_encoder: Path) -> Iterator[Runtime]:
    with Runtime.open(encoder_bundle(tiny_encoder), threads=1) as opened:
        yield opened


@pytest.fixture
def adapter(runtime: Runtime) -> Path:
    return runtime.folder / "adapters" / "mood"


@pytest.fixture
def device(runtime: Runtime, keys: Keys, tmp_path: Path) -> Device:
    return Device(
        runtime, tmp_path / "source", tmp_path / "disk", signed_by=read_public_key(keys.public)
    )


@pytest.fixture
def trial(device: Device, adapter: Path, key: PrivateKey) -> Device:
    """Version 2 on trial beside what the bundle ships."""
    publish(adapter, device.place, key=key, version=2)
    device.rollout.step()
    return device


def test_what_the_bundle_ships_answers_until_something_comes(device: Device) -> None:
    device.place.mkdir()
    device.rollout.step()
    assert (device.answer(), device.steps.last[0]) == ("mood", "failed")


def test_a_new_version_answers_its_share_and_is_kept(trial: Device) -> None:
    assert trial.steps.names == ["fetched", "checking", "checked", "trial"]
    assert trial.aliases.all() == {"mood": {"mood": 0.5, "mood@v2": 0.5}}
    trial.serve(60)
    assert trial.steps.names[-2:] == ["kept", "settled"]
    assert trial.answer() == "mood@v2"


def test_a_version_that_fails_is_rolled_back_and_not_tried_again(trial: Device) -> None:
    trial.serve(20, failing="mood@v2")
    assert trial.steps.last == ("rolled back", "3 of 3 requests failed")
    assert trial.aliases.all() == {"mood": {"mood": 1.0}}
    trial.start()
    trial.rollout.step()
    assert trial.answer() == "mood"
    assert trial.steps.last[0] == "refused" and "was rolled back" in trial.steps.last[1]


def test_the_roll_back_holds_before_it_is_on_the_disk(trial: Device) -> None:
    for _ in range(3):
        trial.rollout.answered("mood@v2", 1.0, failed=True)
    assert trial.aliases.all() == {"mood": {"mood": 1.0}}  # no step was taken yet


def test_a_roll_back_that_the_disk_cannot_take_is_written_later(
    trial: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RolloutFolder, state: object) -> None:
        raise OutputError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RolloutFolder, "write", full)
        for _ in range(3):
            trial.rollout.answered("mood@v2", 1.0, failed=True)
        trial.rollout.step()
        trial.rollout.step()
    assert trial.steps.names[-1] == "failed" and trial.rollout.state.phase == "trial"
    trial.rollout.step()
    assert trial.steps.last == ("rolled back", "3 of 3 requests failed")
    assert trial.rollout.state.phase == "settled"


def test_a_disk_that_is_full_for_long_is_no_failed_attempt(
    device: Device, adapter: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RolloutFolder, identity: str) -> Path:
        raise OutputError("no space left on device")

    publish(adapter, device.place, key=key, version=2)
    with monkeypatch.context() as patch:
        patch.setattr(RolloutFolder, "keep", full)
        for _ in range(2 * MOST_ATTEMPTS):
            device.rollout.step()
    assert "refused" not in device.steps.names
    device.rollout.step()
    assert device.steps.last[0] == "trial"


def test_a_version_that_failed_most_of_few_requests_is_not_kept(trial: Device) -> None:
    for failed in (True, True, False):
        trial.rollout.answered("mood@v2", 1.0, failed=failed)
    trial.now += trial.rules.bounds.wait_s
    trial.rollout.step()
    assert trial.steps.last == ("rolled back", "2 of 3 requests failed")


def test_an_aliass_versions_are_nobody_elses(trial: Device) -> None:
    held = [trial.rollout.holds(name) for name in ("mood", "mood@v2", "mood@v9", "moody")]
    assert held == [True, True, True, False]


def test_a_slow_version_is_rolled_back(trial: Device) -> None:
    trial.bounds(requests=40)
    trial.start()
    trial.serve(90, slow="mood@v2")
    assert trial.steps.last == ("rolled back", "it takes 9.00 times as long")


def test_a_version_that_answers_otherwise_is_rolled_back(trial: Device) -> None:
    for _ in range(20):
        trial.rollout.shadowed(alike=False)
    trial.rollout.step()
    assert trial.steps.last == ("rolled back", "0 of 20 answers alike")


def test_a_kept_version_is_watched_and_goes_back_when_it_fails_later(trial: Device) -> None:
    trial.serve_until("kept")
    trial.serve(3, failing="mood@v2")
    assert (trial.steps.last[0], trial.answer()) == ("rolled back", "mood")


def test_a_version_without_requests_is_kept_after_a_while(trial: Device) -> None:
    trial.now += trial.rules.bounds.wait_s
    trial.rollout.step()
    trial.now += trial.rules.bounds.wait_s
    trial.rollout.step()
    assert trial.steps.names[-2:] == ["kept", "settled"]


def test_versions_follow_each_other_and_older_ones_are_refused(
    trial: Device, adapter: Path, key: PrivateKey
) -> None:
    trial.serve(60)
    publish(adapter, trial.place, key=key, version=3)
    trial.rollout.step()
    trial.serve(60)
    assert trial.answer() == "mood@v3"
    for version, why in ((2, "mood@v2 was replaced"), (1, "an older version"), (None, "an older")):
        publish(adapter, trial.place, key=key, version=version)
        trial.rollout.step()
        assert trial.steps.last[0] == "refused" and why in trial.steps.last[1]
    publish(adapter, trial.place, key=key, version=3)
    count = len(trial.steps.told)
    trial.rollout.step()
    assert trial.steps.names[count:] == ["fetched"]  # it answers already
    folders = [path.name for path in (trial.disk / "versions").iterdir()]
    assert len(folders) == 2  # the one that answers, and the one before it


def test_a_restart_goes_on_where_it_was(trial: Device) -> None:
    trial.start()
    assert trial.aliases.all() == {"mood": {"mood": 0.5, "mood@v2": 0.5}}
    trial.serve(60)
    trial.start()
    assert (trial.answer(), trial.steps.told) == ("mood@v2", [])


def test_a_version_that_ends_the_process_is_rolled_back(trial: Device) -> None:
    for _ in range(MOST_ATTEMPTS - 1):
        trial.start()
        assert "mood@v2" in trial.aliases.all()["mood"]
    trial.start()
    assert trial.steps.last[0] == "rolled back"
    assert trial.aliases.all() == {"mood": {"mood": 1.0}}


def test_a_clean_stop_is_no_failed_attempt_and_a_crash_is(trial: Device) -> None:
    for _ in range(2 * MOST_ATTEMPTS):
        trial.stop()
        trial.start()
    assert trial.rollout.on_trial is not None
    trial.start()
    for _ in range(MOST_ATTEMPTS):
        trial.stop()
        trial.start()
    assert trial.rollout.on_trial is not None
    trial.start()
    assert trial.rollout.on_trial is not None
    trial.start()
    assert trial.steps.last == ("rolled back", "the process ended 3 times while it was on trial")


def test_a_stop_while_a_version_is_watched_is_no_failed_attempt(trial: Device) -> None:
    trial.serve_until("kept")
    for _ in range(2 * MOST_ATTEMPTS):
        trial.stop()
        trial.start()
    assert (trial.rollout.state.phase, trial.answer()) == ("watched", "mood@v2")


def test_nothing_is_written_after_the_stop(trial: Device) -> None:
    trial.stop()
    before = (trial.disk / "state.json").read_bytes()
    trial.serve(20, failing="mood@v2")
    assert (trial.steps.names[-1], (trial.disk / "state.json").read_bytes()) == ("failed", before)


@pytest.mark.parametrize("state", [b"", b"{}x", b"[]", b'{"current": "../x"}', b"\xff"])
def test_a_damaged_state_leaves_a_device_that_answers(trial: Device, state: bytes) -> None:
    (trial.disk / "state.json").write_bytes(state)
    trial.start()
    assert trial.answer() == "mood"
    trial.rollout.step()
    assert trial.steps.last[0] == "trial"


def test_a_damaged_version_is_left_out_and_comes_again(trial: Device) -> None:
    trial.serve(60)
    (folder,) = (trial.disk / "versions").iterdir()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    trial.start()
    assert (trial.steps.names, trial.answer()) == (["lost"], "mood")
    trial.rollout.step()
    assert trial.steps.last[0] == "trial"


@pytest.mark.parametrize("lost", ["the version", "the state"])
def test_after_a_loss_nothing_older_comes_and_what_was_lost_does(
    trial: Device, adapter: Path, key: PrivateKey, lost: str
) -> None:
    trial.serve(60)
    publish(adapter, trial.place, key=key, version=7)
    trial.rollout.step()
    trial.serve(60)
    newest = trial.rollout.state.current
    assert trial.answer() == "mood@v7" and newest is not None
    if lost == "the state":
        (trial.disk / "state.json").write_bytes(b"{")
    else:
        (trial.disk / "versions" / newest / "adapter_model.safetensors").write_bytes(b"")
    trial.start()
    for version in (3, 6):
        publish(adapter, trial.place, key=key, version=version)
        trial.rollout.step()
        assert trial.steps.last[0] == "refused" and "an older version" in trial.steps.last[1]
    publish(adapter, trial.place, key=key, version=7, mark="other")  # of the same number
    trial.rollout.step()
    assert trial.steps.last[0] == "refused"
    publish(adapter, trial.place, key=key, version=7)
    trial.rollout.step()
    assert trial.steps.last[0] == "trial"


def test_what_answers_is_remembered_however_many_came_after_it() -> None:
    first = "a" * 64
    state = RolloutState(current=first, seen={first: SeenVersion("home@v1", 1)})
    for at in range(MOST_SEEN + 5):
        state = state.with_seen(f"{at:064x}", SeenVersion(f"home@{at}", fate="slow"))
    assert first in state.seen and len(state.seen) == MOST_SEEN + 1
    assert f"{at:064x}" in state.seen and "0" * 64 not in state.seen


def test_what_was_checked_is_what_is_loaded(
    trial: Device, adapter: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial.serve(60)
    publish(adapter, trial.place, key=key, version=3)
    load = trial.runtime.load_adapter

    def another(name: str, folder: Path, **more: Any) -> Any:
        """An older one, well signed, is in the folder by now."""
        publish(adapter, folder, key=key, version=1, mark="old")
        return load(name, folder, **more)

    monkeypatch.setattr(trial.runtime, "load_adapter", another)
    trial.rollout.step()
    assert trial.steps.last[0] == "refused" and "changed while it was read" in trial.steps.last[1]
    assert trial.answer() == "mood@v2" and "mood@v3" not in trial.runtime.adapters


def test_what_no_adapter_of_the_base_can_be_is_not_fetched(
    device: Device, adapter: Path, key: PrivateKey
) -> None:
    publish(adapter, device.place, key=key, version=2)
    with (device.place / "more.bin").open("wb") as file:
        file.truncate(1 << 28)
    device.rollout.step()
    assert device.steps.last[0] == "refused" and "larger than any" in device.steps.last[1]
    assert not list(device.disk.rglob("more.bin")) and not list(device.disk.glob("store/*/*"))


def test_halves_of_what_is_gone_are_removed(device: Device, adapter: Path, key: PrivateKey) -> None:
    half = device.disk / "store" / "partial" / ("0" * 64)
    half.parent.mkdir(parents=True)
    half.write_bytes(b"x")
    publish(adapter, device.place, key=key, version=2)
    device.rollout.step()
    assert device.steps.last[0] == "trial" and not half.exists()


def test_unsigned_and_forged_versions_are_refused(
    device: Device, adapter: Path, key: PrivateKey, tmp_path: Path
) -> None:
    publish(adapter, device.place)
    device.rollout.step()
    assert "there is no signature" in device.steps.last[1]
    publish(adapter, device.place, key=read_private_key(make_keys(tmp_path).private), version=9)
    device.rollout.step()
    assert "not this key's" in device.steps.last[1]
    publish(adapter, device.place, key=key, version=9)
    spoil(device.place)
    device.rollout.step()
    assert "changed since it was signed" in device.steps.last[1]
    assert (device.answer(), device.rollout.state.seen) == ("mood", {})
    publish(adapter, device.place, key=key, version=9)
    device.rollout.step()
    assert device.steps.last[0] == "trial"


def test_another_base_is_refused(device: Device, adapter: Path, key: PrivateKey) -> None:
    other = {"base": {"name": "other", "digest": "sha256:" + "b" * 64}}
    publish(adapter, device.place, key=key, version=2, metadata=other)
    device.rollout.step()
    assert device.steps.last[0] == "refused" and "base" in device.steps.last[1]
    assert not list(device.disk.glob("versions/*"))


def prove(runtime: Runtime, adapter: Path, copy: Path, *, wrong: int = 0) -> Path:
    """The adapter with its answers to ten texts; some of them are not its own."""
    shutil.copytree(adapter, copy)
    rows = [{"text": f"hello {at}"} for at in range(10)]
    found = runtime.classify([row["text"] for row in rows], "mood")
    other = {"calm": "upset", "upset": "calm"}
    for at, (row, one) in enumerate(zip(rows, found, strict=True)):
        row["label"] = other[str(one.label)] if at < wrong else str(one.label)
    (copy / "edgetune_proof.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return copy


def test_the_adapters_own_proof_is_done_again(
    device: Device, runtime: Runtime, adapter: Path, key: PrivateKey, tmp_path: Path
) -> None:
    publish(prove(runtime, adapter, tmp_path / "a", wrong=1), device.place, key=key, version=2)
    device.rollout.step()
    assert device.steps.last[0] == "refused"
    assert "does not answer here as it did where it was made" in device.steps.last[1]
    publish(prove(runtime, adapter, tmp_path / "b"), device.place, key=key, version=3)
    device.rollout.step()
    assert ("checked", {"version": "mood@v3", "proof_rows": 10}) in device.steps.told
    assert device.steps.last[0] == "trial"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"text": "x"}', b"x" * (2 << 20)])
def test_a_proof_that_cannot_be_read_is_refused(
    device: Device, adapter: Path, key: PrivateKey, tmp_path: Path, raw: bytes
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    (tmp_path / "a" / "edgetune_proof.jsonl").write_bytes(raw)
    publish(tmp_path / "a", device.place, key=key, version=2)
    device.rollout.step()
    assert device.steps.last[0] == "refused"


def test_a_version_over_the_devices_budget_is_refused(
    runtime: Runtime, adapter: Path, tmp_path: Path
) -> None:
    never, here = {"request_ms": 1e-6}, load_device("host")
    device = Device(runtime, tmp_path / "source", tmp_path / "disk", budget=never, device=here)
    publish(adapter, device.place)
    device.rollout.step()
    assert device.steps.last[0] == "refused" and "over this device's budget" in device.steps.last[1]


def test_unsigned_versions_go_by_their_digests(
    runtime: Runtime, adapter: Path, tmp_path: Path
) -> None:
    device = Device(runtime, tmp_path / "source", tmp_path / "disk")
    publish(adapter, device.place, mark="a")
    device.rollout.step()
    device.serve(60)
    first = device.answer()
    publish(adapter, device.place, mark="b")
    device.rollout.step()
    device.serve(60)
    assert first.startswith("mood@") and device.answer() not in ("mood", first)
    publish(adapter, device.place, mark="a")
    device.rollout.step()
    assert device.steps.last[0] == "refused" and "was replaced" in device.steps.last[1]
