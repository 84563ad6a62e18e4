"""The exported model as a transformers class: the base's own parts, with the appended module in its blocks.

Tensors have the base's names; those of the module are `model.layers.N.moe.*`, those of rows that trained
`model.embed_tokens.rows.*` and `lm_head.rows.*`. Blocks and rows are those of training, from `append_moe` and
`append_rows`, so there is one forward pass and not a second one to keep equal.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from moect.model.append import append_moe, base_only, is_appended_tensor, modules_of
from moect.model.configuration_moect import MoectConfig
from moect.model.embeddings import ExtendedCausalLM, TokenRows, append_rows, rows_of
from moect.moe_config import MoeConfig


class MoectForCausalLM(ExtendedCausalLM, PreTrainedModel, GenerationMixin):
    """A causal LM with an appended mixture of experts. The base's parameters are frozen, what was appended is not.

    Raises:
        UnsupportedModelError: the config's base is of a family that cannot be served.
    """

    config_class = MoectConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoectConfig):
        super().__init__(config)
        base = AutoModelForCausalLM.from_config(
            config.base_config, dtype=torch.get_default_dtype(), trust_remote_code=False
        )
        append_moe(base, MoeConfig(**config.moe))
        self.model, self.lm_head, self.moe_config = base.model, base.lm_head, base.moe_config
        if config.rows:  # which tokens they are of is among the weights
            added = config.added_tokens + config.spare_tokens
            first_id = config.base_config.vocab_size - config.spare_tokens
            append_rows(self, range(config.rows - added), first_id, [[0]] * added)
        self._no_split_modules = [type(self.model.layers[0]).__name__]
        self.post_init()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As in every model, where no token has a row of its own; else the size cannot change.

        Raises:
            ValueError: another size than the vocabulary's, and there are such rows.
        """
        if not rows_of(self):
            return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"the vocabulary of {self.config.vocab_size} tokens, some with rows of their own, cannot be resized"
            )
        return self.get_input_embeddings()

    def base_only(self):
        """Context manager: inside, this model is its base, bit for bit."""
        return base_only(self)

    @torch.no_grad()
    def initialize_weights(self):
        """Fill what was not loaded, the base as its family does, a module as `append_moe` does; freeze the base.

        transformers calls this when a model is made and, with loaded tensors marked, after loading.
        """
        incomplete = []
        for module in (*modules_of(self), *rows_of(self)):
            tensors = module.state_dict(keep_vars=True)
            loaded = {n: t for n, t in tensors.items() if getattr(t, "_is_hf_initialized", False)}
            if len(loaded) < len(tensors):
                incomplete.append((module, {n: t.clone() for n, t in loaded.items()}))
        super().initialize_weights()
        for module, loaded in incomplete:
            if isinstance(module, TokenRows):
                module.reset()
            else:
                module.reset(self.model.layers[module.index].mlp, torch.Generator().manual_seed(module.index))
            module.load_state_dict(loaded, strict=False)
        for name, parameter in self.named_parameters():  # loading made new ones
            parameter.requires_grad_(is_appended_tensor(name))
