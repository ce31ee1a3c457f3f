"""A server that follows a folder: versions come, are compared on requests asked again, go back."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import CommandLine
from rollout_helpers import broken, follow, publish
from runtime_helpers import decoder_bundle, encoder_bundle
from server_helpers import Running, serve, until
from signature_helpers import Keys, make_keys

from edgetune.cli.follow import followed, state_beside, take_over
from edgetune.core.errors import InputError, OutputError
from edgetune.runtime.rollout.rollout import AliasRollout
from edgetune.runtime.rollout.trial import RANGES, RolloutBounds, parse_bounds
from edgetune.runtime.signature.keys import read_private_key


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


def rollout(running: Running, alias: str) -> AliasRollout:
    return running.service.rollouts[alias]


def test_a_good_version_is_kept_and_a_broken_one_goes_back(
    tiny_encoder: Path, keys: Keys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place, adapter = tmp_path / "source", encoder_bundle(tiny_encoder) / "adapters" / "mood"
    key = read_private_key(keys.private)

    def ask() -> tuple[int, str]:
        answer = running.post("/classify", {"model": "mood", "input": "hello"})
        return answer.status_code, answer.json().get("model", "")

    with serve(encoder_bundle(tiny_encoder)) as running:
        publish(adapter, place, key=key, version=2)
        with follow(running, "mood", place, tmp_path / "disk", signed_by=keys.public):
            own = rollout(running, "mood")
            until(lambda: own.state.phase == "trial")
            assert {ask() for _ in range(20)} == {(200, "mood"), (200, "mood@v2")}
            trial = own._trial
            assert trial is not None
            until(lambda: trial.compared)
            assert trial.alike == trial.compared
            until(lambda: ask()[0] == 200 and own.state.phase == "settled")
            assert ask() == (200, "mood@v2")
            publish(broken(adapter, tmp_path / "broken"), place, key=key, version=3)
            until(lambda: own.state.phase == "trial")
            statuses = [ask()[0] for _ in range(40)]
            assert statuses.count(400) >= 3 and statuses[-1] == 200
            until(lambda: own.state.phase == "settled")
            assert {ask() for _ in range(20)} == {(200, "mood@v2")}
            page = running.get("/metrics").text
            assert 'edgetune_rollout_steps_total{alias="mood",step="rolled back"} 1.0' in page
        assert json.loads((tmp_path / "disk" / "mood" / "state.json").read_text())["phase"]


def test_a_decoders_versions_are_compared_on_text(tiny_decoder: Path, tmp_path: Path) -> None:
    adapters = decoder_bundle(tiny_decoder) / "adapters"
    publish(adapters / "b", tmp_path / "source")
    with serve(decoder_bundle(tiny_decoder)) as running:
        bounds = ("share=0.5", "shadow=1", "latency=1000", "requests=1000")
        with follow(running, "a", tmp_path / "source", tmp_path / "disk", follow_bounds=bounds):
            own = rollout(running, "a")
            until(lambda: own.state.phase == "trial")
            trial = own._trial
            assert trial is not None
            asked = {"model": "a", "prompt": "hello", "max_tokens": 4, "stream": True}

            def compared() -> bool:
                running.post("/v1/completions", asked)
                time.sleep(0.01)
                return trial.compared >= 3

            until(compared)
            assert trial.alike == 0  # another adapter says something else


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("home=/srv/home", "home"),
        ("/srv/channel/home/", "home"),
        ("oci://registry.example:5000/acme/home:stable", "home"),
        ("tea=oci://registry.example/acme/home:stable", "tea"),
        ("https://example.org/home", "home"),
    ],
)
def test_a_source_has_a_name(text: str, name: str) -> None:
    assert followed(text)[0] == name


def test_the_state_has_a_folder_for_each_name_and_stays_where_a_link_is(tmp_path: Path) -> None:
    for slot in "ab":
        (tmp_path / slot).mkdir()
    link = tmp_path / "current"
    link.symlink_to("a")
    assert state_beside(link) == tmp_path / "current.rollout"
    assert state_beside(Path("x.v1")) != state_beside(Path("x.v2"))
    assert state_beside(Path("x/..")) == Path.cwd().with_name(f"{Path.cwd().name}.rollout")


def test_a_state_from_before_links_had_one_of_their_own_is_taken_over(tmp_path: Path) -> None:
    for name in ("a", "home.v1", "other", "other.v2"):
        (tmp_path / name).mkdir()
    for name in ("a", "home", "other"):
        (tmp_path / f"{name}.rollout").mkdir()
        (tmp_path / f"{name}.rollout" / "of").write_text(name)
    (tmp_path / "current").symlink_to("a")
    for name, of in (("current", "a"), ("home.v1", "home"), ("other.v2", None)):
        state = state_beside(tmp_path / name)
        take_over(state, tmp_path / name)
        assert (state / "of").read_text() == of if of else not state.exists()
    (tmp_path / "a.rollout").mkdir()
    take_over(tmp_path / "current.rollout", tmp_path / "current")  # it has one
    assert (tmp_path / "current.rollout" / "of").read_text() == "a"
    assert (tmp_path / "other.rollout" / "of").read_text() == "other"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("share=0", "share is out of its range (expected a number from 0.001 to 1, got 0)"),
        ("errors=2", "errors is out of its range (expected a number from 0 to 1, got 2)"),
        ("requests=0", "expected a number from 1 to 1e+09"),
        ("latency=fast", "expected a number from 0 to 1e+09, got fast"),
        ("speed=1", "KEY is one of share, shadow, requests"),
    ],
)
def test_a_bound_out_of_its_range_says_the_range(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_bounds((text,))
    assert said in str(error.value)


def test_every_bound_has_a_range_that_its_default_is_in() -> None:
    defaults = asdict(RolloutBounds())
    assert set(defaults) == set(RANGES)
    assert all(low <= defaults[key] <= high for key, (low, high) in RANGES.items())


def test_a_second_server_with_the_same_state_is_refused_in_one_line(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    adapter = encoder_bundle(tiny_encoder) / "adapters" / "mood"
    publish(adapter, tmp_path / "source")
    with serve(encoder_bundle(tiny_encoder)) as running:
        with follow(running, "mood", tmp_path / "source", tmp_path / "disk"):
            again = follow(running, "mood", tmp_path / "source", tmp_path / "disk")
            with pytest.raises(OutputError, match="Stop the other server") as error:
                again.__enter__()
            assert "\n" not in str(error.value)
            until(lambda: rollout(running, "mood").state.phase == "trial")
        state = json.loads((tmp_path / "disk" / "mood" / "state.json").read_text())
        assert (state["phase"], state["attempts"]) == ("trial", {})  # a stop is no attempt
        with follow(running, "mood", tmp_path / "source", tmp_path / "disk"):
            pass  # the first one has ended


@pytest.mark.parametrize(
    "arguments",
    [
        ("--follow", "a=x", "--follow", "a=y"),
        ("--follow", "a=x", "--follow", "oci://host/team/A:stable"),
        ("--follow", "=x"),
        ("--follow", "../"),
        ("--follow", "a=x", "--follow-bound", "share=0"),
        ("--follow", "a=x", "--follow-bound", "speed=1"),
        ("--follow", "a=x", "--follow-bound", "errors=2"),
        ("--follow", "a=x", "--budget", "speed=1"),
        ("--follow", "a=x", "--follow-state", "/dev/null/x"),
    ],
)
def test_bad_options_are_one_line(
    tiny_decoder: Path, command_line: CommandLine, arguments: tuple[str, ...]
) -> None:
    code, _, err = command_line("serve", decoder_bundle(tiny_decoder), "--port", 0, *arguments)
    assert code == 2 and "Traceback" not in err
