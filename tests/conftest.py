"""Every test starts from one seed, in deterministic mode, with fresh memory full of NaN.

torch is prepared only where a test file has imported it, so tests without torch stay quick.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# These are read when a library loads, here and in every command that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# Parts of torch import triton, and without a GPU only its interpreter can run our kernels.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("local", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    # torch.empty then holds NaN: code that reads what nobody wrote fails at once
    torch.utils.deterministic.fill_uninitialized_memory = True
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(was_deterministic)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu on a machine without one."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


WORDS = ("the", "a", "cat", "dog", "sees", "likes", "finds", "red", "blue", "old", "house", "river")
TINY_RECIPE = """# Trains in a second.
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 5
num_attention_heads = 2
num_key_value_heads = 1
max_position_embeddings = 64
num_recursions = 3
router = "expert_choice"
router_aux_loss_coef = 0.1

[train]
budget_tokens = 1536
context = 32
batch_tokens = 128
micro_batch_tokens = 64
dtype = "float32"
device = "cpu"
log_every = 1
eval_every = 5
eval_tokens = 4096
checkpoint_every = 4
"""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of prepared sentences, vocabulary 280."""
    from mor.data.config import PrepareConfig
    from mor.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    texts = (" ".join(draw.choices(WORDS, k=30)) + ".\n" for _ in range(150))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(lines, encoding="utf-8")
    config = PrepareConfig(
        input=(folder / "corpus.jsonl",),
        out=folder / "data",
        vocab_size=280,
        val_fraction=0.1,
        heldout_fraction=0.1,
    )
    prepare(config)
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of a tiny MoR: 12 steps in fp32, 2 micro-batches each."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY_RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the recipe; tests only read it."""
    from mor.data.loader import PreparedData
    from mor.train.config import load_recipe
    from mor.train.trainer import train

    out = tmp_path_factory.mktemp("run") / "tiny"
    train(load_recipe(tiny_recipe), data=PreparedData.open(tiny_data), out=out)
    return out
