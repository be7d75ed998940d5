"""What `mor convert` is asked to do. Imports no torch."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mor.config import Gating, KVStrategy, Projection, RouterBody, RouterKind, Sharing, check_choice

Init = Literal["stepwise", "average", "lower", "upper", "random", "svd"]
StoredType = Literal["auto", "float32", "bfloat16"]

INEXACT_GATINGS = {
    "weighted": "its gate is alpha x sigmoid, so the stream is not the parent's; use residual",
    "additive": "it adds a recursion to the stream once more; use residual or none",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """Settings of a conversion. Raises ValueError, in one line, for what does not fit."""

    num_recursions: int = 2
    """times that the shared block is applied; 1 keeps the vanilla model"""
    sharing: Sharing = "middle_cycle"
    """which layers share weights; none keeps all of the parent's and adds routing alone"""
    prelude_layers: int = -1
    """layers before the block that are applied once; -1 for what the sharing says"""
    coda_layers: int = -1
    """layers behind the block that are applied once; -1 for what the sharing says"""
    init: Init = "average"
    """shared layers from the parent's that they stand for: evenly spaced ones, their average, the
    lower or upper ones, random, or svd: the average, and what each differs by as LoRA"""
    router: RouterKind = "expert_choice"
    """who decides on depth; fixed leaves every token at full depth"""
    router_body: RouterBody = "linear"
    """what turns a state into a score"""
    gating: Gating = "residual"
    """residual with zero router weights (a gate of 1), or none"""
    kv_strategy: KVStrategy = "per_recursion"
    """keys and values of each recursion, or shared, which is not exact before healing"""
    relax_norms: bool = False
    """norm gains of each recursion's own, from the parent's layers"""
    lora_rank: int = 0
    """rank of each recursion's low-rank additions; svd needs one"""
    lora_targets: tuple[Projection, ...] = ("q_proj", "v_proj")
    """projections that have such an addition"""
    exit_maps: bool = False
    """linear maps in place of skipped recursions, zero until they are fitted or trained"""
    drop_layers: tuple[int, ...] = ()
    """layers of the parent, from 0, to leave out, where their number does not divide"""
    tokenizer: Path | None = None
    """tokenizer.json or its folder, where the parent brings none that we can read"""
    dtype: StoredType = "auto"
    """type of the stored weights; auto keeps the parent's, float32 where it was quantised"""
    seed: int = 0
    """seed of what is random"""

    def __post_init__(self) -> None:
        check_choice("init", self.init, typing.get_args(Init))
        check_choice("dtype", self.dtype, typing.get_args(StoredType))
        if self.num_recursions < 1:
            raise ValueError(f"num_recursions is {self.num_recursions}; give 1 or more")
        if self.is_routed and self.gating in INEXACT_GATINGS:
            raise ValueError(f"gating is {self.gating}; {INEXACT_GATINGS[self.gating]}")
        if self.is_routed and self.router == "token_choice":
            raise ValueError(
                "router is token_choice, whose scores decide at once, so no zero weights leave "
                "every token at full depth; use expert_choice or threshold"
            )
        if self.num_recursions == 1:
            for name in ("sharing", "kv_strategy", "relax_norms", "lora_rank"):
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but num_recursions is 1, which keeps "
                        "the vanilla model; leave it out, or give 2 recursions or more"
                    )
        if self.init == "svd" and not self.is_shared:
            raise ValueError(
                "init is svd, but no layer is shared; leave it out, or give --sharing middle_cycle"
            )
        if self.init == "svd" and self.lora_rank < 1:
            raise ValueError("init is svd and lora_rank is 0; give the rank of the additions")
        if self.exit_maps and not self.is_routed:
            raise ValueError(
                "exit_maps serve routers that let tokens go, in 2 recursions or more; leave it out"
            )
        if len(set(self.drop_layers)) != len(self.drop_layers):
            raise ValueError(f"drop_layers is {list(self.drop_layers)}; give each once")

    @property
    def is_routed(self) -> bool:
        return self.num_recursions > 1 and self.router != "fixed"

    @property
    def is_shared(self) -> bool:
        """Some layers serve more than one of the parent's."""
        return self.num_recursions > 1 and self.sharing != "none"

    @property
    def is_exact(self) -> bool:
        """The model at full depth is the parent, layers that were left out apart."""
        return not self.is_shared and self.kv_strategy != "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillGatesConfig:
    """Settings of `--distill-gates`. Raises ValueError, in one line, for what does not fit."""

    distill_gates: bool = False
    """with --to llama: train away gates and exits that no Llama has; needs --data"""
    data: Path | None = None
    """text for --distill-gates: a folder that mor prepare --tokenizer MODEL wrote"""
    distill_tokens: float = 1e6
    """tokens to train on"""
    distill_lr: float = 1e-4
    """learning rate"""
    distill_context: int = 512
    """tokens of a sequence"""

    def __post_init__(self) -> None:
        if self.distill_gates and self.data is None:
            raise ValueError("--distill-gates needs --data FOLDER, text to learn from")
