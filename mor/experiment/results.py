"""Results as JSON lines, one a member, each with a hash of itself: an edit by hand is found.

The file is written whole under another name and renamed, so a kill loses no line.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mor.files import locked, write_text
from mor.train.config import with_defaults

FORMAT_VERSION = 1

Result = dict[str, Any]


def sealed(result: Result) -> Result:
    """Return a result with the hash of its content."""
    body = {key: value for key, value in result.items() if key != "sha256"}
    return {**body, "sha256": _hash(body)}


def _hash(body: Result) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(settings: Result) -> str | None:
    """Return the SHA-256, in hex, of what decides a result; None for one that is no training.

    Model, training, data, text that is evaluated. Fields that came later have their defaults.
    """
    if "recipe" not in settings:
        return None
    parts = {
        name: settings.get(name) for name in ("data_sha256", "tokenizer_sha256", "eval_tokens")
    }
    recipe = with_defaults(settings["recipe"])
    return hashlib.sha256(json.dumps([recipe, parts], sort_keys=True).encode()).hexdigest()


def read_results(path: Path) -> list[Result]:
    """Read a file of results; none when there is no such file.

    Raises ValueError for a line that is no result, of another format, or changed since it was
    written
    """
    if not path.is_file():
        return []
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            result = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(result, dict) or "sha256" not in result:
            raise ValueError(f"{path}, line {number}: no result of mor experiment")
        if result.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path}, line {number}: format version is {result.get('format_version')}, this "
                f"mor reads {FORMAT_VERSION}"
            )
        if _hash({k: v for k, v in result.items() if k != "sha256"}) != result["sha256"]:
            raise ValueError(
                f"{path}, line {number}: {result.get('member')} was changed after it was written; "
                "restore the file, or take the line out and run the member again"
            )
        results.append(result)
    return results


class Results:
    """The results of one experiment."""

    def __init__(self, path: Path) -> None:
        """Read what is there; ValueError as for `read_results`."""
        self.path = path
        self.by_name: dict[str, Result] = {one["member"]: one for one in read_results(path)}

    def done(self, name: str, settings: Result) -> Result | None:
        """Return a member's result, or one of the same settings; None when it is to be run.

        Raises ValueError when the member was run from other settings
        """
        key, known = key_of(settings), self.by_name.get(name)
        if known is not None and known["outcome"] == "done":
            if key_of(known) != key:
                raise ValueError(
                    f"{self.path} holds {name} from other settings or data; give another --out or "
                    "--results, or take its line out"
                )
            return known
        done = (one for one in self.by_name.values() if one["outcome"] == "done")
        return next((one for one in done if key_of(one) == key), None)

    def add(self, result: Result) -> Result:
        """Keep a result, in place of an earlier one of its name; returns what is kept.

        A failure takes no finished result's place.

        What another run has added to the file meanwhile stays, and is known from now on.
        """
        result = sealed({"format_version": FORMAT_VERSION, **result})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            self.by_name = {one["member"]: one for one in read_results(self.path)}
            known = self.by_name.get(result["member"])
            if known is not None and known["outcome"] == "done" != result["outcome"]:
                return known
            self.by_name[result["member"]] = result
            lines = [json.dumps(one, sort_keys=True) for one in self.by_name.values()]
            write_text(self.path, "\n".join(lines) + "\n")
        return result
