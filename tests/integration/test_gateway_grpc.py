"""Clients of gRPC that are slow, silent or impatient: they get their answer, and cost nobody else anything."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import pytest

from tests.gateway_fakes import Doorway, points_request
from tests.shipping import until
from tracelet.gateway.callers import Caller
from tracelet.gateway.grpc_service import GrpcDoor
from tracelet.gateway.limits import Limits
from tracelet.otlp.decode import Decoded

METHOD = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
POINTS = points_request().SerializeToString()


class Server:
    """The gRPC service over an intake that remembers, on a free port, in a thread with a loop of its own."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.door = Doorway(folder, limits=limits)
        self.address = ""
        self._pool = ThreadPoolExecutor(2)
        self._ready = threading.Event()
        self._stop: Future[float] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        grpc_door = self.grpc_door = GrpcDoor(self.door.reception, self._pool)
        self.address = f"127.0.0.1:{grpc_door.server.add_insecure_port('127.0.0.1:0')}"
        await grpc_door.server.start()
        self._ready.set()
        await grpc_door.close(await asyncio.wrap_future(self._stop))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._stop.done():
            self.stop(0.0)
        self._thread.join()
        self._pool.shutdown()
        self.door.close()

    def stop(self, grace_s: float) -> None:
        """Begin to close the door."""
        self._stop.set_result(grace_s)

    @property
    def in_flight(self) -> int:
        return self.door.reception.budget.in_flight

    def refused(self, reason: str) -> float:
        return self.door.number(f'refused_total{{reason="{reason}"}}')


class Silent:
    """A call that has begun and says nothing until `hang_up`."""

    def __init__(self, channel: grpc.Channel, metadata: Any = ()) -> None:
        self._ends = threading.Event()
        self.future = channel.stream_unary(METHOD).future(self._nothing(), metadata=metadata)

    def _nothing(self) -> Iterator[bytes]:
        self._ends.wait(60)
        yield from ()

    def hang_up(self) -> None:
        self._ends.set()
        self.future.cancel()


class Busy:
    """An intake's rule that holds every request until it is told otherwise."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.may_go = threading.Event()

    def __call__(self, decoded: Decoded, caller: Caller) -> None:
        self.entered.release()
        assert self.may_go.wait(60)


def export(address: str, body: bytes = POINTS, **options: Any) -> None:
    with grpc.insecure_channel(address) as channel:
        channel.unary_unary(METHOD)(body, **{"timeout": 30, **options})


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Server]:
    """Four messages at once; whoever holds a place for nothing goes as soon as another wants it."""
    with Server(tmp_path, Limits(max_body=1_000_000, max_in_flight=4_000_000, crowded_s=0.05)) as server:
        yield server


def test_calls_that_say_nothing_keep_nobody_out(small: Server) -> None:
    with grpc.insecure_channel(small.address) as channel:
        silent = [Silent(channel) for _ in range(20)]
        until(lambda: small.refused("busy") >= 16)  # they make way for each other, down to the last four
        export(small.address)
        for one in silent:
            one.hang_up()
    assert len(small.door.intake.taken) == 1


def test_a_call_that_makes_way_is_told_to_come_again(small: Server) -> None:
    with grpc.insecure_channel(small.address) as channel:
        silent = [Silent(channel) for _ in range(5)]
        ended = until(lambda: next((one.future for one in silent if one.future.done()), None))
        assert ended.code() is grpc.StatusCode.UNAVAILABLE
        assert "grpc-status-details-bin" in dict(ended.trailing_metadata())
        for one in silent:
            one.hang_up()


def test_a_call_without_a_message_ends_when_its_time_is_over(tmp_path: Path) -> None:
    with Server(tmp_path, Limits(body_timeout_s=0.1)) as server, grpc.insecure_channel(server.address) as channel:
        ours = Silent(channel, (("tracelet.wire.version", "1.0"),))
        other = Silent(channel)
        assert ours.future.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert other.future.exception().code() is grpc.StatusCode.UNAVAILABLE
        assert server.refused("slow") == 2
        ours.hang_up()
        other.hang_up()
        export(server.address)


def test_a_call_that_ends_without_a_message_is_malformed(small: Server) -> None:
    with grpc.insecure_channel(small.address) as channel, pytest.raises(grpc.RpcError) as error:
        channel.stream_unary(METHOD)(iter(()), timeout=30)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("how", ["deadline", "cancel", "connection"])
def test_whoever_leaves_before_the_answer_holds_memory_only_as_long_as_the_work_goes_on(
    small: Server, how: str
) -> None:
    busy = small.door.intake.rule = Busy()
    body = gzip.compress(POINTS + b"\xfa\x01" + bytes([0xFF, 0x7F]) + bytes(0x3FFF))
    for turn in range(1, 4):
        channel = grpc.insecure_channel(small.address)
        call = channel.unary_unary(METHOD).future(body, timeout=0.5 if how == "deadline" else 60)
        assert busy.entered.acquire(timeout=30)
        held = small.in_flight
        assert held > 0x3FFF
        if how == "cancel":
            call.cancel()
        elif how == "connection":
            channel.close()
        else:
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda turn=turn: small.refused("client left") == turn)
        assert small.in_flight == held  # it is in memory still
        busy.may_go.set()
        until(lambda: small.in_flight == 0)
        busy.may_go.clear()
        channel.close()
    busy.may_go.set()
    export(small.address)
    assert small.in_flight == 0


def test_work_that_has_not_begun_when_its_client_leaves_is_not_begun(small: Server) -> None:
    busy = small.door.intake.rule = Busy()
    with grpc.insecure_channel(small.address) as channel:
        export_ = channel.unary_unary(METHOD)
        working = [export_.future(POINTS, timeout=60) for _ in range(2)]  # all threads there are
        for _ in working:
            assert busy.entered.acquire(timeout=30)
        left = [export_.future(POINTS, timeout=60) for _ in range(4)]
        until(lambda: small.in_flight == 6 * len(POINTS))
        for call in left:
            call.cancel()
        until(lambda: small.in_flight == 2 * len(POINTS))
        busy.may_go.set()
        for call in working:
            call.result(30)
    assert len(small.door.intake.taken) == 2
    assert small.in_flight == 0


def test_calls_without_a_message_are_told_to_come_again_when_the_door_closes(small: Server) -> None:
    with grpc.insecure_channel(small.address) as channel:
        silent = [Silent(channel) for _ in range(3)]
        until(lambda: len(small.grpc_door._service.places._holders) == 3)
        small.door.reception.stopping.set()
        small.stop(60.0)
        for one in silent:
            assert one.future.exception(30).code() is grpc.StatusCode.UNAVAILABLE
        assert small.refused("stopping") == 3
