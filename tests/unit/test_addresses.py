"""Addresses without credentials, also mistyped ones; what has none is not touched."""

from __future__ import annotations

import pytest

from tracelet.addresses import MASK, shown_address, user_info, without_credentials


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////x/mlflow.db",
        "sqlite:///a@b.db",
        "http://h:1/p?q=1",
        "http://h:1/a@b",
        "http://h/a@b",
        "file:/a@b/mlruns",
        "databricks",
        "",
        "mlruns",
        "/shared/u@lab/mlruns",
        "http://[::1]:5000",
    ],
)
def test_an_address_without_credentials_is_untouched(uri: str) -> None:
    assert (without_credentials(uri), user_info(uri)) == (uri, "")


@pytest.mark.parametrize(
    ("mistyped", "shown"),
    [
        ("u:pw@h:4318", "h:4318"),
        ("pw@h", "h"),
        ("u:p/w@h:4318/v1", "h:4318/v1"),
        ("u:p#w@h", "h"),
        ("u:p@w@h", "h"),
        ("http://u:p,w@h", "http://h"),
        ("u:pw@h/x?token=pw&a=1", "h/x?a=1"),
        ("htp://u:pw@h", "htp://h"),
        ("http://u:p/w@h", "http://h"),
        ("http://u:p?w@h", "http://h"),
        ("http://u:pw@h:notaport", "http://h:notaport"),
        ("postgresql://ml:p/w@db/runs", "postgresql://ml@db/runs"),
    ],
)
def test_a_mistyped_address_is_shown_without_what_stands_before_its_host(mistyped: str, shown: str) -> None:
    assert without_credentials(mistyped) == shown
    assert shown_address(mistyped) == shown


def test_what_cannot_be_taken_apart_is_masked() -> None:
    with pytest.raises(ValueError, match="IPv6"):
        without_credentials("http://[u:pw@h")
    assert shown_address("http://[u:pw@h") == f"http://{MASK}"
