"""What `mor prepare` is asked to do. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """From text to token shards. Raises ValueError for settings that do not fit together."""

    out: Path
    """new or empty folder for shards, tokenizer and manifest"""
    input: tuple[str | Path, ...] = ()
    """files and folders of text, code, JSONL (each also .gz, .xz, .zst) and Parquet; Hugging Face
    datasets as hf://OWNER/NAME[:CONFIG][@SPLIT], split train unless given, streamed twice"""
    corpus: Literal["none", "stdlib"] = "none"
    """stdlib reads the Python standard library of this machine instead of --input"""
    tokenizer: Path | None = None
    """a tokenizer.json or its folder; a BPE is trained on the corpus unless given"""
    vocab_size: int = 8192
    """entries of the BPE that is trained"""
    eos_token: str | None = None
    """end-of-document token of --tokenizer, if it has no well-known name"""
    val: tuple[str | Path, ...] = ()
    """what --input takes, used as the validation split instead of a share of the input"""
    val_fraction: float = 0.02
    """share of documents for validation, chosen by their hash"""
    heldout_fraction: float = 0.01
    """share of documents held out of training to set the routers' thresholds"""
    text_field: str = "text"
    """field of JSONL records, or column of Parquet files and datasets, that holds the text"""
    max_document_bytes: int = 65536
    """a longer text file is cut at line ends into documents of this size"""
    limit_bytes: int | None = None
    """stop the input at the document that reaches so many bytes of text"""
    shard_tokens: int = 2**26
    """tokens in a shard file"""
    skip_bad: bool = False
    """leave broken files and lines out and go on"""

    def __post_init__(self) -> None:
        if self.corpus not in ("none", "stdlib"):
            raise ValueError(f"corpus {self.corpus!r} is unknown; choose none or stdlib")
        if bool(self.input) == (self.corpus != "none"):
            raise ValueError("give either --input or --corpus stdlib")
        for name in ("val_fraction", "heldout_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a share in [0, 1)")
        if self.val_fraction + self.heldout_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction} and heldout_fraction {self.heldout_fraction} "
                "leave nothing to train on; keep their sum below 1"
            )
        for name, low in (("vocab_size", 257), ("max_document_bytes", 16), ("shard_tokens", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; give {low} or more")
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise ValueError(f"limit_bytes is {self.limit_bytes}; give 1 or more")
        if self.eos_token is not None and self.tokenizer is None:
            raise ValueError(
                f"eos_token {self.eos_token!r} needs --tokenizer; a trained BPE has one"
            )
