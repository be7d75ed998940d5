"""The Hugging Face face of a model folder: `AutoModelForCausalLM` and `AutoTokenizer` load it.

An adapter without mathematics: it holds the core (`mor.model.mor.MoR`) and translates. Padding on
any side becomes the core's packed rows, `generate` gets one cache, the files stay the core's.
Shapes: B sequences, T columns of the input (tokens and padding), V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mor.hf_config import MorConfig
from mor.model.cache import KVCache
from mor.model.mor import IGNORE, MoR

# Newer versions of transformers 5 renamed `past_key_values` everywhere.
OUTPUTS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE = "cache" if "cache" in OUTPUTS else "past_key_values"


@dataclasses.dataclass
class MorOutput(CausalLMOutputWithPast):
    """What transformers' causal models return, and the depth of every token."""

    depth: Tensor | None = None
    """(B, T) int64, recursions that each token took; 0 at padding"""


class MorCache(Cache):
    """transformers' handle on our `KVCache`, which is made when the first tokens come."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kv: KVCache | None = None
        self.num_columns = 0

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # so `generate` leaves out the columns that are here already

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen, padding counted, as attention masks count them."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.kv is not None:
            self.kv.reorder(beam_idx.to(self.kv.length_B.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv is not None:
            self.reorder_cache(torch.arange(len(self.kv.length_B)).repeat_interleave(repeats))

    def reset(self) -> None:
        self.kv, self.num_columns = None, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("the cache of mor cannot be cropped; generate without an assistant")


class Padded(NamedTuple):
    """A batch with padding anywhere, its real tokens moved to the left as the core wants them."""

    order_BT: Tensor
    """columns, those of real tokens first"""
    place_BT: Tensor
    """inverse of the order: where each column went"""
    length_B: Tensor

    @classmethod
    def read(cls, mask_BT: Tensor) -> Padded:
        order_BT = mask_BT.logical_not().int().argsort(dim=1, stable=True)
        return cls(order_BT, order_BT.argsort(dim=1), mask_BT.sum(1))

    def pack(self, x_BT: Tensor) -> Tensor:
        return x_BT.gather(1, self.order_BT)

    def unpack(self, x_BT: Tensor) -> Tensor:
        rows_B1 = torch.arange(len(x_BT), device=x_BT.device)[:, None]
        return x_BT[rows_B1, self.place_BT]


class MorForCausalLM(PreTrainedModel, GenerationMixin):
    """A Mixture-of-Recursions language model for transformers.

    Depth follows the causal rule, in `generate` too. Top-k, which looks at the future, chooses in
    training only: in training mode with gradients. Weights have the names of the core's files.
    """

    config_class = MorConfig
    base_model_prefix = "model"
    _no_split_modules = ["Stack"]  # noqa: RUF012, as in transformers
    _supports_sdpa = True
    _is_warm = False
    """no warm-up of capacities is left"""

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        # On the way through fp32 the routers get the type they keep (see Router._apply).
        core = MoR(config.core).float().to(torch.get_default_dtype())
        self.model, self.lm_head = core.model, core.lm_head
        self.__dict__["_core"] = core  # no submodule: the weights belong to `model` and `lm_head`
        self.register_load_state_dict_pre_hook(_refuse_foreign)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what tools add, such as a longer embedding.

        The core has drawn its own weights, and a load that misses any is refused
        """
        if type(module) not in (nn.Linear, nn.Embedding):
            return
        if all(module is not one for one in self.modules()):
            weight = cast(nn.Parameter, module.weight)
            nn.init.normal_(weight, std=self.config.core.initializer_range)

    @property
    def core(self) -> MoR:
        """The model itself, on the modules that are here now: tools may have replaced some."""
        core: MoR = self.__dict__["_core"]
        core.model, core.lm_head, core.training = self.model, self.lm_head, self.training
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        if type(head) not in (nn.Linear, nn.Embedding):
            raise ValueError(
                f"the head is a {type(head).__name__}, but mor uses its plain weight; leave "
                "lm_head (and embed_tokens where it is tied) out of the adapter's modules"
            )
        return core

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a folder as transformers does, but strictly.

        Raises ValueError for weights that are missing, foreign or misshapen, for several devices,
        and for quantisation, which would find the routers alone
        """
        for name in ("quantization_config", "load_in_8bit", "load_in_4bit"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not supported by mor; leave it out")
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        foreign = set(info["unexpected_keys"])
        if model.lm_head is None:
            foreign.discard("lm_head.weight")  # some tools store the tied head a second time
        for kind, names in (("missing", info["missing_keys"]), ("foreign", foreign)):
            if names:
                raise ValueError(f"the weight {min(names)} is {kind}; the file is of another model")
        if info.get("mismatched_keys"):
            raise ValueError(
                f"the weight {min(map(str, info['mismatched_keys']))} has another shape than the "
                "model; leave out ignore_mismatched_sizes"
            )
        places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(places) > 1 or "disk" in places:
            raise ValueError(
                f"device_map puts mor on {', '.join(sorted(places))}; its head and blocks are read "
                "from one device: give one that holds it all"
            )
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MorCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: MorCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MorOutput | tuple[Any, ...]:
        """Run a batch with padding anywhere; padding never enters the model.

        input_ids        (B, T) int64
        attention_mask   (B, columns of the cache + T): 1 for tokens, 0 for padding
        past_key_values  cache of earlier columns; `cache` is its name in newer versions
        labels           (B, T) int64, shifted here; -100 and padding count nothing
        logits_to_keep   how many last columns get logits, or which; 0 for all. 1 gives every
                         row its last real token, wherever the padding is
        num_items_in_batch  labels of all micro-batches together; default those of this batch
        Returns          loss (mean over labels, with the routers' losses in training), logits
                         (zero at padding), cache, depth
        Raises           ValueError for what the core does not do
        """
        keep = _read_rest(kwargs, logits_to_keep)
        cache = cache if cache is not None else past_key_values
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("mor takes input_ids; inputs_embeds are not supported")
        if cache is None and use_cache:
            cache = MorCache()
        if cache is not None and not isinstance(cache, MorCache):
            raise ValueError(f"the cache is a {type(cache).__name__}; give a MorCache, or none")
        is_training = self.training and torch.is_grad_enabled()
        if cache is not None and is_training:
            raise ValueError("a cache serves generation; call eval(), or leave use_cache out")
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel is not supported; set CUDA_VISIBLE_DEVICES to one GPU, or use "
                "torchrun"
            )
        core = self.core
        if is_training and not self._is_warm:
            self._is_warm = _check_schedule(core)
        padded = _read_mask(attention_mask, input_ids, cache)
        if cache is not None and cache.kv is None:
            cache.kv = core.new_cache(len(input_ids))
        kv = None if cache is None else cache.kv
        _check_positions(kwargs.get("position_ids"), input_ids, padded, kv)
        only_last = (
            isinstance(keep, int)
            and keep == 1
            and labels is None
            and (padded is None or bool(padded.length_B.all()))
        )
        # What is stored for later keeps no gradient, else every step would hold the ones before.
        with torch.set_grad_enabled(torch.is_grad_enabled() and kv is None):
            out = core(
                input_ids if padded is None else padded.pack(input_ids),
                lengths=None if padded is None else padded.length_B,
                rule="train" if is_training else "causal",
                cache=kv,
                last_only=only_last,
            )
        if cache is not None:
            cache.num_columns += input_ids.shape[1]

        loss = None
        if labels is not None:
            target_BT = _targets(labels, padded)
            count = (target_BT != IGNORE).sum().clamp(min=1)
            total = count if num_items_in_batch is None else num_items_in_batch
            loss = self.loss_function(
                logits=out.logits,
                labels=None,
                vocab_size=out.logits.shape[-1],
                num_items_in_batch=total,
                shift_labels=target_BT.contiguous(),
            )
            if is_training and out.router_loss_sum is not None:
                # The routers' mean over tokens, weighted as this batch is among its siblings.
                loss = loss + out.router_loss_sum / out.num_tokens * (count / total)
        logits, depth = out.logits, out.depth
        if padded is not None:
            logits = logits if only_last else padded.unpack(logits)
            depth = padded.unpack(depth)
        if not only_last:
            logits = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        fields: dict[str, Any] = {"loss": loss, "logits": logits, "depth": depth, CACHE: cache}
        result = MorOutput(**fields)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return result if wants_dict else result.to_tuple()

    def _prepare_cache_for_generation(  # pyrefly: ignore[bad-override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
    ) -> None:
        """Give `generate` our cache; refuse what would crop it or choose another."""
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError("mor cannot roll its cache back; generate without an assistant")
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, but mor has "
                "one cache, with keys and values of active tokens only; leave it out"
            )
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = MorCache()


class MorTokenizer(PreTrainedTokenizerFast):
    """tokenizer.json of a model folder, with the document token that its config.json names.

    It begins every text, as in `mor generate`, ends documents and pads, on the left.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012, as in transformers
    padding_side = "left"

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        tokenizer = super().from_pretrained(path, *args, **kwargs)
        if tokenizer.eos_token is None:
            of_hub = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
            where = {key: kwargs[key] for key in of_hub if key in kwargs}
            config = MorConfig.from_pretrained(path, **where)
            if config.eos_token_id is not None:
                end = tokenizer.convert_ids_to_tokens(config.eos_token_id)
                tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = end
                tokenizer.add_bos_token = True
            tokenizer.model_max_length = config.max_position_embeddings
        return tokenizer


def _check_schedule(core: MoR) -> bool:
    """Refuse to train amid a warm-up of capacities: `mor train` alone counts its steps.

    Returns True, since none begins later; it asks the device, so once will do
    """
    warmup = core.config.capacity_warmup_steps
    if warmup and int(core.model.router(0).get_buffer("steps_done")) < warmup:
        raise ValueError(
            f"capacity_warmup_steps is {warmup} and has not ended; mor train alone counts its "
            "steps: go on with that first"
        )
    return True


def _refuse_foreign(model: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hold what is loaded into the model to its names and shapes, also where strict is off.

    peft drops what it finds no place for, so a LoRA of another model would half apply.
    """
    own = {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if not name.startswith(prefix) or name == f"{prefix}lm_head.weight":
            continue
        if name not in own:
            raise ValueError(f"the weight {name} is foreign; the file is of another model")
        if tensor.shape != own[name]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, the model's is {list(own[name])}; "
                "the file is of another model"
            )


def _read_rest(rest: dict[str, Any], logits_to_keep: int | Tensor) -> int | Tensor:
    """Refuse arguments that would be dropped in silence; returns the columns to keep."""
    older = rest.pop("num_logits_to_keep", None)
    for name, value in rest.items():
        # cache_position repeats what the cache knows; positions are checked later
        if name in ("cache_position", "position_ids") or value is None or value is False:
            continue
        raise ValueError(f"{name} is not supported by mor; leave it out")
    return logits_to_keep if older is None else older


def _read_mask(mask: Tensor | None, input_ids: Tensor, cache: MorCache | None) -> Padded | None:
    """Return where the real tokens of these columns are; None when all are real."""
    B, T = input_ids.shape
    if mask is None:
        return None
    seen = 0 if cache is None else cache.num_columns
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] != seen + T:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; give ({B}, {seen + T}) of 0 and 1"
        )
    mask_BT = mask[:, -T:] != 0
    if bool(mask_BT.all()):
        return None
    if not bool(mask_BT.any()):
        raise ValueError("attention_mask hides every token; leave one at least")
    return Padded.read(mask_BT)


def _check_positions(
    position_ids: Tensor | None, input_ids: Tensor, padded: Padded | None, kv: KVCache | None
) -> None:
    """Hold positions that a caller gives to those that the core takes: real tokens, counted."""
    if position_ids is None:
        return
    B, T = input_ids.shape
    given_BT = position_ids.expand(B, T)
    place_BT = torch.arange(T, device=given_BT.device).expand(B, T)
    is_real = torch.ones_like(place_BT, dtype=torch.bool)
    if padded is not None:
        given_BT, is_real = padded.pack(given_BT), place_BT < padded.length_B[:, None]
    if kv is not None:
        place_BT = place_BT + kv.length_B[:, None]
    if not torch.equal(given_BT[is_real], place_BT[is_real]):
        raise ValueError("position_ids do not count the real tokens of each row; leave them out")


def _targets(labels: Tensor, padded: Padded | None) -> Tensor:
    """Return the label that each packed place predicts: the one of the row's next real token."""
    if padded is None:
        return F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    next_BT = F.pad(padded.pack(labels), (0, 1), value=IGNORE)[:, 1:]
    place_T = torch.arange(labels.shape[1], device=labels.device)
    return next_BT.masked_fill(place_T >= padded.length_B[:, None] - 1, IGNORE)


# Trainer asks this table whether labels are to be shifted (label_smoothing_factor).
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mor"] = "MorForCausalLM"
AutoModelForCausalLM.register(MorConfig, MorForCausalLM, exist_ok=True)
AutoTokenizer.register(MorConfig, fast_tokenizer_class=MorTokenizer, exist_ok=True)
