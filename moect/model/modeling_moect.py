"""The exported model as transformers classes: the base's own parts, with the appended module in its blocks.

Tensors have the base's names; those of the module are `model.layers.N.moe.*`, those of rows that trained
`model.embed_tokens.rows.*` and `lm_head.rows.*`. Blocks and rows are those of training, from `append_to_blocks` and
`place_rows`, so there is one forward pass and not a second one to keep equal.

`MoectModel` is the model without its head. Serving engines that take their models from transformers (vLLM's backend of
that name) make this one from the configuration, replace its parts by their own and put a head of their own on top. So:

- attention is the base's own, through transformers' attention interface, which every keyword reaches; nothing is kept
  between calls, but for the sums of a gate that counts, which are in the cache; tokens of several texts may come as one
  row, (1, T), told apart by their positions;
- a fusion and a language gate are served, the latter not in a pipeline of several stages: its value is computed in the
  first block with a module, and no engine carries it from one stage to the next;
- tokens with rows of their own are not: the engine's head knows nothing of the rows, so the model refuses to be made;
- vLLM has to be told `--enforce-eager`: which experts get how many tokens decides the shapes of their products, and a
  closed gate leaves the experts out altogether, which is what makes it cheap. (All experts for all tokens would have
  fixed shapes. At D 512, F 1536, 4 experts of 512, one CPU core, fp32, random weights, closed gate, this took 2.5 times
  the frozen FFN's time for 256 tokens and 5 times for one, against 1.1 and 1.3 as it is; so there is no such twin.)
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, GenerationMixin, PreTrainedModel

from moect.errors import UnsupportedModelError
from moect.model.append import append_to_blocks, base_only, begin_pass, is_appended_tensor, modules_of
from moect.model.configuration_moect import MoectConfig
from moect.model.embeddings import ExtendedCausalLM, TokenRows, place_rows, rows_of
from moect.model.families import check_config
from moect.moe_config import MoeConfig

ENGINES = ("vllm", "vllm_mla", "sglang")  # their names for their attention, by which a model can tell where it is


class MoectPreTrainedModel(PreTrainedModel):
    """What the model with a head and the one without share. The base's parameters are frozen, the others are not."""

    config_class = MoectConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "moect_record"]
    _keep_in_fp32_modules_strict = ["selection_bias", "of_token", "of_pair"]

    def base_only(self):
        """Context manager: inside, this model is its base, bit for bit."""
        return base_only(self)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As in every model, where no token has a row of its own; else the size cannot change.

        Raises:
            ValueError: another size than the vocabulary's, and there are such rows.
        """
        if not rows_of(self):
            embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
            for moe in modules_of(self):
                if moe.counts:
                    moe.language_gate.resize(embedding.num_embeddings)
            return embedding
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"the vocabulary of {self.config.vocab_size} tokens, some with rows of their own, cannot be resized"
            )
        return self.get_input_embeddings()

    @torch.no_grad()
    def initialize_weights(self):
        """Fill what was not loaded, the base as its family does, a module as `append_moe` does; freeze the base.

        transformers calls this when a model is made and, with loaded tensors marked, after loading.

        Raises:
            UnsupportedModelError: the loaded tensors are of another form of the language gate.
        """
        incomplete = []
        for module in (*modules_of(self), *rows_of(self)):
            tensors = module.state_dict(keep_vars=True)
            loaded = {n: t for n, t in tensors.items() if getattr(t, "_is_hf_initialized", False)}
            absent = [t for n, t in tensors.items() if n not in loaded and ".evidence." in n]
            if loaded and any(not t.is_meta for t in absent):  # those on the meta device lie on a disk
                raise UnsupportedModelError(
                    "this model was exported with a language gate of an earlier form, which this version does not "
                    "have: load it with the version of moect that wrote it, or train and export it anew"
                )
            if len(loaded) < len(tensors):
                incomplete.append((module, {n: t.clone() for n, t in loaded.items()}))
        super().initialize_weights()
        layers = self.base_model.layers
        for module, loaded in incomplete:
            if isinstance(module, TokenRows):
                module.reset()
            else:
                module.reset(layers[module.index].mlp, torch.Generator().manual_seed(module.index))
            module.load_state_dict(loaded, strict=False)
        for name, parameter in self.named_parameters():  # loading made new ones
            parameter.requires_grad_(is_appended_tensor(name))


class MoectModel(MoectPreTrainedModel):
    """The blocks, embedding and last norm of a base, with its appended module; no head.

    What is made is of a subclass of the base's own class too, say `Qwen3Model`: whatever looks for that finds it.

    Raises:
        UnsupportedModelError: the config's base is of a family that cannot be served, or some tokens have rows of their
            own and an engine makes the model, to put a head on it that knows nothing of them.
    """

    def __new__(cls, config: MoectConfig | None = None, *args, **kwargs):  # without a config when copied
        if config is not None and cls is MoectModel:
            check_config(config.base_config)
            engine = config._attn_implementation in ENGINES and config._attn_implementation
            if config.rows and engine:
                raise UnsupportedModelError(
                    f"{config.rows} tokens of this model have rows of their own, and the head of this serving engine "
                    f"({engine}) cannot add them: its logits would be wrong; serve the model with transformers"
                )
            if engine and config.moe["language_gate"] and config.moe["gate_sees"] == "pairs":
                raise UnsupportedModelError(
                    "the language gate of this model counts tokens from the beginning of a text, and this serving "
                    f"engine ({engine}) shows it the last one only; serve the model with transformers, or train it "
                    "with moe.gate_sees: context"
                )
            cls = _of_family(MODEL_MAPPING[type(config.base_config)])
        return super().__new__(cls)

    def __init__(self, config: MoectConfig):
        super().__init__(config.base_config)
        self.moe_config = MoeConfig(**config.moe)
        append_to_blocks(self, config.base_config, self.moe_config)
        if config.rows:  # which tokens they are of is among the weights
            place_rows(self.embed_tokens, config.rows, config.added_tokens, config.spare_tokens, self.moe_config)
        _keep_buffers_off_meta(self)
        self._no_split_modules = [type(self.layers[0]).__name__]
        self.config = config
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As the base's own; `moect_record=ForwardRecord()` collects what routers and gates did."""
        kwargs["attention_mask"] = attention_mask
        begin_pass(self, input_ids, kwargs)
        return super().forward(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class MoectForCausalLM(ExtendedCausalLM, MoectPreTrainedModel, GenerationMixin):
    """A causal LM with an appended mixture of experts. The base's parameters are frozen, what was appended is not.

    Raises:
        UnsupportedModelError: the config's base is of a family that cannot be served.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoectConfig):
        super().__init__(config)
        self.model = MoectModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.base_config.vocab_size, bias=False)
        self.moe_config = self.model.moe_config
        if config.rows and not config.tie_word_embeddings:
            place_rows(self.lm_head, config.rows, config.added_tokens, config.spare_tokens, self.moe_config)
            _keep_buffers_off_meta(self.lm_head)
        self.post_init()


@functools.cache  # an engine makes the model twice and expects the same class
def _of_family(base_class: type) -> type:
    name = MoectModel.__name__
    names = {"__module__": MoectModel.__module__, "__qualname__": f"{name}[{base_class.__name__}]"}
    return type(name, (MoectModel, base_class), names)


def _keep_buffers_off_meta(model: nn.Module) -> None:
    """Engines make parameters alone on the meta device and fill those only, so that a buffer has to be a real one.

    Where buffers are wanted on meta too, that is the default device, and they stay there.
    """
    for module in (*modules_of(model), *rows_of(model)):
        for child in module.modules():
            for name, buffer in child.named_buffers(recurse=False):
                if buffer.is_meta:
                    child.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
