"""`mor generate`: a model folder writes text, streamed, with the depth of every token."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from mor.engine.config import Backend, EngineConfig
from mor.engine.engine import Engine
from mor.engine.outputs import StepOutput
from mor.engine.params import SamplingParams
from mor.log import logger
from mor.model.cost import kv_bytes
from mor.ops.device import pick_device, pick_dtype

COLOUR_SYSTEMS = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
}
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""control characters other than tab and the end of a line"""
DEPTH_COLOURS = ("grey62", "cyan", "yellow", "magenta", "red", "green")


def open_engine(
    folder: Path, *, device: str, dtype: str, backend: Backend, max_num_seqs: int = 1
) -> Engine:
    """Open a model folder for a command; ValueError in one line for what cannot be."""
    where = pick_device(device)
    config = EngineConfig(max_num_seqs=max_num_seqs, backend=backend)
    return Engine.load(folder, config, dtype=pick_dtype(dtype, where), device=where)


def write_text(
    engine: Engine, prompt: str, params: SamplingParams, *, show_depth: bool, quiet: bool
) -> dict[str, Any]:
    """Generate from a prompt; streams to stdout unless quiet, and returns what was written.

    The result holds text, tokens, depths (of new tokens; the last one is never run and has none,
    unless the document's end came after it), prompt_depths, mean_depth (of all), flops_saved
    (share, against every token at full depth), prompt_kv_bytes, tokens_per_s and, where asked for,
    logprobs.
    """
    config, tokenizer = engine.model.config, engine.tokenizer
    assert tokenizer is not None
    first = [] if config.bos_token_id is None else [config.bos_token_id]
    ids = [*first, *tokenizer.encode(prompt)]
    request_id = engine.add(ids, params)
    printer = Printer(show_depth, quiet, config.num_recursions)
    printer.expect(["" for _ in first] + tokenizer.pieces(ids[len(first) :]))
    first_s = 0.0
    try:
        while not engine.is_done(request_id):
            for piece in engine.step():
                first_s = first_s or (time.perf_counter() if piece.token_ids else 0.0)
                printer.take(piece)
        seconds = time.perf_counter() - first_s
        output = engine.result(request_id)
    finally:
        engine.forget(request_id)
        printer.end()
    answer = output.outputs[0]
    if answer.error is not None:
        raise ValueError(answer.error)
    is_ended = answer.finish_reason == "stop" and answer.stop_reason is None
    tokens = answer.token_ids[:-1] if is_ended else answer.token_ids
    result: dict[str, Any] = {
        "prompt": prompt,
        "text": answer.text,
        "tokens": tokens,
        "depths": answer.depths,
        "prompt_depths": output.prompt_depths,
        "mean_depth": output.mean_depth,
        "flops_saved": output.flops_saved,
        "prompt_kv_bytes": kv_bytes(
            config,
            output.prompt_depths,
            element_bytes=engine.kv_dtype.itemsize,
        ),
        "tokens_per_s": (len(answer.token_ids) - 1) / seconds if len(tokens) > 1 else 0.0,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs is not None:
        result["logprobs"] = [told._asdict() for told in answer.logprobs]
    if answer.finish_reason == "length" and len(ids) + len(tokens) == engine.max_model_len:
        logger.info("the context of %d tokens is full", engine.max_model_len)
    logger.info(
        "%d tokens, %.1f per second, mean depth %.2f of %d, %.0f%% of the FLOPs saved",
        len(tokens),
        result["tokens_per_s"],
        output.mean_depth,
        config.num_recursions,
        100 * output.flops_saved,
    )
    return result


class Printer:
    """Streams text to stdout, coloured by depth on request: then each piece waits for its depth."""

    def __init__(self, show_depth: bool, quiet: bool, num_recursions: int) -> None:
        self.show_depth = show_depth
        self.quiet = quiet
        self.console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self.waiting: deque[tuple[str, bool]] = deque()
        """pieces of text whose depth is not known yet, and whether the prompt has them"""
        if show_depth and not quiet:
            colours = ", ".join(f"{r} {self._colour(r)}" for r in range(1, num_recursions + 1))
            logger.info("depth: %s", colours)
            if not self.console.is_terminal:
                logger.info("stdout is no terminal: colours are left out; --json has the depths")

    @staticmethod
    def _colour(depth: int) -> str:
        return DEPTH_COLOURS[min(max(depth, 1), len(DEPTH_COLOURS)) - 1]

    def expect(self, pieces: list[str]) -> None:
        """Take the pieces of a prompt; they are shown at once, or with their depths."""
        if self.show_depth:
            self.waiting.extend((piece, True) for piece in pieces)
        else:
            self._show("".join(pieces), None)

    def skip(self, count: int) -> None:
        """Let the depths of so many tokens of a prompt pass without text."""
        self.waiting.extend([("", True)] * count)

    def take(self, output: StepOutput) -> None:
        """Show what a tick brought."""
        if not self.show_depth:
            self._show(output.text, None)
            return
        for depth in output.depths:
            if self.waiting:
                piece, is_prompt = self.waiting.popleft()
                self._show(piece, Style(color=self._colour(depth), underline=is_prompt))
        if output.token_ids:
            self.waiting.append((output.text, False))

    def end(self) -> None:
        """Show what is left, the last token without a depth, and end the line."""
        while self.waiting:
            self._show(self.waiting.popleft()[0], None)
        if not self.quiet:
            print(flush=True)

    def _show(self, piece: str, style: Style | None) -> None:
        if self.quiet or not piece:
            return
        if sys.stdout.isatty():  # what a model writes must not move the cursor or set a title
            piece = CONTROLS.sub("\ufffd", piece)
        system = COLOUR_SYSTEMS.get(self.console.color_system or "")
        if style is not None and system is not None:  # rich would change tabs and :smile:
            piece = style.render(piece, color_system=system)
        sys.stdout.write(piece)
        sys.stdout.flush()
