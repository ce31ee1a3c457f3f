"""A server that follows a tag of a real registry: every fate that a version may have."""

from __future__ import annotations

from pathlib import Path

from rollout_helpers import broken, follow, publish
from runtime_helpers import encoder_bundle
from server_helpers import serve, until
from signature_helpers import make_keys
from source_helpers import docker_registry

from edgetune.publishing.push import push
from edgetune.runtime.signature.keys import read_private_key


def test_versions_of_a_tag_are_served_rolled_back_and_refused(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    keys, adapter = make_keys(tmp_path), encoder_bundle(tiny_encoder) / "adapters" / "mood"
    key = read_private_key(keys.private)
    with docker_registry(tmp_path / "registry") as url, serve(encoder_bundle(tiny_encoder)) as own:
        tag, place = f"{url}/acme/mood:stable", tmp_path / "desk"

        def release(folder: Path, version: int, *, signed: bool = True) -> None:
            publish(folder, place, key=key if signed else None, version=version, mark=str(version))
            push(place, tag)

        def ask() -> tuple[int, str]:
            answer = own.post("/classify", {"model": "mood", "input": "hello"})
            return answer.status_code, answer.json().get("model", "")

        def steps(step: str) -> float:
            line = f'edgetune_rollout_steps_total{{alias="mood",step="{step}"}} '
            page = own.get("/metrics").text
            return float(page.partition(line)[2].partition("\n")[0] or 0)

        release(adapter, 1)
        with follow(own, "mood", tag, tmp_path / "disk", signed_by=keys.public):
            for version in (1, 2):
                release(adapter, version)
                until(lambda: ask()[0] == 200 and steps("settled") == version)  # noqa: B023
                assert ask() == (200, f"mood@v{version}")
            release(broken(adapter, tmp_path / "broken"), 3)
            until(lambda: ask() and steps("rolled back") == 1)
            until(lambda: own.service.rollouts["mood"].state.phase == "settled")
            assert {ask() for _ in range(20)} == {(200, "mood@v2")}
            release(adapter, 4, signed=False)
            until(lambda: steps("refused") == 1)
            release(adapter, 1)  # a replay
            until(lambda: steps("refused") == 2)
            assert {ask() for _ in range(20)} == {(200, "mood@v2")}
        state = own.service.rollouts["mood"].state
        assert (state.newest, sorted(seen.name for seen in state.seen.values())) == (
            3,
            ["mood@v1", "mood@v2", "mood@v3"],
        )
