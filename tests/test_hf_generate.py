"""Promises of the Hugging Face adapter: `generate` and its cache, the tokenizer, Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support_hf import (
    KINDS,
    TEXTS,
    causal,
    ids_of,
    load,
    model_of,
    pad,
    tokenizer_of,
    write_folder,
)

from mor.checkpoint import load_model
from mor.model.generate import GeneratedToken, generate
from mor.tokenizer import Tokenizer

pytest.importorskip("transformers", minversion="5.0")
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from mor.hf import CACHE, MorCache

pytestmark = pytest.mark.xdist_group("hf")
hf_logging.disable_progress_bar()
F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-9}
IDS = ids_of(2, 5)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(model_of(request.param), tmp_path_factory.mktemp("hf") / request.param)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "routed"
    return write_folder(model_of("expert_choice"), path)


def ours(folder: Path, prompts: list[torch.Tensor], count: int) -> list[list[int]]:
    events = generate(
        load_model(folder, dtype=F64),
        [prompt.tolist() for prompt in prompts],
        max_tokens=count,
    )
    made = [event for event in events if isinstance(event, GeneratedToken)]
    return [[e.token for e in made if e.sequence == b] for b in range(len(prompts))]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_those_of_our_own_generation(folder: Path, use_cache: bool) -> None:
    """Also with padding: each row goes on as if it were alone."""
    prompts = [ids_of(n, seed=n) for n in (9, 3, 6)]
    model = load(folder, dtype=F64)
    options = {"max_new_tokens": 8, "use_cache": use_cache, "eos_token_id": None}
    wanted = ours(folder, prompts, 8)
    assert len({tuple(tokens) for tokens in wanted}) == 3, "the test would prove little"
    for side in ("left", "right"):
        ids, mask = pad(prompts, side)
        out = model.generate(ids, attention_mask=mask, **options)
        assert out[:, ids.shape[1] :].tolist() == wanted
    alone = model.generate(prompts[1][None], **options)
    assert alone[0, 3:].tolist() == wanted[1]
    trained = model.train().generate(prompts[1][None], **options)  # the causal rule all the same
    assert torch.equal(trained, alone)


def test_a_row_that_ended_leaves_the_others_alone(routed: Path) -> None:
    prompts = [ids_of(n, seed=n) for n in (9, 3)]
    first, second = ours(routed, prompts, 8)
    end = next(token for token in second if token not in first)
    ids, mask = pad(prompts, "left")
    out = load(routed, dtype=F64).generate(
        ids, attention_mask=mask, max_new_tokens=8, eos_token_id=end, pad_token_id=5
    )
    kept = second.index(end) + 1
    assert out[:, 9:].tolist() == [first, second[:kept] + [5] * (8 - kept)]


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    ],
    ids=["beams", "sampled beams", "samples"],
)
def test_beams_and_samples_do_not_depend_on_the_cache(folder: Path, how: dict[str, Any]) -> None:
    model = load(folder, dtype=F64)
    ids, mask = pad([ids_of(n, seed=n) for n in (7, 4)], "left")
    results = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        results.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **how)
        )
    assert torch.equal(*results)
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert not torch.equal(results[0][: len(greedy)], greedy)


def test_generation_goes_on_from_a_cache(routed: Path) -> None:
    model, ids = load(routed, dtype=F64), ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=6)
    cache = MorCache()
    model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=6, **{CACHE: cache})
    assert torch.equal(whole, again)
    assert cache.kv is not None and cache.get_seq_length() == 12 + 5
    assert cache.kv.length_B.tolist() == [17, 14]


def test_a_cache_reorders_repeats_and_resets(routed: Path) -> None:
    model, ids = load(routed, dtype=F64), ids_of(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    next_ids = ids_of(4, 1, seed=5)
    cache = MorCache()
    cache.batch_repeat_interleave(2)  # nothing yet
    model(ids, attention_mask=mask, past_key_values=cache)
    chosen = torch.tensor([2, 0])
    cache.batch_select_indices(chosen)
    cache.batch_repeat_interleave(2)
    out = model(next_ids, past_key_values=cache)
    rows = chosen.repeat_interleave(2)
    whole = model(
        torch.cat([ids[rows], next_ids], 1),
        attention_mask=torch.cat([mask[rows], torch.ones(4, 1)], 1),
    )
    torch.testing.assert_close(out.logits[:, -1], whole.logits[:, -1], **EXACT)
    cache.reorder_cache(torch.tensor([1]))  # one sequence: every stored key of it is seen
    out = model(next_ids[:1], past_key_values=cache)
    text = torch.cat([ids[2:], next_ids[1:2], next_ids[:1]], 1)
    torch.testing.assert_close(out.logits[:, -1], model(text).logits[:, -1], **EXACT)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, **EXACT)


def test_a_cached_pass_keeps_no_gradients(routed: Path) -> None:
    """Outside of no_grad, every step would else hold the graph of all before."""
    cache = MorCache()
    load(routed)(IDS, past_key_values=cache)
    assert cache.kv is not None and not cache.kv.own.kv_2LBSGK.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"prompt_lookup_num_tokens": 2}, "generate without an assistant"),
    ],
)
def test_other_caches_and_assistants_are_refused(
    routed: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(routed).generate(IDS[:1], max_new_tokens=3, **options)
    with pytest.raises(ValueError, match="cannot be cropped"):
        MorCache().crop(-1)


def test_the_tokenizer_gives_the_ids_of_ours(routed: Path, tmp_path: Path) -> None:
    own, theirs = Tokenizer.load(routed), tokenizer_of(routed)
    for text in TEXTS:
        assert theirs(text).input_ids == [0, *own.encode(text)]  # as `mor generate` begins
        assert theirs(text, add_special_tokens=False).input_ids == own.encode(text)
        assert theirs.decode(own.encode(text)) == text
    assert theirs.eos_token_id == theirs.pad_token_id == own.eos_token_id
    batch = theirs(TEXTS, padding=True, return_tensors="pt")
    assert batch.attention_mask[:, 0].tolist() == [0, 1, 0]
    assert batch.keys() == {"input_ids", "attention_mask"}
    theirs.save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint() == own.fingerprint()
    (tmp_path / "config.json").write_text((routed / "config.json").read_text())
    again = tokenizer_of(tmp_path)
    assert again(TEXTS, padding=True).input_ids == batch.input_ids.tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_a_vanilla_folder_is_llama(tmp_path: Path, tied: bool) -> None:
    """Within fp32, which transformers' norm and rotary embedding use in a float64 model too."""
    core = model_of("vanilla", tie_word_embeddings=tied)
    fields = core.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    names += ("rms_norm_eps", "tie_word_embeddings")
    config = LlamaConfig(**{name: fields[name] for name in names})
    llama = LlamaForCausalLM(config).double().eval()
    missing, unexpected = llama.load_state_dict(core.state_dict(), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    llama.tie_weights()
    ids = ids_of(2, 12)
    wanted = llama(ids).logits
    torch.testing.assert_close(causal(core, ids).logits, wanted, rtol=1e-4, atol=1e-4)
    llama.save_pretrained(tmp_path)
    again = causal(load_model(tmp_path, dtype=F64), ids).logits
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)
