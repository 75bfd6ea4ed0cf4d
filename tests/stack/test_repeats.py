"""A shipper killed between every answer of a real Prometheus and its acknowledgement doubles no sample.

Pattern and limits as in tests/crash/test_repeats.py.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from tests.crash.test_repeats import EXPECTED, ROWS, check_repeats, environ
from tests.mortal_shipper import logged_by_ranks, ship_with_deaths
from tests.servers import recording_proxy
from tests.stack.prometheus_server import shipped
from tracelet import ids
from tracelet.backends import Prometheus, to_destination
from tracelet.spool import store


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
