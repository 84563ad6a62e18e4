"""Small tokenizers of the forms that bases have, text in made-up languages, and BPE in plain Python."""

from __future__ import annotations

import json
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

OLD = ["tha", "ing", "con", "er", "at", "ion", "st", "re", "wo"]
NEW = ["mba", "kwe", "nya", "þó", "ðu", "ata", "லை", "கி", "st"]
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Llama 3's, in short
FORMS = ("gpt2", "neox", "llama3", "llama2", "metaspace")
ON_BYTES = FORMS[:3]


def write_text(syllables: list[str], documents: int, seed: int = 0) -> list[str]:
    """Documents of words made of syllables, frequent and rare ones."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(60)]
    marks = [" ", " ", " ", ", ", ". ", "\n", "  ", " 17 ", "-"]
    pick = lambda: words[min(int(rng.expovariate(0.1)), 59)]  # noqa: E731
    return ["".join(pick() + rng.choice(marks) for _ in range(rng.randint(5, 60))) for _ in range(documents)]


def make_base(form: str, texts: list[str], size: int = 340) -> PreTrainedTokenizerFast:
    """A tokenizer of one of FORMS trained on `texts`, with added tokens behind its vocabulary."""
    special = ["<s>", "</s>"]
    if form in ON_BYTES:
        backend = Tokenizer(models.BPE(ignore_merges=form == "llama3"))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=form != "llama3")
        split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if form == "llama3" else byte_level
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if form == "neox":
            backend.normalizer = normalizers.NFC()
    else:
        special = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        metaspace = pre_tokenizers.Metaspace(prepend_scheme="first")
        # as SentencePiece learns: no token mixes letters and other characters
        kinds = [pre_tokenizers.Punctuation(), pre_tokenizers.Split("\n", "isolated")]
        backend.pre_tokenizer = pre_tokenizers.Sequence([metaspace, *kinds])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    trainer.show_progress = False
    backend.train_from_iterator(texts, trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(spec))
    if form == "metaspace":
        backend.pre_tokenizer = metaspace
    if form == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens([AddedToken("    ", normalized=False), AddedToken("<think>", normalized=False)])
    bos = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=bos)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def spec_of(tokenizer) -> dict:
    """The tokenizer as in its tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


class SlowTokenizer:
    """BPE in plain Python; the normaliser and pre-tokenizer are the library's. Knows no added tokens."""

    def __init__(self, tokenizer):
        spec = spec_of(tokenizer)
        self.vocab, self.ignore_merges = spec["model"]["vocab"], spec["model"]["ignore_merges"]
        self.byte_fallback = spec["model"]["byte_fallback"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(spec["model"]["merges"])}
        self.normalizer = tokenizer.backend_tokenizer.normalizer
        self.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer

    def ids(self, text: str) -> list[int]:
        """Ids of a text."""
        text = self.normalizer.normalize_str(text) if self.normalizer else text
        words = [word for word, _ in self.pre_tokenizer.pre_tokenize_str(text)] if self.pre_tokenizer else [text]
        return [self.vocab[symbol] for word in words for symbol in self._word(word)]

    def _word(self, word: str) -> list[str]:
        if self.ignore_merges and word in self.vocab:
            return [word]
        symbols = []
        for character in word:
            known = character in self.vocab or not self.byte_fallback
            symbols += [character] if known else [f"<0x{byte:02X}>" for byte in character.encode()]
        while True:
            pairs = enumerate(zip(symbols, symbols[1:], strict=False))
            ranked = [(self.ranks[pair], i) for i, pair in pairs if pair in self.ranks]
            if not ranked:
                return symbols
            _, i = min(ranked)
            symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
