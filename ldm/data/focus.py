"""Where the subject of a photograph is, so that the cut keeps it: from a file beside it, or from what the camera wrote.

    dog/1.jpg  dog/1.json       {"focus": [0.3, 0.4]}: 30 % from the left, 40 % from the top, as the picture is seen

A camera's tags SubjectArea and SubjectLocation (EXIF 2.3, 4.6.5) give pixels of the picture as it is stored, before its
orientation turns it.
"""

import io
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ldm import images
from ldm.errors import InputError
from ldm.images import Picture
from ldm.runtime import read_json

Point = tuple[float, float]  # x and y, from (0, 0), left and top, to (1, 1)

ORIENTATION, CAMERA, WIDTH, HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003  # EXIF tags
SUBJECT = (0x9214, 0xA214)  # SubjectArea: x, y and its size; SubjectLocation: x, y
MAX_STRETCH = 1.02  # of the stored picture against the size in its tags, which a program may have forgotten to change

# A point of the picture as it is stored -> as it is seen, by orientation (EXIF 2.3, tag 0x0112).
SEEN = {
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (1 - y, x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (y, 1 - x),
}


def read_focus(path: Path) -> Point | None:
    """The focal point in a JSON file; None if it says none. Raises InputError, which names the file, if it is wrong."""
    tree = read_json(path)
    if not isinstance(tree, dict) or "focus" not in tree:  # other programs write such files too
        return None
    match tree["focus"]:
        case [int() | float() as x, int() | float() as y] if 0 <= x <= 1 and 0 <= y <= 1:
            return float(x), float(y)
    raise InputError(f"{path}: the focus is {tree['focus']!r}, and should be two numbers from 0 to 1, as [0.3, 0.4]")


def camera_focus(picture: Picture) -> Point | None:
    """The focal point that the camera wrote into a photograph's file; None if it wrote none that makes sense."""
    with suppress(Exception):  # Pillow raises anything on damaged tags; a damaged picture is found when it is loaded
        with images.open_picture(io.BytesIO(picture.content)) as image:
            return _focus(image)
    return None


def _focus(image: Image.Image) -> Point | None:
    exif = image.getexif()
    tags = exif.get_ifd(CAMERA)
    point = next((tags[tag][:2] for tag in SUBJECT if tag in tags), None)
    if point is None:
        return None
    width, height = tags.get(WIDTH, image.width), tags.get(HEIGHT, image.height)
    stretch = (image.width / width) / (image.height / height)
    if not 1 / MAX_STRETCH <= stretch <= MAX_STRETCH:
        return None
    x, y = point[0] / width, point[1] / height
    if not (0 < x < 1 and 0 < y < 1):
        return None
    seen = SEEN.get(exif.get(ORIENTATION))
    return seen(x, y) if seen else (x, y)
