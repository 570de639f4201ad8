"""Augmentation options of batches in memory: alternating flips, erased rectangles, RandAugment."""

import pytest
import torch

from detection.config.schema import ImageAugment
from detection.data.image_batches import MemoryBatches, augment_batch, draw_augmentation, draw_rectangles
from detection.data.images import Images

OFF = {"hflip": 0, "padding": 0}


def batches_of(number: int, augment: ImageAugment, **options) -> MemoryBatches:
    """Images of which each has its number in its left column, and label; the right columns are black."""
    pixels = torch.zeros(number, 3, 4, 4, dtype=torch.uint8)
    pixels[..., 0] = torch.arange(1, number + 1).view(-1, 1, 1).to(torch.uint8)
    images = Images(pixels, torch.arange(number), tuple(map(str, range(number))))
    return MemoryBatches(images, torch.device("cpu"), **{"batch_size": 8, "augment": augment, "seed": 3} | options)


def flipped(batches: MemoryBatches, epoch: int) -> dict[int, bool]:
    """Whether each image of an epoch is flipped, by its label."""
    batches.set_epoch(epoch)
    found = {}
    for images, labels in batches:
        for image, label in zip(images, labels.tolist(), strict=True):
            left, right = ((255 * image[0, 0, column]).round().item() for column in (0, -1))
            assert {left, right} == {0, label + 1}
            found[label] = right > left
    return found


def test_alternating_flips_show_each_image_once_each_way_in_two_epochs():
    augment = ImageAugment(flip="alternating", padding=0)
    batches = batches_of(200, augment)
    first, second, third, fourth = (flipped(batches, epoch) for epoch in (1, 2, 3, 4))
    assert len(first) == 200 and 70 < sum(first.values()) < 130
    assert all(second[label] == (not turned) for label, turned in first.items())
    assert third == first and fourth == second
    # An epoch that is gone on with after a stop, and two processes, flip the same images.
    batches.set_epoch(2, 20)
    assert all(
        (image[0, 0, -1] > 0) == second[label]
        for images, labels in batches
        for image, label in zip(images, labels.tolist(), strict=True)
    )
    shares = [flipped(batches_of(200, augment, batch_size=4, share=(index, 2)), 1) for index in range(2)]
    assert shares[0] | shares[1] == first and not shares[0].keys() & shares[1].keys()
    other = flipped(batches_of(200, augment, seed=4), 1)
    assert other != first


def test_no_image_flips_where_the_flip_is_off_and_random_flips_stay_random():
    assert not any(flipped(batches_of(64, ImageAugment(flip="alternating", **OFF)), 1).values())
    batches = batches_of(200, ImageAugment(padding=0))
    first, second = flipped(batches, 1), flipped(batches, 2)
    same = sum(first[label] == second[label] for label in first)
    assert 60 < same < 140  # not once each way


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_erased_rectangles_have_the_sizes_of_the_definition(probability):
    number, size = 4000, 32
    images = torch.full((number, 3, size, size), 200, dtype=torch.uint8)
    augment = ImageAugment(erase=probability, **OFF)
    drawn = draw_augmentation(number, size, augment, torch.Generator().manual_seed(0))
    assert drawn.keys() == {"rectangle"}
    found = augment_batch(images, augment, drawn)
    black = (found == 0).all(dim=1)
    assert torch.equal(found, torch.where(black[:, None], 0, 200).to(torch.uint8).expand_as(found))
    erased = black.flatten(1).any(dim=1)
    assert erased.float().mean().item() == pytest.approx(probability, abs=0.03)
    rows, columns = black.any(dim=2).sum(dim=1)[erased], black.any(dim=1).sum(dim=1)[erased]
    area = black.sum(dim=(1, 2))[erased]
    assert torch.equal(area, rows * columns)  # one rectangle
    share, ratio = area / size**2, rows / columns
    assert share.min() >= 0.015 and share.max() <= 0.35 and share.mean() == pytest.approx(0.175, abs=0.01)
    assert ratio.min() >= 0.25 and ratio.max() <= 4 and ratio.log().mean() == pytest.approx(0.0, abs=0.05)
    assert black.any(dim=0).all()  # everywhere, the corners included
    top, left, bottom, right = drawn["rectangle"][erased].T
    assert (top >= 0).all() and (bottom <= size).all() and (left >= 0).all() and (right <= size).all()


def test_a_rectangle_by_hand_is_black_and_nothing_else():
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    drawn = {"rectangle": torch.tensor([[1, 0, 3, 2], [2, 2, 2, 2]])}
    found = augment_batch(images, ImageAugment(erase=0.5, **OFF), drawn)
    assert found[0, 0].tolist() == [[1, 2, 3, 4], [0, 0, 7, 8], [0, 0, 11, 12], [13, 14, 15, 16]]
    assert torch.equal(found[1], images[1])  # an empty one
    assert draw_rectangles(5, 8, 0.0, torch.Generator()).mT.unflatten(0, (2, 2)).diff(dim=0).abs().sum() == 0


def test_randaugment_changes_images_by_their_seeds_alone():
    pixels = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, augment = pixels.expand(12, 3, 16, 16), ImageAugment(randaugment=2, **OFF)
    drawn = draw_augmentation(12, 16, augment, torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    found = augment_batch(images, augment, drawn)
    assert torch.equal(torch.random.get_rng_state(), state)  # the network's dropout is not touched
    assert found.dtype == torch.uint8 and found.shape == images.shape
    changed = (found != images).flatten(1).any(dim=1)
    assert changed.sum() >= 8 and len({image.numpy().tobytes() for image in found}) >= 8
    # Each by its own seed, whatever its neighbours: so processes that share a batch change it as one does.
    torch.manual_seed(9)
    half = augment_batch(images[::2], augment, {name: values[::2] for name, values in drawn.items()})
    assert torch.equal(half, found[::2])
    weak = augment_batch(images, ImageAugment(randaugment=2, randaugment_magnitude=1, **OFF), drawn)
    assert (weak.float() - images.float()).abs().mean() < (found.float() - images.float()).abs().mean()


def test_options_that_are_off_draw_nothing():
    def draw(augment: ImageAugment):
        return draw_augmentation(50, 16, augment, torch.Generator().manual_seed(0))

    plain, named = draw(ImageAugment()), draw(ImageAugment(erase=0, randaugment=0, flip="random"))
    assert plain.keys() == named.keys() == {"top", "left", "flip"}
    with_all = draw(ImageAugment(erase=0.5, randaugment=1))
    for name, values in plain.items():
        assert torch.equal(values, named[name]) and torch.equal(values, with_all[name])
