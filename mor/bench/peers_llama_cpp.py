"""llama.cpp on the twin's weights, in bf16 or Q4_0, through its own bindings.

The weights go to a GGUF file without a vocabulary: it takes and gives token ids. Loaded when peers
are asked for.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mor.model.mor import MoR

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' names to GGUF's"""


def write_gguf(model: MoR, path: Path) -> None:
    """Write a vanilla model's weights, matrices in bf16 and norms in fp32."""
    import gguf

    config = model.config
    assert config.num_recursions == 1, "GGUF has no recursions"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        weight = tensor.detach().cpu()
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in heads:
            weight = _pairs_together(weight, heads[part])
        if weight.dim() == 1:
            writer.add_tensor(_gguf_name(name), weight.float().numpy())
        else:
            bits = weight.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(_gguf_name(name), bits, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def _pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Bring the two halves of a head that turn together side by side, as llama.cpp has them."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


class LlamaCpp:
    """One llama.cpp model; a context for each size of batch."""

    def __init__(self, twin: MoR, *, is_quantised: bool = False) -> None:
        import llama_cpp

        self.name = "llama.cpp Q4_0" if is_quantised else "llama.cpp BF16"
        self.is_exact = not is_quantised
        self.lib: Any = llama_cpp
        self.vocab_size = twin.config.vocab_size
        self.lib.llama_log_set(_quiet(llama_cpp), ctypes.c_void_p())
        self.lib.llama_backend_init()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "twin.gguf"
        write_gguf(twin, path)
        if is_quantised:
            path = self._quantise(path)
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"{self.name} does not read the file of the twin's weights")
        self.context: Any = None
        self.sizes = (0, 0)

    def _quantise(self, path: Path) -> Path:
        params = self.lib.llama_model_quantize_default_params()
        params.ftype = self.lib.LLAMA_FTYPE_MOSTLY_Q4_0
        params.nthread = torch.get_num_threads()
        to = path.with_name("twin-q4.gguf")
        failed = self.lib.llama_model_quantize(
            str(path).encode(), str(to).encode(), ctypes.byref(params)
        )
        if failed:
            raise RuntimeError(f"{self.name} does not quantise the twin's weights")
        return to

    def _open(self, batch: int, tokens: int) -> None:
        """Make a context for so many sequences of so many tokens."""
        if self.sizes == (batch, tokens):
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
            return
        self._close_context()
        params = self.lib.llama_context_default_params()
        params.n_ctx = batch * (-(-tokens // 256) * 256)
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.no_perf = True
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"{self.name} gives no context for {batch} x {tokens} tokens")
        self.batch = self.lib.llama_batch_init(512, 0, 1)
        self.sizes = (batch, tokens)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        self._open(len(prompts), len(prompts[0]) + new_tokens)
        drawn: list[list[int]] = [[] for _ in prompts]
        rows: list[tuple[int, int, int, bool]] = []
        for sequence, prompt in enumerate(prompts):
            if len(rows) + len(prompt) > 512:
                self._decode(rows, drawn)
                rows = []
            last = len(prompt) - 1
            rows += [(token, at, sequence, at == last) for at, token in enumerate(prompt)]
        self._decode(rows, drawn)
        for at in range(len(prompts[0]), len(prompts[0]) + new_tokens - 1):
            rows = [(tokens[-1], at, sequence, True) for sequence, tokens in enumerate(drawn)]
            for first in range(0, len(rows), 512):
                self._decode(rows[first : first + 512], drawn)
        return drawn

    def _decode(self, rows: list[tuple[int, int, int, bool]], drawn: list[list[int]]) -> None:
        """Run rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        wanted = []
        for index, (token, position, sequence, wants) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wants
            if wants:
                wanted.append(sequence)
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"{self.name} does not decode {len(rows)} rows")
        logits = self.lib.llama_get_logits(self.context)
        best = np.ctypeslib.as_array(logits, (len(wanted), self.vocab_size)).argmax(1)
        for sequence, token in zip(wanted, best.tolist(), strict=True):
            drawn[sequence].append(token)

    def _close_context(self) -> None:
        if self.context:
            self.lib.llama_batch_free(self.batch)
            self.lib.llama_free(self.context)
            self.context = None

    def close(self) -> None:
        self._close_context()
        self.lib.llama_model_free(self.model)
        self.folder.cleanup()


_callbacks: list[Any] = []
"""llama.cpp calls them as long as it lives"""


def _quiet(llama_cpp: Any) -> Any:
    """Return a log that says nothing."""
    _callbacks.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    return _callbacks[-1]
