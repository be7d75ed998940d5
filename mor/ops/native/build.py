"""Compile the CPU kernels at first use, and keep the library in the user's cache folder.

The file's name holds everything that the code depends on, and it appears there whole or not at
all: processes may build at once and may be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parent
# NaN and infinity must come through, so no -ffast-math. In -std=c++17 GCC does not contract.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-w",
)
TIMEOUT_S = 300


class BuildError(Exception):
    """Why there is no library, and what mends it, in one line."""


class _TookTooLong(BuildError):
    """The compiler was stopped: another plan would say nothing of this one."""


class _Plan(NamedTuple):
    compiler: str
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]


def open_library(machine: tuple[str, ...] | None = None) -> ctypes.CDLL:
    """Return the kernels, compiled if need be; BuildError says why not.

    machine: the compiler's flags for the processor; None for this one.
    """
    compiler = _compiler()
    version = _run([compiler, "--version"])
    plans = _plans(compiler, version, machine)
    name = f"kernels-{_digest(version, plans)}.so"
    folder = _cache_folder()
    # What does not load, after an update of torch say, or may not be looked at, is built anew.
    with contextlib.suppress(OSError, BuildError):
        if folder is not None and (folder / name).exists():
            return _load(folder / name, compiler)
    try:
        if folder is None:
            raise FileNotFoundError
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix="build-")
    except OSError:
        # A folder that cannot be written costs a compilation in every process, no more.
        scratch = tempfile.TemporaryDirectory(prefix="mor-")
        folder = Path(scratch.name)
    with scratch:
        fresh = Path(scratch.name) / name
        _compile(plans, fresh)
        os.replace(fresh, folder / name)
        return _load(folder / name, compiler)


def _load(library: Path, compiler: str) -> ctypes.CDLL:
    """Load a library, or a copy in the folder for temporary files: a cache may be noexec."""
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        why = error
    with tempfile.TemporaryDirectory(prefix="mor-") as folder:
        try:
            copy = shutil.copy2(library, folder)
            return ctypes.CDLL(str(copy))
        except OSError:
            raise BuildError(
                f"what {compiler} made does not load ({why}); set $CXX to g++, or $XDG_CACHE_HOME "
                "to a folder that is not mounted noexec"
            ) from why


def _cache_folder() -> Path | None:
    """Return where libraries are kept; None for a user without a home."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return None if base.parts[0] == "~" else base / "mor"


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    looked_for = f"$CXX={wanted} is not there" if wanted else "no c++, g++ or clang++ here"
    raise BuildError(f"{looked_for}; install a C++ compiler or set $CXX to one")


def _plans(compiler: str, version: str, machine: tuple[str, ...] | None) -> tuple[_Plan, ...]:
    """Return the ways to try: with OpenMP, then without, since Apple's clang has none."""
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    if machine is None:
        machine = ("-mcpu=native",) if is_arm else ("-march=native",)
    flags = (*FLAGS, *machine)
    if not is_arm and "clang" not in version:
        flags = (*flags, "-mprefer-vector-width=512", "-Wno-psabi")
    # torch's own runtime: two pools of threads would fight for the cores
    runtime = _openmp_of_torch("libomp" if "clang" in version else "libgomp")
    if runtime is None:
        link = ("-fopenmp",)
    else:
        link = (str(runtime), f"-Wl,-rpath,{runtime.parent}")
    return (_Plan(compiler, (*flags, "-fopenmp"), link), _Plan(compiler, flags, ()))


def _openmp_of_torch(stem: str) -> Path | None:
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for path in sorted(folder.glob(f"{stem}*")):
            return path
    return None


def _digest(version: str, plans: tuple[_Plan, ...]) -> str:
    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    parts = [version, repr(plans), _processor()]
    parts += [path.name + path.read_text(encoding="utf-8") for path in sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """Name the processor and its instructions: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(plans: tuple[_Plan, ...], library: Path) -> None:
    failure = None
    for plan in plans:
        object_file = library.with_suffix(".o")
        source = str(SOURCES / "kernels.cpp")
        try:
            _run([plan.compiler, *plan.compile_flags, "-c", source, "-o", str(object_file)])
            _run([plan.compiler, "-shared", str(object_file), *plan.link_flags, "-o", str(library)])
            return
        except _TookTooLong:
            raise
        except BuildError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise _TookTooLong(f"{command[0]} took more than {TIMEOUT_S} s; try again") from error
    except OSError as error:
        raise BuildError(
            f"{command[0]} does not run ({error}); set $CXX to a C++17 compiler"
        ) from error
    if done.returncode:
        lines = [*(line for line in done.stderr.splitlines() if "error" in line), "no message"]
        raise BuildError(f"{command[0]} failed ({lines[0]}); set $CXX to a C++17 compiler")
    return done.stdout
