"""Fine-tuning the exported class with transformers' own Trainer, and with TRL where that is installed."""

import pytest
import torch
from export_helpers import exported, extended
from test_append import VARIANTS
from tiny import logits, tokens
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

LENGTHS = (12, 3, 7, 12, 5, 12, 2, 9)


@pytest.fixture(scope="module", params=["gate", "language-gate"])
def folder(request, tmp_path_factory):
    model = extended("qwen3", {**VARIANTS[request.param], "balance": "bias"})
    return exported(model, tmp_path_factory.mktemp("trainer") / "export")


def texts():
    """Rows of one length, whose labels end early by various lengths."""
    rows = tokens(8, 12, seed=3)
    labels = rows.clone()
    for row, length in zip(labels, LENGTHS, strict=True):
        row[length:] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def trainer(folder, output, batch=2, accumulate=2, **options):
    settings = TrainingArguments(
        output_dir=output,
        max_steps=4,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=0,
        **options,
    )
    return Trainer(model=AutoModelForCausalLM.from_pretrained(folder), args=settings, train_dataset=texts())


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_resumed_fine_tuning_ends_with_the_bits_of_one_that_was_not_interrupted(folder, tmp_path):
    whole = trainer(folder, tmp_path / "whole", activation_checkpointing=True)
    whole.train()
    assert whole.model.is_activation_checkpointing
    resumed = trainer(folder, tmp_path / "resumed", activation_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name

    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    moved = {name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(".moe." in name for name in moved)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    for parameter in (*saved.parameters(), *whole.model.parameters()):
        parameter.data = parameter.data.clone()  # from a file's mapping products may round differently
    assert torch.equal(logits(saved, tokens()), logits(whole.model.eval(), tokens()))


def test_accumulated_batches_weigh_each_label_once(folder, tmp_path):
    split, whole = trainer(folder, tmp_path / "a", 2, 4), trainer(folder, tmp_path / "b", 8, 1)
    split.train()
    whole.train()
    for ours, theirs in zip(losses(split), losses(whole), strict=True):
        assert abs(ours - theirs) < 1e-4

    model, batch = AutoModelForCausalLM.from_pretrained(folder).train(), texts()
    labels = torch.stack([row["labels"] for row in batch])[:, 1:]
    with torch.no_grad():
        rows = model(torch.stack([row["input_ids"] for row in batch]), use_cache=False).logits[:, :-1]
    by_hand = nn.functional.cross_entropy(rows.flatten(0, 1).double(), labels.flatten())
    assert abs(losses(split)[0] - by_hand.item()) < 1e-4


@pytest.mark.slow
def test_trl_fine_tunes_the_class_and_updates_on_top(folder, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t0")
    updates = LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["moe.experts.down_proj"], task_type="CAUSAL_LM"
    )
    for on_top in (None, updates):
        settings = SFTConfig(
            output_dir=tmp_path / str(on_top is None),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            logging_steps=1,
            max_length=24,
            packing=True,
            packing_strategy="wrapped",
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        done = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": tokens(16, 12, seed=3).tolist()}),
            processing_class=tokenizer,
            peft_config=on_top,
        )
        done.train()
        assert losses(done)[-1] < losses(done)[0]
