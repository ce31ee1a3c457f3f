"""The playground in a real Chromium: it answers, compares, classifies, loads adapters, and works by
keyboard alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import chromium
from head_helpers import bundle as head_bundle
from runtime_helpers import decoder_bundle, encoder_bundle
from server_helpers import Running, paced, serve

from edgetune.runtime.server.playground import page, security_policy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Path) -> Path:
    root = tmp_path_factory.mktemp("allowed")
    shutil.copytree(decoder_bundle(tiny_decoder) / "adapters" / "a", root / "more")
    return root


@pytest.fixture(scope="module")
def decoder(tiny_decoder: Path, allowed: Path) -> Iterator[Running]:
    with serve(decoder_bundle(tiny_decoder), adapter_folders=(allowed,)) as running:
        yield running


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a page whose errors and foreign requests end up in lists."""
    contexts = []

    def call(server: Running, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.complaints, tab.asked = [], []
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on(
            "console",
            lambda line: tab.complaints.append(line.text) if line.type == "error" else None,
        )
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.goto(server.url)
        tab.wait_for_selector("#model-a option", state="attached")
        return tab

    yield call
    for context in contexts:
        context.close()


def answered(tab: Any) -> None:
    tab.wait_for_selector("#run:not([disabled])")


def test_two_answers_stand_side_by_side_and_are_the_servers_own(
    decoder: Running, opened: Any
) -> None:
    tab = opened(decoder)
    tab.check("#compare")
    tab.select_option("#model-a", "a")
    tab.select_option("#model-b", "b")
    tab.fill("#prompt", "hello")
    tab.click("#run")
    answered(tab)
    (plain,) = decoder.client().completions.create(model="a", prompt="hello").choices
    (chat,) = (
        decoder.client()
        .chat.completions.create(model="b", messages=[{"role": "user", "content": "hello"}])
        .choices
    )
    texts = [node.text_content() for node in tab.query_selector_all(".answer")]
    assert texts == [plain.text, chat.message.content]
    assert tab.locator("#latency-table tbody tr").count() == 2
    assert tab.locator("#charts circle").count() == 4
    assert tab.complaints == []
    assert all(url.startswith((decoder.url, "data:")) for url in tab.asked)


def test_the_keyboard_alone_reaches_and_runs_everything(decoder: Running, opened: Any) -> None:
    tab = opened(decoder)
    tab.keyboard.press("Tab")
    assert tab.locator(":focus").get_attribute("href") == "#prompt"
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    if tab.locator(":focus").get_attribute("id") != "prompt":
        tab.focus("#prompt")
    tab.keyboard.type("hello")
    reached = []
    for _ in range(6):
        tab.keyboard.press("Tab")
        reached.append(
            tab.locator(":focus").get_attribute("id") or tab.locator(":focus").text_content()
        )
    assert reached[:3] == ["run", "compare", "Settings"]
    assert "model-a" in reached
    tab.focus("#prompt")
    tab.keyboard.press("Control+Enter")
    answered(tab)
    assert tab.locator(".answer").text_content()


def test_escape_stops_an_answer(decoder: Running, opened: Any) -> None:
    tab = opened(decoder)
    with paced(decoder) as pace:
        tab.fill("#prompt", "hello")
        tab.keyboard.press("Control+Enter")
        for _ in range(4):
            pace.step()
        tab.keyboard.press("Escape")
        answered(tab)
    assert tab.locator('[data-number="reason"]').text_content() == "you"


def test_an_adapter_is_loaded_offered_and_unloaded(decoder: Running, opened: Any) -> None:
    tab = opened(decoder)
    tab.fill("#load-name", "fresh")
    tab.fill("#load-path", "more")
    tab.click("text=Load adapter")
    tab.wait_for_selector("#load-note.good")
    assert "fresh" in tab.locator("#model-a option").all_text_contents()
    tab.click('[aria-label="Unload fresh"]')
    tab.wait_for_selector('[aria-label="Unload fresh"]', state="detached")
    tab.fill("#load-name", "evil")
    tab.fill("#load-path", "/etc")
    tab.click("text=Load adapter")
    tab.wait_for_selector("#load-note.bad")
    assert "outside the folders" in tab.locator("#load-note").text_content()


def test_an_error_is_shown_in_its_place(decoder: Running, opened: Any) -> None:
    tab = opened(decoder)
    tab.fill("#prompt", "~" * 300)
    tab.click("#run")
    answered(tab)
    assert "at most 255" in tab.locator(".answer.error").text_content()


def test_classes_are_shown_as_bars(tiny_encoder: Path, opened: Any) -> None:
    with serve(encoder_bundle(tiny_encoder)) as encoder:
        tab = opened(encoder)
        tab.fill("#prompt", "my card")
        tab.click("#run")
        answered(tab)
        scores = encoder.runtime.classify(["my card"], "intent")[0].scores
        best = sorted(scores, key=lambda label: -scores[label])
        assert [row.split("\n")[0] for row in tab.locator(".bar").all_inner_texts()] == best
        assert not tab.locator(".settings").is_visible()


def test_dark_and_light_differ_and_every_control_has_a_name(decoder: Running, opened: Any) -> None:
    tabs = [opened(decoder, color_scheme=scheme) for scheme in ("light", "dark")]
    colours = [
        tab.locator("body").evaluate("node => getComputedStyle(node).backgroundColor")
        for tab in tabs
    ]
    assert colours[0] != colours[1]
    unnamed = tabs[0].evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")].filter((node) =>
          !(node.labels && node.labels.length) && !node.getAttribute("aria-label")
          && !node.textContent.trim()
        ).map((node) => node.outerHTML)"""
    )
    assert unnamed == []


def test_a_key_is_asked_for_and_used(tiny_decoder: Path, browser: Any) -> None:
    with serve(decoder_bundle(tiny_decoder), api_keys=("open",)) as closed:
        tab = browser.new_context().new_page()
        tab.goto(closed.url)
        tab.fill("#key", "open")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#model-a option", state="attached")
        tab.context.close()


def test_the_page_is_whole_and_its_policy_allows_nothing_else() -> None:
    assert "/*STYLE*/" not in page() and "/*SCRIPT*/" not in page()
    assert page().count("</script>") == 1
    assert "unsafe" not in security_policy() and "default-src 'none'" in security_policy()


def test_a_tagger_marks_the_words(tiny_encoder: Path, opened: Any) -> None:
    with serve(head_bundle(tiny_encoder)) as encoder:
        tab = opened(encoder)
        tab.select_option("#model-a", "rooms")
        tab.fill("#prompt", "turn on the lights in the old kitchen please")
        tab.click("#run")
        answered(tab)
        (expected,) = encoder.runtime.tag(["turn on the lights in the old kitchen please"], "rooms")
        marked = [text.split(" room")[0] for text in tab.locator("mark").all_text_contents()]
        assert marked == [span.text for span in expected.entities] != []
