#!/usr/bin/env python3
"""PyTorch and Ray for the tests, in an environment of their own: the real torchrun, data loaders, Ray clusters.

scripts/trainers.py build  # once: a minute or two, into ~/.cache/tracelet/stack
scripts/trainers.py where  # prints the interpreter of that environment, or says why there is none

They are too large for .venv, and a PyTorch for x86-64 Linux comes with 4 GB of CUDA libraries. On a machine without a
GPU nothing in them is ever called, so files without content stand there in their place; on one that has a GPU, and on
other kinds of machines, all that PyTorch asks for is installed. What is installed stands in stack/trainers/.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import stand_in_libraries
from stack_programs import REPOSITORY, Program, StackError, have, run, say

SOURCES = REPOSITORY / "stack" / "trainers"
CONSTRAINTS = REPOSITORY / "constraints.txt"

STAND_INS = {
    "libcublas.so.13": (),
    "libcublasLt.so.13": (),
    "libcudnn.so.9": (),
    "libcufft.so.12": (),
    "libcufile.so.0": (),
    "libcupti.so.13": (),
    "libcusolver.so.12": (),
    "libcusparse.so.12": (),
    "libcusparseLt.so.0": (),
    # NVSHMEM's variable is in the wrong house on purpose: the linker takes a name without a version from any library
    # but the one that the name's version belongs to.
    "libnccl.so.2": ("nvshmem_selected_device_transport",),
    "libnvrtc.so.13": (),
    "libnvshmem_host.so.3": (),
}
"""What libtorch_cuda.so is linked with, beside libcudart (which is called before main), and the variables it wants."""

LAZILY = 'import os; os.environ.setdefault("TORCH_USE_RTLD_GLOBAL", "1")\n'
"""PyTorch's own switch for binding its libraries lazily; Python would have every function looked up at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/trainers.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("build", "where"))
    arguments = parser.parse_args(argv)
    program = trainers()
    try:
        if arguments.command == "build":
            have(program, 1)
        elif program.place().exists():
            print(program.place())
        else:
            raise StackError(
                f"PyTorch and Ray are not installed: `make trainers` (scripts/trainers.py build) installs them into "
                f"{program.home()}"
            )
    except StackError as error:
        print(f"trainers.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def trainers() -> Program:
    """The environment for this Python on this kind of machine."""
    kind = f"{platform.machine()}-{sys.platform}{'-small' if small() else ''}"
    return Program(
        name="trainers",
        version=f"cp{sys.version_info.major}{sys.version_info.minor}-{kind}",
        result="bin/python",
        folder="trainers",
        on_path=(),
        make=make,
        more_sources=(CONSTRAINTS, Path(__file__), Path(stand_in_libraries.__file__)),
    )


def small() -> bool:
    """Whether stand-ins will do: they are x86-64's, and a GPU would be used."""
    here = (sys.platform, platform.machine()) == ("linux", "x86_64")
    return here and not Path("/proc/driver/nvidia/version").exists()


def make(program: Program, into: Path, jobs: int) -> None:
    """An environment in a folder that is empty, and a look at whether PyTorch and Ray start in it."""
    run([sys.executable, "-m", "venv", str(into)], into, {}, program.name)
    python = into / "bin" / "python"
    bare = ["--requirement", str(SOURCES / "torch.txt")]
    install(python, [*bare, "--no-deps"] if small() else bare, program.name)
    install(python, ["--requirement", str(SOURCES / "requirements.txt")], program.name)
    if small():
        stand_in(python)
    seen = "import torch.distributed, ray; assert torch.distributed.is_gloo_available(); torch.ones(2).sum()"
    run([str(python), "-c", seen], into, {}, program.name)


def install(python: Path, wanted: Sequence[str], name: str) -> None:
    """By uv where it is there, else, and where uv's settings don't fit the network, by pip."""
    words = ["--quiet", "--constraint", str(CONSTRAINTS), *wanted]
    uv = shutil.which("uv")
    if uv is not None:
        try:
            return run([uv, "pip", "install", "--python", str(python), *words], python.parent, {}, name)
        except StackError as error:
            say(f"{name}: {error}\n{name}: trying pip")
    run([str(python), "-m", "pip", "install", "--disable-pip-version-check", *words], python.parent, {}, name)


def stand_in(python: Path) -> None:
    """Put the files without content where PyTorch's own look for their neighbours, and have them bound lazily."""
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    for name, variables in STAND_INS.items():
        stand_in_libraries.write(packages / "nvidia" / "cu13" / "lib" / name, variables)
    (packages / "trainers.pth").write_text(LAZILY)


if __name__ == "__main__":
    raise SystemExit(main())
