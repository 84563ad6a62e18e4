"""The trainer's slow twin: one process, no DeepSpeed, each step's rows as one batch, every formula written out.

T tokens, E experts, K experts per token, V vocabulary
"""

from __future__ import annotations

import math

import torch
from transformers import AutoModelForCausalLM

from moect.config import RunConfig
from moect.data.batches.loader import Loader
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.model.build import build_model
from moect.model.record import ForwardRecord
from moect.train.gate_counts import count_gate
from moect.train.gate_start import start_gate


def train_plainly(config: RunConfig, cache) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Figures of each step, and what trained in the end, by name."""
    train, moe = config.train, config.moe
    config.train.micro_batch = train.batch_size
    loader = Loader(config, load_tokenizer(config.model), cache)
    model = build_model(config).train()
    for begin in (start_gate, count_gate):
        begin(model, config, loader.stores, load_tokenizer(config.model), model.config.vocab_size)
    base = AutoModelForCausalLM.from_pretrained(config.model.base)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    biases = {name: b for name, b in model.named_buffers() if name.endswith("selection_bias")}
    counted = {name: b for name, b in model.named_buffers() if name.endswith((".of_token", ".of_pair"))}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}
    blocks = moe.layer_indices(model.config.num_hidden_layers) if config.method == "moe-ct" else []
    load = {block: torch.full((moe.experts,), 1 / moe.experts) for block in blocks}
    steps = []
    for step in range(train.steps):
        (batch,) = loader.next_step()
        record = ForwardRecord()
        extra = {"moect_record": record} if blocks else {}
        logits_BSV = model(
            input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False, **extra
        ).logits
        figures = _losses(config, logits_BSV, batch, record, load)
        if config.loss.base_kl:
            with torch.no_grad():
                base_BSV = base(
                    input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
                ).logits
            old_T = batch.role_BS.flatten() == 0
            p_TV = base_BSV.flatten(0, 1)[old_T].softmax(-1)
            kl_T = (p_TV * (p_TV.log() - logits_BSV.flatten(0, 1)[old_T].log_softmax(-1))).sum(-1)
            figures["base_kl"] = kl_T.mean()
            figures["total"] = figures["total"] + config.loss.base_kl * figures["base_kl"]
        for p in trained.values():
            p.grad = None
        figures["total"].backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        figures["grad_norm"] = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        figures = {key: float(value.detach()) if torch.is_tensor(value) else value for key, value in figures.items()}
        shrink = min(1.0, train.clip / figures["grad_norm"]) if train.clip else 1.0
        lr = train.lr * (step + 1) / train.warmup if step < train.warmup else train.lr
        with torch.no_grad():
            for name, p in trained.items():
                _adamw(p, gradients[name] * shrink, *moments[name], step + 1, lr, train)
            for block in blocks:
                counts_E = _counts(record.blocks[block], batch, moe.experts)
                load[block] = counts_E / counts_E.sum()
                if moe.balance == "bias":  # up where an expert got less than the mean, down where more
                    bias_E = biases[f"model.layers.{block}.moe.router.selection_bias"]
                    bias_E += config.loss.bias_rate * torch.sign(counts_E.mean() - counts_E)
        steps.append(figures)
    return steps, {name: t.detach() for name, t in (trained | biases | counted).items()}


def _losses(config, logits_BSV, batch, record, load) -> dict:
    moe, weights = config.moe, config.loss
    role_T = batch.role_BS.flatten()
    log_p_TV = logits_BSV.flatten(0, 1).log_softmax(-1)
    labels_T = batch.labels_BS.flatten()
    scored_T = labels_T != -100
    figures = {"loss": -log_p_TV[scored_T].gather(1, labels_T[scored_T, None]).mean()}
    total = figures["loss"]
    balances, trained_balances, zs = [], [], []
    for block, f_before_E in load.items():
        counts_E = _counts(record.blocks[block], batch, moe.experts)
        logits_TE = record.blocks[block].logits_TE[role_T >= 0]
        scores_TE = logits_TE.exp() if moe.router == "softmax" else 1 / (1 + (-logits_TE).exp())
        P_E = (scores_TE / scores_TE.sum(1, keepdim=True)).mean(0)
        trained_balances.append(moe.experts * (f_before_E * P_E).sum())
        balances.append(moe.experts * (counts_E / counts_E.sum() * P_E).sum())
        zs.append(logits_TE.exp().sum(1).log().square().mean())
    if load and moe.balance == "loss" and weights.balance:
        figures["balance"] = sum(balances) / len(
            balances
        )  # with this step's load; trained with that of the step before
        total = total + weights.balance * sum(trained_balances) / len(balances)
    if load and weights.z:
        figures["z"] = sum(zs) / len(zs)
        total = total + weights.z * figures["z"]
    if load and moe.language_gate:
        q_T = 1 / (1 + (-record.gate_logit_T.double()).exp())
        old_T, new_T = -(1 - q_T[role_T == 0]).log(), -q_T[role_T == 1].log()
        figures["gate"] = sum(part_T.sum() / max(len(part_T), 1) for part_T in (old_T, new_T))
        # over as many tokens as the mixture has on average, which a small step may not
        valid, share = (role_T >= 0).sum(), config.data.replay
        total = total + weights.gate * (old_T.sum() / (share * valid) + new_T.sum() / ((1 - share) * valid))
    return figures | {"total": total}


def _counts(block, batch, experts: int) -> torch.Tensor:
    chosen_TK = block.indices_TK[(batch.role_BS >= 0).flatten()]
    return torch.stack([(chosen_TK == e).sum() for e in range(experts)]).float()


def _adamw(p, gradient, mean, square, t: int, lr: float, train) -> None:
    beta1, beta2 = train.betas
    mean.mul_(beta1).add_((1 - beta1) * gradient)
    square.mul_(beta2).add_((1 - beta2) * gradient**2)
    decay = train.weight_decay if p.dim() >= 2 else 0.0
    p -= lr * decay * p
    p -= lr * (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + train.eps)
