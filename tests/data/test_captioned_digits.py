import sys
from collections import Counter
from hashlib import sha256

import pytest
import torch

from lightning_feat.baselines import MLPClassifier
from lightning_feat.data.captioned_digits import PIXEL_MEAN, PIXEL_STD, CaptionedDigitsDataModule
from lightning_feat.data.digits import load_digits
from lightning_feat.data.scenes import (
    COLOURS,
    DIGITS,
    PLACES,
    TEMPLATES,
    TEXTURES,
    class_name,
    draws,
    split_compositions,
    split_handwriting,
)
from tests.helpers import trainer

pytest.importorskip("sklearn")


def ready(**arguments):
    data = CaptionedDigitsDataModule(**{"num_pairs": 200, "test_per_class": 5, **arguments})
    data.setup()
    return data


def checksum(part):
    scenes = part.scenes
    text = f"{scenes.sources.tolist()}{scenes.textures.tolist()}{scenes.places.tolist()}{list(part.labels)}"
    return sha256(text.encode()).hexdigest()[:16]


def named(scenes):
    """Colour, digit and texture of each picture."""
    return list(zip(scenes.colours.tolist(), scenes.digits.tolist(), scenes.textures.tolist(), strict=True))


def test_every_choice_is_the_same_on_every_machine():
    data, pairs = ready(), ready(task="pairs", caption_noise=0.2)
    parts = (data.train_set, data.val_set, data.test_set, data.novel_test_set, pairs.train_set, pairs.val_set)
    expected = ["47e8b4ef9c397f4d", "86353e1fba954f0e", "93519fa100e7dc86", "459bde25d2a8bae1"]
    assert [checksum(part) for part in parts] == [*expected, "4d5e044829c1b533", "66edc0a1bbe09dd3"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_classes_are_new_compositions_of_known_pairs_of_words(seed):
    base, novel, pretraining = split_compositions(seed)
    assert list(map(len, (base, novel, pretraining))) == [20, 20, 360]
    assert len({*base, *novel, *pretraining}) == 400
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pairs = Counter((each[i], each[j]) for each in pretraining)
        assert min(pairs[each[i], each[j]] for each in base + novel) >= 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_words_are_as_frequent_in_base_as_in_novel_classes(seed):
    for classes in split_compositions(seed)[:2]:
        counts = [sorted(Counter(column).values()) for column in zip(*classes, strict=True)]
        assert counts == [[5] * 4, [2] * 10, [10] * 2]


def test_handwriting_is_split_by_digit_without_overlap():
    targets = load_digits()[1]
    parts = split_handwriting(targets, seed=0)
    numbers = [number for part in parts.values() for members in part for number in members]
    assert sorted(numbers) == list(range(1797))
    for part in parts.values():
        assert all((targets[members] == digit).all() for digit, members in enumerate(part))


def test_pictures_show_the_handwriting_of_their_part_and_their_digit():
    data, pairs = ready(), ready(task="pairs")
    used = [
        set(part.scenes.sources.tolist()) for part in (pairs.train_set, data.train_set, data.val_set, data.test_set)
    ]
    assert all(a.isdisjoint(b) for i, a in enumerate(used) for b in used[:i])
    targets = load_digits()[1]
    for part in (pairs.train_set, data.train_set, data.novel_test_set):
        assert torch.equal(targets[part.scenes.sources], part.scenes.digits)


def test_pretraining_shows_none_of_the_classes():
    data, pairs = ready(), ready(task="pairs")
    seen = set(named(pairs.train_set.scenes)) | set(named(pairs.val_set.scenes))
    assert seen.isdisjoint(named(data.train_set.scenes) + named(data.novel_test_set.scenes))
    assert set(data.class_names).isdisjoint(data.novel_class_names)


def test_targets_are_places_in_the_class_names():
    data = ready()
    for part, names in (
        (data.train_set, data.class_names),
        (data.val_set, data.class_names),
        (data.test_set, data.class_names),
        (data.novel_test_set, data.novel_class_names),
    ):
        assert [names[target] for target in part.labels] == [class_name(each) for each in named(part.scenes)]
        assert torch.tensor(part.labels).bincount().unique().numel() == 1  # as many of each class


def test_base_is_the_first_half_rounded_up():
    data = ready(num_classes=7)
    assert (len(data.class_names), len(data.novel_class_names)) == (4, 3)
    assert data.class_names == ready().class_names[:4]


def test_shots_change_with_their_seed_and_nothing_else_does():
    data, other = ready(shots=4), ready(shots=4, shot_seed=1)
    assert not torch.equal(data.train_set.scenes.sources, other.train_set.scenes.sources)
    assert torch.equal(data.test_set.images, other.test_set.images)
    assert torch.equal(data.val_set.images, other.val_set.images)
    more = ready(shots=16)
    assert torch.equal(more.train_set.images.unflatten(0, (20, 16))[:, :4].flatten(0, 1), data.train_set.images)


def test_captions_say_what_is_there():
    part = ready(task="pairs", num_pairs=400).train_set
    scenes, colours, places = part.scenes, list(COLOURS), list(PLACES)
    for number, caption in enumerate(part.labels):
        words = {
            "digit": DIGITS[scenes.digits[number]],
            "colour": colours[scenes.colours[number]],
            "texture": TEXTURES[scenes.textures[number]],
            "place": places[scenes.places[number]],
        }
        assert caption in {template.format(**words) for template in TEMPLATES}


def test_caption_noise_makes_its_share_wrong_and_leaves_the_pictures():
    clean, noisy = ready(task="pairs", num_pairs=1000), ready(task="pairs", num_pairs=1000, caption_noise=0.3)
    wrong = sum(a != b for a, b in zip(clean.train_set.labels, noisy.train_set.labels, strict=True))
    assert wrong == pytest.approx(300, abs=45)  # three standard deviations of a binomial
    assert torch.equal(clean.train_set.images, noisy.train_set.images)
    assert clean.val_set.labels == noisy.val_set.labels


def test_words_are_all_that_captions_and_class_names_use():
    data = ready(task="pairs", num_pairs=2000, caption_noise=0.2)
    texts = [*data.train_set.labels, *data.class_names, *data.novel_class_names]
    assert {word for text in texts for word in text.replace(".", " .").split()} == set(data.words)


def test_ink_has_the_colour_and_stands_at_the_place():
    part = ready(task="pairs", num_pairs=300).train_set
    plain = [i for i in range(300) if part.scenes.textures[i] == TEXTURES.index("plain")]
    for i in plain:
        picture = part.images[i].double()
        paper = picture.flatten(1).median(1).values[:, None, None]  # most of it is background
        ink = (picture - paper).abs().sum(0)
        row, column = ((ink.sum(axis) * torch.linspace(-1, 1, 32)).sum() / ink.sum() for axis in (1, 0))
        x, y = list(PLACES.values())[part.scenes.places[i]]
        assert (row - y).abs() < 0.25
        assert (column - x).abs() < 0.25
        wanted = torch.tensor(list(COLOURS.values()))[part.scenes.colours[i]].double()
        shown = picture.flatten(1)[:, ink.flatten().argmax()]
        assert torch.cosine_similarity(shown, wanted, dim=0) > 0.97


def test_shift_changes_the_classes_and_not_the_pairs():
    assert not torch.equal(ready(shift=0.0).test_set.images, ready(shift=0.5).test_set.images)
    pairs = ready(task="pairs", shift=0.0), ready(task="pairs", shift=1.0)
    assert torch.equal(pairs[0].train_set.images, pairs[1].train_set.images)


def test_batches_have_the_shapes_and_dtypes_promised():
    images, targets = next(iter(ready(batch_size=5, image_size=24).train_dataloader()))
    assert (images.shape, images.dtype) == ((5, 3, 24, 24), torch.float32)
    assert (targets.shape, targets.dtype) == ((5,), torch.int64)
    images, captions = next(iter(ready(task="pairs", batch_size=5).train_dataloader()))
    assert (images.shape, len(captions), type(captions[0])) == ((5, 3, 32, 32), 5, str)


def test_images_are_standardised_by_the_pixels_of_pretraining():
    part = ready(task="pairs", num_pairs=2000).train_set
    images = torch.stack([image for image, _ in part])
    assert images.mean().item() == pytest.approx(0, abs=0.1)
    assert images.std().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(images[3] * PIXEL_STD + PIXEL_MEAN, part.images[3] / 255)


def test_two_test_loaders_hold_base_and_novel_classes():
    data = ready()
    base, novel = data.test_dataloader()
    assert (base.dataset, novel.dataset) == (data.test_set, data.novel_test_set)


def test_draws_look_uniform_and_depend_on_their_salt_alone():
    numbers = draws(["a", "b"], 5000)
    assert torch.equal(draws(["b"], 5000)[0], numbers[1])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.0087)  # three standard errors
    assert torch.corrcoef(numbers)[0, 1].abs() < 0.042  # likewise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "both"}, "task='both'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"shots": 17}, "shots=17"),
        ({"num_classes": 41}, "num_classes=41"),
        ({"shift": 1.1}, "shift=1.1"),
        ({"caption_noise": -0.1}, "caption_noise=-0.1"),
        ({"image_size": 15}, "image_size=15"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        CaptionedDigitsDataModule(**arguments)


def test_pairs_have_no_test():
    with pytest.raises(ValueError, match="task='pairs' has no test"):
        ready(task="pairs").test_dataloader()


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-feat\[recipes\]"'):
        ready()


@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {}])
def test_lightning_can_make_its_loaders_anew(tmp_path, options):
    data = CaptionedDigitsDataModule(batch_size=16, shots=2, test_per_class=1)
    trainer(tmp_path, **options).fit(MLPClassifier(3 * 32 * 32, 20, hidden=(4,)), data)
