"""What a student learns from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """What a student learns from. Raises ValueError, in one line, for weights that do not fit."""

    label_weight: float = 0.3
    """weight of the plain loss"""
    teacher_weight: float = 0.7
    """weight of the divergence from the parent's distribution, forward KL"""
    state_weight: float = 0.0
    """weight of the distance of states at recursion ends, over the parent's mean square"""

    top_k: int = 0
    """learn from the parent's so many likeliest tokens, worked out once and kept on disk for runs
    of the same text; 0 learns from its whole distribution, worked out at every step"""

    def __post_init__(self) -> None:
        for name in ("label_weight", "teacher_weight", "state_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; give a number of 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 1 or more, or 0 for all tokens")
        if self.top_k and self.state_weight:
            raise ValueError("top_k keeps no states; set state_weight to 0, or top_k to 0")
        if self.label_weight + self.teacher_weight == 0:
            raise ValueError("label_weight and teacher_weight are 0; give one of them above 0")
