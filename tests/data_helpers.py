"""What the tests of moect.data share: a word-level tokenizer and corpora of numbered words."""

import json
import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moect.config import RunConfig, config_from_dict

WORDS = 400
DATA_KEYS = ("sequence_length", "packing", "replay", "sampling", "temperature", "max_epochs", "workers")


class Words:
    """`w17 w3` → [17, 3] with BOS 400 and EOS 401; counts the documents that it has tokenized."""

    def __init__(self, bos="<s>", eos="</s>"):
        vocab = {f"w{i}": i for i in range(WORDS)} | {"<s>": WORDS, "</s>": WORDS + 1, "<unk>": WORDS + 2}
        backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.inner = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
        self.documents = 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __call__(self, texts, **options):
        self.documents += len(texts)
        return self.inner(texts, **options)


def write_corpus(path, n_documents, seed, longest=30):
    """Documents of 1 to `longest` words; returns their ids without BOS and EOS."""
    rng = random.Random(seed)
    documents = [[rng.randrange(WORDS) for _ in range(rng.randint(1, longest))] for _ in range(n_documents)]
    path.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in d)}) + "\n" for d in documents))
    return documents


def run_config(folder, *, sources=None, languages=None, **values) -> RunConfig:
    """A run over two corpora `old.jsonl` and `new.jsonl` in `folder`, unless told otherwise."""
    data = {
        "root": str(folder),
        "languages": languages or {"en": "old", "cy": "new"},
        "train": sources or [{"path": "old.jsonl", "lang": "en"}, {"path": "new.jsonl", "lang": "cy"}],
        "sequence_length": 16,
    }
    train = {"steps": 10, "batch_size": 8, "micro_batch": 2}
    for key, value in values.items():
        (data if key in DATA_KEYS else train)[key] = value
    seed = train.pop("seed", 3)
    return config_from_dict({"seed": seed, "model": {"base": "unused"}, "data": data, "train": train})
