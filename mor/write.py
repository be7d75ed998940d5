"""`mor generate`: a model folder writes text, streamed, with the depth of every token."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.style import Style

from mor.checkpoint import load_model
from mor.log import logger
from mor.model.cost import generation_flops
from mor.model.generate import Prefill, SamplingParams, generate
from mor.ops.device import pick_device
from mor.tokenizer import StreamDecoder, Tokenizer

DEPTH_COLOURS = ("grey62", "cyan", "yellow", "magenta", "red", "green")


def write_text(
    folder: Path,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    ignore_eos: bool,
    show_depth: bool,
    device: str,
    dtype: str,
    quiet: bool,
) -> dict[str, Any]:
    """Generate from a prompt; streams to stdout unless quiet, and returns what was written.

    The result holds text, tokens, depths (of new tokens), prompt_depths, mean_depth (of all),
    flops_saved (share, against every token at full depth), kv_bytes and tokens_per_s.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}; give a number of at most 63 bits")
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    model = load_model(folder, dtype=getattr(torch, dtype), device=pick_device(device))
    config = model.config
    tokenizer = Tokenizer.load(folder, eos_token=config.eos_token_id)
    first = [] if config.bos_token_id is None else [config.bos_token_id]
    ids = [*first, *tokenizer.encode(prompt)]
    printer = _Printer(show_depth, quiet, config.num_recursions)
    decoder = StreamDecoder(tokenizer)
    tokens: list[int] = []
    depths: list[int] = []
    prompt_depths: list[int] = []
    kv_bytes, text, start_s = 0, "", time.perf_counter()
    for event in generate(
        model, [ids], params, eos_token_id=None if ignore_eos else config.eos_token_id
    ):
        if isinstance(event, Prefill):
            prompt_depths, kv_bytes = event.prompt_depths[0], event.kv_bytes
            pieces = ["" for _ in first] + tokenizer.pieces(ids[len(first) :])
            for piece, depth in zip(pieces, prompt_depths, strict=True):
                printer.put(piece, depth, is_prompt=True)
            start_s = time.perf_counter()
            continue
        tokens.append(event.token)
        depths.append(event.depth)
        piece = decoder.push(event.token)
        text += piece
        printer.put(piece, event.depth)
    seconds = time.perf_counter() - start_s
    rest = decoder.flush()
    text += rest
    printer.put(rest, depths[-1] if depths else 1)
    printer.end()

    all_depths = prompt_depths + depths
    heads = len(tokens) + 1  # a prompt needs the logits of its last token only
    spent = generation_flops(config, all_depths, head_tokens=heads)
    full_depths = [config.num_recursions] * len(all_depths)
    full = generation_flops(config, full_depths, head_tokens=heads)
    result = {
        "prompt": prompt,
        "text": text,
        "tokens": tokens,
        "depths": depths,
        "prompt_depths": prompt_depths,
        "mean_depth": sum(all_depths) / len(all_depths),
        "flops_saved": 1 - spent / full,
        "prompt_kv_bytes": kv_bytes,
        "tokens_per_s": len(tokens) / seconds if tokens else 0.0,
    }
    logger.info(
        "%d tokens, %.1f per second, mean depth %.2f of %d, %.0f%% of the FLOPs saved",
        len(tokens),
        result["tokens_per_s"],
        result["mean_depth"],
        config.num_recursions,
        100 * result["flops_saved"],
    )
    return result


class _Printer:
    """Streams pieces of text to stdout, coloured by depth on request."""

    def __init__(self, show_depth: bool, quiet: bool, num_recursions: int) -> None:
        self.show_depth = show_depth
        self.quiet = quiet
        self.console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
        if show_depth and not quiet:
            colours = ", ".join(f"{r} {self._colour(r)}" for r in range(1, num_recursions + 1))
            logger.info("depth: %s", colours)
            if not self.console.is_terminal:
                logger.info("stdout is no terminal: colours are left out; --json has the depths")

    @staticmethod
    def _colour(depth: int) -> str:
        return DEPTH_COLOURS[min(max(depth, 1), len(DEPTH_COLOURS)) - 1]

    def put(self, piece: str, depth: int, *, is_prompt: bool = False) -> None:
        if self.quiet or not piece:
            return
        if self.show_depth:
            style = Style(color=self._colour(depth), underline=is_prompt)
            self.console.print(piece, end="", style=style)
        else:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def end(self) -> None:
        if not self.quiet:
            print(flush=True)
