"""A model folder in vLLM: `engine_vllm.py FOLDER JOB`, run by the interpreter of an environment that has vllm.

The JOB folder holds ids.json and gets logits.npy and greedy.json.
"""

import json
import os
import sys
from pathlib import Path


def main(folder: Path, job: Path) -> None:
    """Logits of all positions but the last, then as many greedy tokens as the job wants.

    The engine gives the logits after a position only where a token of the prompt follows.
    """
    import numpy as np
    from vllm import LLM, SamplingParams

    wanted = json.loads((job / "ids.json").read_text())
    model = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        trust_remote_code=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=1,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
    )
    params = SamplingParams(
        temperature=0, max_tokens=wanted["new"], prompt_logprobs=-1, ignore_eos=True, detokenize=False
    )
    answer = model.generate([{"prompt_token_ids": wanted["ids"]}], params)[0]
    config = json.loads((folder / "config.json").read_text())
    vocabulary = config.get("base_config", config)["vocab_size"]
    logits_SV = np.full((len(wanted["ids"]) - 1, vocabulary), np.nan, dtype=np.float32)
    for position, by_token in enumerate(answer.prompt_logprobs[1:]):
        for token, value in by_token.items():
            logits_SV[position, token] = value.logprob
    np.save(job / "logits.npy", logits_SV)
    (job / "greedy.json").write_text(json.dumps(list(answer.outputs[0].token_ids)))


if __name__ == "__main__":
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
