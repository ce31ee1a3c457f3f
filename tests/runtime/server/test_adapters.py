"""vLLM's adapter endpoints: what loads answers at once, what does not fit is refused, nothing
outside is touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle
from server_helpers import Running, in_background, paced, serve, until

from edgetune.runtime.server.http.service import WAITS

PROMPT = {"prompt": "hello", "max_tokens": 6}


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Path) -> Path:
    """A folder with two good adapters, a damaged one, links and a file."""
    root, shipped = tmp_path_factory.mktemp("allowed"), decoder_bundle(tiny_decoder) / "adapters"
    shutil.copytree(shipped / "a", root / "team" / "first")
    shutil.copytree(shipped / "b", root / "second")
    shutil.copytree(shipped / "a", root / "damaged")
    (root / "damaged" / "adapter_model.safetensors").write_bytes(b"nonsense")
    (root / "linked").symlink_to(shipped / "a")
    shutil.copytree(shipped / "a", root / "links-inside")
    (root / "links-inside" / "adapter_model.safetensors").unlink()
    (root / "links-inside" / "adapter_model.safetensors").symlink_to(
        shipped / "a" / "adapter_model.safetensors"
    )
    (root / "file").write_text("x")
    return root


@pytest.fixture(scope="module")
def server(tiny_decoder: Path, allowed: Path) -> Iterator[Running]:
    with serve(decoder_bundle(tiny_decoder), adapter_folders=(allowed,)) as running:
        yield running


def load(server: Running, name: str, path: object, **more: object) -> tuple[int, str]:
    answer = server.post(
        "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more}
    )
    return answer.status_code, (
        answer.text if answer.status_code == 200 else answer.json()["error"]["code"]
    )


def unload(server: Running, name: str, **how: object) -> tuple[int, str]:
    answer = server.post("/v1/unload_lora_adapter", {"lora_name": name, **how})
    return answer.status_code, (
        answer.text if answer.status_code == 200 else answer.json()["error"]["code"]
    )


def text_of(server: Running, model: str) -> str:
    return str(
        server.post("/v1/completions", {"model": model, **PROMPT}).json()["choices"][0]["text"]
    )


def test_an_adapter_is_loaded_answers_and_is_unloaded(server: Running, allowed: Path) -> None:
    added = "Success: LoRA adapter 'mine' added successfully."
    assert load(server, "mine", allowed / "team" / "first") == (200, added)
    assert text_of(server, "mine") == text_of(server, "a") != text_of(server, "tiny")
    card = server.client().models.retrieve("mine")
    assert (card.model_extra or {})["parent"] == "tiny"
    assert unload(server, "mine") == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert server.post("/v1/completions", {"model": "mine", **PROMPT}).status_code == 404


def test_a_path_may_be_relative_to_an_allowed_folder(server: Running) -> None:
    assert load(server, "relative", "second")[0] == 200
    assert text_of(server, "relative") == text_of(server, "b")
    assert unload(server, "relative")[0] == 200


def test_loading_in_place_changes_the_answers_of_the_same_name(server: Running) -> None:
    assert load(server, "swap", "team/first")[0] == 200
    before = text_of(server, "swap")
    assert load(server, "swap", "second") == (400, "adapter_exists")
    assert load(server, "swap", "second", load_inplace=True)[0] == 200
    assert text_of(server, "swap") == text_of(server, "b") != before
    assert load(server, "swap", "damaged", load_inplace=True) == (400, "adapter_error")
    assert text_of(server, "swap") == text_of(server, "b")
    assert unload(server, "swap")[0] == 200


OUTSIDE = [
    "..",
    "../x",
    "team/../../x",
    "/etc",
    "/",
    "linked",
    "links-inside",
    "team/first\0",
    "second/../second",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_outside_the_allowed_folder_is_reached(path: str, server: Running) -> None:
    assert load(server, "evil", path) == (403, "forbidden_path")


def test_a_sibling_with_the_same_beginning_is_outside(server: Running, allowed: Path) -> None:
    assert load(server, "evil", f"{allowed}-other/first") == (403, "forbidden_path")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nowhere", (404, "adapter_not_found")),
        ("file", (400, "invalid_value")),
        ("team", (400, "adapter_error")),
        ("damaged", (400, "adapter_error")),
        (".", (403, "forbidden_path")),
    ],
)
def test_a_folder_that_is_no_adapter_is_refused(
    path: str, expected: tuple[int, str], server: Running
) -> None:
    assert load(server, "bad", path) == expected
    assert "bad" not in [model.id for model in server.client().models.list()]


@pytest.mark.parametrize("name", ["", " ", "a b", "-x", "x\n", "tiny", "ä"])
def test_a_name_that_cannot_be_one_is_refused(name: str, server: Running) -> None:
    assert load(server, name, "second")[0] == 400


def test_unloading_what_is_not_there_is_not_found(server: Running) -> None:
    assert unload(server, "ghost") == (404, "adapter_not_found")


def test_a_text_under_way_goes_on_when_its_adapter_is_unloaded(server: Running) -> None:
    assert load(server, "short-lived", "team/first")[0] == 200
    expected = text_of(server, "short-lived")
    with paced(server) as pace:
        answer = in_background(lambda: text_of(server, "short-lived"))
        until(lambda: server.running() == 2)
        pace.step()
        pace.step()
        assert unload(server, "short-lived")[0] == 200
    assert answer.result(20) == expected


def test_an_unload_waits_for_the_texts_under_way_or_is_refused_as_asked(server: Running) -> None:
    assert load(server, "busy", "team/first")[0] == 200
    expected = text_of(server, "busy")
    with paced(server) as pace:
        answer = in_background(lambda: text_of(server, "busy"))
        until(lambda: server.running() == 2)
        pace.step()
        assert unload(server, "busy", in_use="refuse") == (409, "adapter_in_use")
        assert unload(server, "busy", in_use="wait", timeout_s=0.05) == (409, "adapter_in_use")
        waiting = in_background(lambda: unload(server, "busy", in_use="wait"))
        until(lambda: not server.runtime.registry.knows("busy"))  # nobody new gets it
        pace.step()
        assert not waiting.done()
    assert answer.result(20) == expected
    assert waiting.result(20)[0] == 200
    assert unload(server, "busy", in_use="later")[0] == 400


def test_unloads_that_wait_are_few_and_keep_nobody_else_waiting(server: Running) -> None:
    names = [f"held{i}" for i in range(WAITS + 1)]
    for name in names:
        assert load(server, name, "team/first")[0] == 200
    leases = [server.runtime.registry.acquire(name) for name in names]
    waiting = [
        in_background(lambda name=name: unload(server, name, in_use="wait"))
        for name in names[:WAITS]
    ]  # type: ignore[misc]
    until(lambda: not any(server.runtime.registry.knows(name) for name in names[:WAITS]))
    assert unload(server, names[-1], in_use="wait") == (429, "queue_full")
    assert server.runtime.registry.knows(names[-1]) and not any(one.done() for one in waiting)
    assert text_of(server, names[-1]) == text_of(server, "a")
    for lease in leases:
        lease.release()
    assert [one.result(20)[0] for one in waiting] == [200] * WAITS
    assert unload(server, names[-1], in_use="wait")[0] == 200


def test_without_an_allowed_folder_nothing_loads_or_unloads(
    tiny_decoder: Path, allowed: Path
) -> None:
    with serve(decoder_bundle(tiny_decoder)) as closed:
        assert load(closed, "mine", allowed / "second") == (403, "adapter_loading_disabled")
        assert unload(closed, "a") == (403, "adapter_loading_disabled")
