"""Headers that stand in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracelet.exporters.headers_file import headers_in


@pytest.mark.parametrize(
    ("text", "headers"),
    [
        ("abc.def-123", {"authorization": "Bearer abc.def-123"}),
        ("\ufeffabc==\r\n", {"authorization": "Bearer abc=="}),
        ("# of this hour\n\nabc\n", {"authorization": "Bearer abc"}),
        ("X-Key: a b:c\n x-team :ml \n", {"x-key": "a b:c", "x-team": "ml"}),
        ("Authorization: Bearer abc", {"authorization": "Bearer abc"}),
        ("x-empty:", {"x-empty": ""}),
    ],
)
def test_a_file_holds_a_token_or_lines_of_headers(tmp_path: Path, text: str, headers: dict[str, str]) -> None:
    file = tmp_path / "headers"
    file.write_text(text, encoding="utf-8")
    assert headers_in(str(file)) == headers


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n\n",
        b"# only words",
        b"hunter2 hunter2",
        b"x-key: 1\nhunter2",
        b"hun ter2: 1",
        b": hunter2",
        b"\xff\xfehunter2",
    ],
)
def test_a_file_that_is_neither_is_refused_without_what_stands_in_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "headers"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="headers") as refused:
        headers_in(str(file))
    assert "hunter2" not in str(refused.value)
    assert "hun ter2" not in str(refused.value)
