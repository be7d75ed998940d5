"""The promise about bad input: one clear line, exit code 2, nothing half-written, nothing lost.

Every case is a command line as a user types it. Beside its one line only lines of progress and log
may stand on stderr; none on stdout.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mor import checkpoint
from mor.cli import main
from mor.data.config import PrepareConfig
from mor.data.prepare import prepare
from mor.data.writer import SplitWriter

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class World:
    """What the cases work on: {names} in their command lines are files and folders of it."""

    folder: Path
    """scratch folder of the case"""
    data: Path
    recipe: Path
    run: Path
    """a finished run, copied for the case"""

    def write(self, name: str, content: bytes | str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def recipe_with(self, old: str, new: str) -> None:
        text = self.recipe.read_text()
        assert old in text
        self.write("r.toml", text.replace(old, new))

    def __getitem__(self, name: str) -> str:
        places = {"data": self.data, "recipe": self.recipe, "run": self.run}
        return str(places.get(name, self.folder))


@pytest.fixture
def world(tmp_path: Path, tiny_data: Path, tiny_recipe: Path, tiny_run: Path) -> World:
    shutil.copytree(tiny_run, tmp_path / "run")
    return World(tmp_path, tiny_data, tiny_recipe, tmp_path / "run")


def nothing(world: World, patch: Patch) -> None:
    """The case needs no preparation."""


def files(**content: bytes | str) -> Callable[[World, Patch], None]:
    """Write files into the scratch folder; "__" in a name stands for a dot."""

    def make(world: World, patch: Patch) -> None:
        for name, data in content.items():
            world.write(name.replace("__", "."), data)

    return make


def recipe(old: str, new: str) -> Callable[[World, Patch], None]:
    return lambda world, patch: world.recipe_with(old, new)


def truncated_zst(world: World, patch: Patch) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.compress(os.urandom(5000).hex().encode())
    world.write("a.txt.zst", data[: len(data) // 2])


def parquet(world: World, patch: Patch) -> None:
    pa = pytest.importorskip("pyarrow")
    path = world.folder / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"text": ["a"], "n": [1]}), path)


def truncate(name: str, keep: int) -> Callable[[World, Patch], None]:
    def make(world: World, patch: Patch) -> None:
        path = world.folder / name
        path.write_bytes(path.read_bytes()[:keep])

    return make


def remove(name: str) -> Callable[[World, Patch], None]:
    return lambda world, patch: (world.folder / name).unlink()


def foreign_weights(world: World, patch: Patch) -> None:
    checkpoint.save_tensors({"a": torch.ones(1)}, world.run / "model/model.safetensors")


def no_safetensors(world: World, patch: Patch) -> None:
    torch.save({"a": torch.ones(1)}, world.run / "model/model.safetensors")


def config_with(**fields: Any) -> Callable[[World, Patch], None]:
    def make(world: World, patch: Patch) -> None:
        file = world.run / "model/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return make


def other_data(world: World, patch: Patch) -> None:
    """Data of other tokenizers, one smaller and one larger."""
    text = "".join(json.dumps({"text": f"Zebra {n} quickly jumps! " * 9}) + "\n" for n in range(99))
    world.write("c.jsonl", text)
    corpora = {"other": world.folder / "c.jsonl", "large": world.data.parent / "corpus.jsonl"}
    for name, size in (("other", 270), ("large", 300)):
        prepare(
            PrepareConfig(
                input=(corpora[name],),
                out=world.folder / name,
                vocab_size=size,
                val_fraction=0.2,
                heldout_fraction=0.2,
            )
        )


def ids_beyond_the_vocabulary(world: World, patch: Patch) -> None:
    shutil.copytree(world.data, world.folder / "data")
    (shard,) = (world.folder / "data").glob("train-*.bin")
    shard.write_bytes(b"\xff\xff" * (shard.stat().st_size // 2))


def cut_shard(world: World, patch: Patch) -> None:
    shutil.copytree(world.data, world.folder / "data")
    (shard,) = (world.folder / "data").glob("train-*.bin")
    shard.write_bytes(shard.read_bytes()[:-2])


def data_of_another_format(world: World, patch: Patch) -> None:
    shutil.copytree(world.data, world.folder / "data")
    file = world.folder / "data/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))


def fails(number: int, owner: Any, name: str) -> Callable[[World, Patch], None]:
    """Let a function fail as the operating system does; as root no folder is read-only."""

    def make(world: World, patch: Patch) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise OSError(number, os.strerror(number), "out/part")

        patch.setattr(owner, name, fail)

    return make


def full_disk_at_checkpoints(world: World, patch: Patch) -> None:
    from mor.train import state

    fails(errno.ENOSPC, state, "save_tensors")(world, patch)


def unreadable(world: World, patch: Patch) -> None:
    world.write("a.txt", "text")
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "a.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *args, **kwargs)

    patch.setattr(Path, "open", refuse)


def poisoned(world: World, patch: Patch) -> None:
    from mor.train import trainer

    patch.setattr(trainer, "learning_rate", lambda *_: 1e38)


TRAIN = "train {tmp}/r.toml --data {data} --out {tmp}/out"
PREPARE = "prepare --out {tmp}/out --input {tmp}/"
GENERATE = "generate {run}/model --max-tokens 4"
EVAL = "eval {run}/model --data {data}"

# name, what is prepared, command line, what the line must say
CASES: list[tuple[str, Callable[[World, Patch], None], str, list[str]]] = [
    # commands and flags
    ("unknown command", nothing, "trian x", ["trian", "did you mean train"]),
    ("missing flag", nothing, "train {recipe} --data {data}", ["--out", "mor train --help"]),
    ("missing recipe", nothing, "train --data {data} --out {tmp}/out", ["--data", "RECIPE"]),
    ("unknown flag", nothing, EVAL + " --contxt 3", ["--contxt", "did you mean --context"]),
    (
        "flag without its table",
        nothing,
        "train {recipe} --data {data} --out {tmp}/x --lr 1e-3",
        ["--lr", "did you mean --train.lr"],
    ),
    ("another's flag", nothing, "generate x --max_new_tokens 3", ["did you mean --max-tokens"]),
    ("half a command", nothing, "bench", ["mor bench what?", "train, decode, prefill, serve"]),
    (
        "an experiment",
        nothing,
        "plan recipes/experiments/claims-cpu.toml",
        ["use mor experiment recipes/experiments/claims-cpu.toml"],
    ),
    (
        "a recipe of uptraining",
        nothing,
        "plan recipes/uptrain-smollm2-cpu.toml",
        ["use mor uptrain PARENT --recipe"],
    ),
    (
        "half a dataset's name",
        nothing,
        "prepare --input hf:me/texts --out {tmp}/out",
        ["hf:me/texts is no dataset's name; write hf://OWNER/NAME"],
    ),
    ("flag of no number", nothing, EVAL + " --context abc", ["--context", "abc"]),
    ("unknown choice", nothing, EVAL + " --split vall", ["--split", "vall", "heldout"]),
    ("bad device", nothing, EVAL + " --device tpu9", ["device 'tpu9'", "use cpu"]),
    ("foreign device", nothing, EVAL + " --device meta", ["device 'meta'", "use cpu"]),
    # preparing text
    ("missing file", nothing, PREPARE + "no.txt", ["no.txt", "does not exist"]),
    ("unreadable file", unreadable, PREPARE + "a.txt", ["a.txt", "Permission denied"]),
    ("empty corpus", files(a__txt=""), PREPARE + "a.txt", ["empty corpus", "give files"]),
    ("one token", files(a__txt="a"), PREPARE + "a.txt", ["1 distinct documents", "more text"]),
    (
        "no text files",
        files(**{"in/a__exe": "x"}),
        PREPARE + "in",
        ["no text, code, JSONL or Parquet", "name a file"],
    ),
    ("binary file", files(a__txt=b"text\0"), PREPARE + "a.txt", ["a.txt is binary", "offset 4"]),
    (
        "invalid UTF-8",
        files(a__txt=b"text \xff\n"),
        PREPARE + "a.txt",
        ["a.txt", "invalid UTF-8 at byte offset 5", "--skip-bad"],
    ),
    ("broken JSON", files(a__jsonl='{"text": 1}'), PREPARE + "a.jsonl", ["a.jsonl:1", "not text"]),
    ("truncated zst", truncated_zst, PREPARE + "a.txt.zst", ["a.txt.zst is cut off"]),
    (
        "broken Parquet",
        files(a__parquet="text"),
        PREPARE + "a.parquet",
        ["a.parquet is damaged or no Parquet file", "--skip-bad"],
    ),
    (
        "unknown column",
        parquet,
        PREPARE + "a.parquet --text-field txt",
        ["a.parquet: no field 'txt' (fields: text, n)", "did you mean --text-field text?"],
    ),
    (
        "column of numbers",
        parquet,
        PREPARE + "a.parquet --text-field n",
        ["column 'n' is int64, not text; set --text-field"],
    ),
    (
        "no dataset's name",
        nothing,
        "prepare --out {tmp}/out --input hf://a/b/c",
        ["hf://a/b/c is no dataset's name", "write hf://OWNER/NAME"],
    ),
    (
        "dataset out of reach",
        nothing,
        "prepare --out {tmp}/out --input hf://nobody/nothing",
        ["hf://nobody/nothing@train", "check the network"],
    ),
    ("no input", nothing, "prepare --out {tmp}/out", ["--input or --corpus stdlib"]),
    ("shares of nan", nothing, PREPARE + "a --val-fraction nan", ["val_fraction is nan"]),
    ("tiny vocabulary", nothing, PREPARE + "a --vocab-size 3", ["vocab_size is 3; give 257"]),
    (
        "used output folder",
        files(a__txt="text"),
        "prepare --input {tmp}/a.txt --out {tmp}/run",
        ["run already holds files", "new folder"],
    ),
    (
        "full disk while preparing",
        fails(errno.ENOSPC, SplitWriter, "write_pending"),
        "prepare --input {data}/../corpus.jsonl --out {tmp}/out",
        ["No space left on device", "free some space"],
    ),
    (
        "no write permission",
        fails(errno.EACCES, Path, "mkdir"),
        "prepare --input {data}/../corpus.jsonl --out {tmp}/out",
        ["Permission denied", "permissions"],
    ),
    # recipes
    ("no recipe", nothing, "plan {tmp}/no.toml", ["no.toml", "path that exists"]),
    ("empty recipe", files(r__toml=""), "plan {tmp}/r.toml", ["budget", "exactly one"]),
    ("no TOML", files(r__toml="a b"), "plan {tmp}/r.toml", ["r.toml is not TOML"]),
    ("recipe of no text", files(r__toml=b"\xff"), "plan {tmp}/r.toml", ["r.toml is not TOML"]),
    ("unknown table", recipe("[model]", "[modle]"), TRAIN, ["modle", "did you mean model"]),
    ("no table", files(r__toml="model = 1"), TRAIN, ["[model] is 1", "write a table"]),
    ("unknown key", recipe("context", "contxt"), TRAIN, ["contxt", "did you mean context"]),
    ("wrong type", recipe("context = 32", 'context = "32"'), TRAIN, ["[train]: context is '32'"]),
    ("no budget", recipe("budget_tokens = 1536", ""), TRAIN, ["give exactly one"]),
    (
        "capacity that rises",
        recipe("num_recursions = 3", "num_recursions = 3\ncapacity = [1, 0.5, 0.6]"),
        TRAIN,
        ["[1.0, 0.5, 0.6] rises"],
    ),
    (
        "capacity of 0",
        recipe("num_recursions = 3", "num_recursions = 3\ncapacity = [1, 0.5, 0]"),
        TRAIN,
        ["[1.0, 0.5, 0.0] leaves (0, 1]"],
    ),
    (
        "first capacity below 1",
        recipe("num_recursions = 3", "num_recursions = 3\ncapacity = [0.9, 0.5, 0.5]"),
        TRAIN,
        ["first capacity is 0.9; give 1"],
    ),
    ("capacity of nan", nothing, "plan {recipe} --model.capacity 1 nan 0.5", ["leaves (0, 1]"]),
    (
        "layers that do not divide",
        recipe("num_hidden_layers = 5", "num_hidden_layers = 6"),
        TRAIN,
        ["num_hidden_layers 6", "use 8"],
    ),
    (
        "width that does not divide",
        recipe("num_attention_heads = 2", "num_attention_heads = 3"),
        TRAIN,
        ["hidden_size 32 does not divide by num_attention_heads 3", "change one"],
    ),
    (
        "heads that do not divide",
        nothing,
        "plan {recipe} --model.num-attention-heads 4 --model.num-key-value-heads 3",
        ["num_attention_heads 4 does not divide by num_key_value_heads 3"],
    ),
    (
        "batch that does not divide",
        recipe("batch_tokens = 128", "batch_tokens = 100"),
        TRAIN,
        ["batch_tokens is 100; give a multiple of context 32"],
    ),
    (
        "micro-batch that does not divide",
        recipe("micro_batch_tokens = 64", "micro_batch_tokens = 96"),
        TRAIN,
        ["batch_tokens 128 is no multiple of micro_batch_tokens 96"],
    ),
    *[
        (f"options that do not go together {number}", nothing, f"plan {{recipe}} {flags}", says)
        for number, (flags, says) in enumerate(
            (
                (
                    "--model.sharing middle_sequence",
                    ["middle_sequence serves the router fixed", "needs cycle, middle_cycle or"],
                ),
                ("--model.num-recursions 1", ["needs num_recursions of 2 or more", "use"]),
                ("--model.router fixed --model.gating weighted", ["leave gating at none"]),
                ("--model.router threshold --model.gating additive", ["use weighted or residual"]),
                (
                    "--model.router token_choice --model.gating none --model.router-balance bias",
                    ["token_choice would learn nothing", "use weighted or residual"],
                ),
                ("--model.router token_choice --model.capacity 1 .5 .5", ["leave it out"]),
                ("--model.router-score softmax", ["not expert_choice; use sigmoid"]),
                ("--model.router-balance bias", ["not expert_choice; use loss"]),
                ("--model.router random --model.router-aux router", ["not random; use loss"]),
                ("--model.router fixed --model.capacity-warmup-steps 2", ["not fixed; use 0"]),
                ("--model.sharing none --model.kv-strategy hybrid", ["kv_strategy hybrid needs a"]),
                ("--model.sharing none --model.relax-norms", ["relax_norms needs a block"]),
                ("--model.sharing none --model.lora-rank 2", ["lora_rank 2 needs a block"]),
                (
                    "--model.router fixed --model.kv-strategy hybrid",
                    ["hybrid equals per_recursion", "use per_recursion"],
                ),
                (
                    "--model.kv-strategy shared --model.lora-rank 2",
                    ["leave k_proj and v_proj out"],
                ),
            )
        )
    ],
    ("no heads", nothing, "plan {recipe} --model.num-attention-heads 0", ["heads is 0; give"]),
    (
        "huge recursions",
        nothing,
        "plan {recipe} --model.num-recursions 1000000000",
        ["do not divide"],
    ),
    ("huge width", nothing, f"plan {{recipe}} --model.hidden-size {10**30}", ["hidden_size is 1"]),
    ("rate of nan", nothing, "plan {recipe} --train.lr nan", ["lr is nan; give a number above 0"]),
    (
        "endless budget",
        nothing,
        "plan {recipe} --train.budget-tokens inf",
        ["budget_tokens is inf"],
    ),
    ("huge seed", nothing, f"plan {{recipe}} --train.seed {2**64}", ["seed is 184", "2**63"]),
    # training
    (
        "context longer than the model's",
        nothing,
        "train {recipe} --data {data} --out {tmp}/out --train.context 128 "
        "--train.micro-batch-tokens 128",
        ["context 128 is longer", "max_position_embeddings 64"],
    ),
    (
        "context longer than the text",
        nothing,
        "train {recipe} --data {data} --out {tmp}/out --train.context 65536 --train.batch-tokens "
        "65536 --train.micro-batch-tokens 0 --model.max-position-embeddings 65536",
        ["fewer than context 65536", "prepare more text"],
    ),
    (
        "vocabulary smaller than the data's",
        recipe("hidden_size", "vocab_size = 100\nhidden_size"),
        TRAIN,
        ["vocab_size is 100", "up to 279"],
    ),
    (
        "no prepared data",
        nothing,
        "train {recipe} --data {tmp}/no --out {tmp}/out",
        ["mor prepare"],
    ),
    ("other folder", nothing, "train {recipe} --data {run} --out {tmp}/out", ["no manifest.json"]),
    (
        "data of another format",
        data_of_another_format,
        "train {recipe} --data {tmp}/data --out {tmp}/out",
        ["manifest.json: format version is 99", "mor prepare again"],
    ),
    (
        "cut shard",
        cut_shard,
        "train {recipe} --data {tmp}/data --out {tmp}/out",
        ["train-00000.bin", "the manifest says", "mor prepare again"],
    ),
    ("used run folder", nothing, "train {recipe} --data {data} --out {run}", ["add --resume"]),
    ("other files there", nothing, "train {recipe} --data {data} --out {data}", ["already holds"]),
    (
        "nothing to resume",
        nothing,
        "train {recipe} --data {data} --out {tmp}/out --resume",
        ["holds no run to resume", "leave out --resume"],
    ),
    (
        "resume with another recipe",
        nothing,
        "train {recipe} --data {data} --out {run} --resume --train.lr 0.5",
        ["train.lr is 0.5", "began with 0.003"],
    ),
    (
        "resume with other data",
        other_data,
        "train {recipe} --data {tmp}/other --out {run} --resume",
        ["data is not what the run", "same --data"],
    ),
    # model folders
    ("no model folder", nothing, "generate {tmp}/no", ["no is not a model folder"]),
    ("folder of something else", nothing, "generate {data}", ["no config.json"]),
    ("truncated weights", truncate("run/model/model.safetensors", 999), GENERATE, ["is broken"]),
    ("no weights", remove("run/model/model.safetensors"), GENERATE, ["is missing"]),
    ("foreign weights", foreign_weights, GENERATE, ["model.safetensors", "another model"]),
    ("a pickle", no_safetensors, GENERATE, ["model.safetensors is broken or no safetensors"]),
    ("truncated config", truncate("run/model/config.json", 99), GENERATE, ["is not JSON"]),
    (
        "model of another format",
        config_with(format_version=99),
        GENERATE,
        ["config.json: format version is 99", "install the mor that wrote it"],
    ),
    (
        "model of another format to measure",
        config_with(format_version=None),
        EVAL,
        ["config.json: format version is None"],
    ),
    (
        "a peft adapter",
        files(**{"lora/adapter_config__json": "{}"}),
        "generate {tmp}/lora",
        ["lora is a peft adapter, not a model", "merge it", "docs/huggingface.md"],
    ),
    ("other model type", config_with(model_type="gpt2"), GENERATE, ["'gpt2'", "mor and llama"]),
    ("config with a null", config_with(capacity=None), GENERATE, ["config.json", "wrong type"]),
    ("broken tokenizer", truncate("run/model/tokenizer.json", 99), GENERATE, ["tokenizer.json"]),
    # generating
    ("temperature of nan", nothing, GENERATE + " --temperature nan", ["temperature is nan"]),
    ("temperature below 0", nothing, GENERATE + " --temperature -1", ["temperature is -1"]),
    ("top-p of 2", nothing, GENERATE + " --top-p 2", ["top_p is 2.0"]),
    ("top-k below -1", nothing, GENERATE + " --top-k -2", ["top_k is -2"]),
    ("huge seed for draws", nothing, GENERATE + f" --seed {2**70}", ["seed is 118"]),
    ("no new tokens", nothing, "generate {run}/model --max-tokens 0", ["max_tokens is 0"]),
    (
        "prompt longer than trained",
        files(p__txt=b"the cat sees the dog " * 20),
        "generate {run}/model --prompt-file {tmp}/p.txt",
        ["the prompt has", "may have 64", "shorten the prompt"],
    ),
    ("no prompt file", nothing, GENERATE + " --prompt-file {tmp}/no", ["no: No such file"]),
    (
        "prompt of no text",
        files(p__txt=b"ab\xff"),
        GENERATE + " --prompt-file {tmp}/p.txt",
        ["p.txt is not UTF-8 at byte 2"],
    ),
    (
        "two prompts",
        files(p__txt="a"),
        GENERATE + " --prompt b --prompt-file {tmp}/p.txt",
        ["give one of them"],
    ),
    # measuring
    ("context longer than trained", nothing, EVAL + " --context 65", ["longer than trained (64)"]),
    ("limit below 0", nothing, EVAL + " --limit-tokens -1", ["take 0 or more"]),
    (
        "data of another tokenizer",
        other_data,
        "eval {run}/model --data {tmp}/other",
        ["another tokenizer", "--tokenizer"],
    ),
    (
        "data of a larger vocabulary",
        other_data,
        "eval {run}/model --data {tmp}/large",
        ["model's vocabulary of 280", "prepare the text with the model's"],
    ),
]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder with size and time of change."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def complaint_of(command: str, world: World, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused; returns its one line."""
    places = {"tmp": world["tmp"], "data": world["data"], "recipe": world["recipe"]}
    argv = [word.format(**places, run=world["run"]) for word in command.split()]
    capsys.readouterr()
    code = main(argv)
    said = capsys.readouterr()
    assert code == 2, said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    *others, last = said.err.splitlines()
    assert last.startswith("mor: ")
    assert not [line for line in others if line.startswith("mor:")]
    return last


@pytest.mark.parametrize(
    ("prepared", "command", "says"),
    [case[1:] for case in CASES],
    ids=[case[0].replace(" ", "_") for case in CASES],
)
def test_bad_input_is_refused_in_one_line(
    prepared: Callable[[World, Patch], None],
    command: str,
    says: list[str],
    world: World,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        prepared(world, patch)
        before = listing(world.folder), listing(world.data)
        last = complaint_of(command, world, capsys)
    for words in says:
        assert words in last
    assert (listing(world.folder), listing(world.data)) == before
    assert not (world.folder / "out").exists()


@pytest.mark.parametrize(
    ("prepared", "command", "says", "left"),
    [
        (
            ids_beyond_the_vocabulary,
            "train {recipe} --data {tmp}/data --out {tmp}/out",
            ["token id 65535", "vocabulary has 280", "mor prepare again"],
            [],
        ),
        (
            full_disk_at_checkpoints,
            "train {recipe} --data {data} --out {tmp}/out",
            ["No space left on device", "free some space"],
            [],
        ),
        (
            poisoned,
            "train {recipe} --data {data} --out {tmp}/out --train.checkpoint-every 1",
            ["step 2: loss is nan", "checkpoint of step 1 is kept", "lower train.lr"],
            ["step-00000001"],
        ),
    ],
    ids=["token ids beyond the vocabulary", "full disk at a checkpoint", "a step of NaN"],
)
def test_a_run_that_breaks_off_keeps_what_it_has(
    prepared: Callable[[World, Patch], None],
    command: str,
    says: list[str],
    left: list[str],
    world: World,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        prepared(world, patch)
        last = complaint_of(command, world, capsys)
    for words in says:
        assert words in last
    out = world.folder / "out"
    assert not (out / "model").exists()
    checkpoints = out / "checkpoints"
    assert (sorted(os.listdir(checkpoints)) if checkpoints.exists() else []) == left


def test_invalid_utf8_is_left_out_on_request(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in range(4):
        world.write(f"in/{name}.txt", f"Some good text, number {name}.\n" * 5)
    world.write("in/bad.txt", b"text \xff\n")
    args = ["prepare", "--input", f"{world.folder}/in", "--out", f"{world.folder}/out"]
    assert main([*args, "--skip-bad", "--json"]) == 0
    said = capsys.readouterr()
    assert "bad.txt: invalid UTF-8 at byte offset 5" in said.err
    assert json.loads(said.out)["skipped"] == 1


def test_a_failed_resume_can_be_tried_again(
    world: World, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full when the model folder is written; with space again nothing is missing."""
    before = (world.run / "model/model.safetensors").read_bytes()
    (world.run / "summary.json").unlink()  # written last: without it the run is not finished
    args = "train {recipe} --data {data} --out {run} --resume"
    with monkeypatch.context() as patch:
        fails(errno.ENOSPC, checkpoint, "save_tensors")(world, patch)
        complaint_of(args, world, capsys)
    assert (world.run / "model/model.safetensors").read_bytes() == before
    places = {"data": world["data"], "recipe": world["recipe"], "run": world["run"]}
    assert main([word.format(**places) for word in args.split()]) == 0
    assert (world.run / "model/model.safetensors").read_bytes() == before
