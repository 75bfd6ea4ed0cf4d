"""A real Prometheus has each sample once: of killed shippers, and of a clock that stands still.

Patterns and limits as in tests/crash/test_repeats.py and tests/crash/test_clock.py.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from tests.crash.test_clock import LOGGED, STANDS_STILL
from tests.crash.test_repeats import EXPECTED, ROWS, check_repeats, environ
from tests.mortal_shipper import logged_by_ranks, ship_with_deaths
from tests.programs import finished
from tests.servers import recording_proxy
from tests.shipping import until
from tests.stack.prometheus_server import shipped
from tracelet import ids
from tracelet.backends import Prometheus
from tracelet.destinations import to_destination
from tracelet.spool import store
from tracelet.spool.lease import shipper_alive


def test_prometheus_has_each_sample_once_and_gets_the_same_bytes_again(tmp_path: Path) -> None:
    run_id = ids.new_run_id()
    with shipped(tmp_path / "prometheus") as server, recording_proxy(server.at) as proxy:
        folder = store.make_folder(store.run_folder(Path(os.environ["TRACELET_DIR"]), run_id))
        destination, _ = to_destination(Prometheus(proxy.uri), {}, tmp_path)
        logged_by_ranks(folder, run_id, [destination], ROWS)
        assert ship_with_deaths(folder, environ()) >= 2
        assert {seen.status for seen in proxy.seen} == {200}
        kept: Counter[str] = Counter()
        for each in server.samples(f'{{tracelet_run_id="{run_id}",__name__=~"ml_.*"}}'):
            kept[each.labels["tracelet_metric_key"]] += len(each.values)
        assert kept == EXPECTED
        # Gzip is without a time, so equal bytes are equal requests; signs of life are small, and each its own.
        check_repeats([seen.body for seen in proxy.seen if len(seen.body) > 1500])


def test_points_of_one_nanosecond_are_all_there_and_none_twice(tmp_path: Path, clean_environment: Path) -> None:
    with shipped(tmp_path / "prometheus") as server:
        done = finished(tmp_path, STANDS_STILL, server.at, limit_s=120)
        assert done.returncode == 0, done.stderr
        folder = store.run_folder(clean_environment, "still")
        until(lambda: shipper_alive(folder) is None, 60)
        assert not list(folder.glob("rejected-*"))
        kept: Counter[tuple[str, str, int]] = Counter()
        for key in ("equal", "nan", "different", "alternating"):
            mine = f'tracelet_run_id="still",tracelet_metric_key="{key}"'
            (given,) = server.samples(f'{{{mine},__name__=~"ml_.*"}}')
            (iteration,) = server.samples(f'{{{mine},__name__="tracelet_iteration"}}')
            assert given.values.keys() == iteration.values.keys(), "two gauges, with the same times"
            kept.update((key, str(value), int(iteration.values[at])) for at, value in given.values.items())
        assert kept == LOGGED
