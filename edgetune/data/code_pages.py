"""Which one-byte code page a text of Latin letters is written in, told by the letters with marks
that its language has: à and ì are Italian together, ŕ and ě are no language's.
"""

from __future__ import annotations

from collections import Counter

# letters beyond ASCII of the languages that a code page is used for; of equals the first is taken
PAGES = {
    "cp1252": {
        "German": "äöüß",
        "French": "àâæçéèêëîïôœùûüÿ",
        "Spanish": "áéíóúüñ¿¡",
        "Italian": "àèéìíîòóùú",
        "Portuguese": "áâãàçéêíóôõúü",
        "Dutch": "áäéèêëïíóöüç",
        "Swedish, Finnish": "åäöé",
        "Danish, Norwegian": "åæøéèêóòôäöü",
        "Catalan": "àçèéíïòóúü",
        "Icelandic": "áéíóúýþæöð",
    },
    "cp1250": {
        "Polish": "ąćęłńóśźż",
        "Czech": "áčďéěíňóřšťúůýž",
        "Slovak": "áäčďéíĺľňóôŕšťúýž",
        "Hungarian": "áéíóöőúüű",
        "Croatian, Slovene": "čćđšž",
        "Romanian": "ăâîşţ",
    },
    "cp1254": {"Turkish": "çğıöşüâîû\u0307"},
    "cp1257": {
        "Lithuanian": "ąčęėįšųūž",
        "Latvian": "āčēģīķļņšūž",
        "Estonian": "äõöüšž",
    },
}
ANYWHERE = frozenset("–—‘’‚“”„…•€£§°«»‹›·©®™%×ªº±µ\u00a0\u00ad")  # marks of every language
SURE = 0.1  # of the letters more have to be a language's, for another code page to be taken


def latin_page(data: bytes) -> str | None:
    """The likeliest code page of these bytes; None where none of them explains the bytes."""
    best, most = None, -1.0
    for page, languages in PAGES.items():
        try:
            text = data.decode(page)
        except UnicodeDecodeError:
            continue
        seen = Counter(c for c in text.lower() if c > "\x7f" and c not in ANYWHERE)
        known = max(sum(seen[c] for c in letters) for letters in languages.values())
        share = known / seen.total() if seen else 1.0
        if share > most + (SURE if best else 0.0):
            best, most = page, share
    return best
