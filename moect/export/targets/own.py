"""moect: our own class, which holds whatever can be trained; its modelling file lies beside the weights."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

from moect.export.targets.form import Piece, Subject, Support, Target

AUTO_MAP = {
    "AutoConfig": "modeling_moect.MoectConfig",
    "AutoModel": "modeling_moect.MoectModel",  # which vLLM puts its own head on
    "AutoModelForCausalLM": "modeling_moect.MoectForCausalLM",
}


class Own(Target):
    """Tensors have the names that they have in training."""

    name = "moect"

    def supports(self, subject: Subject) -> Support:
        if subject.moe is None:
            return Support("nothing was appended")
        notes = ["needs moect, or trust_remote_code for the file beside the weights"]
        if subject.rows:
            notes.append("vLLM cannot serve rows of tokens beside the head")
        elif subject.moe.language_gate and subject.moe.gate_sees == "pairs":
            notes.append("vLLM cannot serve a language gate that counts tokens")
        elif subject.moe.language_gate:
            notes.append("vLLM serves the language gate without stages of a pipeline")
        return Support(None, True, "; ".join(notes))

    def config(self, subject: Subject):
        from moect.model.configuration_moect import MoectConfig

        moe = replace(subject.moe, dispatch="auto")  # no part of the model: what trained here need not be there
        config = MoectConfig(base_config=copy.deepcopy(subject.base), moe=asdict(moe), **(subject.rows or {}))
        config.architectures = ["MoectForCausalLM"]
        config.auto_map = AUTO_MAP
        return config

    def block(self, subject: Subject, index: int, names: list[str]) -> list[Piece]:
        return [Piece(name, (name,)) for name in names]
