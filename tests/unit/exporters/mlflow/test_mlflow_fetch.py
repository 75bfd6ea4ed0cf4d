"""Which addresses a gateway opens, which it never does, and that what it reads is what the event describes."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tracelet.errors import ConfigError
from tracelet.exporters.artifact_names import gateway_uri, held_at
from tracelet.exporters.mlflow.fetch import OnlyReference, Sources
from tracelet.exporters.original import Changed
from tracelet.records import ArtifactLogged

BYTES = b"weights" * 100
SHA = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A shared folder with one artifact, and beside it what nobody may have."""
    folder = tmp_path / "shared"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "best model.pt").write_bytes(BYTES)
    (tmp_path / "shared-evil").mkdir()
    (tmp_path / "shared-evil" / "best.pt").write_bytes(BYTES)
    (tmp_path / "secret").write_bytes(BYTES)
    return folder


def logged(uri: str | None, **other: Any) -> ArtifactLogged:
    fields: dict[str, Any] = {"size": len(BYTES), "sha256": SHA, "media_type": "text/plain", **other}
    return ArtifactLogged(1, "models/best.pt", "", None, uri=uri, **fields)


def why_not(sources: Sources, uri: str | None, **other: Any) -> str:
    with pytest.raises(OnlyReference) as no:
        sources.open("run", logged(uri, **other))
    return str(no.value)


def content(sources: Sources, uri: str, run: str = "run", **other: Any) -> bytes:
    fetched = sources.open(run, logged(uri, **other))
    try:
        fetched.digest()
        return fetched.file.read()
    finally:
        fetched.close()


def test_a_file_below_a_prefix_is_opened(shared: Path) -> None:
    for prefix in (f"file://{shared}", f"file://{shared}/", str(shared), f"file://{shared}/run"):
        sources = Sources({"artifact_prefixes": ["s3://elsewhere", prefix]})
        assert content(sources, f"file://{shared}/run/best%20model.pt") == BYTES
        assert content(sources, f"file://localhost{shared}/run/best%20model.pt") == BYTES


def test_without_a_prefix_nothing_is_opened(shared: Path) -> None:
    for spec in ({}, {"artifact_prefixes": []}, {"artifact_prefixes": None}):
        assert "--artifact-prefix" in why_not(Sources(spec), f"file://{shared}/run/best%20model.pt")


@pytest.mark.parametrize(
    "planted",
    [
        "file:///etc/passwd",
        "file://{shared}-evil/best.pt",
        "file://{shared}/../secret",
        "file://{shared}/run/../../secret",
        "file://{shared}/%2e%2e/secret",
        "file://{shared}/%2E%2e%2fsecret",
        "file://{shared}/%252e%252e/secret",
        "file://{shared}/run%2f..%2f..%2fsecret",
        "file://{shared}//run/best%20model.pt",
        "file://{shared}/./run/best%20model.pt",
        "file://{shared}",
        "file://{shared}/",
        "file://otherhost{shared}/run/best%20model.pt",
        "file://user@localhost{shared}/run/best%20model.pt",
        "file:{shared}/run/../../secret",
        "file://{shared}/run/best%20model.pt?x=1",
        "file://{shared}/run/best%20model.pt#x",
        "file://{shared}/run/best model.pt\n",
        "file://{shared}/run/%00",
        "FILE:///etc/passwd",
        "local://{shared}/../secret",
        "{shared}/run/best model.pt",
        "/etc/passwd",
        "http://169.254.169.254/latest/meta-data/",
        "https://example.com/x",
        "s3://other-bucket/key",
        "s3://bucket-evil/team/key",
        "s3://bucket/teams/key",
        "s3://bucket/team/../other/key",
        "s3://bucket/team/%2e%2e/other/key",
        "s3://bucket/team/x::file:///etc/passwd",
        "simplecache::file:///etc/passwd",
        "s3://key:secret@bucket/team/key",
        "s3://bucket\\@evil/team/key",
        "tracelet-gateway:sha256:../../../etc/passwd",
        "tracelet-gateway:sha256:" + "0" * 64,
        "tracelet-gateway:",
        "data:text/plain,hello",
        "",
        None,
    ],
)
def test_a_planted_address_is_never_opened(shared: Path, planted: str | None) -> None:
    sources = Sources(
        {"artifact_prefixes": [f"file://{shared}", "s3://bucket/team"], "artifact_dir": str(shared.parent / "held")}
    )
    (shared.parent / "held").mkdir()
    assert why_not(sources, planted if planted is None else planted.replace("{shared}", str(shared)), size=700)


def test_links_devices_and_pipes_are_not_followed_wherever_they_lead(shared: Path) -> None:
    sources = Sources({"artifact_prefixes": [f"file://{shared}"]})
    (shared / "out").symlink_to(shared.parent / "secret")
    (shared / "folder").symlink_to(shared.parent)
    (shared / "inside").symlink_to(shared / "run" / "best model.pt")
    (shared / "null").symlink_to("/dev/null")
    os.mkfifo(shared / "pipe")
    begun = time.monotonic()
    for planted in ("out", "folder/secret", "inside", "null", "pipe", "run"):
        assert why_not(sources, f"file://{shared}/{planted}")
    with _listening(shared / "socket"):
        assert why_not(sources, f"file://{shared}/socket")
    assert time.monotonic() - begun < 5  # a pipe's other end was not waited for


@contextmanager
def _listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's path may be short only
        try:
            listener.bind(path.name)
        finally:
            os.chdir(before)
        yield


def test_a_folder_that_becomes_a_link_meanwhile_never_leads_out(shared: Path) -> None:
    sources = Sources({"artifact_prefixes": [f"file://{shared}"]})
    (shared.parent / "outside").mkdir()
    (shared.parent / "outside" / "best model.pt").write_bytes(b"X" * len(BYTES))
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.rename(shared / "run", shared / "aside")
            os.symlink(shared.parent / "outside", shared / "run")
            os.unlink(shared / "run")
            os.rename(shared / "aside", shared / "run")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        opened = 0
        until = time.monotonic() + 60
        while opened < 200 and time.monotonic() < until:
            try:
                assert content(sources, f"file://{shared}/run/best%20model.pt") == BYTES
                opened += 1
            except OnlyReference:
                continue
    finally:
        stop.set()
        thread.join()
    assert opened


def test_bytes_of_another_digest_or_size_are_not_taken(shared: Path) -> None:
    sources = Sources({"artifact_prefixes": [f"file://{shared}"]})
    uri = f"file://{shared}/run/best%20model.pt"
    assert "bytes are there" in why_not(sources, uri, size=len(BYTES) - 1)
    with pytest.raises(Changed):
        content(sources, uri, sha256="0" * 64)
    assert content(sources, uri, sha256=None) == BYTES


def test_a_file_exchanged_while_it_is_sent_is_noticed(shared: Path) -> None:
    fetched = Sources({"artifact_prefixes": [f"file://{shared}"]}).open(
        "run", logged(f"file://{shared}/run/best%20model.pt")
    )
    fetched.digest()
    (shared / "run" / "best model.pt").write_bytes(BYTES[:-1] + b"!")
    while fetched.file.read(100):
        pass
    with pytest.raises(Changed):
        fetched.check()
    fetched.close()


def test_what_is_too_large_stays_where_it_is(shared: Path) -> None:
    uri = f"file://{shared}/run/best%20model.pt"
    sources = Sources({"artifact_prefixes": [f"file://{shared}"], "artifact_max_bytes": len(BYTES) - 1})
    assert "more than this gateway copies" in why_not(sources, uri)
    sources = Sources({"artifact_prefixes": [f"file://{shared}"], "artifact_max_bytes": len(BYTES)})
    assert content(sources, uri) == BYTES


def test_bytes_at_the_gateway_belong_to_their_run(tmp_path: Path) -> None:
    held = tmp_path / held_at("mine", SHA)
    held.parent.mkdir()
    held.write_bytes(BYTES)
    sources = Sources({"artifact_dir": str(tmp_path)})
    assert content(sources, gateway_uri(SHA), run="mine") == BYTES
    with pytest.raises(OnlyReference):
        sources.open("another", logged(gateway_uri(SHA)))
    with pytest.raises(OnlyReference):
        sources.open("mine", replace(logged(gateway_uri(SHA)), sha256="0" * 64))
    with pytest.raises(OnlyReference):
        Sources({}).open("mine", logged(gateway_uri(SHA)))


def test_a_store_is_opened_through_fsspec_below_its_prefix_only() -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/bucket/team/a.bin", BYTES)
    fsspec.filesystem("memory").pipe("/bucket/other/a.bin", BYTES)
    sources = Sources({"artifact_prefixes": ["memory://bucket/team"]})
    assert content(sources, "memory://bucket/team/a.bin") == BYTES
    assert "nothing is there" in why_not(sources, "memory://bucket/team/b.bin")
    assert why_not(sources, "memory://bucket/other/a.bin")


@pytest.mark.parametrize(
    "wrong", ["", "shared", "http://host/x", "https://host", "file:///", "/", "local:///x", "s3://b/x::file:///", "x y"]
)
def test_what_can_not_be_a_prefix_is_said_at_once(wrong: str) -> None:
    with pytest.raises(ConfigError):
        Sources({"artifact_prefixes": [wrong]})
