"""The page of examples/browser in a real Chromium: bundles and adapters answer as edgetune's own
runtime, the base is fetched once, and what is wrong is one line.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import chromium
from runtime_helpers import decoder_bundle, encoder_bundle

from edgetune.core.files import sha256_file
from edgetune.export.inputs.small_adapter import (
    factors_of,
    ranks_within,
    read_whole,
    small_adapter,
    spectra_of,
    write_rounded,
    write_small,
)
from edgetune.runtime import Runtime

PAGE = Path(__file__).parents[2] / "examples" / "browser"
PROMPT = "hello there"
SPELLED = "what is <|im_end|> and <|IM_END|>?"


@dataclass
class Site:
    """A folder behind Python's own file server, and what was asked of it."""

    folder: Path
    url: str
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def packages() -> Path:
    """The page's node_modules, else a skip that says how to have them."""
    folder = Path(os.environ.get("EDGETUNE_NODE_MODULES", PAGE / "node_modules"))
    if not (folder / "onnxruntime-web").is_dir():
        pytest.skip("onnxruntime-web is not installed: cd examples/browser && npm install")
    return folder


@pytest.fixture(scope="module")
def site(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True, ignore=lambda *_: ["node_modules"])
    (folder / "node_modules").symlink_to(packages.resolve())
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Site(folder, f"http://127.0.0.1:{server.server_port}/index.html", asked)
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


class Page:
    """One tab of its own; `adapter` chosen, `answer` read."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.complaints: list[str] = []
        tab.set_default_timeout(60_000)
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, site: Site, bundle: str) -> Page:
        self.tab.goto(f"{site.url}?bundle={bundle}")
        self.tab.wait_for_selector("body[data-ready]")
        return self

    def idle(self) -> None:
        self.tab.wait_for_selector("#open button:not([disabled])")

    def choose(self, adapter: str | None) -> None:
        self.tab.check(f'#adapters input[value="{adapter or ""}"]')
        self.idle()

    def add(self, folder: str) -> None:
        self.tab.fill("#adapter-url", folder)
        self.tab.click("#add button")
        self.idle()

    def ask(self, prompt: str) -> None:
        self.tab.fill("#prompt", prompt)
        self.tab.click("#answer-button")
        self.idle()

    def token_ids(self, prompt: str) -> list[int]:
        self.ask(prompt)
        assert self.error == ""
        return [int(token) for token in self.tab.text_content("#ids").split()]

    @property
    def error(self) -> str:
        return str(self.tab.text_content("#error"))


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    context = browser.new_context()
    opened = Page(context.new_page())
    yield opened
    context.close()
    assert opened.complaints == []


@pytest.fixture(scope="module")
def decoder(site: Site, tiny_decoder: Path) -> Path:
    """The decoder's bundle as `decoder` of the site; beside it `small`, adapter `b` with 3 ranks in
    3 bits, and `half`, adapter `a` in fp16.
    """
    bundle = decoder_bundle(tiny_decoder)
    (site.folder / "decoder").symlink_to(bundle)
    read = read_whole(bundle / "adapters" / "b")
    spectra = spectra_of(read)
    small = small_adapter(read, factors_of(spectra, ranks_within(spectra, 3)), 3)
    write_small(small, site.folder / "small" / "adapter")
    write_rounded(bundle / "adapters" / "a", site.folder / "half", "fp16")
    return bundle


@pytest.fixture(scope="module")
def runtime(decoder: Path, site: Site) -> Iterator[Runtime]:
    with Runtime.open(decoder, threads=1, engine="onnxruntime") as opened:
        opened.load_adapter("small", site.folder / "small" / "adapter")
        opened.load_adapter("half", site.folder / "half")
        yield opened


def test_adapters_are_switched_while_it_runs_and_give_the_runtimes_tokens(
    site: Site, runtime: Runtime, page: Page
) -> None:
    page.open(site, "decoder")
    page.add("small/adapter")
    page.add("half")
    found = {}
    for adapter in ("a", "small", "b", None, "half", "small"):
        page.choose(adapter)
        for prompt in (PROMPT, SPELLED):
            (expected,) = runtime.generate([prompt], adapter)
            assert page.token_ids(prompt) == list(expected.token_ids), (adapter, prompt)
            assert page.tab.text_content("#answer") == expected.text
        found[adapter] = expected.token_ids
    assert len({found["a"], found["small"], found["b"], found[None]}) == 4
    assert page.tab.get_attribute("#switched", "data-from") == "memory"


def test_the_base_is_fetched_once(site: Site, decoder: Path, page: Page) -> None:
    page.open(site, "decoder")
    assert "from the network" in page.tab.text_content("#opened")
    site.asked.clear()
    page.open(site, "decoder")
    assert "out of this browser" in page.tab.text_content("#opened")
    assert [path for path in site.asked if path.startswith("/decoder/")] == [
        "/decoder/edgetune.json"
    ]
    page.tab.click("#forget")
    page.idle()
    page.open(site, "decoder")
    assert "/decoder/model.onnx.data" in site.asked


def test_labels_and_scores_are_the_runtimes(site: Site, tiny_encoder: Path, page: Page) -> None:
    bundle = encoder_bundle(tiny_encoder)
    shutil.copytree(bundle, site.folder / "encoder")
    unsure = site.folder / "unsure"
    shutil.copytree(bundle / "adapters" / "intent", unsure)
    metadata = json.loads((unsure / "edgetune_adapter.json").read_text())
    metadata["confidence"] = {"temperature": 2.5, "threshold": 0.99}
    (unsure / "edgetune_adapter.json").write_text(json.dumps(metadata))
    page.open(site, "encoder")
    page.add("unsure")
    with Runtime.open(bundle, threads=1) as runtime:
        runtime.load_adapter("unsure", unsure)
        for adapter in ("intent", "mood", "unsure"):
            page.choose(adapter)
            page.ask("Turn on my card!")
            (expected,) = runtime.classify(["Turn on my card!"], adapter)
            bars = page.tab.query_selector_all(".bar")
            names = [bar.query_selector("span").text_content() for bar in bars]
            scores = [float(bar.get_attribute("data-score")) for bar in bars]
            assert dict(zip(names, scores, strict=True)) == pytest.approx(expected.scores, abs=1e-4)
            assert names[0] == expected.likeliest
            assert page.tab.get_attribute("#answer", "data-label") == (expected.label or "")
    assert expected.label is None
    page.choose(None)
    page.ask("Turn on my card!")
    assert page.error == "choose an adapter: this base alone gives no answers"


def damaged(site: Site, bundle: Path, name: str) -> Path:
    """A copy of a bundle in the site, to be damaged."""
    return Path(shutil.copytree(bundle, site.folder / name))


def test_a_file_that_was_changed_is_not_used(site: Site, decoder: Path, page: Page) -> None:
    folder = damaged(site, decoder, "changed")
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    page.open(site, "changed")
    expected = sha256_file(decoder / "model.onnx.data")[:12]
    assert page.error.startswith(f"model.onnx.data: expected sha256 {expected}…, got ")
    (folder / "model.onnx.data").write_bytes(data[:-1])
    page.open(site, "changed")
    assert "bytes, got" in page.error


def other_base(folder: Path) -> None:
    path = folder / "edgetune_adapter.json"
    metadata = json.loads(path.read_text())
    metadata["base"]["digest"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(metadata))


def dora(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    (folder / "edgetune_adapter.json").unlink()


def half_a_file(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    (folder / "edgetune_adapter.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage, line",
    [
        (other_base, "trained on another base: expected "),
        (dora, "use_dora is set: adapter inputs take plain LoRA"),
        (half_a_file, "a safetensors file that is not whole"),
        (no_weights, "adapter_model.safetensors: the server says 404"),
    ],
)
def test_a_wrong_adapter_is_one_line_and_the_others_go_on(
    damage: Any, line: str, site: Site, decoder: Path, page: Page
) -> None:
    name = f"wrong-{damage.__name__}"
    damage(Path(shutil.copytree(decoder / "adapters" / "a", site.folder / name)))
    page.open(site, "decoder")
    page.add(name)
    assert line in page.error and "\n" not in page.error
    page.choose("b")
    assert page.token_ids(PROMPT)


def test_a_wrong_address_is_one_line(site: Site, page: Page) -> None:
    page.open(site, "nowhere")
    assert page.error.endswith("/nowhere/edgetune.json: the server says 404")
