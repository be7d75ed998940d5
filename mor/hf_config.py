"""`ModelConfig` as transformers wants it; every field of it is an attribute here."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers.configuration_utils import PretrainedConfig

from mor.config import ModelConfig

FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
KEPT = ("architectures", "dtype", "transformers_version")  # what config.json may hold beside FIELDS


class MorConfig(PretrainedConfig):
    """Config of a model folder. `core` is the same as our own `ModelConfig`.

    Takes the fields of `ModelConfig` and those of transformers. Raises ValueError as ModelConfig
    does: at once for the values given here, and in `core` for attributes that were set later.
    """

    model_type = "mor"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "depth"]

    def __init__(self, **kwargs: Any) -> None:
        # Auto classes make a config first, so this is where they learn of model and tokenizer.
        # When the hook registers the config, parts of transformers may still be half imported.
        import mor.hf  # noqa: F401

        core = ModelConfig(**{name: kwargs.pop(name) for name in FIELDS if name in kwargs})
        for name in ("model_type", "format_version"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        for name in FIELDS:
            setattr(self, name, getattr(core, name))
        if getattr(self, "pad_token_id", None) is None:
            self.pad_token_id = core.eos_token_id  # any would do: padding never enters the model

    @property
    def core(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in FIELDS})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what config.json holds; ValueError for a key that is missing or unknown."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"the config is of a {config_dict['model_type']}; make a folder of mor with mor "
                "convert"
            )
        # transformers adds keys of its own, such as _commit_hash
        ModelConfig.from_dict({k: v for k, v in config_dict.items() if not k.startswith("_")})
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds, so that `mor` reads it as its own."""
        own = super().to_dict()
        return self.core.to_dict() | {key: own[key] for key in KEPT if own.get(key) is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
