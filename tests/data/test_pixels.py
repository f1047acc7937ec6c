"""Every mode becomes RGB by its own range, orientation is followed, and there is one way to the model."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageCms, ImageOps
from transformers import ViTImageProcessorPil

from peft_bsr import DatasetError
from peft_bsr.data import collate, open_image, to_pixels, to_rgb, with_pixels
from peft_bsr.training.augmentation import Augmentation

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})


def again(image, kind):
    """Written to a file and opened."""
    file = io.BytesIO()
    image.save(file, kind)
    return Image.open(io.BytesIO(file.getvalue()))


SAME = {
    "16 bits": again(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"),
    "16 bits, TIFF": again(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
    "16 bits, big-endian": Image.frombytes("I;16B", (256, 4), (RAMP.astype(">u2") * 257).tobytes()),
    "32 bits to 255": again(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "32 bits to 65535": again(Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF"),
    "32 bits, more": again(Image.fromarray(RAMP.astype(np.int32) * 8_000_000), "TIFF"),
    "32 bits, below 0": Image.fromarray(RAMP.astype(np.int32) * 20 - 1024),
    "float to 1": again(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
    "float to 255": Image.fromarray(RAMP.astype(np.float32)),
    "float, below 0": Image.fromarray(RAMP.astype(np.float32) * 4 - 3),
}


@pytest.mark.parametrize("image", SAME.values(), ids=SAME)
def test_a_ramp_is_the_same_in_every_depth(image):
    found = np.asarray(to_rgb(image))
    assert found.shape == (4, 256, 3)
    assert np.abs(found.astype(int) - RAMP[..., None]).max() <= 1


def test_a_range_does_not_stretch_a_dark_image():
    dark = RAMP.astype(np.uint16) // 4
    assert np.asarray(to_rgb(Image.fromarray(dark * 257))).max() == 63
    assert np.asarray(to_rgb(Image.fromarray(dark.astype(np.float32) / 255))).max() == 63


def test_what_is_not_finite_and_what_is_constant():
    assert np.asarray(to_rgb(Image.fromarray(np.array([[np.nan, np.inf, 1.0, 0.5]], np.float32))))[
        0, :, 0
    ].tolist() == [0, 0, 255, 128]
    assert np.asarray(to_rgb(Image.fromarray(np.full((2, 2), -5, np.int32)))).max() == 0


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_of_pillow(mode):
    source = Image.new("RGB", (4, 4), (255, 255, 255))
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(source, srgb, lab, outputMode="LAB")
    else:
        image = source.convert({"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, mode)).convert(mode)
    assert image.mode == mode
    assert np.asarray(to_rgb(image)).min() >= 253


def test_alpha_is_dropped():
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert to_rgb(image).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_the_same_everywhere(tmp_path, picture, orientation):
    image = picture()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    upright = to_pixels([ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))], PROCESSOR)
    rows = Dataset.from_dict({"image": [str(tmp_path / "x.png")]}, features=Features({"image": ImageFeature()}))
    found = [
        to_pixels([Image.open(tmp_path / "x.png")], PROCESSOR),
        to_pixels([open_image(tmp_path / "x.png")], PROCESSOR),
        to_pixels([rows[0]["image"]], PROCESSOR),
        with_pixels(rows, PROCESSOR)[0]["pixel_values"][None],
    ]
    assert all(torch.equal(pixels, upright) for pixels in found)


def test_a_transform_sees_upright_rgb_images(picture):
    rows = Dataset.from_dict({"image": [Image.fromarray(RAMP), picture()], "label": [3, 1]})
    seen = []

    def flip(image):
        seen.append((image.mode, image.size))
        return ImageOps.mirror(image)

    batch = collate([with_pixels(rows, PROCESSOR, flip)[i] for i in range(2)])
    assert seen == [("RGB", (256, 4)), ("RGB", (20, 30))]
    assert batch["labels"].tolist() == [3, 1]
    assert torch.equal(batch["pixel_values"], to_pixels([ImageOps.mirror(i) for i in rows["image"]], PROCESSOR))


@pytest.mark.parametrize("transform", [None, Augmentation("strong")], ids=["plain", "augmented"])
def test_workers_that_are_spawned_make_the_same_pixels(picture, transform):
    """`spawn` and `forkserver` (macOS, Windows, Python 3.14) pickle the rows."""
    rows = with_pixels(Dataset.from_dict({"image": [picture()], "label": [1]}), PROCESSOR, transform)
    sent = pickle.loads(pickle.dumps(rows))
    torch.manual_seed(0)
    here = rows[0]
    torch.manual_seed(0)
    there = sent[0]
    assert torch.equal(here["pixel_values"], there["pixel_values"]) and here["labels"] == there["labels"]


def test_without_labels_there_are_none(picture):
    rows = with_pixels(Dataset.from_dict({"image": [picture()]}), PROCESSOR)
    assert set(collate([rows[0]])) == {"pixel_values"}


def test_an_image_that_cannot_be_read_is_named(tmp_path, picture):
    picture().save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    for content, reason in (
        (whole[: len(whole) // 2], "cannot be decoded: "),
        (b"text", "is not an image"),
        (b"", "is not an image"),
    ):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(DatasetError, match=rf"x.jpg` {reason}"):
            open_image(tmp_path / "x.jpg")
        with pytest.raises(DatasetError, match=rf"x.jpg` {reason}"):
            open_image({"path": "somewhere/x.jpg", "bytes": content})
    with pytest.raises(DatasetError, match="a row has no image"):
        open_image(None)
