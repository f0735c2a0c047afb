"""Contact sheets: pictures in rows, each row with a label above it."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ldm.errors import InputError, one_line
from ldm.images import MAX_PIXELS

Row = tuple[str, list[Image.Image]]  # label, pictures

MIN_CELL = 128  # pixels along a cell
MARGIN, PAPER, INK = 4, (250, 250, 248), (40, 40, 44)
MAX_LABEL = 200  # letters
HEADING_LINES = 3  # of a column


def grid(rows: Sequence[Row], headings: Sequence[str] = ()) -> Image.Image:
    """One sheet of rows. All cells have the first picture's size, magnified if it is small.

    headings: of the columns, above all rows.
    """
    first = rows[0][1][0]
    factor = max(1, -(-MIN_CELL // min(first.size)))
    width, height = first.width * factor, first.height * factor
    label = _label(height)
    font = ImageFont.load_default(size=label - 2 * MARGIN)
    columns = max(len(pictures) for _, pictures in rows)
    lines = [_wrapped(heading, font, width) for heading in headings]
    line_height = label - MARGIN
    head = line_height * max(map(len, lines), default=0)
    size = (columns * (width + MARGIN) + MARGIN, head + len(rows) * (height + label + MARGIN))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN + c * (width + MARGIN) for c in range(columns)]
    for left, heading in zip(lefts, lines, strict=False):
        for i, line in enumerate(heading):
            draw.text((left + 2, i * line_height + MARGIN), line, fill=INK, font=font)
    for r, (text, pictures) in enumerate(rows):
        top = head + r * (height + label + MARGIN)
        draw.text((MARGIN + 2, top + MARGIN), one_line(text, MAX_LABEL), fill=INK, font=font)
        for left, picture in zip(lefts, pictures, strict=False):
            sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top + label))
    return sheet


def _label(height: int) -> int:
    """The height of a label above cells of this height."""
    return max(13, height // 12) + 2 * MARGIN


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels where its words permit it; what needs more lines is left out."""
    lines: list[str] = []
    for word in one_line(text, MAX_LABEL).split():
        while len(word) > 1 and font.getlength(word) > width:
            word = word[:-1]
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > HEADING_LINES:
        lines[HEADING_LINES - 1 :] = [lines[HEADING_LINES - 1].rpartition(" ")[0] + " ..."]
    return lines


def first_column(sheet: Image.Image, rows: int, side: int) -> list[Image.Image]:
    """The first picture of each row of a `grid` without headings, as magnified there. side: its pixels before that."""
    side *= max(1, -(-MIN_CELL // side))
    label = _label(side)
    tops = [r * (side + label + MARGIN) + label for r in range(rows)]
    return [sheet.crop((MARGIN, top, MARGIN + side, top + side)) for top in tops]


def check_size(rows: int, columns: int, width: int, height: int) -> None:
    """Raises InputError if a sheet of pictures of this size has too many pixels."""
    factor = max(1, -(-MIN_CELL // min(width, height)))
    if rows * columns * width * height * factor**2 > MAX_PIXELS:
        raise InputError(
            f"a sheet of {rows} x {columns} pictures of {width} x {height} pixels is too large: it should have at most "
            f"{MAX_PIXELS} pixels; ask for fewer or smaller pictures"
        )


def beside(top: Image.Image, left: Image.Image, right: Image.Image) -> Image.Image:
    """One sheet above two others side by side."""
    width = max(top.width, left.width + right.width)
    sheet = Image.new("RGB", (width, top.height + max(left.height, right.height)), PAPER)
    for picture, corner in ((top, (0, 0)), (left, (0, top.height)), (right, (left.width, top.height))):
        sheet.paste(picture, corner)
    return sheet
