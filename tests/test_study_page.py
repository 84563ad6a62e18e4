"""What a study's page shows, against figures by hand."""

from __future__ import annotations

import pytest
from PIL import Image

from moect.cli import main
from moect.errors import DataError
from moect.study.page import fill_page
from moect.study.results import read_results, write_results
from moect.study.tables import (
    languages_table,
    lengths_table,
    lifelong_table,
    methods_table,
    rates_table,
    variants_table,
)

PAGE = """# A page

<!-- study: methods -->
what was there
<!-- end -->

kept

![](page/pareto.png) and ![](page/curves.png)

<!-- study: languages web -->
<!-- end -->

<!-- study: summary web -->
<!-- end -->
"""


def run(method: str, seed: int, new: float, old: float, kind: str = "method") -> dict:
    """A run that was measured on two languages of one domain, and at three steps of its way."""
    length = {"from": 1, "to": 16, "documents": 40, "identical_documents": 30 + seed}
    exact = {
        "documents": 50,
        "identical_documents": 40 + seed,
        "tokens": 9,
        "identical_tokens": 8,
        "by_length": [length],
    }
    measured = (("en", "old", old, 2.0), ("cy", "new", new, 4.0), ("ga", "new", new + 1, 4.0))
    texts = [
        {"lang": lang, "role": role, "domain": "web", "documents": 50, "bits_per_byte": now, "base_bits_per_byte": base}
        for lang, role, now, base in measured
    ]
    texts[0]["exact"] = exact | {"by_length": [length]}
    texts += [text | {"domain": "news"} for text in texts]
    ways = [(role, step, 3 - step / 100) for role in ("new", "old") for step in (0, 50, 100)]
    curve = [{"step": s, "role": r, "domain": "web", "bits_per_byte": b, "base": 3.0} for r, s, b in ways]
    return {
        **{"name": f"{method}-{seed}", "method": method, "kind": kind, "seed": seed, "rate": 0.01, "steps": 100},
        **{"tokens": 64, "trainable": 1_230_000, "active": 4_560_000, "tokens_per_second": 1000.0 + seed},
        **{"peak_memory": 2**30, "texts": texts, "curve": curve},
    }


@pytest.fixture
def results() -> dict:
    runs = [run("full", 0, 1.0, 2.4), run("full", 1, 1.2, 2.6), run("gate", 0, 1.3, 2.0)]
    runs += [run("narrow", 0, 1.4, 2.02, "variant")]
    about = {name: {"about": "", "like": "gate" if name == "narrow" else None} for name in ("full", "gate", "narrow")}
    tried = [(0.001, 1.5), (0.002, 1.4), (0.004, None)]
    pilots = [{"method": "full", "kind": "pilot", "rate": rate, "bits_per_byte": bits} for rate, bits in tried]
    return {"format": 2, "about": about, "runs": pilots + runs}


def cells(table: str) -> dict[str, list[str]]:
    """The lines of a table by their first column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_methods_are_means_over_seeds_against_one_of_them(results):
    table = cells(methods_table(results, "full"))
    # (1.0 + 2.0) / 2 and (1.2 + 2.2) / 2: mean 1.6, deviation 0.1414
    full = ["2", "1.600 ± 0.141", "+0.0% ± 0.0%", "1.600 ± 0.141", "+25.00% ± 7.07%", "+25.00% ± 7.07%"]
    assert table["`full`"] == [*full, "81.0% ± 1.4%", "1.23 M", "4.56 M", "1.00", "1.0 GiB"]
    # against the run with the same seed, 1.5
    assert table["`gate`"][:3] == ["1", "1.800", "+20.0%"] and table["`gate`"][6] == "80.0%"


def test_variants_stand_below_what_they_are_like(results):
    table = cells(variants_table(results))
    assert list(table)[2:] == ["**`gate`**", "`narrow`"]
    assert table["`narrow`"] == ["1.900", "+5.6%", "1.900", "+1.00%", "+1.00%", "80.0%", "1.23 M"]
    assert table["**`gate`**"][:2] == ["1.800", ""]


def test_lengths_are_pooled_over_seeds_and_the_best_rate_is_bold(results):
    assert "| web | 1 to 16 | 80 | 76.2% |" in lengths_table(results, "full")
    assert cells(rates_table(results))["`full`"] == ["1.500", "**1.400**", "diverged"]


def test_what_was_learned_before_is_shown_before_and_after(results):
    """`cy` first, `ga` then; the first line is the method that learned both at once."""
    later = run("later", 0, 1.7, 2.0, "variant")
    for text in later["texts"]:
        if text["lang"] == "cy":
            text |= {"role": "learnt", "base_bits_per_byte": 1.5}
    results["about"]["later"] = {"about": "", "like": "gate"}
    results["runs"].append(later)
    table = cells(lifelong_table(results, "web"))
    assert list(table)[0] == "" and table[""][:2] == ["cy", "ga"]
    assert table["**`gate`**"] == ["1.300", "2.300", "+0.00%", "80.0%"]
    assert table["`later`"] == ["1.500 → 1.700", "2.700", "+0.00%", "80.0%"]
    # both count among what was to be learned; the base's own figures are those of the other runs
    assert cells(variants_table(results))["`later`"][0] == "2.200"
    assert cells(languages_table(results, "web"))["base"][1].startswith("4.000")
    assert len(lifelong_table({"about": {}, "runs": []}, "web").splitlines()) == 2


def test_a_page_keeps_its_words_and_gets_tables_and_pictures_again_and_again(results, tmp_path, capsys):
    page, kept = tmp_path / "page.md", tmp_path / "page.json"
    page.write_text(PAGE)
    write_results(results, kept)
    assert read_results(kept) == results and len(kept.read_text().splitlines()) > len(results["runs"])
    written = fill_page(page, read_results(kept))
    first = page.read_text()
    assert "what was there" not in first and "\nkept\n" in first and "| `gate` | 1 | 1.800 |" in first
    assert "| base | 2.000 ± 0.000 | 4.000 ± 0.000 | 4.000 ± 0.000 |" in first
    for picture in written[1:]:
        with Image.open(picture) as image:
            assert image.width > 1000 and len(image.convert("L").getcolors()) > 20
    # base 4.0 each: 1.6 and 1.8 are 60% and 55% less; of one that is measured against itself nothing is told
    assert "| `full` | -60.0% ± 3.5% |  | +25.00% ± 7.07% | 81.0% ± 1.4% | 1.23 M |" in first
    assert "| `gate` | -55.0% | +20.0% | +0.00% | 80.0% | 1.23 M |" in first
    fill_page(page, results)
    assert page.read_text() == first and len(written) == 3
    other = tmp_path / "other.md"  # without pictures, from results that lie elsewhere
    other.write_text("<!-- study: rates -->\n<!-- end -->\n")
    assert fill_page(other, results) == [other] and "**1.400**" in other.read_text()
    page.write_text(PAGE.replace("methods", "riches"))
    with pytest.raises(DataError, match="wants a table `riches`; there are methods"):
        fill_page(page, results)
    page.write_text("<!-- study: lengths gat -->\n<!-- end -->")
    with pytest.raises(DataError, match="has no method 'gat'; there are full, gate, narrow"):
        fill_page(page, results)
    page.write_text("<!-- study: lengths gate -->\n<!-- end -->")
    fill_page(page, {**results, "runs": results["runs"][:4]})
    assert page.read_text().count("\n|") == 2, "heads alone: no run of it has ended yet"
    kept.write_text('{"format": 2}')
    assert main(["study", "nowhere.yaml", "--page", str(page)]) == 2
    with pytest.raises(DataError, match="holds no results of a study"):
        read_results(kept)
