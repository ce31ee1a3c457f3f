"""Aliases: which version answers, and that a caller meets the same one again."""

from __future__ import annotations

import pytest

from edgetune.core.errors import InputError
from edgetune.runtime.rollout.aliases import Aliases, parse_alias


def test_an_alias_of_one_version_is_that_version() -> None:
    aliases = Aliases()
    aliases.set(*parse_alias("home=home@v2"))
    assert aliases.choose("home", "anyone") == "home@v2"
    assert aliases.choose("home@v2", "anyone") is None


def test_shares_are_kept_and_a_key_stays_where_it_is() -> None:
    aliases = Aliases()
    aliases.set(*parse_alias("home=home@v1:90,home@v2:10"))
    chosen = {str(key): aliases.choose("home", str(key)) for key in range(5000)}
    assert 0.08 < list(chosen.values()).count("home@v2") / 5000 < 0.12
    aliases.set("home", {"home@v1": 0.8, "home@v2": 0.2})
    moved = {key for key, name in chosen.items() if aliases.choose("home", key) != name}
    assert {chosen[key] for key in moved} == {"home@v1"}  # whom the new one answers, it still does


def test_no_version_is_left_when_the_alias_is_taken_away() -> None:
    aliases = Aliases()
    aliases.set("home", {"v1": 1})
    assert aliases.using("v1") == "home"
    aliases.set("home", {})
    assert (aliases.choose("home", "x"), aliases.all(), aliases.using("v1")) == (None, {}, None)


@pytest.mark.parametrize(
    "text", ["", "home", "=v1", "home=", "home=a:x", "home=a:0", "home=a:1,b", "home=a:1,a:2",
             "home=a:inf", "home=a:nan", "home=a:-1,b:2", "home=:1"]
)  # fmt: skip
def test_another_form_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="cannot read --alias"):
        parse_alias(text)
