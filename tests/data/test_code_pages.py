"""Tables of one-byte code pages, as Excel saves them, are read in their own letters."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.data.rows import read_rows

TEXTS = {
    "Italian": ("cp1252", "Perché è così caro? Il pacco non è arrivato, la città è più lontana"),
    "Portuguese": ("cp1252", "Não recebi a encomenda, a cobrança está errada, coração"),
    "Swedish": ("cp1252", "Var är mitt paket? Jag vill återlämna två tröjor på måndag"),
    "Danish": ("cp1252", "Jeg ønsker at få pengene tilbage på kontoen – 25 €"),
    "French": ("cp1252", "Où est mon colis ? J’ai été débité, à Noël ça coûtait 25 €"),
    "German": ("cp1252", "Wo bleibt mein Päckchen? Größe 42, für März"),
    "Polish": ("cp1250", "Proszę o zwrot pieniędzy, źle naliczono opłatę za przesyłkę"),
    "Czech": ("cp1250", "Kde je můj balík? Částka byla stržena dvakrát, děkuji"),
    "Hungarian": ("cp1250", "Kétszer vonták le a pénzt, köszönöm, őszi időpont"),
    "Turkish": ("cp1254", "Siparişim nerede? Ürün çok geç geldi, ödeme iki kez alındı"),
    "Lithuanian": ("cp1257", "Noriu grąžinti pinigus, šiandien žodžiai ačiū"),
    "Russian": ("cp1251", "Где моя посылка? Я хочу вернуть деньги"),
}


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("rows", [1, 60])
def test_every_language_keeps_its_letters(language: str, rows: int, tmp_path: Path) -> None:
    page, text = TEXTS[language]
    lines = ["text;label", *(f"{text} {n};x" for n in range(rows))]
    (tmp_path / "a.csv").write_bytes("\r\n".join(lines).encode(page))
    found = read_rows(tmp_path / "a.csv")
    assert [row.values["text"] for row in found.rows] == [f"{text} {n}" for n in range(rows)]
    assert f"{page} text (a guess; data.encoding sets it)" in found.notes[0]
