"""Inspecting corpora: planted faults are found, counted and named, and nothing else is."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from data_helpers import run_config

from moect.data.inspection import inspect as inspection
from moect.data.inspection.contamination import EvaluationIndex
from moect.data.inspection.inspect import inspect_data
from moect.data.inspection.inspector import Batch, Inspector, inspect_batches
from moect.data.inspection.table import render
from moect.errors import DataError

VOCABULARY = {
    "en": "the a river house bridge old new water people which with their under after before many between small great "
    "because through morning evening children would could about these those where there never always together",
    "de": "der die das ein eine nicht mit auf für von wird auch wenn aber nach vor über unter zwischen durch gegen "
    "Haus Brücke Wasser Menschen Morgen Abend Kinder würde könnte immer niemals zusammen während obwohl schon sehr",
    "sw": "ya wa na kwa katika ni hii hiyo watu maji nyumba daraja mto asubuhi jioni watoto kabla baada sana pia "
    "lakini kwamba wakati mpya kubwa ndogo pamoja kila hapo wengi zaidi kati yake wake walikuwa alikuwa",
}


def make_text(rng: random.Random, lang: str, words: int = 40) -> str:
    return " ".join(rng.choice(VOCABULARY[lang].split()) for _ in range(words))


def write(file: Path, documents: list[tuple[str, str]]) -> None:
    file.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents), "utf-8")


def clean(rng: random.Random, lang: str, number: int, name: str) -> list[tuple[str, str]]:
    return [(f"{name}{i}", make_text(rng, lang)) for i in range(number)]


def configure(folder: Path, sources: dict[str, str], evaluation: list[dict] = (), languages: dict | None = None):
    """A run over files, by name, of languages."""
    config = run_config(
        folder,
        sources=[{"path": file, "lang": lang} for file, lang in sources.items()],
        languages=languages or {"en": "old", "de": "old", "sw": "new"},
    )
    from moect.data_config import EvaluationConfig

    config.data.evaluation = [EvaluationConfig(**entry) for entry in evaluation]
    return config


def inspect(config, folder: Path, **options) -> tuple[dict, list[dict]]:
    """What is returned, and the findings."""
    result = inspect_data(config, folder / "cache", folder / "out", **{"workers": 1, **options})
    assert json.loads((folder / "out" / "inspection.json").read_text("utf-8")) == result
    lines = (folder / "out" / "findings.jsonl").read_text("utf-8").splitlines()
    assert os.listdir(folder / "cache") == [] and len(os.listdir(folder / "out")) == 2  # nothing temporary stays
    return result, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Three corpora and two evaluation texts with faults of every kind; the result and the findings."""
    folder = tmp_path_factory.mktemp("planted")
    rng = random.Random(1)
    en, de, sw = (clean(rng, lang, 60, f"{lang}-") for lang in ("en", "de", "sw"))
    held = {lang: clean(rng, lang, 20, "held-") for lang in ("en", "sw")}

    en.append(("en-copy", en[0][1]))
    en.append(("en-spaced", en[4][1].replace(" ", "\n ")))
    words = en[5][1].split()
    en.append(("en-near", " ".join([*words[:38], "house", "house"])))  # 34 of 38 shingles in common
    en.append(("en-edge", " ".join([*en[8][1].split()[:36], *["house"] * 4])))  # 32 of 40: just near
    en.append(("en-beyond", " ".join([*en[9][1].split()[:35], *["house"] * 5])))  # 31 of 41: just not
    en.append(("en-shouting", en[6][1].upper() + "!"))  # other characters, the same words
    de.append(("de-of-en", en[7][1]))  # a copy over a border, in the wrong language too
    en.append(("en-german", make_text(rng, "de")))
    en.append(("en-numbers", "3141 5926 5358 9793"))
    piece = " ".join(held["en"][9][1].split()[:13])
    en.append(("en-leak", f"{make_text(rng, 'en', 9)} {held['en'][2][1]} {make_text(rng, 'en', 9)} {piece}"))
    piece = " ".join(held["sw"][5][1].split()[10:23])  # thirteen words
    sw.append(("sw-leak", f"{make_text(rng, 'sw', 9)} {piece} {make_text(rng, 'sw', 9)}"))
    less = " ".join(held["sw"][6][1].split()[10:22])  # twelve
    sw.append(("sw-no-leak", f"{make_text(rng, 'sw', 9)} {less} {make_text(rng, 'sw', 9)}"))

    for name, documents in {"en": en, "de": de, "sw": sw, "held-en": held["en"], "held-sw": held["sw"]}.items():
        write(folder / f"{name}.jsonl", documents)
    config = configure(
        folder,
        {"en.jsonl": "en", "de.jsonl": "de", "sw.jsonl": "sw"},
        [{"path": f"held-{lang}.jsonl", "lang": lang, "domain": "web"} for lang in ("en", "sw")],
    )
    return (config, folder, *inspect(config, folder))


def named(findings: list[dict], kind: str) -> set[tuple]:
    mine = [f for f in findings if f["kind"] == kind]
    assert len(mine) == len({f["document"] for f in mine})
    return {(f["source"], f["document"], f["partner_source"], f["partner"]) for f in mine}


def test_every_planted_fault_is_found_and_named_and_nothing_else(planted):
    _, _, _, findings = planted
    assert named(findings, "exact") == {
        ("en.jsonl", "en-copy", "en.jsonl", "en-0"),
        ("en.jsonl", "en-spaced", "en.jsonl", "en-4"),
        ("de.jsonl", "de-of-en", "en.jsonl", "en-7"),
    }
    assert named(findings, "near") == {
        ("en.jsonl", "en-near", "en.jsonl", "en-5"),
        ("en.jsonl", "en-edge", "en.jsonl", "en-8"),
        ("en.jsonl", "en-shouting", "en.jsonl", "en-6"),
    }
    assert named(findings, "contamination") == {
        ("en.jsonl", "en-leak", "en web", "held-2"),  # of the two in it, the one that more of is there
        ("sw.jsonl", "sw-leak", "sw web", "held-5"),
    }
    assert named(findings, "language") == {
        ("de.jsonl", "de-of-en", None, "en"),
        ("en.jsonl", "en-german", None, "de"),
    }
    scores = {f["document"]: f["score"] for f in findings if f["kind"] != "language"}
    assert scores["en-copy"] == scores["en-shouting"] == scores["en-leak"] == 1
    assert scores["en-near"] == pytest.approx(34 / 38, abs=1e-4)
    assert scores["en-edge"] == 0.8
    assert scores["sw-leak"] == pytest.approx(1 / 28, abs=1e-4)  # of 40 words, 28 runs of thirteen


def test_what_is_found_is_counted_by_source_and_by_language(planted):
    _, folder, result, _ = planted
    en, de, sw = result["sources"]
    assert [row["documents"] for row in (en, de, sw)] == [69, 61, 62]
    assert [row["exact_copies"] for row in (en, de, sw)] == [2, 1, 0]
    assert [row["exact_copies_of_other_sources"] for row in (en, de, sw)] == [0, 1, 0]
    assert [row["near_copies"] for row in (en, de, sw)] == [3, 0, 0]
    assert [row["holding_evaluation_text"] for row in (en, de, sw)] == [1, 0, 1]
    assert [row["others"] for row in (en, de, sw)] == [{"de": 1}, {"en": 1}, {}]
    assert [row["unsure"] for row in (en, de, sw)] == [1, 0, 0]  # the numbers
    texts = [json.loads(line)["text"] for line in (folder / "en.jsonl").read_text("utf-8").splitlines()]
    assert en["bytes"] == sum(len(text.encode()) for text in texts)
    assert en["exact_copy_bytes"] == len(texts[60].encode()) + len(texts[61].encode())
    assert result["between"] == [{"source": "de.jsonl", "of": "en.jsonl", "exact": 1, "near": 0}]
    assert [(row["lang"], row["role"], row["documents"]) for row in result["languages"]] == [
        ("en", "old", 69),
        ("de", "old", 61),
        ("sw", "new", 62),
    ]
    assert result["evaluation"] == [
        {
            **{"lang": "en", "domain": "web", "documents": 20, "without_words": 0, "contaminated": 2, "mostly": 1},
            "by_source": [{"source": "en.jsonl", "documents": 2}],
        },
        {
            **{"lang": "sw", "domain": "web", "documents": 20, "without_words": 0, "contaminated": 1, "mostly": 0},
            "by_source": [{"source": "sw.jsonl", "documents": 1}],
        },
    ]


def test_the_tables_say_what_was_found(planted):
    lines = render(planted[2]).splitlines()
    source = next(line for line in lines if line.startswith("en.jsonl"))
    assert source.split() == "en.jsonl en 69 0.0 2 (2.9%) 3 (4.3%) 0 1 (1.4%) 1 (1.4%) de 1".split()
    cells = [line.split() for line in lines]
    assert ["de.jsonl", "en.jsonl", "1", "0"] in cells
    assert ["sw", "web", "20", "1", "(5.0%)", "0", "sw.jsonl", "1"] in cells
    assert "1 document more looks like another" in "\n".join(lines)
    assert max(map(len, lines)) <= 140


def test_two_processes_find_what_one_finds(planted, tmp_path, monkeypatch):
    config, _, result, findings = planted
    monkeypatch.setattr(inspection, "BATCH_DOCUMENTS", 10)  # many batches, in another grouping
    assert inspect(config, tmp_path, workers=2) == (result, findings)


def test_a_sample_takes_copies_of_a_document_together(tmp_path):
    rng = random.Random(2)
    documents = clean(rng, "en", 300, "a")
    copies = [(f"b{number}", f" {text} ") for number, (_, text) in enumerate(documents)][::-1]
    near = [(f"c{number}", f"{text} and more") for number, (_, text) in enumerate(documents)]
    for name, texts in {"a": documents, "b": copies, "c": near}.items():
        write(tmp_path / f"{name}.jsonl", texts)
    config = configure(tmp_path, {"a.jsonl": "en", "b.jsonl": "en", "c.jsonl": "en"}, languages={"en": "old"})
    result, findings = inspect(config, tmp_path, sample=0.4)
    a, b, c = result["sources"]
    assert 80 < a["documents"] < 160
    assert b["documents"] == b["exact_copies"] == b["exact_copies_of_other_sources"] == a["documents"]
    assert all(other == f"a{name[1:]}" for _, name, _, other in named(findings, "exact"))
    assert result["languages"][0]["documents"] == sum(row["documents"] for row in result["sources"])
    assert result["languages"][0]["exact_copies"] == a["documents"]
    assert c["near_copies"] > 0.85 * c["documents"] > 60  # 36 of 38 shingles in common, so most decide alike
    assert "a sample of 0.4" in render(result)
    again, _ = inspect(config, tmp_path, sample=0.4)
    assert again == result


def test_a_sample_may_be_empty(tmp_path):
    write(tmp_path / "a.jsonl", clean(random.Random(3), "en", 5, "a"))
    result, findings = inspect(configure(tmp_path, {"a.jsonl": "en"}), tmp_path, sample=1e-9)
    assert result["sources"][0]["documents"] == 0 and findings == []
    assert "a.jsonl" in render(result)


@pytest.mark.parametrize("sample", [0, -1, 1.5])
def test_a_sample_of_an_impossible_size_is_refused(tmp_path, sample):
    with pytest.raises(DataError, match="give a share above 0, at most 1"):
        inspect_data(configure(tmp_path, {"a.jsonl": "en"}), tmp_path, tmp_path, sample=sample)


def test_a_language_that_the_identification_does_not_know_is_not_judged(tmp_path, caplog):
    rng = random.Random(4)
    write(tmp_path / "a.jsonl", clean(rng, "en", 5, "a"))
    write(tmp_path / "b.jsonl", clean(rng, "sw", 5, "b"))
    config = configure(tmp_path, {"a.jsonl": "tlh", "b.jsonl": "swh_Latn"}, languages={"tlh": "old", "swh_Latn": "new"})
    caplog.set_level("INFO", logger="moect.data")
    result, findings = inspect(config, tmp_path)
    assert [row["other_language"] for row in result["sources"]] == [None, 0]
    assert [row["others"] for row in result["languages"]] == [None, {}]
    assert findings == []
    assert "tlh: a language that the identification does not know" in caplog.text
    assert "not judged: tlh" in render(result)


def test_bad_text_ends_the_inspection_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 3}\n', "utf-8")
    with pytest.raises(DataError, match="a.jsonl"):
        inspect_data(configure(tmp_path, {"a.jsonl": "en"}), tmp_path / "cache", tmp_path / "out", workers=1)
    assert os.listdir(tmp_path / "cache") == os.listdir(tmp_path / "out") == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    write(tmp_path / "a.jsonl", clean(random.Random(5), "en", 5, "a"))
    with pytest.raises(DataError, match=r"a\.jsonl.*cannot be written \(File exists\)"):
        inspect_data(configure(tmp_path, {"a.jsonl": "en"}), tmp_path, tmp_path / "a.jsonl", workers=1)


class Dying(Inspector):
    def __call__(self, batch):
        os._exit(9)


def test_a_process_that_is_killed_is_told_in_one_line():
    with pytest.raises(DataError, match="ended by itself.*fewer workers"):
        list(inspect_batches(Dying(EvaluationIndex([]), 1.0), [Batch(0, False)], workers=2))


REAL = Path(os.environ.get("MOECT_DATA", "/nonexistent"))


@pytest.mark.skipif(not (REAL / "corpus/bible").is_dir(), reason="MOECT_DATA holds no corpus/bible")
def test_chapters_that_a_book_repeats_are_near_copies_in_real_text(tmp_path):
    config = configure(tmp_path, {"corpus/bible/zh.train.jsonl.gz": "zh"}, languages={"zh": "old"})
    config.data.root = str(REAL)
    result, findings = inspect(config, tmp_path)
    assert named(findings, "near") == {
        ("corpus/bible/zh.train.jsonl.gz", "bible:ISA.37", "corpus/bible/zh.train.jsonl.gz", "bible:2KI.19")
    }
    assert result["sources"][0]["other_language"] == 0
