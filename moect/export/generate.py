"""Continue a text with an exported model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from moect.config import ModelConfig
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.errors import ExportError


def generate_text(folder: Path, text: str, tokens: int = 64, sample: bool = False, seed: int = 0) -> str:
    """The text with its continuation.

    Args:
        folder: an exported model.
        text: to continue.
        tokens: greatest number of new tokens.
        sample: draw from the distribution; else take the likeliest token each time.
        seed: of sampling.

    Raises:
        ExportError: there is no model that can be loaded, or nothing to continue.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder}: no exported model there (no config.json); make one with moect export RUN")
    if tokens < 1:
        raise ExportError(f"--tokens is {tokens}: it must be at least 1")
    try:
        tokenizer = load_tokenizer(ModelConfig(base=str(folder)))
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}; export the run again") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not inputs["input_ids"].numel():
        raise ExportError("the text has no tokens: give at least one character")
    torch.manual_seed(seed)
    output_BS = model.generate(**inputs, max_new_tokens=tokens, do_sample=sample)
    return tokenizer.decode(output_BS[0], skip_special_tokens=True)
