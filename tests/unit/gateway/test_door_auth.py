"""Tokens: which are taken, when they change, and that none is ever shown."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

from tracelet.errors import ConfigError
from tracelet.gateway.auth import Auth, read_tokens
from tracelet.gateway.callers import Caller
from tracelet.gateway.limits import Refused


def bearer(token: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}", **more}


def tokens(folder: Path, text: str) -> Path:
    path = folder / "tokens.toml"
    path.write_text(text)
    return path


def entry(name: str, token: str, more: str = 'projects = ["*"]') -> str:
    return f'[[token]]\nname = "{name}"\ntoken = "{token}"\n{more}\n'


def test_without_a_file_everybody_is_taken_and_the_header_is_not_looked_at() -> None:
    auth = Auth(None)
    assert auth.caller({}) == Caller()
    assert auth.caller({"authorization": "Bearer "}) == Caller()  # a collector whose token is empty
    assert auth.caller({"tracelet.wire.version": "1.0"}).ours


def test_a_token_is_found_as_text_as_a_file_and_as_a_digest(tmp_path: Path) -> None:
    (tmp_path / "b.token").write_text("beta-token\n")
    digest = hashlib.sha256(b"gamma-token").hexdigest()
    auth = Auth(
        tokens(
            tmp_path,
            entry("a", "alpha-token", 'projects = ["vision", "speech"]')
            + '[[token]]\nname = "b"\ntoken_file = "b.token"\nprojects = ["*"]\n'
            + f'[[token]]\nname = "c"\nsha256 = "{digest}"\nprojects = ["*"]\n',
        )
    )
    assert auth.caller(bearer("alpha-token")) == Caller("a", ("vision", "speech"))
    assert auth.caller(bearer("beta-token")) == Caller("b", None)
    assert auth.caller(bearer("gamma-token")) == Caller("c", None)
    assert auth.caller({"authorization": "bearer alpha-token"}).name == "a"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic YTpi", "alpha-token", "Bearer alpha-toke", "Bearer ä"]
)
def test_no_token_or_a_wrong_one_is_401(tmp_path: Path, header: str) -> None:
    auth = Auth(tokens(tmp_path, entry("a", "alpha-token")))
    with pytest.raises(Refused) as refused:
        auth.caller({"authorization": header})
    assert refused.value.http == 401


def test_a_token_ends_when_it_expires(tmp_path: Path) -> None:
    now = [1_798_761_599.0]  # a second before
    path = tokens(tmp_path, entry("a", "alpha-token", 'projects = ["*"]\nexpires = 2027-01-01T00:00:00Z'))
    auth = Auth(path, clock=lambda: now[0])
    assert auth.caller(bearer("alpha-token")).name == "a"
    now[0] += 1
    with pytest.raises(Refused) as refused:
        auth.caller(bearer("alpha-token"))
    assert refused.value.reason == "expired token"


def test_a_changed_file_is_in_force_at_the_next_request(tmp_path: Path) -> None:
    path = tokens(tmp_path, entry("a", "old-token"))
    auth = Auth(path)
    for number in range(20):  # also within one tick of the file system's clock, and of the same length
        path.write_text(entry("a", f"tok-{number:05}"))
        assert auth.caller(bearer(f"tok-{number:05}")).name == "a"
        with pytest.raises(Refused):
            auth.caller(bearer("old-token"))


def test_while_a_rotation_goes_on_both_tokens_are_the_same_owner(tmp_path: Path) -> None:
    auth = Auth(tokens(tmp_path, entry("a", "old-token") + entry("a", "new-token")))
    assert auth.caller(bearer("old-token")) == auth.caller(bearer("new-token"))


def test_a_changed_token_file_is_seen_too(tmp_path: Path) -> None:
    (tmp_path / "b.token").write_text("one-token")
    auth = Auth(tokens(tmp_path, '[[token]]\nname = "b"\ntoken_file = "b.token"\nprojects = ["*"]\n'))
    assert auth.caller(bearer("one-token")).name == "b"
    (tmp_path / "b.token").write_text("two-token")
    assert auth.caller(bearer("two-token")).name == "b"


@pytest.mark.parametrize("broken", ["[[token", "", "x = 1", '[[token]]\nname = "a"'])
def test_a_file_that_breaks_later_leaves_the_tokens_in_force(tmp_path: Path, broken: str) -> None:
    path = tokens(tmp_path, entry("a", "old-token"))
    auth = Auth(path)
    path.write_text(broken)
    assert auth.caller(bearer("old-token")).name == "a"
    assert auth.is_bad
    path.write_text(entry("b", "new-token"))
    assert auth.caller(bearer("new-token")).name == "b"
    assert not auth.is_bad


def test_a_file_that_vanishes_leaves_the_tokens_in_force(tmp_path: Path) -> None:
    path = tokens(tmp_path, entry("a", "old-token"))
    auth = Auth(path)
    path.unlink()
    assert auth.caller(bearer("old-token")).name == "a"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "[[token]]"),
        ('[[token]]\ntoken = "sesame-token"\nprojects = ["*"]', "name"),
        ('[[token]]\nname = "a"\nprojects = ["*"]', "one of"),
        ('[[token]]\nname = "a"\ntoken = "sesame-token"\nsha256 = "aa"\nprojects = ["*"]', "one of"),
        ('[[token]]\nname = "a"\ntoken = "sesame-token"', "projects"),
        ('[[token]]\nname = "a"\ntoken = "sesame-token"\nprojects = []', "projects"),
        ('[[token]]\nname = "a"\ntoken = "sesame-token"\nprojects = "vision"', "projects"),
        ('[[token]]\nname = "a"\ntoken = "sesame-token"\nprojects = ["*"]\nexpires = 2027-01-01', "zone"),
        ('[[token]]\nname = "a"\ntoken = "sesame-token"\nprojects = ["*"]\nexpires = 2027-01-01T00:00:00', "zone"),
        ('[[token]]\nname = "a"\ntoken = "sesame-token"\nprojects = ["*"]\nproject = 1', "no field"),
        ('[[token]]\nname = "a"\nsha256 = "sesame-token"\nprojects = ["*"]', "64"),
        ('[[token]]\nname = "a"\ntoken = "  "\nprojects = ["*"]', "empty"),
        ('[[token]]\nname = "a"\ntoken_file = "nowhere"\nprojects = ["*"]', "can't be read"),
        ('[[token]]\nname = "a"\ntoken = sesame-token', "TOML"),
        ('token = "sesame-token"', "[[token]]"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_what_and_shows_no_token(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Auth(tokens(tmp_path, text))
    assert said in str(error.value)
    assert "sesame" not in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        Auth(tmp_path / "nowhere.toml")


def test_no_token_stands_in_a_log_or_a_repr(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = tokens(tmp_path, entry("a", "sesame-token"))
    auth = Auth(path)
    path.write_text(entry("a", "sesame-second", "projects = 1"))
    auth.caller(bearer("sesame-token"))
    with pytest.raises(Refused) as refused:
        auth.caller(bearer("sesame-wrong"))
    assert "sesame" not in caplog.text + repr(read_tokens(tokens(tmp_path, entry("a", "sesame-token"))))
    assert "sesame" not in str(refused.value) + repr(vars(auth))
