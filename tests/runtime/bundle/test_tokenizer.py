"""Texts become the same ids as with transformers, and stream back without half a character."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import decoder_manifest, encoder_manifest
from transformers import AutoTokenizer

from edgetune.core.control_tokens import Rendered
from edgetune.core.errors import BundleError, InputError
from edgetune.core.templates import chat_messages, chat_text, with_system
from edgetune.data.completions import encode_prompts
from edgetune.data.prompts import apply_chat_template
from edgetune.runtime.bundle.manifest import TokenizerInfo
from edgetune.runtime.bundle.tokenizer import BundleTokenizer, Detokenizer

TEXTS = [
    "",
    "Turn on the lights!",
    " leading and  double  spaces ",
    "naïve façade — “quotes” … 漢字かな 🙂👩‍👩‍👧 \u0301combining",
    "<|im_start|>user\nspecial tokens in a text<|im_end|>",
    "tabs\tand\nnew lines\r\n",
    '{"json": [1, 2.5, null]}',
    "\ud7ff\ufffd￿",
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "  spaces \n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "ç🙂"},
    ],
]
TEMPLATES = {
    "loop controls": (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{%"
        " endfor %}"
    ),
    "trimmed blocks": (
        "  {% for m in messages %}\n    {% if m.role %}\n{{ m['content'] }}\n  {% endif %}\n{%"
        " endfor %}\n"
    ),
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "generation tag": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
    "special tokens": (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor"
        " %}{{ ns.n }}"
    ),
    "strftime": "{{ strftime_now('%Y') }}{{ messages[0].content }}",
}


def info(folder: Path) -> TokenizerInfo:
    reference = AutoTokenizer.from_pretrained(folder)
    template = "chat_template.jinja" if reference.chat_template else None
    return TokenizerInfo(
        "tokenizer.json",
        template,
        dict(reference.special_tokens_map),
        (2,),
        reference.pad_token_id,
        256,
    )


@pytest.fixture
def decoder_tokenizer(tiny_decoder: Path) -> BundleTokenizer:
    return BundleTokenizer(tiny_decoder, decoder_manifest(tokenizer=info(tiny_decoder)))


@pytest.fixture
def encoder_tokenizer(tiny_encoder: Path) -> BundleTokenizer:
    return BundleTokenizer(tiny_encoder, encoder_manifest(tokenizer=info(tiny_encoder)))


@pytest.mark.parametrize("text", TEXTS)
def test_texts_get_the_ids_of_transformers(
    text: str,
    decoder_tokenizer: BundleTokenizer,
    encoder_tokenizer: BundleTokenizer,
    tiny_decoder: Path,
    tiny_encoder: Path,
) -> None:
    for ours, folder in ((decoder_tokenizer, tiny_decoder), (encoder_tokenizer, tiny_encoder)):
        reference = AutoTokenizer.from_pretrained(folder)
        assert ours.encode(text) == reference(text, split_special_tokens=True)["input_ids"]
        assert ours.encode(Rendered(text)) == reference(text)["input_ids"]
        assert (
            ours.encode_within(text, max_tokens=5)
            == reference(text, truncation=True, max_length=5, split_special_tokens=True)[
                "input_ids"
            ]
        )


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_conversations_get_the_ids_of_transformers(
    messages: list[dict[str, str]], decoder_tokenizer: BundleTokenizer, tiny_decoder: Path
) -> None:
    reference = AutoTokenizer.from_pretrained(tiny_decoder)
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert decoder_tokenizer.encode_chat(messages) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, tiny_decoder: Path) -> None:
    reference = AutoTokenizer.from_pretrained(tiny_decoder)
    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False
        )
        got = chat_text(
            TEMPLATES[name],
            messages,
            special_tokens=reference.special_tokens_map,
            add_generation_prompt=False,
        )
        assert got == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_can_refuse_but_not_reach_out(template: str) -> None:
    with pytest.raises(InputError, match="the chat template refuses"):
        chat_text(template, CONVERSATIONS[0], special_tokens={})


@pytest.mark.parametrize(
    "form",
    [
        {"template": "chat", "system": None},
        {"template": "chat", "system": ""},
        {"template": "plain"},
    ],
)
def test_a_prompt_gets_the_ids_of_training(
    form: dict[str, Any], decoder_tokenizer: BundleTokenizer, tiny_decoder: Path
) -> None:
    reference = AutoTokenizer.from_pretrained(tiny_decoder)
    text = "Turn on the lights"
    if form["template"] == "chat":
        text = apply_chat_template(reference, chat_messages(text, system=form["system"]))
    expected = encode_prompts([text], form["template"], reference)[0]
    assert decoder_tokenizer.encode_prompt("Turn on the lights", form) == expected


def test_saved_padding_and_truncation_are_switched_off(tiny_encoder: Path, tmp_path: Path) -> None:
    document = json.loads((tiny_encoder / "tokenizer.json").read_text())
    document["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = BundleTokenizer(tmp_path, encoder_manifest(tokenizer=info(tiny_encoder)))
    assert len(tokenizer.encode("one two three four five six seven")) > 8


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="the tokenizer cannot be read"):
        BundleTokenizer(tmp_path, decoder_manifest())


def stream(tokenizer: BundleTokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_text(text: str, decoder_tokenizer: BundleTokenizer) -> None:
    ids = decoder_tokenizer.encode(text)
    pieces = stream(decoder_tokenizer, ids)
    assert "".join(pieces) == decoder_tokenizer.decode(ids)


def test_a_character_of_many_tokens_appears_whole(decoder_tokenizer: BundleTokenizer) -> None:
    ids = decoder_tokenizer.encode("a🙂b")
    assert len(ids) == 6
    assert [piece for piece in stream(decoder_tokenizer, ids) if piece] == ["a", "🙂", "b"]


def test_a_cut_character_appears_only_at_the_end(decoder_tokenizer: BundleTokenizer) -> None:
    ids = decoder_tokenizer.encode("ok 漢")[:-1]
    pieces = stream(decoder_tokenizer, ids)
    assert "\ufffd" not in "".join(pieces[:-1])
    assert "".join(pieces) == decoder_tokenizer.decode(ids) == "ok \ufffd"


def test_random_tokens_stream_as_they_decode(decoder_tokenizer: BundleTokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(352) for _ in range(rng.randrange(1, 30))]
        assert "".join(stream(decoder_tokenizer, ids)) == decoder_tokenizer.decode(ids)


def test_a_conversation_gets_the_trained_system_message_unless_it_has_one() -> None:
    user = {"role": "user", "content": "hi"}
    assert with_system([user], system="be brief")[0] == {
        "role": "system",
        "content": "be brief",
    }
    assert with_system([user], system=None) == [user]
    own = [{"role": "system", "content": "mine"}, user]
    assert with_system(own, system="be brief") == own


def test_messages_without_a_chat_template_are_refused(tiny_decoder: Path) -> None:
    plain = replace(info(tiny_decoder), chat_template=None)
    tokenizer = BundleTokenizer(tiny_decoder, decoder_manifest(tokenizer=plain))
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.encode_chat(CONVERSATIONS[0])
