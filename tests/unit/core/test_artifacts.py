"""Artifacts: the copy at the call, references, names that stay inside the run, and nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tracelet.core import artifacts
from tracelet.core.artifacts import destination, take
from tracelet.errors import FileMissing, InvalidValue, SpoolError, SpoolFull
from tracelet.guard import Guard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    path.write_bytes(b"weights" * 1000)
    return path


def copies(folder: Path) -> list[Path]:
    return sorted((folder / "artifacts").iterdir()) if (folder / "artifacts").exists() else []


def test_the_bytes_are_those_of_the_call_whatever_is_written_later(folder: Path, model: Path) -> None:
    before = model.read_bytes()
    (record,) = take(model, None, folder, clock=lambda: 17)
    model.write_bytes(b"other")
    assert record.stored is not None
    assert (folder / record.stored).read_bytes() == before
    assert (record.size, record.sha256) == (len(before), hashlib.sha256(before).hexdigest())
    assert (record.path, record.source, record.time_unix_nano) == ("model.pth", str(model), 17)
    assert (record.mtime_ns, record.inode) == (None, None)


def test_copies_are_the_users_alone_whatever_the_umask(folder: Path, model: Path) -> None:
    before = os.umask(0)
    try:
        (record,) = take(model, None, folder)
    finally:
        os.umask(before)
    assert (folder / "artifacts").stat().st_mode & 0o777 == 0o700
    assert (folder / str(record.stored)).stat().st_mode & 0o777 == 0o600


def test_rewriting_in_place_does_not_reach_the_copy(folder: Path, model: Path) -> None:
    (record,) = take(model, None, folder)
    with model.open("r+b") as file:
        file.write(b"WEIGHTS")
    assert (folder / str(record.stored)).read_bytes().startswith(b"weights")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (None, "model.pth"),
        ("models/checkpoint_epoch_10.pth", "models/checkpoint_epoch_10.pth"),
        ("models/", "models/model.pth"),
        ("./", "model.pth"),
        (".", "model.pth"),
        ("a//./b.pth", "a/b.pth"),
        (Path("a/b.pth"), "a/b.pth"),
        ("模型/最好.pth", "模型/最好.pth"),
        ("a..b/..c", "a..b/..c"),
    ],
)
def test_the_destination_is_the_file_and_a_slash_at_its_end_makes_it_a_folder(
    folder: Path, model: Path, path: str | Path | None, name: str
) -> None:
    assert [record.path for record in take(model, path, folder)] == [name]


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../x", "a/../../x", "a/..", "..", "a\\..\\x", "C:\\x", "C:/x", "a\0b", "", " ", "\ud800", 5],
)
def test_a_destination_outside_the_run_is_refused(folder: Path, model: Path, path: str) -> None:
    with pytest.raises((InvalidValue, TypeError)):
        take(model, path, folder)
    assert copies(folder) == []


def test_destination_is_normal() -> None:
    assert [destination(path) for path in ("a/", "./a", "a//b", ".")] == ["a", "a", "a/b", ""]


def test_a_missing_file_raises_at_once_as_a_traceleterror_and_as_what_python_raises(folder: Path) -> None:
    for missing in (folder / "nothing", folder / "nothing" / "below", "a\0b"):
        with pytest.raises(InvalidValue):
            take(missing, None, folder)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*nothing") as caught:
        take(folder / "nothing", None, folder)
    assert isinstance(caught.value, FileMissing)
    assert caught.value.facts == {"path": str(folder / "nothing")}


def test_a_relative_path_and_a_path_of_bytes_are_files(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    for source in ("model.pth", b"./model.pth"):
        assert [record.source for record in take(source, None, folder)] == [str(model)]  # type: ignore[arg-type]


def test_an_empty_file_is_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (record,) = take(tmp_path / "empty", None, folder)
    assert (record.size, record.sha256) == (0, hashlib.sha256().hexdigest())


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    (made / "sub" / "deep").mkdir(parents=True)
    (made / "b.txt").write_text("b")
    (made / "sub" / "a.json").write_text("{}")
    (made / "sub" / "deep" / "c").write_text("c")
    return made


@pytest.mark.parametrize(
    ("path", "prefix"),
    [(None, "checkpoint/"), ("models/best", "models/best/"), ("models/best/", "models/best/"), (".", "")],
)
def test_a_folder_is_logged_with_all_below_it(folder: Path, tree: Path, path: str | None, prefix: str) -> None:
    records = take(tree, path, folder)
    assert [record.path for record in records] == [prefix + name for name in ("b.txt", "sub/a.json", "sub/deep/c")]
    assert [record.media_type for record in records] == ["text/plain", "application/json", "application/octet-stream"]
    assert len(copies(folder)) == 3


def test_links_are_followed_and_loops_and_broken_ones_are_left_out_with_a_word(
    folder: Path, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tree / "sub" / "loop").symlink_to(tree)
    (tree / "broken").symlink_to(tree / "nowhere")
    (tree / "linked").symlink_to(tree / "sub" / "deep")
    os.mkfifo(tree / "pipe")
    with caplog.at_level(logging.WARNING, "tracelet"):
        records = take(tree, "t", folder)
    assert [record.path for record in records] == ["t/b.txt", "t/linked/c", "t/sub/a.json", "t/sub/deep/c"]
    assert sorted(message.getMessage().split()[1].rsplit("/", 1)[1].strip("'") for message in caplog.records) == [
        "broken",
        "loop",
        "pipe",
    ]


def test_an_empty_folder_logs_nothing_and_says_so(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nothing in it").mkdir()
    assert take(tmp_path / "nothing in it", None, folder) == []
    assert "is an empty folder" in caplog.text


def test_names_that_no_store_could_take_are_escaped(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "odd"
    made.mkdir()
    for name in (b"back\\slash", b"not\xffutf8"):
        Path(os.fsdecode(os.path.join(os.fsencode(made), name))).touch()
    assert [record.path for record in take(made, None, folder)] == ["odd/back%5cslash", "odd/not%ffutf8"]


def test_a_pipe_is_refused_instead_of_waited_for(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidValue, match="neither a file nor a folder"):
        take(tmp_path / "pipe", None, folder)


# ---- references --------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(artifacts.REFERENCE_ABOVE + 1)  # sparse: takes no room
    return path


def has_reflinks(folder: Path, path: Path) -> bool:
    with path.open("rb") as source, (folder / "probe").open("wb") as out:
        return artifacts._reflink(source.fileno(), out.fileno())


def test_a_large_file_is_a_reference_and_said_once(
    folder: Path, large: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_reflinks(folder, large):
        pytest.skip("this file system makes reflinks, so a large file is copied")
    monkeypatch.setattr(artifacts, "_once", Guard(interval_s=float("inf")))
    (record,) = take(large, None, folder)
    take(large, None, folder)
    status = large.stat()
    assert (record.stored, record.sha256, record.size) == (None, None, status.st_size)
    assert (record.mtime_ns, record.inode) == (status.st_mtime_ns, status.st_ino)
    assert copies(folder) == []
    assert caplog.text.count("copy=True makes a copy") == 1


def test_copy_true_and_false_decide(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(artifacts, "REFERENCE_ABOVE", 10)
    (copied,) = take(model, None, folder, copy=True)
    assert copied.stored is not None
    monkeypatch.setattr(artifacts, "REFERENCE_ABOVE", 10**9)
    (referenced,) = take(model, None, folder, copy=False)
    assert referenced.stored is None
    assert referenced.inode == model.stat().st_ino


def test_a_reflink_has_the_bytes_and_their_digest(folder: Path, model: Path) -> None:
    if not has_reflinks(folder, model):
        pytest.skip("this file system makes no reflinks")
    (record,) = take(model, None, folder)
    assert (folder / str(record.stored)).read_bytes() == model.read_bytes()
    assert record.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()


# ---- when there is no room, or no permission ---------------------------------------------------------------------


def test_beyond_the_room_that_is_left_nothing_is_copied(folder: Path, tree: Path) -> None:
    assert len(take(tree, None, folder, room=4)) == 3
    with pytest.raises(SpoolFull, match="TRACELET_MAX_BYTES"):
        take(tree, None, folder, room=2)
    assert len(copies(folder)) == 3


def test_a_file_of_a_folder_that_cannot_be_read_leaves_no_copy_of_the_others(folder: Path, tree: Path) -> None:
    if os.geteuid() == 0:
        # Root reads everything: one beyond the limit of a file's size stands for it (RLIMIT_FSIZE, in a process).
        code = f"""
import resource, signal; from pathlib import Path
from tracelet.core.artifacts import take; from tracelet.errors import SpoolFull
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
Path({str(tree)!r}, "z").write_bytes(b"z" * 100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    take({str(tree)!r}, None, Path({str(folder)!r}))
except SpoolFull as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
        assert "copy=False logs a reference" in done.stdout
    else:
        (tree / "sub" / "deep" / "c").chmod(0)
        with pytest.raises(InvalidValue, match="can't be read"):
            take(tree, None, folder)
    assert copies(folder) == []


def test_a_spool_that_cannot_be_written_is_a_spool_error(folder: Path, model: Path) -> None:
    (folder / "artifacts").write_text("in the way")
    with pytest.raises(SpoolError) as caught:
        take(model, None, folder)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno in (errno.EEXIST, errno.ENOTDIR)


def test_a_copy_is_for_the_user_alone(folder: Path, model: Path) -> None:
    (record,) = take(model, None, folder)
    assert (folder / str(record.stored)).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png", "image/png"),
        ("a.json", "application/json"),
        ("a.tar.gz", "application/gzip"),
        ("a", "application/octet-stream"),
    ],
)
def test_the_media_type_is_of_the_destinations_name(folder: Path, model: Path, name: str, kind: str) -> None:
    assert [record.media_type for record in take(model, name, folder)] == [kind]
