"""What a model is: one frozen dataclass, checked where it is made. Imports no torch.

Names of sizes are transformers', names of routing are the paper's (arXiv 2507.10524).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FORMAT_VERSION = 2

Sharing = Literal["cycle", "middle_cycle", "sequence", "middle_sequence", "none"]
RouterKind = Literal["expert_choice", "token_choice", "threshold", "fixed", "random"]
Gating = Literal["auto", "weighted", "additive", "residual", "none"]
RouterBody = Literal["linear", "mlp", "wide_mlp"]
RouterAux = Literal["loss", "router"]
RouterScore = Literal["auto", "sigmoid", "softmax"]
RouterBalance = Literal["loss", "bias"]
KVStrategy = Literal["per_recursion", "shared", "hybrid"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def end_layers(sharing: Sharing, given: int) -> int:
    """Return the layers at an end: those given, or what the sharing map keeps apart for -1."""
    if given >= 0:
        return given
    return 0 if sharing in ("cycle", "sequence") else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a model. `num_recursions = 1` with the `fixed` router is a plain Llama.

    Raises ValueError, in one line that names the value and the fix, for sizes that do not fit.
    """

    vocab_size: int = 49152
    """entries of the tokenizer"""
    hidden_size: int = 576
    """width of the residual stream"""
    intermediate_size: int = 1536
    """width of the gated feed-forward layer"""
    num_hidden_layers: int = 30
    """layers after unrolling: prelude + recursions x block + coda"""
    num_attention_heads: int = 9
    """query heads"""
    num_key_value_heads: int = 3
    """key and value heads; divides the query heads"""
    head_dim: int = 0
    """size of one head; 0 for hidden_size / num_attention_heads"""
    max_position_embeddings: int = 2048
    """longest context, in tokens"""
    rope_theta: float = 10000.0
    """base of the rotary embedding"""
    rms_norm_eps: float = 1e-5
    """epsilon of the norms"""
    tie_word_embeddings: bool = True
    """one matrix for embedding and head"""
    initializer_range: float = 0.02
    """standard deviation of fresh weights"""
    bos_token_id: int | None = None
    """token that begins a document"""
    eos_token_id: int | None = None
    """token that ends a document"""

    num_recursions: int = 1
    """R, how often the shared block can be applied to a token"""
    sharing: Sharing = "middle_cycle"
    """which layers are shared; the middle maps and none keep first and last layer apart"""
    prelude_layers: int = -1
    """layers before the block, applied once; -1 for the sharing's own, 0 for cycle and sequence"""
    coda_layers: int = -1
    """layers behind the block, applied once; -1 as above"""
    router: RouterKind = "fixed"
    """who decides the depth; fixed gives every token the full depth, random is the control"""
    capacity: tuple[float, ...] = ()
    """share of tokens active at each recursion; (R - r + 1) / R unless given"""
    gating: Gating = "auto"
    """how a recursion's result joins the stream; auto is none for fixed, weighted for the others"""
    router_score: RouterScore = "auto"
    """what turns logits into scores; auto is softmax for token choice, sigmoid for the others"""
    router_alpha: float = 0
    """scale of the weighted gate; 0 for 0.1, or 1 with softmax"""
    router_body: RouterBody = "linear"
    """what turns a state into a score; the MLPs have a hidden layer of 2 or 4 times the width"""
    router_bias: bool = False
    """give the router's layers a bias"""
    router_aux: RouterAux = "loss"
    """how expert choice learns its causal rule: a loss on its scores, or a second router beside"""
    router_z_loss_coef: float = 0.0
    """weight of the mean squared logit, which keeps scores small"""
    capacity_warmup_steps: int = 0
    """optimizer steps in which capacities fall from 1 to their own, on half a cosine"""
    router_threshold_rate: float = 0.1
    """how far the threshold router moves towards its target share after a step"""
    router_aux_loss_coef: float = 0.001
    """weight of the loss that teaches scores to predict the top-k choice"""
    router_balance: RouterBalance = "loss"
    """what keeps token choice's depths evenly used: a loss, or a bias moved after each step"""
    router_balance_loss_coef: float = 0.1
    """weight of the balancing loss"""
    router_balance_rate: float = 0.001
    """how far the balancing bias moves after a step"""
    router_seed: int = 0
    """seed of the random router"""
    kv_strategy: KVStrategy = "per_recursion"
    """which keys and values a recursion sees: those made there, recursion 1's, or a mix"""
    relax_norms: bool = False
    """give the shared layers norm gains of their own at each recursion"""
    recursion_encoding: bool = False
    """multiply the block's result by a vector of the recursion's own"""
    lora_rank: int = 0
    """rank of what each recursion adds to the shared projections; 0 for none"""
    lora_alpha: float = 0
    """the addition counts lora_alpha / lora_rank; 0 for twice the rank"""
    lora_targets: tuple[Projection, ...] = ("q_proj", "v_proj")
    """projections that have such an addition"""
    exit_maps: bool = False
    """a token that leaves early passes a linear map in place of the recursions that it skips"""
    attention_bias: bool = False
    """queries, keys and values have biases, as in Qwen2; for converted models"""
    qk_norm: bool = False
    """queries and keys are normed head by head, as in Qwen3; for converted models"""

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # frozen: resolve the defaults once, here
        if self.head_dim == 0:
            heads = max(self.num_attention_heads, 1)  # 0 is refused below
            _require(
                self.hidden_size % heads == 0,
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads "
                f"{heads}; change one, or give head_dim",
            )
            set_(self, "head_dim", self.hidden_size // heads)
        self._check_sizes()
        self._check_layers()
        if self.gating == "auto":
            set_(self, "gating", "none" if self.router == "fixed" else "weighted")
        if self.router_score == "auto":
            set_(self, "router_score", "softmax" if self.router == "token_choice" else "sigmoid")
        if self.router_alpha == 0:
            set_(self, "router_alpha", 1.0 if self.router_score == "softmax" else 0.1)
        if self.lora_alpha == 0:
            set_(self, "lora_alpha", 2.0 * max(self.lora_rank, 0))
        set_(self, "lora_targets", tuple(self.lora_targets))
        if not self.capacity:
            everyone = (1.0,) * self.num_recursions
            set_(self, "capacity", self._even_capacity if self.has_router else everyone)
        else:
            set_(self, "capacity", tuple(float(c) for c in self.capacity))
        self._check_routing()
        self._check_coefficients()
        self._check_recursions_apart()

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "num_recursions",
            "head_dim",
        ):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and 1 <= value < 2**31,
                f"{name} is {value!r}; give a whole number from 1 to 2147483647",
            )
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value > 0,
                f"{name} is {value}; give a positive number",
            )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} does not divide by "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; rotary needs an even one")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value < self.vocab_size,
                f"{name} is {value}, but the vocabulary has {self.vocab_size} entries",
            )

    def _check_layers(self) -> None:
        for name, kind in (
            ("sharing", Sharing),
            ("router", RouterKind),
            ("gating", Gating),
            ("router_body", RouterBody),
            ("router_aux", RouterAux),
            ("router_score", RouterScore),
            ("router_balance", RouterBalance),
            ("kv_strategy", KVStrategy),
        ):
            check_choice(name, getattr(self, name), typing.get_args(kind))
        for name in ("prelude_layers", "coda_layers"):
            value = getattr(self, name)
            _require(value >= -1, f"{name} is {value}; give 0 or more, or -1 for the sharing's own")
        own = self.num_own_layers
        shared = self.num_hidden_layers - own
        if shared < self.num_recursions or shared % self.num_recursions:
            per_block = max(1, math.ceil(shared / self.num_recursions))
            fits = own + per_block * self.num_recursions
            raise ValueError(
                f"num_hidden_layers {self.num_hidden_layers} does not fit {self.num_recursions} "
                f"recursions of {self.sharing}: {shared} shared layers do not divide; use {fits}"
            )

    def _check_routing(self) -> None:
        _require(
            len(self.capacity) == self.num_recursions,
            f"capacity has {len(self.capacity)} values for {self.num_recursions} recursions; "
            "give one each",
        )
        _require(
            all(math.isfinite(c) and 0.0 < c <= 1.0 for c in self.capacity),
            f"capacity {list(self.capacity)} leaves (0, 1]; give shares of all tokens",
        )
        _require(
            self.capacity[0] == 1.0,
            f"the first capacity is {self.capacity[0]}; give 1, recursion 1 takes every token",
        )
        _require(
            all(a >= b for a, b in zip(self.capacity, self.capacity[1:], strict=False)),
            f"capacity {list(self.capacity)} rises; a token that left cannot come back",
        )
        if self.router == "fixed":
            _require(
                self.gating == "none" and set(self.capacity) == {1.0},
                "the fixed router takes every token through every recursion: leave gating at none "
                "and capacity at 1, or choose the router expert_choice",
            )
        else:
            _require(
                self.num_recursions > 1,
                f"the router {self.router} needs num_recursions of 2 or more, it is "
                f"{self.num_recursions}; use the router fixed",
            )
            _require(
                "sequence" not in self.sharing,
                f"sharing {self.sharing} serves the router fixed; the router {self.router} needs "
                "cycle, middle_cycle or none",
            )
            has_gate = self.gating in ("weighted", "residual")
            _require(
                self.router != "threshold" or has_gate,
                f"the router threshold learns through its gate, gating {self.gating} has none; use "
                "weighted or residual",
            )
            _require(
                self.router != "token_choice" or has_gate or self.router_balance == "loss",
                f"the router token_choice would learn nothing: gating {self.gating} has no gate "
                "and router_balance bias no loss; use weighted or residual",
            )
        shares = [
            (self.num_recursions - r) / self.num_recursions for r in range(len(self.capacity))
        ]
        _require(
            self.router != "token_choice" or math.dist(self.capacity, shares) < 1e-6,
            f"capacity {list(self.capacity)} is not for the router token_choice, which uses all "
            "depths evenly; leave it out",
        )
        _require(
            self.router_score == "sigmoid" or self.router == "token_choice",
            f"router_score softmax serves the router token_choice, not {self.router}; use sigmoid",
        )
        _require(
            self.router_aux == "loss" or self.router == "expert_choice",
            f"router_aux router serves the router expert_choice, not {self.router}; use loss",
        )
        _require(
            self.router_aux == "loss" or self.gating in ("weighted", "residual"),
            f"router_aux router leaves top-k to what the gate teaches, gating {self.gating} has "
            "none; use weighted or residual",
        )
        _require(
            self.router_balance == "loss" or self.router == "token_choice",
            f"router_balance bias serves the router token_choice, not {self.router}; use loss",
        )
        _require(
            not self.exit_maps or self.router != "fixed",
            "exit_maps serve routers that let tokens go, not fixed; leave them out",
        )
        _require(
            self.capacity_warmup_steps == 0 or self.router not in ("fixed", "token_choice"),
            f"capacity_warmup_steps serves routers with capacities, not {self.router}; use 0",
        )

    def _check_coefficients(self) -> None:
        _require(
            0 <= self.capacity_warmup_steps < 2**31,
            f"capacity_warmup_steps is {self.capacity_warmup_steps}; give 0 or more",
        )
        for name in ("router_threshold_rate", "router_balance_rate"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"{name} is {value}; give a number in (0, 1]")
        for name in (
            "router_alpha",
            "router_aux_loss_coef",
            "router_balance_loss_coef",
            "router_z_loss_coef",
            "lora_alpha",
        ):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value >= 0,
                f"{name} is {value}; give a number of 0 or more",
            )

    def _check_recursions_apart(self) -> None:
        """Hold what differs between the recursions of shared layers to layers that are shared."""
        _require(
            0 <= self.lora_rank < 2**31, f"lora_rank is {self.lora_rank}; give 0 (off) or more"
        )
        for target in self.lora_targets:
            check_choice("lora_targets", target, typing.get_args(Projection))
        _require(
            len(set(self.lora_targets)) == len(self.lora_targets) > 0,
            f"lora_targets is {list(self.lora_targets)}; name each projection once, at least one",
        )
        is_shared = self.num_recursions > 1 and self.sharing in ("cycle", "middle_cycle")
        for name, is_on in (
            (f"kv_strategy {self.kv_strategy}", self.kv_strategy != "per_recursion"),
            ("relax_norms", self.relax_norms),
            ("recursion_encoding", self.recursion_encoding),
            (f"lora_rank {self.lora_rank}", self.lora_rank > 0),
        ):
            _require(
                is_shared or not is_on,
                f"{name} needs a block that is shared by 2 recursions or more; sharing is "
                f"{self.sharing} and num_recursions {self.num_recursions}",
            )
        _require(
            self.kv_strategy != "hybrid" or self.router != "fixed",
            "kv_strategy hybrid equals per_recursion with the router fixed; use per_recursion",
        )
        _require(
            self.kv_strategy != "shared"
            or self.lora_rank == 0
            or not {"k_proj", "v_proj"} & set(self.lora_targets),
            f"lora_targets is {list(self.lora_targets)}, but kv_strategy shared makes keys and "
            "values at recursion 1 only; leave k_proj and v_proj out",
        )

    @property
    def _even_capacity(self) -> tuple[float, ...]:
        """As many tokens of each depth."""
        return tuple(
            (self.num_recursions - r) / self.num_recursions for r in range(self.num_recursions)
        )

    @property
    def num_own_layers(self) -> int:
        """Layers of prelude and coda together, applied once to every token."""
        return self.num_prelude_layers + self.num_coda_layers

    @property
    def num_prelude_layers(self) -> int:
        return end_layers(self.sharing, self.prelude_layers)

    @property
    def num_coda_layers(self) -> int:
        return end_layers(self.sharing, self.coda_layers)

    @property
    def num_block_layers(self) -> int:
        """Layers of a recursion."""
        return (self.num_hidden_layers - self.num_own_layers) // self.num_recursions

    @property
    def num_unique_layers(self) -> int:
        """Layers that have weights of their own."""
        block = self.num_block_layers * (self.num_recursions if self.sharing == "none" else 1)
        return self.num_own_layers + block

    def block_layer(self, recursion: int, index: int) -> int:
        """Return which stored layer is the index-th of a recursion (both from 0).

        Source: the sharing maps of arXiv 2507.10524, Table 1, over the layers between prelude and
        coda: cycle repeats the block, sequence each of its layers, none shares nothing.
        """
        unrolled = recursion * self.num_block_layers + index
        if self.sharing == "none":
            return self.num_prelude_layers + unrolled
        if "sequence" in self.sharing:
            return self.num_prelude_layers + unrolled // self.num_recursions
        return self.num_prelude_layers + index

    @property
    def shares_block(self) -> bool:
        """All recursions run the same layers, so tokens of any depth fit one call."""
        return self.sharing in ("cycle", "middle_cycle")

    @property
    def has_router(self) -> bool:
        return self.router != "fixed"

    @property
    def num_routers(self) -> int:
        """One decision for all recursions, one at each, or none."""
        if self.router == "token_choice":
            return 1
        return self.num_recursions if self.has_router else 0

    @property
    def router_outputs(self) -> int:
        """Logits of a router."""
        return self.num_recursions if self.router == "token_choice" else 1

    @property
    def has_aux_router(self) -> bool:
        """A second router, on detached states, decides at inference."""
        return self.router == "expert_choice" and self.router_aux == "router"

    @property
    def router_hidden_size(self) -> int:
        """Hidden width of an MLP router."""
        return self.hidden_size * {"linear": 0, "mlp": 2, "wide_mlp": 4}[self.router_body]

    @property
    def capacity_depth(self) -> float:
        """Mean depth that the capacities ask for."""
        return sum(self.capacity)

    def twin(self) -> ModelConfig:
        """Return the vanilla model of equal unrolled layers."""
        return dataclasses.replace(
            self,
            num_recursions=1,
            router="fixed",
            gating="auto",
            capacity=(),
            router_score="auto",
            router_alpha=0,
            router_aux="loss",
            router_balance="loss",
            capacity_warmup_steps=0,
            kv_strategy="per_recursion",
            relax_norms=False,
            recursion_encoding=False,
            lora_rank=0,
            lora_alpha=0,
            exit_maps=False,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds."""
        fields = dataclasses.asdict(self)
        for name in _TUPLES:
            fields[name] = list(fields[name])
        return {"model_type": "mor", "format_version": FORMAT_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a config of ours, or a plain Llama's as one recursion.

        Raises ValueError for another model type, format version or an unknown key.
        """
        kind = data.get("model_type")
        if kind == "llama":
            return _build(_llama_fields(data, where), where)
        if kind != "mor":
            raise ValueError(f"{where}: model_type is {kind!r}; mor loads mor and llama")
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{where}: format version is {data.get('format_version')}, this mor reads "
                f"{FORMAT_VERSION}; install the mor that wrote it"
            )
        rest = {k: v for k, v in data.items() if k not in _NOT_FIELDS}
        names = [f.name for f in dataclasses.fields(cls)]
        for key in rest:
            check_choice(f"{where}: key", key, names)
        missing = [name for name in names if name not in rest and name not in _LATER]
        if missing:
            raise ValueError(f"{where}: {missing[0]} is missing; the file is not whole")
        return _build(rest, where)

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Read `config.json` at path (the file, or the folder that holds it)."""
        file = path / "config.json" if path.is_dir() else path
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{file} does not hold a JSON object")
        return cls.from_dict(data, where=str(file))


def _build(fields: dict[str, Any], where: str) -> ModelConfig:
    """Make a config of what a file holds; errors name the file."""
    try:
        tuples: dict[str, Any] = {n: tuple(fields[n]) for n in _TUPLES if n in fields}
        return ModelConfig(**fields | tuples)
    except TypeError as error:
        raise ValueError(f"{where}: a value has the wrong type ({error})") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


_TUPLES = ("capacity", "lora_targets")
_LATER = ("attention_bias", "qk_norm", "prelude_layers", "coda_layers", "exit_maps")
"""fields that older model folders do not have"""
_NOT_FIELDS = ("model_type", "format_version", "architectures", "dtype", "transformers_version")


def _llama_fields(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Translate a transformers Llama config; refuse what our layers cannot do."""
    for key, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if data.get(key, plain) != plain:
            raise ValueError(f"{where}: {key} is {data[key]!r}; only {plain!r} is supported")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{where}: rotary scaling {rope} is not supported")
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    own = {k: v for k, v in data.items() if k in names and v is not None}
    own["sharing"] = "cycle"  # no layer is special, however few there are
    own.setdefault("num_key_value_heads", data.get("num_attention_heads"))
    own.setdefault("tie_word_embeddings", False)  # here and below: transformers' own defaults
    own.setdefault("rms_norm_eps", 1e-6)
    own.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(own.get(key), list):
            own[key] = own[key][0]
    return own


def check_choice(name: str, value: str, choices: tuple[str, ...] | list[str]) -> None:
    """Raise ValueError naming the nearest choice when value is not one of them."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
    raise ValueError(f"{name} {value!r} is unknown; {hint}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
