"""Augmentation: by torch's random numbers, safe in workers; mixup and cutmix with shares that are true."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from peft_bsr import ConfigError
from peft_bsr.training import MixupDataset, augmentation
from peft_bsr.training.augmentation import Augmentation, colour_jitter, rand_augment, random_crop


def photo(width=48, height=32):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("strength", ["light", "strong"])
def test_a_seed_fixes_it(strength):
    augment, image = Augmentation(strength), photo()

    def run(seed):
        torch.manual_seed(seed)
        return [np.asarray(augment(image)) for _ in range(4)]

    first, again, other = run(0), run(0), run(1)
    assert all(a.shape == (32, 48, 3) for a in first)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_every_mode_comes_out_as_rgb(mode):
    assert Augmentation("strong")(photo().convert(mode)).mode == "RGB"


def test_none_changes_nothing():
    before = torch.get_rng_state()
    assert np.array_equal(np.asarray(Augmentation("none")(photo())), np.asarray(photo()))
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_keep_the_share_and_the_place():
    """On a picture whose pixels are their own places, a crop shows how much of it is left."""
    size = 64
    ramp = np.repeat(np.arange(size, dtype=np.uint8)[None] * 4, size, 0)
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp], -1))
    shares = []
    for _ in range(200):
        crop = np.asarray(random_crop(image, 0.25)).astype(int)
        width = (crop[:, -1, 0].mean() - crop[:, 0, 0].mean()) / 252
        height = (crop[-1, :, 1].mean() - crop[0, :, 1].mean()) / 252
        shares.append(width * height)
        assert 0.6 < width / height < 1.6
    assert 0.2 < min(shares) < 0.35
    assert max(shares) > 0.85


def test_flips_are_half_and_can_be_left_out():
    left = np.zeros((16, 16, 3), np.uint8)
    left[:, :8] = 255
    image = Image.fromarray(left)

    def flipped(flip):
        return np.mean([np.asarray(Augmentation("light", flip=flip)(image))[:, 0].mean() < 128 for _ in range(200)])

    assert 0.3 < flipped(True) < 0.7
    assert flipped(False) < 0.05


@pytest.mark.parametrize("index", range(len(augmentation._OPERATIONS)))
def test_operations_run_both_ways(index):
    for magnitude in (-1.0, 1.0):
        changed = augmentation._OPERATIONS[index](photo(), magnitude)
        assert (changed.size, changed.mode) == ((48, 32), "RGB")
        assert np.array_equal(np.asarray(changed), np.asarray(photo())) == (index == 0)
    nearly = np.asarray(colour_jitter(photo(), 0.0)).astype(int)
    assert abs(nearly - np.asarray(photo())).max() <= 1
    assert rand_augment(photo()).size == (48, 32)


def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError, match="strength='heavy'"):
        Augmentation("heavy")
    with pytest.raises(ConfigError, match=r"(?s)`mixup=-1`.*`probability=2`"):
        MixupDataset([], 3, mixup=-1, probability=2)


class Photos(Dataset):
    """Each image is changed when it is asked for."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.from_numpy(np.array(Augmentation("strong")(photo()))).float()


def test_workers_are_seeded_and_differ():
    def epoch():
        torch.manual_seed(0)
        return torch.cat(list(DataLoader(Photos(), batch_size=2, num_workers=2)))

    first = epoch()
    assert torch.equal(first, epoch())
    assert len({image.sum().item() for image in first}) == 8, "no two workers draw the same"


def colours(count=6):
    """Images whose every pixel is the number of their class."""
    return [{"pixel_values": torch.full((3, 8, 8), float(i % 3)), "labels": i % 3, "name": i} for i in range(count)]


@pytest.mark.parametrize("kind", [{"mixup": 1.0, "cutmix": 0}, {"mixup": 0, "cutmix": 1.0}, {"mixup": 1.0}])
def test_labels_are_the_shares_of_the_pixels(kind):
    mixed = MixupDataset(colours(), 3, probability=1.0, **kind)
    torch.manual_seed(3)
    for batch in DataLoader(mixed, batch_size=6, shuffle=True):
        assert batch["labels"].sum(1) == pytest.approx(torch.ones(6))
        shares = (batch["labels"] * torch.arange(3)).sum(1)
        assert batch["pixel_values"].mean((1, 2, 3)) == pytest.approx(shares, abs=1e-5)
        assert ((batch["labels"] > 0) & (batch["labels"] < 1)).any()
        assert set(batch) == {"pixel_values", "labels", "name"}


def test_sources_are_not_changed_and_some_batches_are_left():
    data = colours()
    mixed = MixupDataset(data, 3)
    torch.manual_seed(0)
    kept = [bool((mixed.__getitems__([0, 1, 2])[1]["labels"] == torch.tensor([0.0, 1, 0])).all()) for _ in range(60)]
    assert 0.3 < np.mean(kept) < 0.8
    assert all(bool((e["pixel_values"] == e["labels"]).all()) for e in data)
