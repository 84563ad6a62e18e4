"""The configuration of an exported model: the base's own, nested, and what was appended to it. Needs no torch."""

from __future__ import annotations

import copy
from dataclasses import asdict

from transformers import AutoConfig, PretrainedConfig

from moect.moe_config import MoeConfig


def _of_base(name: str) -> property:
    return property(
        lambda self: getattr(self.base_config, name), lambda self, value: setattr(self.base_config, name, value)
    )


class MoectConfig(PretrainedConfig):
    """Hugging Face config of a base with an appended module.

    Args:
        base_config: the base's config, or its values with `model_type`; copied.
        moe: values of `MoeConfig`; missing ones take its defaults.
        rows: U, tokens that have rows of their own in embedding and head.
        added_tokens: A, how many of these follow the base's vocabulary.
        spare_tokens: how many before these A were added too, to rows that the base's tokenizer left unused.

    Raises:
        ValueError: `moe` describes no module.
    """

    model_type = "moect"
    sub_configs = {"base_config": AutoConfig}  # attention kernel and dtype are handed down to it

    def __init__(
        self,
        base_config: dict | PretrainedConfig | None = None,
        moe: dict | None = None,
        rows: int = 0,
        added_tokens: int = 0,
        spare_tokens: int = 0,
        **kwargs,
    ):
        values = base_config.to_dict() if isinstance(base_config, PretrainedConfig) else copy.deepcopy(base_config)
        values = values or {"model_type": "llama"}  # transformers makes configs without arguments, to learn defaults
        values.pop("_name_or_path", None)
        self.base_config = AutoConfig.for_model(**values)
        before = {} if not moe or "gate_sees" in moe else {"gate_sees": "token"}  # an export of before there was one
        if before and rows and moe.get("language_gate"):
            raise ValueError("exported when rows of tokens came before the language gate; export the run again")
        self.moe = asdict(MoeConfig(**before, **(moe or {})))
        self.rows, self.added_tokens, self.spare_tokens = rows, added_tokens, spare_tokens
        if self._auto_class is None:
            kwargs.pop("auto_map", None)  # saved again, no modelling file will lie beside it
        super().__init__(**kwargs)

    def __getattr__(self, name: str):
        """What is not the module's is the base's: `head_dim`, `layer_types` and all that caches, masks and serving
        engines ask a config for. So this config is the text config itself, and not one with another inside: engines
        take the latter for a model of images and text."""
        if name.startswith("_") or name == "base_config":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.base_config, name)

    def __setattr__(self, name: str, value) -> None:
        base_config = self.__dict__.get("base_config")
        private = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if base_config is not None and not private and hasattr(base_config, name):
            setattr(base_config, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def vocab_size(self) -> int:
        """Tokens of the base, and those added to them."""
        return self.base_config.vocab_size + self.added_tokens

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.base_config.vocab_size = value - self.added_tokens

    # these every config has, so that they are not asked of the base by themselves
    tie_word_embeddings = _of_base("tie_word_embeddings")
    bos_token_id = _of_base("bos_token_id")
    eos_token_id = _of_base("eos_token_id")
    pad_token_id = _of_base("pad_token_id")
    base_model_tp_plan = _of_base("base_model_tp_plan")
    base_model_pp_plan = _of_base("base_model_pp_plan")
