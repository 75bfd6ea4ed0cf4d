"""Real data loaders: what PyTorch's worker processes log stands in the run, whichever way they were started.

Pattern: a DataLoader of a real PyTorch with two workers, each item of its data set logged where it is loaded; a worker
is killed in the midst of it; an OTLP receiver says what came. Limit: seven minutes a program.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.programs import written
from tests.sinks import HttpSink, until
from tests.trainers.arrived import whole
from tests.trainers.environment import TELL, run, said, told

LOADER = (
    TELL
    + """
import signal, sys, tracelet
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __init__(self, exp, fatal):
        self.exp, self.fatal = exp, fatal
    def __len__(self):
        return 100
    def __getitem__(self, index):
        self.exp.log_metric("loaded", index, iteration=index)
        if index == self.fatal:
            tell(worker=os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)
        return float(index * index)

if __name__ == "__main__":
    method, epochs, fatal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    exp = tracelet.start_logging(exp_name="loader", project="trainers", backend="otlp")
    tell(run=exp.id)
    loader = DataLoader(Squares(exp, fatal), batch_size=10, num_workers=2, multiprocessing_context=method)
    for epoch in range(epochs):  # the workers of each epoch are new ones
        for batch, squares in enumerate(loader):
            exp.log_metric("mean", squares.mean(), iteration=epoch * 10 + batch)
    assert exp.stats.refused == 0
"""
)


@pytest.mark.parametrize(("method", "epochs"), [("fork", 3), ("spawn", 1), ("forkserver", 1)])
def test_what_the_workers_of_a_data_loader_log_stands_in_the_run(
    tmp_path: Path, sink: HttpSink, method: str, epochs: int
) -> None:
    written(tmp_path, LOADER)
    run(tmp_path, "train.py", method, str(epochs), "-1")
    ((run_id,),) = (one.values() for one in told(tmp_path))
    whole(sink, run_id, ["FINISHED"], 110 * epochs)
    points = Counter((point.name, point.iteration) for point in sink.points(run_id))
    assert points == Counter({("loaded", index): epochs for index in range(100)}) + Counter(
        {("mean", batch): 1 for batch in range(10 * epochs)}
    )


def test_a_loader_whose_worker_is_killed_fails_the_run_with_all_that_was_logged(tmp_path: Path, sink: HttpSink) -> None:
    written(tmp_path, LOADER)
    run(tmp_path, "train.py", "fork", "1", "55", code=1)
    assert "Traceback" in said(tmp_path)  # of the loader, or of what it was just asking the worker for
    (run_id,) = (one["run"] for one in told(tmp_path) if "run" in one)

    def loaded() -> Counter[int]:
        return Counter(point.iteration for point in sink.points(run_id) if point.name == "loaded")

    until(lambda: sink.ends(run_id) == ["FAILED"] and 55 in loaded(), 60)
    assert set(range(50, 56)) <= loaded().keys()  # the batch that it died in, to the last call
    assert set(loaded().values()) == {1}
