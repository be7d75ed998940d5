"""Promises of mor.files: a final name never holds half a file or folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from mor.files import (
    atomic_file,
    atomic_folder,
    claim_folder,
    only_one,
    read_json,
    remove_leftovers,
    sha256_file,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with contextlib.suppress(RuntimeError), atomic_file(tmp_path / "a") as part:
        part.write_text("ne")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "f") as part:
        (part / "old").write_text("1")
    with contextlib.suppress(RuntimeError), atomic_folder(tmp_path / "f") as part:
        (part / "new").write_text("2")
        raise RuntimeError
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["old"]
    with atomic_folder(tmp_path / "f") as part:
        (part / "new").write_text("2")
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["new"]


def test_a_link_keeps_its_place_and_a_mount_point_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "link") as part:
        (part / "a").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "a").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    with (
        pytest.raises(ValueError, match="disk is a mount point; give a folder inside"),
        atomic_folder(tmp_path / "disk"),
    ):
        pass


def test_a_folder_that_cannot_be_renamed_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_folder(tmp_path / "f") as part:
        (part / "a").write_text("old")
    rename = os.replace

    def fail(source: Path, to: Path) -> None:
        if ".part-" in str(source):
            raise OSError(16, "busy")
        rename(source, to)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="busy"), atomic_folder(tmp_path / "f") as part:
        (part / "a").write_text("new")
    assert (tmp_path / "f" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_json_goes_round_and_other_files_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"a": [1, 2]}
    for text in ("{", "[1]", "\udcff".encode(errors="surrogateescape")):
        file = tmp_path / "b.json"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=r"b\.json"):
            read_json(file)


def test_only_a_new_or_empty_folder_is_claimed(tmp_path: Path) -> None:
    assert claim_folder(tmp_path / "a" / "b", what="it").is_dir()
    assert claim_folder(tmp_path / "a" / "b", what="it").is_dir()
    with pytest.raises(ValueError, match="already holds files"):
        claim_folder(tmp_path / "a", what="it")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder for it"):
        claim_folder(tmp_path / "file", what="it")


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    for name in (".m.part-1", ".m.old-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    for name in (".run.json.part-3", ".hidden", "m.part-1"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "m.part-1"]
    remove_leftovers(tmp_path / "absent")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_what_fails_within_a_held_folder_is_not_taken_for_another_run(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="a pipe is full"), only_one(tmp_path):
        raise BlockingIOError("a pipe is full")
    with only_one(tmp_path):
        pass
