"""A page of pictures to compare: labelled rows, titled columns."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from restoration.imaging import from_pillow, to_pillow

logger = logging.getLogger(__name__)

# A warm off-white like a picture mount: pure white would make old paper look dirty.
_MOUNT_COLOUR = (246, 243, 236)
_TITLE_COLOUR = (52, 46, 40)
_LABEL_COLOUR = (128, 118, 106)

# As Linux distributions install them. Paintings' files often have Chinese names.
_FONTS_OF_MORE_LETTERS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "DejaVuSans.ttf",
)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[torch.Tensor]]], column_titles: Sequence[str], *, cell: int = 320
) -> torch.Tensor:
    """Lay pictures out in titled columns and labelled rows, each scaled to fit ``cell`` x ``cell`` pixels.

    ``rows`` are (label, pictures), a picture being float [3, h, w] in [0, 1] of any size, one for each column title.
    A label stands above its row; an empty one takes no room. Returns float32 [3, H, W], for ``imaging.write_image``.
    """
    if not rows or any(len(pictures) != len(column_titles) for _, pictures in rows):
        counts = [len(pictures) for _, pictures in rows]
        raise ValueError(f"rows must hold {len(column_titles)} pictures each, one a column title, got {counts}")
    margin = max(4, cell // 20)
    text_height = max(10, cell // 18)  # the smallest that Pillow's default font still renders readably is 10
    font = _font_for("".join([*column_titles, *(label for label, _ in rows)]), text_height)
    line = text_height + margin // 2
    scaled = [(label, [_fit(to_pillow(picture), cell) for picture in pictures]) for label, pictures in rows]
    heights = [max(picture.height for picture in pictures) for _, pictures in scaled]
    labels_height = sum(line for label, _ in scaled if label)
    width = margin + (cell + margin) * len(column_titles)
    height = margin + line + labels_height + sum(heights) + margin * len(scaled)

    sheet = Image.new("RGB", (width, height), _MOUNT_COLOUR)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        centre = margin + column * (cell + margin) + cell // 2
        draw.text((centre, margin // 2), _shorten(title, font, cell), font=font, fill=_TITLE_COLOUR, anchor="ma")
    top = margin + line
    for (label, pictures), row_height in zip(scaled, heights, strict=True):
        if label:
            text = _shorten(label, font, width - 2 * margin)
            draw.text((margin, top - margin // 2), text, font=font, fill=_LABEL_COLOUR)
            top += line
        for column, picture in enumerate(pictures):
            left = margin + column * (cell + margin) + (cell - picture.width) // 2
            sheet.paste(picture, (left, top + (row_height - picture.height) // 2))
        top += row_height + margin
    return from_pillow(sheet)


def _fit(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _font_for(text: str, height: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, or what this computer has for more letters than ASCII's."""
    default = ImageFont.load_default(height)
    if text.isascii():
        return default
    lacking = {default: _missing(text, default)}
    for name in _FONTS_OF_MORE_LETTERS:
        with contextlib.suppress(OSError):  # there is none of that name
            font = ImageFont.truetype(name, height)
            lacking[font] = _missing(text, font)
    font = min(lacking, key=lambda font: len(lacking[font]))
    if lacking[font]:
        logger.warning("contact sheet: no font found for %s; install Noto Sans CJK", "".join(lacking[font]))
    return font


def _missing(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """The letters that the font shows as the box that stands for any it lacks."""
    box = bytes(font.getmask("\uffff"))
    return sorted(letter for letter in set(text) if not letter.isascii() and bytes(font.getmask(letter)) == box)
