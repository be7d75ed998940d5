"""The commands of `mor`: one dataclass of flags each, and what runs with them. Imports no torch.

Work is imported when a command starts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mor.bench.config import BenchTrainConfig
from mor.bench.load_config import BenchServeConfig
from mor.bench.serve_config import BenchDecodeConfig, BenchPrefillConfig
from mor.config import ModelConfig
from mor.convert.config import ConvertConfig, DistillGatesConfig
from mor.data.config import PrepareConfig
from mor.engine.config import Backend
from mor.engine.params import SamplingParams
from mor.experiment.config import ExperimentConfig
from mor.log import logger
from mor.serve.config import ServeConfig
from mor.train.config import Recipe, TrainConfig
from mor.uptrain.config import UptrainConfig

if TYPE_CHECKING:
    from mor.engine.engine import Engine

RecipePath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
OptionalRecipe = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
ModelFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small MoR, its vanilla twin and two controls on real text, and compare them."""

    out: Path
    """folder for the run: report.html and one folder per model"""
    quick: bool = False
    """end within a minute; the numbers say little"""
    input: tuple[str | Path, ...] = ()
    """own text instead of the Python standard library"""
    seed: int = 0
    """seed of weights, data order and the random router"""
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn text, code or JSONL into token shards that training reads."""

    config: tyro.conf.OmitArgPrefixes[PrepareConfig]
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model from a recipe: `mor train RECIPE --data PREPARED --out DIR`."""

    recipe: RecipePath
    """TOML file of the fields below; flags given after it win"""
    data: Path
    """folder that `mor prepare` wrote"""
    out: Path
    """folder for checkpoints, metrics.jsonl and the model"""
    resume: bool = False
    """go on from the newest checkpoint in --out"""
    json: bool = False
    """print one JSON object as the last line"""
    model: ModelConfig
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn an open checkpoint of the Llama family into a MoR folder, or a MoR into a Llama."""

    parent: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PARENT")]
    """Hugging Face folder, hub name OWNER/NAME, .gguf file, or smollm2-135m-instruct"""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """new or empty folder for the model"""
    config: tyro.conf.OmitArgPrefixes[ConvertConfig]
    to: Literal["mor", "llama"] = "mor"
    """llama unrolls a MoR folder whose gates are all 1 into a plain Llama"""
    distill: tyro.conf.OmitArgPrefixes[DistillGatesConfig]
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class Uptrain:
    """Convert an open checkpoint and heal it in stages, taught by its parent."""

    parent: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PARENT")]
    """what mor convert takes, such as smollm2-135m-instruct"""
    config: tyro.conf.OmitArgPrefixes[UptrainConfig]
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model folder behind OpenAI's API, with depth as a field and a page to try it."""

    model: ModelFolder
    """model folder"""
    config: tyro.conf.OmitArgPrefixes[ServeConfig]
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, how deep they go, and on what."""

    max_tokens: int = 128
    """new tokens at most"""
    temperature: float = 0.8
    """0 is greedy"""
    top_k: int = 0
    """draw from the k likeliest tokens, 0 for all"""
    top_p: float = 0.95
    """draw from the likeliest tokens that reach this share together"""
    min_p: float = 0.0
    """draw from tokens with at least this share of the likeliest one's probability"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens of prompt and answer less likely"""
    presence_penalty: float = 0.0
    """taken off the logit of every token in the answer"""
    frequency_penalty: float = 0.0
    """taken off a token's logit for each time it is in the answer"""
    stop: tuple[str, ...] = ()
    """texts that end the answer"""
    seed: int = 0
    """seed of the draws"""
    max_recursions: int | None = None
    """recursions that a token may take; all of the model unless given"""
    threshold_shift: float = 0.0
    """added to every threshold of scores, which are 0 to 1: above 0 fewer tokens go on"""
    target_depth: float | None = None
    """mean depth to aim at, by the scores that the model folder keeps"""
    backend: Backend = "auto"
    """native: compiled for the CPU; triton: on a GPU; torch: plain; auto: the fastest to be had"""
    device: str = "auto"
    """cpu, cuda or auto"""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """type of the weights; auto is bfloat16 where the processor multiplies it"""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write text with a model folder; a token that left early costs nothing further."""

    model: ModelFolder
    """model folder"""
    prompt: str = ""
    """text to go on from; empty begins a new document"""
    prompt_file: Path | None = None
    """file to read the prompt from, - for standard input"""
    ignore_eos: bool = False
    """go on after the end of the document"""
    logprobs: int | None = None
    """with --json: so many likeliest tokens beside each drawn one, with their log-probabilities"""
    show_depth: bool = False
    """colour every token by the recursions it took"""
    sampling: tyro.conf.OmitArgPrefixes[Sampling]
    json: bool = False
    """print one JSON object with tokens and depths as the last line"""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk with a model folder; Ctrl-C stops an answer, Ctrl-D ends."""

    model: ModelFolder
    """model folder"""
    system: str = ""
    """what the model is told before the conversation"""
    show_depth: bool = False
    """colour every token by the recursions it took"""
    sampling: tyro.conf.OmitArgPrefixes[Sampling]
    json: bool = False
    """print one JSON object with all turns as the last line, instead of the answers"""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a model folder under causal routing: loss, bits per byte, few-shot tasks."""

    model: ModelFolder
    """model folder"""
    data: Path | None = None
    """folder that `mor prepare` wrote, with the model's tokenizer: loss and bits per byte"""
    split: Literal["val", "heldout", "train"] = "val"
    """which part of it"""
    limit_tokens: int = 0
    """stop after so many tokens, 0 for the whole split"""
    context: int = 0
    """tokens of a row; 0 for what the model allows, at most 2048"""
    also_top_k: bool = False
    """measure once more with top-k routing, which peeks at the future; only shown beside"""
    tasks: str = ""
    """few-shot tasks with commas between, such as piqa,arc_easy; docs/evaluation.md lists them"""
    data_dir: Path | None = None
    """folder of the tasks' files, a folder for each"""
    limit: int = 0
    """items of each task, 0 for all"""
    num_fewshot: int = 0
    """examples before a question of mmlu"""
    max_recursions: int = 0
    """recursions that a token may take in tasks, 0 for all"""
    against: Path | None = None
    """folder of the parent: measure the model, its fixed depths and --beside next to it"""
    beside: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """LABEL=FOLDER of a model that had the same budget, for --against; once for each"""
    out: Path | None = None
    """HTML file for the report of --against"""
    answers: Path | None = None
    """folder where answers are kept, so that a killed run goes on"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """type of the products in tasks"""
    device: str = "auto"
    """cpu, cuda or auto"""
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict parameters, FLOPs, keys and values and memory of a recipe beside its vanilla twin."""

    recipe: RecipePath
    """TOML file of the fields below; flags given after it win"""
    json: bool = False
    """print one JSON object as the last line"""
    model: ModelConfig
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class BenchTrain:
    """Time training steps of MoR, its vanilla twin and transformers' Llama, and their memory."""

    config: tyro.conf.OmitArgPrefixes[BenchTrainConfig]
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class BenchDecode:
    """Serve requests with MoR and its vanilla twin, beside what the kernels alone allow."""

    config: tyro.conf.OmitArgPrefixes[BenchDecodeConfig]
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class BenchPrefill:
    """Time reading prompts with MoR and its vanilla twin."""

    config: tyro.conf.OmitArgPrefixes[BenchPrefillConfig]
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class BenchServe:
    """Put load on a server that speaks OpenAI's API, ours or another, and time its answers."""

    config: tyro.conf.OmitArgPrefixes[BenchServeConfig]
    json: bool = False
    """print one JSON object as the last line"""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Run the trainings of one recipe and say what they show; goes on where it was stopped."""

    recipe: OptionalRecipe = None
    """TOML file of an experiment, such as recipes/experiments/claims-cpu.toml"""
    config: tyro.conf.OmitArgPrefixes[ExperimentConfig]
    json: bool = False
    """print one JSON object as the last line"""


def run_demo(args: Demo) -> dict[str, Any]:
    from mor.demo import demo

    return demo(args.out, quick=args.quick, inputs=args.input, seed=args.seed, argv=sys.argv[1:])


def run_prepare(args: Prepare) -> dict[str, Any]:
    from mor.data.prepare import prepare

    manifest = prepare(args.config)
    return {"out": str(args.config.out), **dataclasses.asdict(manifest)}


def run_train(args: Train) -> dict[str, Any]:
    from mor.data.loader import PreparedData
    from mor.train.trainer import train

    recipe = Recipe(model=args.model, train=args.train)
    summary = train(recipe, data=PreparedData.open(args.data), out=args.out, resume=args.resume)
    logger.info(
        "%s: causal validation loss %.4f, %.4f bits per byte at mean depth %.2f",
        summary.model,
        summary.val_loss,
        summary.bits_per_byte,
        summary.mean_depth,
    )
    return summary._asdict()


def run_convert(args: Convert) -> dict[str, Any]:
    if args.to == "llama":
        for field in dataclasses.fields(ConvertConfig):
            value = getattr(args.config, field.name)
            if value != field.default:
                raise ValueError(
                    f"{field.name} is {value}, but --to llama keeps the model's own; leave it out"
                )
    if args.distill.distill_gates:
        if args.to != "llama":
            raise ValueError("--distill-gates makes a Llama; give --to llama with it")
        from mor.convert.distill_gates import distill_gates

        return distill_gates(Path(args.parent), args.out, args.distill)
    if args.to == "llama":
        from mor.convert.llama import to_llama

        return to_llama(Path(args.parent), args.out)
    from mor.convert.convert import convert

    return convert(args.parent, args.out, args.config)


def run_uptrain(args: Uptrain) -> dict[str, Any]:
    from mor.uptrain.run import uptrain

    return uptrain(args.parent, args.config)


def run_serve(args: Serve) -> dict[str, Any]:
    _require("serve", "uvicorn", "fastapi", "prometheus_client", "llguidance")
    from mor.serve.run import serve

    return serve(args.model, args.config)


def run_generate(args: Generate) -> dict[str, Any]:
    from mor.write import write_text

    prompt = args.prompt
    if args.prompt_file is not None:
        if args.prompt:
            raise ValueError("both --prompt and --prompt-file are given; give one of them")
        is_stdin = str(args.prompt_file) == "-"
        raw = sys.stdin.buffer.read() if is_stdin else args.prompt_file.read_bytes()
        try:
            prompt = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompt_file} is not UTF-8 at byte {error.start}") from error
    params = _params(
        args.sampling,
        ignore_eos=args.ignore_eos,
        skip_special_tokens=not args.ignore_eos,
        logprobs=args.logprobs,
    )
    engine = _engine(args.model, args.sampling)
    return write_text(engine, prompt, params, show_depth=args.show_depth, quiet=args.json)


def run_chat(args: Chat) -> dict[str, Any]:
    from mor.chat import chat
    from mor.chat_template import check_extra

    check_extra()
    params = _params(args.sampling)
    return chat(
        args.model,
        _engine(args.model, args.sampling),
        params,
        system=args.system,
        show_depth=args.show_depth,
        quiet=args.json,
    )


def _params(sampling: Sampling, **more: Any) -> SamplingParams:
    fields: dict[str, Any] = dict(dataclasses.asdict(sampling))
    for name in ("backend", "device", "dtype"):
        del fields[name]
    return SamplingParams(**fields, **more)


def _engine(model: Path, sampling: Sampling) -> Engine:
    from mor.write import open_engine

    return open_engine(
        model, device=sampling.device, dtype=sampling.dtype, backend=sampling.backend
    )


def run_eval(args: Eval) -> dict[str, Any]:
    if args.data is None and not args.tasks:
        raise ValueError("nothing to measure; give --data, or --tasks and --data-dir")
    foreign = ("also_top_k", "max_recursions") if args.against else ("beside", "out")
    for name in foreign:
        if getattr(args, name):
            flag = name.replace("_", "-")
            fits = "does not go with --against" if args.against else "needs --against PARENT"
            raise ValueError(f"--{flag} {fits}; leave one of them out")
    if args.against is not None:
        from mor.evals.against import compare, folders_of

        return compare(
            args.model,
            args.against,
            beside=folders_of(args.beside),
            data_folder=args.data,
            tasks=[name.strip() for name in args.tasks.split(",") if name.strip()],
            data_dir=args.data_dir,
            out=args.out,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            split=args.split,
            limit_tokens=args.limit_tokens,
            context=args.context,
            cache=args.answers,
            device=args.device,
            dtype=args.dtype,
        )
    result: dict[str, Any] = {}
    if args.data is not None:
        from mor.evals.loss import evaluate_folder

        result = evaluate_folder(
            args.model,
            args.data,
            split=args.split,
            limit_tokens=args.limit_tokens,
            context=args.context,
            also_top_k=args.also_top_k,
            device=args.device,
        )
    if args.tasks:
        from mor.evals.tasks import evaluate_tasks

        result["tasks"] = evaluate_tasks(
            args.model,
            args.tasks,
            args.data_dir,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            cache=args.answers,
            device=args.device,
            dtype=args.dtype,
            max_recursions=args.max_recursions,
        )
    return result


def run_plan(args: Plan) -> dict[str, Any]:
    from mor.explore.plan import plan, print_plan

    result = plan(args.model, args.train)
    if not args.json:
        print_plan(result)
    return result


def run_bench_train(args: BenchTrain) -> dict[str, Any]:
    from mor.bench.table import print_table, verdict
    from mor.bench.train import bench_train

    result = bench_train(args.config)
    print_table(result, sys.stderr if args.json else sys.stdout)
    for line in verdict(result["rows"]):
        logger.info("%s", line)
    return result


def run_bench_decode(args: BenchDecode) -> dict[str, Any]:
    from mor.bench.decode import bench_decode
    from mor.bench.serve_table import print_decode, verdict

    result = bench_decode(args.config)
    print_decode(result, sys.stderr if args.json else sys.stdout)
    for line in verdict(result):
        logger.info("%s", line)
    return result


def run_bench_prefill(args: BenchPrefill) -> dict[str, Any]:
    from mor.bench.prefill import bench_prefill
    from mor.bench.serve_table import print_prefill

    result = bench_prefill(args.config)
    print_prefill(result, sys.stderr if args.json else sys.stdout)
    return result


def run_bench_serve(args: BenchServe) -> dict[str, Any]:
    _require("serve", "aiohttp")
    from mor.bench.load import bench_serve

    result = bench_serve(args.config)
    logger.info(
        "%d answered in %.1f s, %.1f tokens/s; first token after %s ms (median), errors: %s",
        result["completed"],
        result["seconds"],
        result["tokens_per_s"],
        "?" if result["ttft_p50_ms"] is None else f"{result['ttft_p50_ms']:.0f}",
        result["errors"] or "none",
    )
    if "ratio" in result:
        logger.info("the server runs at %.3f of the bare engine", result["ratio"])
    return result


def run_experiment(args: Experiment) -> dict[str, Any]:
    if args.config.render:
        from mor.experiment.render import render

        return render(args.config.render, kept=args.config.kept)
    if args.recipe is None:
        raise ValueError("there is no recipe; write mor experiment RECIPE --data DATA --out OUT")
    from mor.experiment.run import list_members, run_experiment

    run = list_members if args.config.list else run_experiment
    return run(args.recipe, args.config)


def _require(extra: str, *modules: str) -> None:
    """Raise ValueError with the install command when a library of an extra is missing."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"{name} is missing; this command needs: pip install "
                f"'mixture-of-recursions[{extra}]'"
            )


COMMANDS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "demo": (Demo, run_demo),
    "prepare": (Prepare, run_prepare),
    "train": (Train, run_train),
    "convert": (Convert, run_convert),
    "uptrain": (Uptrain, run_uptrain),
    "serve": (Serve, run_serve),
    "generate": (Generate, run_generate),
    "chat": (Chat, run_chat),
    "eval": (Eval, run_eval),
    "plan": (Plan, run_plan),
    "bench train": (BenchTrain, run_bench_train),
    "bench decode": (BenchDecode, run_bench_decode),
    "bench prefill": (BenchPrefill, run_bench_prefill),
    "bench serve": (BenchServe, run_bench_serve),
    "experiment": (Experiment, run_experiment),
}
GROUPS = ("bench",)
"""first words of commands of two words"""
