"""The texts of a Hugging Face dataset by its name, streamed: hf://OWNER/NAME[:CONFIG][@SPLIT].

`datasets` is the extra `hf` and is imported where it is used; from version 4 on it runs no code
that a dataset brings.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from mor.config import check_choice
from mor.data.records import Row, choose_field, text_of
from mor.data.streams import BadInput

HUB_PREFIX = "hf://"
_NAME = re.compile(
    r"hf://(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^/:@\s]+))?(@(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True, slots=True)
class HubDataset:
    """One split of one configuration of a dataset."""

    name: str
    config: str | None = None
    """the only or the default one unless given"""
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read hf://OWNER/NAME[:CONFIG][@SPLIT]; ValueError for anything else."""
        found = _NAME.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text} is no dataset's name; write hf://OWNER/NAME, with :CONFIG and @SPLIT "
                "behind it where they are needed"
            )
        return cls(found["name"], found["config"], found["split"] or "train")

    def __str__(self) -> str:
        config = "" if self.config is None else f":{self.config}"
        return f"{HUB_PREFIX}{self.name}{config}@{self.split}"


def read_hub(
    source: HubDataset, text_field: str, *, report: Callable[[str], None]
) -> Iterator[Row]:
    """Yield the rows of a dataset in order.

    report  told, in one line, of a row that has no text
    Raises  ValueError when the dataset, its split or its field is not there or out of reach
    """
    with _in_one_line(source):
        rows = iter(_open(source, text_field))
    for number in itertools.count(1):
        with _in_one_line(source):
            record = next(rows, None)
            if record is None:
                return
            choose_field(list(record), text_field)
        try:
            text = text_of(record, text_field)
        except BadInput as error:
            report(f"{source}:{number}: {error}")
            continue
        yield Row(text, number)


def _open(source: HubDataset, text_field: str) -> Iterable[Any]:
    """Return the rows of a dataset, with the field of their text alone where that is known."""
    import datasets

    datasets.disable_progress_bars()
    splits = datasets.load_dataset(source.name, source.config, streaming=True)
    check_choice("split", source.split, [str(name) for name in splits])
    rows = splits[source.split]
    if rows.column_names is None:
        return rows
    return rows.select_columns([choose_field(rows.column_names, text_field)])


@contextmanager
def _in_one_line(source: HubDataset) -> Iterator[None]:
    """Say in one line what `datasets` and the libraries below it raise, of many kinds."""
    try:
        yield
    except Exception as error:
        said = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        if isinstance(error, BadInput):
            raise ValueError(f"{source}: {said}") from error
        if isinstance(error, FileNotFoundError):
            fix = "check the name; a private one needs HF_TOKEN"
        elif isinstance(error, ValueError):
            fix = "write hf://OWNER/NAME, with :CONFIG and @SPLIT where they are needed"
        else:
            fix = "check the network and HF_HUB_OFFLINE, or give files"
        raise ValueError(f"{source}: {said}; {fix}") from error
