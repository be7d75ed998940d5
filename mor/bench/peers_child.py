"""An engine on the twin's weights in a child process, since its pins are not ours.

The child runs a worker, which says what goes in and out: `vllm_worker`, `openvino_worker`.

Loaded when peers are asked for.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mor.bench.peers import save_llama
from mor.model.mor import MoR

STOP_S = 30.0
LAST_CHARS = 2000


class ChildPeer:
    """An engine behind a worker that reads the twin as a transformers folder."""

    is_exact = True

    def __init__(
        self,
        name: str,
        worker: Path,
        twin: MoR,
        *,
        python: str,
        max_model_len: int,
        max_requests: int,
    ) -> None:
        """Start it; RuntimeError with its last words when it does not come up.

        python  of the environment that the engine is installed in
        """
        self.name = name
        self.folder = tempfile.TemporaryDirectory()
        save_llama(twin, Path(self.folder.name))
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.child = subprocess.Popen(
            [python, str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        try:
            self._ask(
                {
                    "model": self.folder.name,
                    "max_model_len": max_model_len,
                    "max_requests": max_requests,
                    "threads": torch.get_num_threads(),
                }
            )
        except RuntimeError:
            self.close()
            raise

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.child.stdin is not None and self.child.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps(question) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended; {self._last_words()}"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read()[-LAST_CHARS:].strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        return self._ask({"prompts": [list(p) for p in prompts], "new_tokens": new_tokens})[
            "tokens"
        ]

    def close(self) -> None:
        assert self.child.stdin is not None and self.child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        try:
            self.child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.log.close()
        self.folder.cleanup()
