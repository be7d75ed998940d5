"""Files of tasks, as `--data-dir` wants them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support_evals import LINES

from mor.evals.items import TASKS


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "eval"
    for task, lines in LINES.items():
        (folder / task).mkdir(parents=True)
        text = "\n".join(map(json.dumps, lines))
        (folder / task / TASKS[task].file).write_text(text)
    (folder / "mmlu" / "dev.jsonl").write_text("\n".join(map(json.dumps, LINES["mmlu"][:3])))
    return folder
