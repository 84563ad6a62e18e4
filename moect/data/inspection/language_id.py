"""Which language a text is in, said by py3langid from a model that it brings along: no network."""

from __future__ import annotations

import functools
import re

CHARACTERS = 1000  # of a text that are looked at: more make no difference
SURE = 0.6  # a lower probability counts as not sure

# ISO 639-3 codes, as corpora write them, of what the library names with two letters or another code
ALIASES = dict(
    pair.split(":")
    for pair in """
    afr:af amh:am arg:an arb:ar ara:ar asm:as azj:az aze:az bak:ba bel:be bul:bg ben:bn bre:br bos:bs cat:ca ces:cs
    cym:cy dan:da deu:de dzo:dz ell:el eng:en epo:eo spa:es ekk:et est:et eus:eu pes:fa fas:fa prs:fa fin:fi fao:fo
    fra:fr fry:fy gle:ga gla:gd glg:gl guj:gu gn:gug grn:gug hau:ha heb:he iw:he hin:hi hrv:hr hat:ht hun:hu hye:hy
    ind:id ibo:ig isl:is ita:it jpn:ja jav:jv kat:ka ki:kik kaz:kk khm:km kan:kn kor:ko kmr:ku kur:ku kir:ky lat:la
    ltz:lb lug:lg lin:ln lao:lo lit:lt lvs:lv lav:lv plt:mg mlg:mg mkd:mk mal:ml khk:mn mon:mn mar:mr zsm:ms msa:ms
    mlt:mt mya:my npi:ne nep:ne nld:nl nno:nn nob:no nor:no nb:no oci:oc orm:om gaz:om ory:or ori:or pan:pa pol:pl
    pbt:ps pus:ps por:pt quy:qu quz:qu que:qu ron:ro rus:ru kin:rw san:sa sme:se sin:si slk:sk slv:sl sna:sn som:so
    als:sq sqi:sq srp:sr sot:st swe:sv swh:sw swa:sw tam:ta tel:te tgk:tg tha:th tuk:tk fil:tl tgl:tl tur:tr tat:tt
    uig:ug ukr:uk urd:ur uzn:uz uzb:uz vie:vi vol:vo wln:wa xho:xh yor:yo cmn:zh zho:zh zul:zu
    """.split()
)
# what the library tells apart inside a language as ISO 639-3 draws it, and often confuses
MEMBERS = {
    "ar": {"ary", "arz"},
    "ku": {"sdh"},
    "no": {"nn"},
    "sh": {"bs", "hr", "sr"},
    "uz": {"uzs"},
    "zh": {"wuu", "yue"},
}


def labels_of(language: str) -> frozenset[str]:
    """The library's names for a language; empty where it does not know it, so that it cannot judge its text.

    Args:
        language: an ISO 639 code, perhaps with script or region behind it: `sw`, `swh_Latn`, `pt-BR`, `zh_Hans`.
    """
    code = re.split(r"[-_]", language.strip().lower())[0]
    code = "sh" if code == "hbs" else ALIASES.get(code, code)
    return frozenset({code, *MEMBERS.get(code, ())} & known_languages())


@functools.cache
def known_languages() -> frozenset[str]:
    """Every name that the library gives; `zxx` stands for text in no language."""
    return frozenset(map(str, _identifier().labels))


def identify(text: str) -> tuple[str, float]:
    """The likeliest language of a text, by the library's name, and the probability that the library gives to it and to
    those that it is often confused with inside one language (`MEMBERS`)."""
    ranked = _identifier().rank(text[:CHARACTERS])
    label, probability = ranked[0]
    if alike := _alike().get(str(label)):
        probability = sum(share for other, share in ranked if str(other) in alike)
    return str(label), min(float(probability), 1.0)


@functools.cache
def _alike() -> dict[str, set[str]]:
    groups = [{language, *members} for language, members in MEMBERS.items()]
    return {label: group for group in groups for label in group}


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
