"""The page of pictures to compare."""

from pathlib import Path

import pytest
import torch

from restoration.contact_sheet import contact_sheet


def test_shows_every_picture_in_its_place():
    colours = torch.eye(3)[:, :, None, None]
    wide, tall, small = (
        colour.expand(3, *size) for colour, size in zip(colours, ((10, 40), (80, 20), (1, 1)), strict=True)
    )
    titles = ("degraded", "reference", "result")
    sheet = contact_sheet([("one", [wide, tall, small]), ("", [small, wide, tall])], titles, cell=64)
    assert sheet.dtype == torch.float32
    assert sheet.shape[0] == 3
    column = sheet.shape[2] // 3
    red, green, blue = ((sheet == colour).all(0) for colour in colours)
    # Scaled to fit 64 x 64: 64 x 16, 16 x 64, 64 x 64, in the order given.
    expected = [(0, red, 64 * 16), (1, green, 16 * 64), (2, blue, 64 * 64)]
    expected += [(0, blue, 64 * 64), (1, red, 64 * 16), (2, green, 16 * 64)]
    for place, mask, area in expected:
        assert int(mask[:, place * column : (place + 1) * column].sum()) == area
    labelled = contact_sheet([("one", [wide, tall, small]), ("two", [small, wide, tall])], titles, cell=64)
    assert labelled.shape[1] > sheet.shape[1]


def test_shortens_long_text():
    picture = torch.zeros(3, 8, 8)
    assert contact_sheet([("x" * 500, [picture])], ["y" * 500], cell=64).shape[2] < 100


@pytest.mark.parametrize("rows", [[], [("one", [torch.zeros(3, 2, 2)])]])
def test_rejects_ragged_rows(rows):
    with pytest.raises(ValueError, match="rows must hold 2 pictures each"):
        contact_sheet(rows, ["degraded", "result"])


@pytest.mark.parametrize("found", [True, False])
def test_letters_beyond_ascii_take_a_font_that_has_them(monkeypatch, caplog, found):
    folder = Path(pytest.importorskip("matplotlib").get_data_path(), "fonts", "ttf")
    fonts = ("no such font.ttf", str(folder / "DejaVuSans.ttf")) if found else ()
    monkeypatch.setattr("restoration.contact_sheet._FONTS_OF_MORE_LETTERS", fonts)
    first, second = (contact_sheet([(label, [torch.zeros(3, 8, 8)])], ["result"]) for label in ("Ωж", "Ψя"))
    assert torch.equal(first, second) is not found  # one box a letter where there is no font
    warnings = ["no font found for Ωж", "no font found for Ψя"]
    assert [warning in caplog.text for warning in warnings] == [not found] * 2
