"""One picture of many: the last samples of every job of a sweep, side by side, with labels."""

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MOST_TILES", "Placed", "Sheet", "Text", "Tile", "arrange", "newest_grid", "paint"]

MOST_TILES = 120
_MOST_SIDES = {6: 528, 24: 272, 60: 200, MOST_TILES: 136}  # of a tile, up to a number of tiles; grids are 265 to 1100 wide
_LEAST_SIDE = 136  # which leaves room for words
_MOST_WIDTH = 1800
_LEAST_WIDTH = 560
_MARGIN, _GAP, _BLOCK_GAP = 16, 6, 26
_TITLE, _LABEL, _CAPTION = 20, 15, 13  # font sizes
_LABEL_LINES, _CAPTION_LINES = 3, 2
_LINE_HEIGHT = 1.25
_INK, _PALE, _ALARM, _EMPTY = (20, 20, 20), (110, 110, 110), (170, 30, 30), (236, 236, 236)
_KINDS = ("samples_epoch_", "samples_step_", "reconstructions_epoch_")  # the first that a run has; a number follows
_DAMAGED = (OSError, SyntaxError, ValueError)  # what PIL says of a damaged file

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """One job.

    Args:
        block: tiles of one block stand in one row, below this label.
        caption: above the tile; may be empty.
        picture: a PNG file, or None.
        words: what stands in the place of the picture where there is none.
        is_wrong: whether the words tell of a failure.
    """

    block: str
    caption: str
    picture: Path | None
    words: str
    is_wrong: bool = False


@dataclass(frozen=True)
class Text:
    """One line of text: where its left upper corner is, its font size, and the width that it was cut to."""

    x: int
    y: int
    line: str
    size: int
    width: int
    colour: Colour


@dataclass(frozen=True)
class Placed:
    """A tile and its left upper corner."""

    x: int
    y: int
    tile: Tile


@dataclass(frozen=True)
class Sheet:
    """Where everything stands, in pixels; tiles are `side` wide, with pictures in their left upper corners."""

    width: int
    height: int
    side: int
    tile_height: int
    tiles: tuple[Placed, ...]
    texts: tuple[Text, ...]


def newest_grid(samples: Path) -> Path | None:
    """The last grid of samples in a run's folder, of a model that cannot sample its last reconstructions; None without."""
    for kind in _KINDS:
        if found := sorted(samples.glob(f"{kind}*.png"), key=lambda file: (len(file.name), file.name)):
            return found[-1]
    return None


def arrange(tiles: Sequence[Tile], title: str) -> Sheet:
    """Blocks in lines, each block as wide as the largest one, at most `MOST_TILES` tiles, no larger than the pictures."""
    shown = tiles[:MOST_TILES]
    sizes = [size for tile in shown if tile.picture and (size := _size(tile.picture))]
    largest = max(map(max, sizes), default=0)
    side = max(_LEAST_SIDE, min(largest, next(side for most, side in _MOST_SIDES.items() if len(shown) <= most)))
    tile_height = max([_LEAST_SIDE, *(_fitted(size, side)[1] for size in sizes)])
    blocks: dict[str, list[Tile]] = {}
    for tile in shown:
        blocks.setdefault(tile.block, []).append(tile)
    across = max(1, (_MOST_WIDTH - 2 * _MARGIN) // (side + _GAP))
    per_row = min(across, max((len(block) for block in blocks.values()), default=1))
    block_width = per_row * (side + _GAP) - _GAP
    per_line = min(len(blocks) or 1, max(1, (_MOST_WIDTH - 2 * _MARGIN + _BLOCK_GAP) // (block_width + _BLOCK_GAP)))
    width = max(_LEAST_WIDTH, 2 * _MARGIN + per_line * (block_width + _BLOCK_GAP) - _BLOCK_GAP)

    texts: list[Text] = []
    placed: list[Placed] = []
    heading = [title] + ([f"{len(tiles) - len(shown)} more jobs are not shown"] if len(tiles) > len(shown) else [])
    y = _MARGIN
    for i, line in enumerate(heading):
        y = _write(texts, line, (_MARGIN, y), (_TITLE, _LABEL_LINES), width - 2 * _MARGIN, _ALARM if i else _INK)
    captions = max((len(_lines(tile.caption, _CAPTION, side, _CAPTION_LINES)) for tile in shown if tile.caption), default=0)
    caption_height = round(captions * _CAPTION * _LINE_HEIGHT) + 2
    row_height = caption_height + tile_height + _GAP
    named = list(blocks.items())
    for line_start in range(0, len(named), per_line):
        line_of_blocks = named[line_start : line_start + per_line]
        top = y + _GAP
        xs = [_MARGIN + i * (block_width + _BLOCK_GAP) for i in range(len(line_of_blocks))]
        y = max(
            _write(texts, label, (x, top), (_LABEL, _LABEL_LINES), block_width, _INK)
            for x, (label, _) in zip(xs, line_of_blocks, strict=True)
        )
        for x, (_, block) in zip(xs, line_of_blocks, strict=True):
            for i, tile in enumerate(block):
                corner = x + i % per_row * (side + _GAP), y + i // per_row * row_height
                _write(texts, tile.caption, corner, (_CAPTION, _CAPTION_LINES), side, _PALE)
                placed.append(Placed(corner[0], corner[1] + caption_height, tile))
        y += row_height * max(-(-len(block) // per_row) for _, block in line_of_blocks) + _GAP
    return Sheet(width, y + _MARGIN, side, tile_height, tuple(placed), tuple(texts))


def paint(sheet: Sheet) -> Any:
    """The sheet as a PIL image; a file that cannot be read leaves words in its place."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (sheet.width, sheet.height), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    texts = list(sheet.texts)
    for placed in sheet.tiles:
        picture, words = _picture(placed.tile, sheet.side)
        if picture is not None:
            image.paste(picture, (placed.x, placed.y))
            continue
        pen.rectangle((placed.x, placed.y, placed.x + sheet.side - 1, placed.y + sheet.tile_height - 1), fill=_EMPTY)
        most = int((sheet.tile_height - 2 * _GAP) / (_CAPTION * _LINE_HEIGHT))
        corner = placed.x + _GAP, placed.y + _GAP
        _write(texts, words, corner, (_CAPTION, most), sheet.side - 2 * _GAP, _ALARM if placed.tile.is_wrong else _PALE)
    for text in texts:
        pen.text((text.x, text.y), text.line, fill=text.colour, font=_font(text.size))
    return image


def _size(picture: Path) -> tuple[int, int] | None:
    """Width and height of a picture; None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(picture) as file:
            return file.size
    except _DAMAGED:
        return None


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height made to fit in a square: smaller, or a whole number of times larger."""
    longer = max(size)
    scale = side // longer if longer <= side else side / longer
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _picture(tile: Tile, side: int) -> tuple[Any, str]:
    """The tile's picture, made to fit in a square, or else words."""
    from PIL import Image

    if tile.picture is None:
        return None, tile.words
    try:
        with Image.open(tile.picture) as file:
            picture = file.convert("RGB")
    except _DAMAGED:
        return None, f"{tile.picture.name} cannot be read"
    is_smaller = max(picture.size) <= side
    way = Image.Resampling.NEAREST if is_smaller else Image.Resampling.LANCZOS
    return picture.resize(_fitted(picture.size, side), way), ""


def _write(texts: list[Text], line: str, corner: tuple[int, int], font: tuple[int, int], width: int, colour: Colour) -> int:
    """Add a text in as many lines as it takes, of a font size and at most a number of lines; returns where it ends."""
    x, y = corner
    size, most = font
    for part in _lines(line, size, width, most):
        texts.append(Text(x, y, part, size, width, colour))
        y += round(size * _LINE_HEIGHT)
    return y + 2


def _lines(text: str, size: int, width: int, most: int) -> list[str]:
    """The text in lines that are no wider than `width`; where it takes more than `most` lines, the last ends in "..."."""
    font = _font(size)
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        rest = word
        while font.getlength(rest) > width:
            fits = max(1, bisect_right(range(1, len(rest)), width, key=lambda n: font.getlength(rest[:n])))
            lines.append(rest[:fits])
            rest = rest[fits:]
        lines.append(rest)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last}..."]


@functools.cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
