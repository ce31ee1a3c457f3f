"""A conversation goes on: its turns reach the model, its oldest leave the context, and what is
stopped is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle, encoder_bundle, write_metadata

from edgetune.core.errors import AdapterError, InputError
from edgetune.models.resolve import resolve_base
from edgetune.runtime import Runtime
from edgetune.runtime.tasks.chat_session import ChatSession


@pytest.fixture(scope="module")
def runtime(tiny_decoder: Path) -> Iterator[Runtime]:
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as runtime:
        yield runtime


def test_every_turn_reaches_the_model(runtime: Runtime) -> None:
    session = ChatSession(runtime, system="Be brief.", max_new_tokens=5)
    first, second = "".join(session.ask("hello")), "".join(session.ask("and you?"))
    told = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and you?"},
    ]
    (expected,) = runtime.generate([told], max_new_tokens=5)
    assert second == expected.text and session.turns[-1]["content"] == second
    assert session.completion is not None and session.completion.text == second
    session.reset()
    assert "".join(session.ask("hello")) == first


def test_what_was_said_before_a_stop_is_kept(runtime: Runtime) -> None:
    session = ChatSession(runtime, max_new_tokens=50, logit_bias={"2": -100})
    pieces = session.ask("hello")
    said = next(pieces)
    pieces.close()
    assert [turn["content"] for turn in session.turns] == ["hello", said]
    assert session.completion is None
    assert "".join(session.ask("go on"))


def test_another_adapter_goes_on_with_the_conversation(runtime: Runtime) -> None:
    session = ChatSession(runtime, max_new_tokens=3)
    "".join(session.ask("hello"))
    session.choose("a")
    assert session.alone and len(session.turns) == 2, "the adapter was trained on plain prompts"
    (expected,) = runtime.generate(["hello"], "a", max_new_tokens=3)
    assert "".join(session.ask("hello")) == expected.text and len(session.turns) == 2
    with pytest.raises(AdapterError, match="nobody"):
        session.choose("nobody")
    assert session.adapter == "a"


def test_the_oldest_turns_leave_a_full_context(runtime: Runtime) -> None:
    session = ChatSession(runtime, system="Be brief.", max_new_tokens=4)
    context = runtime.manifest.graph.max_length
    while not session.left_out:
        "".join(session.ask("word " * 40))
        messages = [{"role": "system", "content": "Be brief."}, *session.turns]
        assert len(runtime.prompt_ids(messages)) < context
    assert session.left_out == 2 and session.turns[0]["role"] == "user"
    with pytest.raises(InputError, match="longer than the context"):
        list(session.ask("word " * context))


def test_settings_are_checked_before_they_are_taken(runtime: Runtime) -> None:
    session = ChatSession(runtime, max_new_tokens=4)
    for wrong in ({"temperature": -1}, {"temperature": "hot"}, {"beams": 3}):
        with pytest.raises(InputError):
            session.set(**wrong)
    session.set(temperature=0.5, max_new_tokens=None)
    assert session.settings == {"temperature": 0.5}


def test_an_adapter_of_conversations_keeps_them(tiny_decoder: Path, tmp_path: Path) -> None:
    import shutil

    bundle = decoder_bundle(tiny_decoder)
    shutil.copytree(bundle / "adapters" / "a", tmp_path / "talks")
    base = {"name": str(tiny_decoder), "digest": resolve_base(str(tiny_decoder)).digest}
    form = {"template": "chat", "prompt": "{{ prompt }}"}
    write_metadata(tmp_path / "talks", base=base, prompt_format=form)
    with Runtime.open(bundle, threads=1) as runtime:
        runtime.load_adapter("talks", tmp_path / "talks")
        session = ChatSession(runtime, "talks", max_new_tokens=2)
        "".join(session.ask("hello"))
        assert not session.alone and len(session.turns) == 2


def test_an_encoder_holds_no_conversation(tiny_encoder: Path) -> None:
    with (
        Runtime.open(encoder_bundle(tiny_encoder), threads=1) as runtime,
        pytest.raises(InputError, match=r"holds no conversation .*Ask it with edgetune predict"),
    ):
        ChatSession(runtime)
