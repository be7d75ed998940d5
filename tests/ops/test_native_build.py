"""The CPU kernels compile once, on any processor, and where they cannot a line says why."""

import logging
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support_native import library, make_case
from torch.nn import functional as F

from mor.ops.native import build
from mor.ops.native.compiled import CompiledKernels, load


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded so far."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load.cache_clear()
    yield tmp_path / "cache" / "mor"
    load.cache_clear()


def fake_compiler(monkeypatch, folder: Path, script: str) -> None:
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))


def warning_of_load(caplog) -> str:
    with caplog.at_level(logging.INFO, logger="mor"):
        assert load() is None
        assert load() is None  # said once
    assert len(caplog.records) == 1
    assert "\n" not in caplog.text.strip()
    return caplog.text


def test_without_a_compiler_a_line_names_the_fix(fresh, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "install a C++ compiler or set $CXX" in warning_of_load(caplog)


def test_a_compiler_that_is_not_there_is_named(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in warning_of_load(caplog)


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch, tmp_path, caplog):
    fake_compiler(
        monkeypatch, tmp_path, 'test "$1" = --version || { echo error: bad >&2; exit 1; }'
    )
    assert "error: bad" in warning_of_load(caplog)
    assert not list(fresh.glob("*"))  # nothing is left over


def test_a_library_that_does_not_load_is_no_library(fresh, monkeypatch, tmp_path, caplog):
    script = 'test "$1" = --version || for last; do :; done; echo junk > "${last:-/dev/null}"'
    fake_compiler(monkeypatch, tmp_path, script)
    assert "does not load" in warning_of_load(caplog)


def test_a_cache_folder_that_cannot_be_written_does_not_matter(monkeypatch, tmp_path):
    library()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert CompiledKernels(build.open_library(("-O0",))).instructions == "portable"


def test_what_was_compiled_is_loaded_again_and_mended_if_it_is_damaged(fresh, monkeypatch):
    build.open_library(("-O0",))  # compiles in a third of the time
    (made,) = fresh.iterdir()
    command = [
        sys.executable,
        "-c",
        "from mor.ops.native.build import open_library; open_library(('-O0',))",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[3])}

    def stamp_after_another_process() -> int:
        subprocess.run(command, env=environment, check=True)
        assert list(fresh.iterdir()) == [made]
        return made.stat().st_mtime_ns

    before = made.stat().st_mtime_ns
    assert stamp_after_another_process() == before
    made.unlink()  # not in place: this process has it mapped
    made.write_bytes(b"damaged")
    assert stamp_after_another_process() > before
    assert made.stat().st_size > 10_000


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
@pytest.mark.parametrize(
    ("level", "name"), [("x86-64", "portable"), ("x86-64-v3", "avx2"), ("x86-64-v4", "avx512")]
)
def test_older_processors_get_right_kernels_too(level, name):
    library()
    if name != "portable" and name not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip(f"this processor has no {name}")
    lib = CompiledKernels(build.open_library((f"-march={level}", "-O1")))
    assert lib.instructions == name
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x, weight = torch.randn(37, 70), torch.randn(100, 70).to(dtype)
        expected = F.linear(x.to(dtype).float(), weight.float())
        torch.testing.assert_close(lib.linear(x, lib.pack_weight(weight)), expected)
        case = make_case([(9, 1, 0), (0, 30, 0), (70, 1, 1)], dtype=dtype, head_dim=24)
        actual, wanted = case.run(lib)[0].double(), case.expected()[0]
        assert (actual - wanted).abs().max() <= 2 * tolerance * wanted.abs().max()
