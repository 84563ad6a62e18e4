"""What an inspection is made of, against slow code that is obviously right."""

from __future__ import annotations

import itertools
import random
import unicodedata

import numpy as np
import pytest

from moect.data.inspection import duplicates
from moect.data.inspection.columns import Columns
from moect.data.inspection.contamination import EvaluationIndex
from moect.data.inspection.duplicates import (
    BANDS,
    COMPARED,
    NEAR,
    SHINGLE,
    band_keys,
    first_alike,
    near_copies,
    shingles_of,
)
from moect.data.inspection.language_id import SURE, identify, known_languages, labels_of
from moect.data.inspection.runs_of_words import hash_words, is_unspaced, normalised, split_words
from moect.data.reading.words import count_words

SCRIPTS = [
    "Plain words, and a second line.\nTwo-fold: it's 12.5!",
    "Größe, straße, ÉTÉ, e\u0301te\u0301, ñandú",
    "வணக்கம், உலகம் எப்படி உள்ளது?",
    "今天天气很好，我们去公园。",
    "これはペンです。English words も混ざる。",
    "สวัสดีครับ ผมชื่อสมชาย",
    "ಕನ್ನಡ ಭಾಷೆ، اردو زبان",
    "...!? --",
    "",
]


def runs(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def shingle_set(text: str) -> set[tuple[str, ...]]:
    words = split_words(text)
    return set(runs(words, SHINGLE)) if len(words) >= SHINGLE else {tuple(words)} if words else set()


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def random_text(rng: random.Random, words: int, vocabulary: int = 300) -> str:
    return " ".join(f"w{rng.randrange(vocabulary)}" for _ in range(words))


def edited(rng: random.Random, text: str, rate: float) -> str:
    words = [f"x{rng.randrange(999)}" if rng.random() < rate else word for word in text.split()]
    return " ".join(words)


def find_near(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shingles, offsets = shingles_of(hash_words(texts))
    keys = band_keys(shingles, offsets)
    found = near_copies(np.arange(len(texts)), lambda n: keys[:, n], shingles, offsets)
    return found.cluster, found.partner, found.similarity


def test_a_text_has_the_words_that_are_counted_elsewhere_in_every_script():
    for text in SCRIPTS:
        assert len(split_words(text)) == count_words(unicodedata.normalize("NFC", text).lower())
    assert split_words(SCRIPTS[0])[:4] == ["plain", "words", "and", "a"]
    assert split_words("ÉTÉ") == split_words("e\u0301te\u0301") == ["été"]
    assert split_words(SCRIPTS[2])[:2] == ["வணக்கம்", "உலகம்"]  # vowel signs belong to their word
    assert [is_unspaced(text) for text in SCRIPTS] == [False] * 3 + [True] * 3 + [False] * 3


def test_two_texts_are_the_same_when_only_white_space_and_unicode_form_differ():
    assert normalised(" e\u0301te\u0301\n\n tous\tles jours ") == "été tous les jours"


@pytest.mark.parametrize("length", [1, 4, 13])
def test_equal_runs_of_words_have_equal_hashes_and_different_ones_different(length):
    rng = random.Random(length)
    texts = [random_text(rng, rng.randrange(40), vocabulary=3) for _ in range(60)] + SCRIPTS
    hashes, documents = hash_words(texts).runs(length)
    expected = [(run, number) for number, text in enumerate(texts) for run in runs(split_words(text), length)]
    assert documents.tolist() == [number for _, number in expected]
    by_run = dict(zip([run for run, _ in expected], hashes.tolist(), strict=True))
    assert [by_run[run] for run, _ in expected] == hashes.tolist()
    assert len(set(by_run.values())) == len(by_run)


def test_the_hash_of_a_whole_document_is_that_of_its_run_inside_another():
    whole = hash_words(["two three four"]).whole()[0]
    hashes, documents = hash_words(["one", "zero, one TWO three: four five"]).runs(3)
    assert (hashes == whole).tolist() == [False, False, True, False]
    assert set(documents.tolist()) == {1}
    assert hash_words(["two three", ""]).whole()[0] != whole


def test_hashes_of_words_stay_the_same():
    """Worker processes, and machines, must agree on them."""
    assert hash_words(["the cat", "katze 今天"]).hashes.tolist() == [
        11708557668414031545,
        8057202178127204485,
        13937409637732027648,
        2251376832318711744,
        636499366318940493,
    ]


def test_shingles_are_the_set_of_runs_of_five_words():
    rng = random.Random(0)
    texts = [random_text(rng, words, vocabulary=2) for words in (0, 1, 4, 5, 6, 40, 400)] + SCRIPTS
    shingles, offsets = shingles_of(hash_words(texts))
    sets = [shingles[a:b] for a, b in itertools.pairwise(offsets)]
    assert [len(s) for s in sets] == [len(shingle_set(text)) for text in texts]
    assert all((np.diff(s.astype(np.int64)) > 0).all() for s in sets)


def test_the_first_of_equal_documents_is_found():
    keys = np.array([5, 3, 5, 9, 3, 5, 0], dtype=np.uint64)
    assert first_alike(keys).tolist() == [0, 1, 0, 3, 1, 0, 6]
    assert first_alike(keys[:0]).tolist() == []


def test_near_copies_are_those_that_comparing_all_pairs_finds():
    rng = random.Random(5)
    texts = [random_text(rng, rng.choice([8, 30, 200])) for _ in range(120)]
    texts += [edited(rng, rng.choice(texts), rate) for rate in (0.01, 0.03, 0.05, 0.1, 0.3) for _ in range(60)]
    texts += [random_text(rng, rng.randrange(6), vocabulary=4) for _ in range(40)] + SCRIPTS
    sets = [shingle_set(text) for text in texts]
    similar = {(a, b): jaccard(sets[a], sets[b]) for a, b in itertools.combinations(range(len(texts)), 2)}
    near = {pair for pair, similarity in similar.items() if similarity >= NEAR}
    close = sum(0.6 <= similarity < NEAR for similarity in similar.values())
    assert len(near) > 100 and close > 30  # there is something to find, and something to be mistaken for it
    expected = np.arange(len(texts))
    for _ in texts:  # until nothing changes, at most so often
        for a, b in near:
            expected[a] = expected[b] = min(expected[a], expected[b])
    cluster, partner, similarity = find_near(texts)
    assert cluster.tolist() == expected.tolist()
    for document, other in enumerate(partner.tolist()):
        assert (other >= 0) == any(document in pair for pair in near)
        if other >= 0:
            exact = similar[min(document, other), max(document, other)]
            assert exact >= NEAR and similarity[document] == pytest.approx(exact, abs=1e-6)


def test_the_keys_of_bands_agree_as_often_as_the_theory_says():
    rng = random.Random(9)
    texts = [random_text(rng, 120, vocabulary=10**9) for _ in range(300)]
    pairs = [(text, edited(rng, text, 0.06)) for text in texts]
    keys = band_keys(*shingles_of(hash_words([text for pair in pairs for text in pair])))
    agree = (keys[0::2] == keys[1::2]).mean()
    expected = np.mean([jaccard(shingle_set(a), shingle_set(b)) ** 6 for a, b in pairs])
    spread = np.sqrt(expected * (1 - expected) / len(pairs))  # at least; bands of one pair are nearly independent
    assert agree == pytest.approx(expected, abs=4 * spread)
    assert keys.shape == (600, BANDS)


def test_a_text_that_very_many_others_are_near_to_does_not_hide_those_that_differ(caplog):
    rng = random.Random(2)
    base = random_text(rng, 100)
    group = [f"{base} {random_text(rng, 2)}" for _ in range(3 * COMPARED)]
    others = [random_text(rng, 100) for _ in range(5)]
    caplog.set_level("INFO", logger="moect.data")
    cluster, _, _ = find_near([*group, *others])
    assert cluster.tolist() == [0] * len(group) + list(range(len(group), len(group) + 5))
    assert "groups were too large to compare all pairs" in caplog.text


def test_a_group_beyond_memory_is_compared_piece_by_piece(monkeypatch, caplog):
    rng = random.Random(8)
    base = random_text(rng, 100)
    group = [f"{base} {random_text(rng, 2)}" for _ in range(40)]
    monkeypatch.setattr(duplicates, "AT_ONCE", 2000)  # some 20 documents
    caplog.set_level("INFO", logger="moect.data")
    cluster, _, _ = find_near(group)
    assert set(cluster.tolist()) == {0}  # the pieces of one band overlap those of another
    assert "groups were too large to compare all pairs" in caplog.text


def test_every_near_pair_of_a_group_is_in_a_part_of_it():
    rng = np.random.default_rng(0)
    sets = [np.unique(rng.integers(0, 12, rng.integers(1, 11))).astype(np.uint32) for _ in range(300)]
    offsets = np.cumsum([0, *map(len, sets)])
    parts = list(duplicates._parts(np.arange(300), np.concatenate(sets), offsets))
    pairs = {pair for part in parts for pair in itertools.combinations(part, 2)}
    near = {
        (a, b)
        for a, b in itertools.combinations(range(300), 2)
        if jaccard(set(sets[a].tolist()), set(sets[b].tolist())) >= NEAR
    }
    assert len(near) > 100 and near <= pairs


def test_forms_that_are_filled_in_differently_are_no_copies_however_many_they_are():
    rng = random.Random(6)
    form = random_text(rng, 40)
    texts = [f"{form} {random_text(rng, 12, vocabulary=10**6)}" for _ in range(400)]
    texts += [f"{text} end" for text in texts[:5]]
    cluster, _, _ = find_near(texts)
    assert cluster.tolist() == [*range(400), *range(5)]


def test_only_candidates_are_compared():
    text = random_text(random.Random(1), 50)
    shingles, offsets = shingles_of(hash_words([text, text, f"{text} more"]))
    keys = band_keys(shingles, offsets)
    found = near_copies(np.array([0, 2]), lambda n: keys[:, n], shingles, offsets)
    assert found.cluster.tolist() == [0, 1, 0]


def contained(text: str, length: int, training: str) -> float:
    """The share of a text's different runs that occur in another, the slow way."""
    mine, theirs = set(runs(split_words(text), length)), set(runs(split_words(training), length))
    return len(mine & theirs) / len(mine)


def test_evaluation_text_is_found_as_searching_for_every_run_finds_it():
    rng = random.Random(3)
    held_out = [random_text(rng, rng.choice([5, 9, 13, 14, 40, 80])) for _ in range(50)]
    training = [random_text(rng, rng.choice([3, 30, 100])) for _ in range(60)]
    for number in range(60):  # plant pieces of many lengths
        words = rng.choice(held_out).split()
        begin, length = rng.choice([0, rng.randrange(len(words))]), rng.choice([4, 12, 13, 14, 20, 80])
        training[number] += f" {' '.join(words[begin : begin + length]).upper()}, {random_text(rng, 5)}"
    index = EvaluationIndex(held_out)
    matches = index.search(hash_words(training))
    found = {(d, e): s for d, e, s in zip(matches.document, matches.evaluation, matches.share, strict=True)}
    expected = {
        (d, e): share
        for (d, text), (e, held) in itertools.product(enumerate(training), enumerate(held_out))
        if (share := contained(held, min(13, len(held.split())), text))
    }
    assert found == pytest.approx(expected)
    assert len(expected) > 10 and min(expected.values()) < 0.5 and max(expected.values()) == 1
    hit = np.zeros(index.n_runs, dtype=bool)
    hit[matches.runs] = True
    everything = ", ".join(training)
    assert index.coverage(hit) == pytest.approx([contained(h, min(13, len(h.split())), everything) for h in held_out])


def test_fifty_letters_count_where_words_have_no_spaces():
    rng = random.Random(4)
    letters = [chr(rng.randrange(0x4E00, 0x9000)) for _ in range(80)]
    index = EvaluationIndex(["".join(letters), "".join(letters[:20])])
    found = {}
    for length in (49, 50, 19, 20):
        matches = index.search(hash_words([f"一二三{''.join(letters[:length])}。一二三"]))
        found[length] = matches.evaluation.tolist()
    assert found == {49: [1], 50: [0, 1], 19: [], 20: [1]}


def test_a_very_short_evaluation_text_is_found_only_as_a_whole_document():
    index = EvaluationIndex(["Yes, it is.", "forty-two", "one two three four five", "?!"])
    training = [
        "he said yes it is so",
        "yes it is",
        "the answer: forty two",
        "Forty-two!",
        "so one two three four five",
    ]
    matches = index.search(hash_words(training))
    assert list(zip(matches.document, matches.evaluation, strict=True)) == [(1, 0), (3, 1), (4, 2)]
    assert index.entries.tolist() == [1, 1, 1, 0]


def test_a_very_short_text_is_not_looked_for_because_a_longer_one_has_as_many_words():
    index = EvaluationIndex(["旧桥昨天夜里关闭了吗", "one two three four five six seven eight nine ten"])
    assert index.lengths == [10]
    assert len(index.search(hash_words(["他说旧桥昨天夜里关闭了吗对不对"])).document) == 0
    assert index.search(hash_words(["旧桥昨天夜里关闭了吗"])).evaluation.tolist() == [0]


def test_without_evaluation_text_nothing_is_found():
    index = EvaluationIndex([])
    assert len(index.search(hash_words(["some text here", ""])).document) == 0
    assert index.n_runs == 0 and len(index.coverage(np.zeros(0, dtype=bool))) == 0


@pytest.mark.parametrize(
    ("language", "labels"),
    [
        ("sw", {"sw"}),
        ("swh_Latn", {"sw"}),
        ("pt-BR", {"pt"}),
        ("EN", {"en"}),
        ("zh_Hans", {"zh", "wuu", "yue"}),
        ("hbs", {"hr", "sr", "bs"}),
        ("tlh", set()),
        ("english", set()),
    ],
)
def test_a_language_has_the_names_that_the_library_gives_it(language, labels):
    assert labels_of(language) == labels


def test_every_known_language_is_known_by_its_own_name_and_all_aliases_lead_to_one():
    from moect.data.inspection.language_id import ALIASES, MEMBERS

    assert all(label in labels_of(label) for label in known_languages())
    assert set(ALIASES.values()) <= known_languages()
    assert set().union(*MEMBERS.values()) <= known_languages()
    assert not set(ALIASES) & known_languages()


def test_languages_are_identified_without_the_network():
    texts = {
        "en": "The old bridge was closed because the river had risen during the night.",
        "de": "Die alte Brücke wurde gesperrt, weil der Fluss in der Nacht gestiegen war.",
        "fr": "Le vieux pont a été fermé parce que la rivière avait monté pendant la nuit.",
        "es": "El viejo puente se cerró porque el río había crecido durante la noche.",
        "zh": "因为河水在夜里上涨，旧桥被关闭了。",
        "ru": "Старый мост закрыли, потому что ночью поднялась вода в реке.",
    }
    for language, text in texts.items():
        label, probability = identify(text)
        assert label in labels_of(language) and probability >= SURE
    label, probability = identify("老人坐在门口喝茶。")  # Mandarin, Wu or Cantonese: Chinese in any case
    assert label in labels_of("zh") and probability > 0.9
    assert identify("OK")[1] < SURE
    assert identify("...")[1] < SURE


def test_columns_give_back_what_was_appended(tmp_path):
    columns = Columns(tmp_path)
    parts = [np.arange(3, dtype=np.uint32), np.arange(0, dtype=np.uint32), np.arange(7, 9, dtype=np.uint32)]
    strided = np.arange(20, dtype=np.uint64).reshape(5, 4)
    for part in parts:
        columns.append("a", part)
    columns.append("b", strided[:, 1])
    columns.append("empty", np.empty(0, dtype=np.uint8))
    assert columns.read("a").tolist() == [0, 1, 2, 7, 8]
    assert columns.read("a").dtype == np.uint32
    assert columns.read("b").tolist() == strided[:, 1].tolist()
    assert columns.read("empty").tolist() == []
    columns.close()
