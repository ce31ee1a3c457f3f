"""An adapter that is read when the first request asks for it: what is wrong with it is one clear
line for that request, and everyone else is answered. Names nobody has get the nearest one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle, encoder_bundle
from server_helpers import serve

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def foreign(adapter: Path) -> None:
    other = next(p for p in sorted(adapter.parent.iterdir()) if p != adapter)
    shutil.copytree(other, adapter, dirs_exist_ok=True)


def cut(adapter: Path) -> None:
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: len(content) // 2])


def changed(adapter: Path) -> None:
    content = bytearray((adapter / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (adapter / WEIGHTS).write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "another adapter's files": foreign,
    "half of the weights": cut,
    "one bit of the weights": changed,
    "no configuration": lambda adapter: (adapter / CONFIG).unlink(),
    "no weights": lambda adapter: (adapter / WEIGHTS).unlink(),
    "no folder": shutil.rmtree,
    "a configuration that is none": lambda adapter: (adapter / CONFIG).write_text("[3]"),
    "metadata that is none": lambda a: (a / "edgetune_adapter.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_the_requests_error(
    damage: str, tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    for whole, name, path, key in (
        (decoder_bundle(tiny_decoder), "a", "/v1/completions", "prompt"),
        (encoder_bundle(tiny_encoder), "intent", "/classify", "input"),
    ):
        bundle = tmp_path / name
        shutil.copytree(whole, bundle, copy_function=shutil.copy)
        with serve(bundle) as server:
            DAMAGES[damage](bundle / "adapters" / name)
            answer = server.post(path, {"model": name, key: "hello"})
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
            assert len(error["message"].splitlines()) < 4
            other = next(one for one in server.runtime.adapters if one != name)
            assert server.post(path, {"model": other, key: "hello"}).status_code == 200


def test_a_name_nobody_has_gets_the_nearest_one(tiny_encoder: Path, tmp_path: Path) -> None:
    with serve(encoder_bundle(tiny_encoder), adapter_folders=(tmp_path,)) as server:
        answer = server.post("/classify", {"model": "intnet", "input": "x"})
        assert answer.status_code == 404
        message = "The model 'intnet' does not exist. Did you mean \"intent\"?"
        assert answer.json()["error"]["message"] == message
        answer = server.post("/v1/unload_lora_adapter", {"lora_name": "mod"})
        assert 'Did you mean "mood"?' in answer.json()["error"]["message"]
        answer = server.post("/classify", {"model": "intent", "input": "x", "usr": "me"})
        assert (
            answer.json()["error"]["message"] == "Unknown parameter: 'usr'. Did you mean \"user\"?"
        )


@pytest.mark.parametrize("asked", [None, "text", "tokens"])
def test_a_request_says_what_its_control_tokens_are(
    asked: str | None, tiny_decoder: Path, tiny_encoder: Path
) -> None:
    more = {} if asked is None else {"control_tokens": asked}
    with serve(encoder_bundle(tiny_encoder)) as server:
        for path in ("/classify", "/v1/embeddings"):
            body = {"model": "intent", "input": "card [SEP] card", **more}
            used = server.post(path, body).json()["usage"]["prompt_tokens"]
            ids = server.runtime.text_ids(body["input"], "intent", control_tokens=asked)
            assert used == len(ids) and (len(ids) == 5) is (asked == "tokens")
    with serve(decoder_bundle(tiny_decoder)) as server:
        for path, text in (
            ("/v1/completions", {"prompt": "a<|im_end|>"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a<|im_end|>"}]}),
        ):
            counts = {
                one: server.post(
                    path, {"model": "b", "max_tokens": 1, "control_tokens": one, **text}
                )
                for one in ("text", "tokens")
            }
            used = {one: a.json()["usage"]["prompt_tokens"] for one, a in counts.items()}
            assert used["tokens"] < used["text"]
