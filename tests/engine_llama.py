"""A model folder in llama.cpp: `engine_llama.py FOLDER JOB`; a process of its own, since the engine aborts on errors.

LLAMA_CPP is the folder of its sources, for their converter; llama_cpp, the Python package, runs what that writes. The
JOB folder holds ids.json and gets logits.npy and greedy.json.
"""

import json
import os
import sys
from pathlib import Path


def convert(folder: Path, file: Path) -> None:
    """Write the folder's model as GGUF in fp32, with no words in its vocabulary: tokens are compared, not texts."""
    source = Path(os.environ["LLAMA_CPP"])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import gguf
    from conversion import get_model_class

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    converter = get_model_class(architecture)

    def no_words(self):
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    converter.set_vocab = no_words
    converter(folder, gguf.LlamaFileType.ALL_F32, file).write()


def run(file: Path, job: Path) -> None:
    """Logits of all positions, then as many greedy tokens as the job wants."""
    import numpy as np
    from llama_cpp import Llama

    wanted = json.loads((job / "ids.json").read_text())
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}  # its cache in fp32; fp16 costs 1e-2 of the logits
    model = Llama(str(file), n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **exact)
    model.eval(wanted["ids"])
    logits_SV = np.array(model.scores[: len(wanted["ids"])], dtype=np.float32)
    np.save(job / "logits.npy", logits_SV)
    greedy = [int(logits_SV[-1].argmax())]
    while len(greedy) < wanted["new"]:
        model.eval(greedy[-1:])
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
    (job / "greedy.json").write_text(json.dumps(greedy))


if __name__ == "__main__":
    place = Path(sys.argv[2])
    convert(Path(sys.argv[1]), place / "model.gguf")
    run(place / "model.gguf", place)
