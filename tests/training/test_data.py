"""Loading photographs: files of any common kind become upright, square RGB pictures in [-1, 1]."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from ldm import InputError, images
from ldm.images import find_pictures, load_picture, square

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(top_left, top_right, bottom_left, bottom_right, size=64) -> Image.Image:
    image = Image.new("RGB", (size, size))
    corners = {(0, 0): top_left, (1, 0): top_right, (0, 1): bottom_left, (1, 1): bottom_right}
    for (x, y), color in corners.items():
        image.paste(color, (x * size // 2, y * size // 2, (x + 1) * size // 2, (y + 1) * size // 2))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    n = image.width
    return [image.getpixel(at) for at in ((n // 8, n // 8), (n - n // 8, n // 8), (n // 8, n - n // 8))]


def close(a, b, by: int) -> bool:
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= by


def test_a_picture_is_rgb_from_minus_one_to_one(tmp_path):
    quarters(RED, GREEN, BLUE, WHITE).save(tmp_path / "a.png")
    pixels = load_picture(tmp_path / "a.png", 32)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.float32)
    assert pixels[:, 2, 2].tolist() == [1, -1, -1] and pixels[:, 2, 29].tolist() == [-1, 1, -1]
    assert pixels[:, 29, 29].tolist() == [1, 1, 1]
    levels = (pixels + 1) * 127.5  # 8-bit levels
    assert (levels - levels.round()).abs().max() < 1e-4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_rotated_as_its_exif_orientation_says(orientation, tmp_path):
    """EXIF 2.3, tag 274, says where the file stores the picture's top left corner."""
    upright = quarters(RED, GREEN, BLUE, WHITE)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    (upright if turn is None else upright.transpose(turn)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert close(corners(square(tmp_path / "a.jpg", 64)), [RED, GREEN, BLUE], by=6)


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (101, 100), (3, 2), (1, 1), (1, 500), (500, 1)])
def test_a_picture_is_scaled_by_its_short_side_and_cropped_to_the_middle(size, tmp_path):
    """The picture is a ramp along its longer side. Its middle is symmetric around the middle grey."""
    width, height = size
    ramp = np.tile(np.linspace(0, 255, max(size)), (min(size), 1))
    ramp = (ramp if width >= height else ramp.T).round().astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    found = np.asarray(square(tmp_path / "a.png", 64), dtype=float)[..., 0]
    assert found.shape == (64, 64)
    if min(size) >= 100:
        profile = found.mean(0) if width >= height else found.mean(1)
        half = 127.5 * min(size) / max(size)
        np.testing.assert_allclose(profile[[0, -1]], [127.5 - half, 127.5 + half], atol=4)


def save_transparent(mode: str, path) -> None:
    """Writes a picture: left half red (black in grey modes), right half transparent over a hidden colour."""
    color, hidden = {"RGBA": ((255, 0, 0, 255), (9, 9, 9, 0)), "LA": ((0, 255), (9, 0))}.get(mode, (0, 1))
    image = Image.new("P" if mode == "P" else mode, (64, 64), hidden)
    image.paste(color, (0, 0, 32, 64))
    if mode == "P":
        image.putpalette([255, 0, 0, 9, 9, 9])
        image.save(path, transparency=1)
    else:
        image.save(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode, tmp_path):
    save_transparent(mode, tmp_path / "a.png")
    left, right, _ = corners(square(tmp_path / "a.png", 64))
    assert left == ((0, 0, 0) if mode == "LA" else RED) and right == WHITE


def test_colour_keys_become_white_and_half_transparent_pixels_are_blended(tmp_path):
    quarters(RED, GREEN, RED, GREEN).save(tmp_path / "key.png", transparency=GREEN)
    assert corners(square(tmp_path / "key.png", 64)) == [RED, WHITE, RED]
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert close(square(tmp_path / "half.png", 8).getpixel((4, 4)), (127, 127, 127), by=1)


def test_cmyk_palette_and_one_bit_pictures_become_rgb(tmp_path):
    image = quarters(RED, GREEN, BLUE, WHITE)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert Image.open(tmp_path / "cmyk.jpg").mode == "CMYK"
    assert close(corners(square(tmp_path / "cmyk.jpg", 64)), [RED, GREEN, BLUE], by=8)
    image.quantize(4).save(tmp_path / "palette.gif")
    assert close(corners(square(tmp_path / "palette.gif", 64)), [RED, GREEN, BLUE], by=1)
    quarters(WHITE, (0, 0, 0), WHITE, WHITE).convert("1").save(tmp_path / "bits.png")
    assert corners(square(tmp_path / "bits.png", 64)) == [WHITE, (0, 0, 0), WHITE]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_not_clipped(name, tmp_path):
    """65535 is white and 0x8000 is the middle grey. Clipping at 255 would make both white."""
    values = np.full((64, 64), 0x8000, dtype=np.uint16)
    values[:32, :32], values[:32, 32:] = 0xFFFF, 0
    Image.fromarray(values).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode.startswith("I")
    found = square(tmp_path / name, 32)
    assert [found.getpixel(at)[0] for at in ((4, 4), (28, 4), (16, 28))] == [255, 0, 128]


def test_floating_point_pictures_are_refused(tmp_path):
    """The file does not say whether 1 or 255 is white."""
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif can't be read .* 8 or 16 bits"):
        square(tmp_path / "a.tif", 8)


def test_pictures_are_found_and_other_files_are_skipped_with_a_warning(tmp_path, recwarn):
    picture = quarters(RED, GREEN, BLUE, WHITE)
    for name in ("b.JPG", "a.Png", "c.webp", ".hidden.png"):
        picture.save(tmp_path / name, format={"b.JPG": "JPEG", "c.webp": "WEBP"}.get(name, "PNG"))
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "paper.pdf"):
        (tmp_path / name).write_bytes(b"junk")
    (tmp_path / "more.png").mkdir()
    picture.save(tmp_path / "more.png" / "d.png")
    assert [path.name for path in find_pictures(tmp_path)] == ["a.Png", "b.JPG", "c.webp"]
    skipped = [".DS_Store", ".hidden.png", "Thumbs.db", "more.png", "notes.txt", "paper.pdf"]
    why = "not a picture file that can be read"
    assert [str(w.message) for w in recwarn] == [f"skipped {tmp_path / name}: {why}" for name in skipped]


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("what", ["missing", "a file", "empty", "junk only"])
def test_a_folder_without_pictures_is_an_error_that_names_it(what, tmp_path):
    folder = tmp_path / "dogs"
    if what == "a file":
        folder.write_text("no folder")
    elif what != "missing":
        folder.mkdir()
    if what == "junk only":
        (folder / "notes.txt").write_text("nothing to see")
    with pytest.raises(InputError, match=r"^.*dogs (is not a folder|holds no picture); \w+"):
        find_pictures(folder)


def damaged() -> dict[str, bytes]:
    """Truncated pictures, and files that are no pictures, as bad cards and broken downloads leave them."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files = {"empty.png": b"", "text.jpg": b"<html>404 not found</html>"}
    for name, format in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("a.gif", "GIF"), ("a.tif", "TIFF")):
        stream = io.BytesIO()
        noise.save(stream, format=format)
        files["short-" + name] = stream.getvalue()[: len(stream.getvalue()) // 2]
    files["header.png"] = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
    return files


@pytest.mark.parametrize("name", damaged())
def test_an_unreadable_picture_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(damaged()[name])
    with pytest.raises(InputError, match=rf"{name} can't be read as a picture") as error:
        load_picture(tmp_path / name, 32)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about many of these files
def test_damaged_bytes_raise_nothing_but_an_input_error(tmp_path):
    rng = np.random.default_rng(0)
    picture, exif = quarters(RED, GREEN, BLUE, WHITE), Image.Exif()
    exif[274], exif[306] = 6, "2024:01:01 00:00:00"
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", *(["AVIF"] if features.check("avif") else [])):
        stream = io.BytesIO()
        picture.save(stream, format=format, **({} if format in ("GIF", "BMP") else {"exif": exif}))
        whole = np.frombuffer(stream.getvalue(), dtype=np.uint8)
        for _ in range(40):
            bytes_ = whole.copy()
            bytes_[rng.integers(0, len(whole), 6)] = rng.integers(0, 256, 6)
            (tmp_path / "a.img").write_bytes(bytes_.tobytes())
            try:
                load_picture(tmp_path / "a.img", 16)
            except InputError:
                pass


# Malicious pictures


def test_only_formats_that_pillow_decodes_itself_are_read_whatever_the_file_name(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for an EPS file. No program may start, whether Ghostscript is installed or not."""
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: started.append(args))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%EndProlog\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    (tmp_path / "b.jpg").write_bytes(b"\x00\x00\x01\xb3\x04\x00\x40" + bytes(64))  # MPEG
    for name in ("a.png", "b.jpg"):
        with pytest.raises(InputError, match=rf"{name} can't be read as a picture \(cannot identify image file"):
            load_picture(tmp_path / name, 32)
    assert not started


def test_videos_and_postscript_are_no_pictures(tmp_path):
    for ending in ("eps", "ps", "mpg", "mpeg", "h5", "hdf", "grib", "bufr", "wmf", "emf", "pdf", "mp4"):
        (tmp_path / f"a.{ending}").write_bytes(b"")
    with pytest.warns(match="skipped"), pytest.raises(InputError, match="holds no picture"):
        find_pictures(tmp_path)


def bomb(width: int, height: int) -> bytes:
    """A PNG file whose header states this size and which has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(12_000, 12_000), (100_000, 100_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)])
def test_a_picture_with_more_pixels_than_any_camera_makes_is_refused(size, tmp_path):
    (tmp_path / "a.png").write_bytes(bomb(*size))
    with pytest.raises(
        InputError, match=r"a\.png can't be read as a picture \(.*pixels.*\); repair it or take it away"
    ):
        load_picture(tmp_path / "a.png", 32)


def test_an_animation_gives_its_first_picture(tmp_path):
    first, second = (Image.new("RGB", (32, 32), color) for color in (RED, GREEN))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    assert all(close(corners(square(tmp_path / name, 32)), [RED] * 3, by=1) for name in ("a.gif", "a.png"))


def test_a_pipe_is_not_opened_as_a_picture(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png can't be read: it is a pipe, socket or device"):
        load_picture(tmp_path / "a.png", 32)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "P", "CMYK", "1"])
@pytest.mark.parametrize("shape", [(2 * images.TILE + 7, 9, 4), (9, 2 * images.TILE + 7, 4)], ids=["tall", "wide"])
def test_a_large_picture_is_converted_in_tiles_to_the_same_pixels(mode, shape):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    whole = Image.fromarray(values, "RGBA")
    if mode == "I;16":
        picture = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    else:
        picture = whole if mode == "RGBA" else whole.convert("RGB").convert(mode)
    assert images.to_rgb(picture).tobytes() == images._tile_to_rgb(picture).tobytes()
