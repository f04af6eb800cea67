"""What becomes of images: the model's own preprocessing, augmentation that depends on nothing but seed, epoch and image."""

from __future__ import annotations

import dataclasses
import random

import numpy
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from fpet import data
from fpet.train import Config, ConfigError
from fpet.train.config import PRESETS
from fpet.train.inputs import Seeded, augmentation, class_counts, labels_of, load_data, mixing, preprocessing, resolve, seeded

VIT = "vit_tiny_patch16_224"  # normalised to [−1, 1], a crop of 90 %


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 255, (90, 140, 3), dtype=numpy.uint8))


def test_what_is_not_given_comes_from_the_model() -> None:
    model = timm.create_model(VIT)
    found = resolve(Config(model=VIT))
    expected = create_transform(**resolve_model_data_config(model), is_training=False)
    assert (found.image_size, found.lr, found.warmup_epochs, found.protocol) == (224, 1e-3, 2.0, "paper")
    assert torch.equal(preprocessing(found).transform()(photo()), expected(photo()))
    assert preprocessing(dataclasses.replace(found, image_size=96)).size == (96, 96)
    embedded = resolve(Config())
    assert (embedded.image_size, embedded.lr, preprocessing(embedded).mean) == (32, 1e-2, (0.0, 0.0, 0.0))
    own = resolve(Config(model=VIT, data="folder", data_dir="x"))
    assert (own.protocol, own.augment) == ("honest", "flips")


def test_the_warm_up_follows_the_epochs() -> None:
    assert resolve(Config(epochs=2)).warmup_epochs == pytest.approx(0.2)
    assert resolve(Config(**PRESETS["paper"] | {"epochs": 30})).warmup_epochs == 3
    assert resolve(Config(epochs=2, warmup_epochs=1.0)).warmup_epochs == 1


def test_the_paper_squashes_and_does_not_normalise() -> None:
    config = resolve(Config(**PRESETS["paper"] | {"image_size": 64}))
    assert torch.allclose(preprocessing(config).transform()(photo()), data.image_transform(64)(photo()), atol=1e-6)
    assert augmentation(config) is None


@pytest.mark.parametrize(
    "change", [{"augment": "flips"}, {"augment": "rand-m9-mstd0.5-inc1"}, {"augment": "none", "random_erasing": 1.0}]
)
def test_augmentation_depends_on_seed_epoch_and_image_alone(change: dict[str, object]) -> None:
    config = resolve(Config(model=VIT, data="folder", data_dir="x", image_size=48, **change))
    images = data.ImageSet([], augmentation(config))
    images.__class__ = type("Photos", (data.ImageSet,), {"__getitem__": lambda self, i: (self.transform(photo(i)), i)})
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    first = [Seeded(images, 1, 0)[i][0] for i in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert numpy.array_equal(numpy.random.get_state()[1], states[2][1])
    torch.rand(3), random.random(), numpy.random.rand()
    assert torch.equal(Seeded(images, 1, 0)[1][0], first[1])
    assert not torch.equal(Seeded(images, 1, 1)[1][0], first[1]) and not torch.equal(Seeded(images, 2, 0)[1][0], first[1])


def test_augmentation_that_timm_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"augment: expected none, flips or what timm takes.*got 'magic'"):
        augmentation(resolve(Config(model=VIT, data="folder", data_dir="x", augment="magic")))


def test_drawn_images_come_in_the_models_size() -> None:
    splits = load_data(resolve(Config(model=VIT, image_size=64, task="count", train_count=20, test_count=10)))
    image, label = splits.train[3]
    plain = load_data(resolve(Config(task="count", train_count=20, test_count=10))).train
    assert image.shape == (3, 64, 64) and label == plain[3][1] and image.min() < -0.2
    assert torch.equal(labels_of(splits.train), plain.labels)


def test_mixing_gives_soft_targets_that_a_seed_repeats() -> None:
    mix = mixing(Config(mixup=0.8, cutmix=1.0, label_smoothing=0.1), 5)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    results = []
    for _ in range(2):
        with seeded(3, 1):
            results.append(mix(images.clone(), labels))
    (a, targets), (b, again) = results
    assert torch.equal(a, b) and torch.equal(targets, again) and torch.allclose(targets.sum(1), torch.ones(4))
    assert mixing(Config(), 5) is None


def test_classes_are_counted_without_reading_images() -> None:
    task = data.TensorTask(torch.zeros(5, 3, 2, 2), torch.tensor([0, 2, 2, 2, 0]))
    assert class_counts(task, 4).tolist() == [2, 1, 3, 1]
    assert class_counts(torch.utils.data.Subset(task, [1, 2]), 4).tolist() == [1, 1, 2, 1]
