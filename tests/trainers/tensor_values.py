"""Tensors as values, on a GPU where there is one: converted once, never holding on to the graph, errors unchanged.

test_tensors.py runs these tests by an interpreter that has PyTorch.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from tests.spooled import folder_of, read
from tracelet.core.experiment import Experiment
from tracelet.errors import InvalidValue

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def spool(clean_environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    monkeypatch.chdir(tmp_path)
    return clean_environment


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16", "int64", "bool"])
def test_scalar_tensor_on_the_device_is_logged_with_its_value(spool: Path, kind: str) -> None:
    tensor = torch.tensor(1, dtype=getattr(torch, kind), device=DEVICE)
    with Experiment("tensor", backend="file") as exp:
        exp.log_metric("m", tensor, iteration=0)
        exp.log_metrics({"n": tensor, "o": 2.0}, iteration=1)
    found = read(folder_of(spool))
    assert found.values("m") == [(0, 1.0)]
    assert found.values("n") == [(1, 1.0)]


def test_loss_with_a_graph_is_let_go(spool: Path) -> None:
    weight = torch.ones(1_000_000, device=DEVICE, requires_grad=True)
    with Experiment("graph", backend="file") as exp:
        exp.log_metric("warm", (weight * 2).sum().detach(), iteration=0)
        gc.collect()
        for i in range(10):
            loss = (weight * 2).sum()
            gone = weakref.ref(loss)
            exp.log_metric("loss", loss, iteration=i)
            del loss
            assert gone() is None
    assert read(folder_of(spool)).values("loss") == [(i, 2_000_000.0) for i in range(10)]


def test_longer_tensor_is_refused_without_leaving_an_open_slot(spool: Path) -> None:
    with Experiment("long", backend="file") as exp, pytest.raises(InvalidValue, match=r"loss.*Tensor"):
        exp.log_metric("loss", torch.zeros(2, device=DEVICE), iteration=0)
    assert read(folder_of(spool)).open_slots == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_cuda_error_of_an_earlier_kernel_passes_through_unchanged(spool: Path, tmp_path: Path) -> None:
    # A device-side assert poisons the process's context, so it gets a process of its own.
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, tracelet\n"
        "exp = tracelet.start_logging(exp_name='poisoned', backend='file')\n"
        "exp.log_metric('loss', 1.0, iteration=0)\n"
        "bad = torch.zeros(4, device='cuda')[torch.tensor([9], device='cuda')].sum()\n"
        "try:\n    exp.log_metric('loss', bad, iteration=1)\n"
        "except BaseException as error:\n"
        "    print(type(error).__module__, type(error).__name__, 'CUDA' in str(error))\n"
        "exp.log_metric('loss', 3.0, iteration=2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    name, told = done.stdout.split()[1:]
    assert name in {"AcceleratorError", "RuntimeError"}
    assert told == "True"
    found = read(folder_of(spool))
    assert found.values("loss") == [(0, 1.0), (2, 3.0)]
    assert found.open_slots == 0
