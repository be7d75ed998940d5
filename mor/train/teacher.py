"""A parent that teaches: its distribution over the next token, and its states at recursion ends.

The parent is a model of the same vocabulary, frozen; a vanilla one, where states are asked for. A
MoR teaches as it generates, by its causal rule. Source: forward KL as in arXiv
1503.02531 at temperature 1; states as in Relaxed Recursive Transformers, arXiv 2410.20672.
Shapes: N rows, A active rows, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mor.checkpoint import WEIGHTS, load_model
from mor.config import ModelConfig
from mor.data.loader import Batch
from mor.files import atomic_file, sha256_file
from mor.model.layers import rotary_angles
from mor.model.mor import MoR, MoROutput
from mor.model.rows import Rows
from mor.model.stack import End
from mor.model.views import LocalKeys
from mor.ops.loss import linear_distillation, linear_top_distillation
from mor.train.distill import DistillConfig

TOP_ROWS = 512
"""rows whose whole logits are held at a time"""
States = Callable[[Batch], tuple[Tensor, list[Tensor]]]


class Taught(NamedTuple):
    """Sums over the tokens of a batch."""

    loss: Tensor
    """what is minimised"""
    cross_entropy: Tensor
    divergence: Tensor
    state_gap: Tensor
    """mean over recursions; 0 where it is not asked for"""


class Teacher:
    """A parent and what is asked of it."""

    def __init__(
        self,
        folder: Path,
        student: ModelConfig,
        config: DistillConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        cache: Path | None = None,
    ) -> None:
        """Load the parent's folder; ValueError when it cannot teach this student.

        cache  folder for the likeliest tokens of `config.top_k`, without which they are not kept
        """
        self.folder, self.config = folder, config
        self.parent = load_model(folder, dtype=dtype, device=device).requires_grad_(False)
        parent = self.parent.config
        if config.state_weight and parent.num_recursions != 1:
            raise ValueError(
                f"{folder} has {parent.num_recursions} recursions; states are learnt from a "
                "vanilla model alone, set state_weight to 0"
            )
        if parent.vocab_size != student.vocab_size:
            raise ValueError(
                f"{folder} has a vocabulary of {parent.vocab_size}, the student one of "
                f"{student.vocab_size}; they must be the same"
            )
        if config.state_weight and parent.hidden_size != student.hidden_size:
            raise ValueError(
                f"{folder} has width {parent.hidden_size}, the student {student.hidden_size}; set "
                "state_weight to 0"
            )
        self.after_layers = layers_at_ends(student, parent.num_hidden_layers)
        self.top: TopTokens | None = None
        if config.top_k:
            self.top = TopTokens(cache, min(config.top_k, parent.vocab_size), folder, dtype)

    def losses(self, student: MoR, batch: Batch, out: MoROutput) -> Taught:
        """Compare a student's states on a batch with the parent's."""
        assert out.states is not None
        if self.top is not None:
            share_NJ, token_NK = self.top.of(batch, self._states, self.parent.head_weight_VD)
            distilled = linear_top_distillation(
                out.states.x_ND,
                student.head_weight_VD,
                batch.labels_BT.flatten(),
                share_NJ,
                token_NK,
                label_weight=self.config.label_weight,
                teacher_weight=self.config.teacher_weight,
            )
            none = torch.zeros_like(distilled.cross_entropy)
            return Taught(distilled.loss, distilled.cross_entropy, distilled.divergence, none)
        with torch.no_grad():
            teacher_ND, ends = self._states(batch)
        distilled = linear_distillation(
            out.states.x_ND,
            student.head_weight_VD,
            batch.labels_BT.flatten(),
            teacher_ND,
            self.parent.head_weight_VD,
            label_weight=self.config.label_weight,
            teacher_weight=self.config.teacher_weight,
        )
        gap = state_gap(out.states.ends, ends) if ends else torch.zeros_like(distilled.loss)
        loss = distilled.loss + self.config.state_weight * gap
        return Taught(loss, distilled.cross_entropy, distilled.divergence, gap.detach())

    def _states(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return the parent's last states, and those after the layers that recursions end at."""
        if self.parent.config.num_recursions > 1:
            out = self.parent(
                batch.input_ids_BT, segments=batch.segment_BT, rule="causal", keep_states=True
            )
            assert out.states is not None
            return out.states.x_ND, []
        stack = self.parent.model
        rows, _ = Rows.pack(batch.input_ids_BT, segment_BT=batch.segment_BT)
        x_ND = stack.embed_tokens(rows.token_N)
        rotary = rotary_angles(rows.position_N, self.parent.config, dtype=x_ND.dtype)
        attend = LocalKeys(self.parent.config, rows).own.layer(0)
        found: dict[int, Tensor] = {}
        for index, layer in enumerate(stack.layers):
            x_ND = layer(x_ND, rotary, attend)
            if self.config.state_weight and index + 1 in self.after_layers:
                found[index + 1] = x_ND
        wanted = self.after_layers if self.config.state_weight else ()
        return stack.norm(x_ND), [found[index] for index in wanted]


class TopTokens:
    """A parent's likeliest tokens after each token of a batch, kept by what the batch holds."""

    def __init__(self, folder: Path | None, K: int, parent: Path, dtype: torch.dtype) -> None:
        """Keep what a parent's folder says, worked out in dtype."""
        self.folder, self.K = folder, K
        self.told = f"{sha256_file(parent / WEIGHTS)} {K} and the rest, {dtype}"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def of(self, batch: Batch, states: States, head_VD: Tensor) -> tuple[Tensor, Tensor]:
        """Return shares (N, K + 1), the last of all other tokens, and token ids (N, K).

        From disk where they are there.
        """
        file = None if self.folder is None else self.folder / f"{self._name(batch)}.safetensors"
        if file is not None and file.is_file():
            try:
                kept = load_file(file, device=str(head_VD.device))
                share_NJ, token_NK = kept["share"], kept["token"]
            except (SafetensorError, KeyError) as error:
                raise ValueError(f"{file} is broken; remove it, and it is made anew") from error
        else:
            x_ND, _ = states(batch)
            shares, tokens = [], []
            for x_CD in x_ND.split(TOP_ROWS):
                share_CK, token_CK = (x_CD @ head_VD.T).float().softmax(-1).topk(self.K)
                shares.append(torch.cat([share_CK, 1 - share_CK.sum(-1, keepdim=True)], -1))
                tokens.append(token_CK.int())
            # Halves last: under autocast on a CPU, cat takes none.
            share_NJ, token_NK = torch.cat(shares).clamp(min=0).half(), torch.cat(tokens)
            if file is not None:
                with atomic_file(file) as part:
                    save_file({"share": share_NJ.cpu(), "token": token_NK.cpu()}, part)
        share_NJ = share_NJ.float()
        return share_NJ / share_NJ.sum(-1, keepdim=True), token_NK

    def _name(self, batch: Batch) -> str:
        told = hashlib.sha256(f"{self.told} {tuple(batch.input_ids_BT.shape)}".encode())
        for ids in (batch.input_ids_BT, batch.segment_BT):
            if ids is not None:
                told.update(ids.cpu().numpy().tobytes())
        return told.hexdigest()[:32]


def layers_at_ends(student: ModelConfig, parent_layers: int) -> list[int]:
    """Return after how many of the parent's layers each recursion of the student ends.

    Where the student has fewer layers, in proportion.
    """
    K, ours = student.num_block_layers, student.num_hidden_layers
    ends = [student.num_prelude_layers + K * (r + 1) for r in range(student.num_recursions)]
    return [round(end * parent_layers / ours) for end in ends]


def state_gap(ends: Sequence[End], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over active rows of |x - t|^2 / |t|^2, mean over the recursions that anybody took."""
    total = teacher[0].new_zeros((), dtype=torch.float32)
    for end, t_ND in zip(ends, teacher, strict=False):
        t_AD = t_ND[end.origin_A].float()
        distance_A = (end.x_AD.float() - t_AD).square().sum(-1)
        total = total + (distance_A / t_AD.square().sum(-1).clamp_min(1e-12)).sum()
    return total / len(ends)
