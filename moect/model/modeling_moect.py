"""The exported model as a transformers class: the base's own parts, with the appended module in its blocks.

Tensors have the base's names; those of the module are `model.layers.N.moe.*`. The blocks are those of training, from
`append_moe`, so there is one forward pass and not a second one to keep equal.

B batch, S sequence, D width, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from moect.model.append import append_moe, base_only, modules_of
from moect.model.configuration_moect import MoectConfig
from moect.moe_config import MoeConfig


class MoectForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM with an appended mixture of experts. The base's parameters are frozen, the module's are not.

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
        self._no_split_modules = [type(self.model.layers[0]).__name__]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As in every causal LM of transformers.

        Args:
            input_ids: int64 (B, S); or give inputs_embeds (B, S, D).
            attention_mask: (B, S), 0 at padding.
            position_ids: int64 (B, S); where they start again at 0, so does the document.
            past_key_values: a cache.
            labels: int64 (B, S), -100 where there is none; shifted here, not by the caller.
            use_cache: return a cache.
            logits_to_keep: logits of the last so many positions only, or of these positions; 0: of all.
            kwargs: for the base; `moect_record=ForwardRecord()` collects what routers and gates did.

        Returns:
            loss (with labels) and logits (B, S, V) in the dtype of the weights.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=logits_BSV.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def base_only(self):
        """Context manager: inside, this model is its base, bit for bit."""
        return base_only(self)

    @torch.no_grad()
    def initialize_weights(self):
        """Fill what was not loaded, the base as its family does, a module as `append_moe` does; freeze the base.

        transformers calls this when a model is made and, with loaded tensors marked, after loading.
        """
        incomplete = []
        for moe in modules_of(self):
            tensors = moe.state_dict(keep_vars=True)
            loaded = {n: t for n, t in tensors.items() if getattr(t, "_is_hf_initialized", False)}
            if len(loaded) < len(tensors):
                incomplete.append((moe, {n: t.clone() for n, t in loaded.items()}))
        super().initialize_weights()
        for moe, loaded in incomplete:
            moe.reset(self.model.layers[moe.index].mlp, torch.Generator().manual_seed(moe.index))
            moe.load_state_dict(loaded, strict=False)
        for name, parameter in self.named_parameters():  # loading made new ones
            parameter.requires_grad_(".moe." in name)
