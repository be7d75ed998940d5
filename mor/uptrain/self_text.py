"""Text that the parent writes itself, from its first token on: healing without a corpus."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mor.data.config import PrepareConfig
from mor.data.prepare import prepare
from mor.engine.config import EngineConfig
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.files import write_text
from mor.log import progress
from mor.ops.device import pick_device, pick_dtype
from mor.uptrain.config import SelfConfig

AT_A_TIME = 32
VAL_FRACTION = 0.05
HELDOUT_FRACTION = 0.05


def write_self_text(parent: Path, out: Path, config: SelfConfig, *, device: str) -> None:
    """Have a parent write so many tokens and prepare them with its tokenizer.

    Text i has the seed `config.seed + i`, so a run that is repeated writes the same, and one that
    was stopped goes on behind its last whole batch.
    Raises ValueError for a parent without a tokenizer
    """
    where = pick_device(device)
    settings = EngineConfig(max_num_seqs=AT_A_TIME)
    engine = Engine.load(parent, settings, dtype=pick_dtype("auto", where), device=where)
    if engine.tokenizer is None:
        raise ValueError(f"{parent} has no tokenizer, so it can write no text; give --data")
    tokenizer = engine.tokenizer
    first = engine.model.config.bos_token_id
    prompt = [tokenizer.bos_token_id if first is None else first]
    out.parent.mkdir(parents=True, exist_ok=True)
    told = hashlib.sha256(f"{config}".encode()).hexdigest()[:12]
    file = out.with_name(f"self-{told}.jsonl")
    index, written = _whole_batches(file)
    with (
        file.open("a", encoding="utf-8") as lines,
        progress("the parent writes", config.tokens) as bar,
    ):
        bar.advance(written)
        while written < config.tokens:
            params = [
                SamplingParams(
                    max_tokens=config.text_tokens,
                    temperature=config.temperature,
                    seed=config.seed + index + place,
                )
                for place in range(AT_A_TIME)
            ]
            for output in engine.generate([prompt] * AT_A_TIME, params):
                ids = output.outputs[0].token_ids
                text = tokenizer.decode([i for i in ids if i not in tokenizer.special_ids])
                lines.write(json.dumps({"text": text, "tokens": len(ids)}) + "\n")
                written += len(ids)
                bar.advance(len(ids))
            lines.flush()
            index += AT_A_TIME
    prepare(
        PrepareConfig(
            out=out,
            input=(file,),
            tokenizer=parent / "tokenizer.json",
            val_fraction=VAL_FRACTION,
            heldout_fraction=HELDOUT_FRACTION,
        )
    )
    file.unlink()


def _whole_batches(file: Path) -> tuple[int, int]:
    """Cut what a stopped run wrote to its whole batches; returns their texts and tokens."""
    if not file.is_file():
        return 0, 0
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [line for line in lines if line.endswith("\n")]
    lines = lines[: len(lines) // AT_A_TIME * AT_A_TIME]
    write_text(file, "".join(lines))
    return len(lines), sum(json.loads(line)["tokens"] for line in lines)
