"""Contact sheets: labelled rows of pictures."""

from PIL import Image, ImageDraw, ImageFont

Row = tuple[str, list[Image.Image]]

SMALLEST = 128  # pixels along a cell
MARGIN, PAPER, INK = 4, (250, 250, 248), (40, 40, 44)


def grid(rows: list[Row]) -> Image.Image:
    """One sheet of rows (label, pictures), all cells of the first picture's size, magnified if that is small."""
    first = rows[0][1][0]
    factor = max(1, -(-SMALLEST // min(first.size)))
    width, height = first.width * factor, first.height * factor
    font = ImageFont.load_default(size=max(13, height // 12))
    label = font.size + 2 * MARGIN
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, len(rows) * (height + label + MARGIN)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, (text, pictures) in enumerate(rows):
        top = r * (height + label + MARGIN)
        draw.text((MARGIN + 2, top + MARGIN), text, fill=INK, font=font)
        for c, picture in enumerate(pictures):
            cell = picture.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (MARGIN + c * (width + MARGIN), top + label))
    return sheet


def beside(top: Image.Image, left: Image.Image, right: Image.Image) -> Image.Image:
    """One sheet above two that stand side by side."""
    width = max(top.width, left.width + right.width)
    sheet = Image.new("RGB", (width, top.height + max(left.height, right.height)), PAPER)
    for picture, corner in ((top, (0, 0)), (left, (0, top.height)), (right, (left.width, top.height))):
        sheet.paste(picture, corner)
    return sheet
