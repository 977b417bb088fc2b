import itertools
from hashlib import sha256

import pytest
import torch

from lightning_feat.baselines import MLPClassifier
from lightning_feat.data import DigitsDataModule
from lightning_feat.data.digits import PIXEL_MEAN, PIXEL_STD
from lightning_feat.data.spurious_digits import (
    NO_PATCH,
    SpuriousDigitsDataModule,
    colours,
    patch_images,
    patch_likelihood,
    shifted,
)
from tests.helpers import trainer

pytest.importorskip("sklearn")


def ready(**arguments):
    data = SpuriousDigitsDataModule(**arguments)
    data.setup()
    return data


def images_of(part):
    return torch.stack([image for image, *_ in part.__getitems__(list(range(len(part))))])


def checksum(values):
    return sha256(",".join(map(str, values.tolist())).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, "039bd83bce462d74"), ({"otherwise": "other", "train_strength": 0.5, "seed": 1}, "61194f6150bf1ee1")],
)
def test_patches_are_the_same_on_every_machine(arguments, expected):
    assert checksum(ready(**arguments).train_set.patch_classes) == expected


def test_the_left_half_is_the_digit_of_the_plain_datamodule():
    data, plain = ready(), DigitsDataModule(channels=3)
    plain.setup()
    assert torch.equal(data.train_indices, plain.train_indices)
    for part, digits in ((data.train_set, plain.train_set), (data.test_set, plain.test_set)):
        assert torch.equal(images_of(part)[..., :8], images_of(digits))
        assert torch.equal(part.targets, digits.targets)


@pytest.mark.parametrize("otherwise", ["none", "other"])
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9, 1.0])
def test_agreement_has_its_probability_in_each_part(otherwise, strength):
    data = ready(
        otherwise=otherwise, train_strength=strength, val_strength=1 - strength, val_fraction=0.3, test_fraction=0.3
    )
    for part, p in ((data.train_set, strength), (data.val_set, 1 - strength), (data.test_set, strength)):
        deviation = (p * (1 - p) / len(part)) ** 0.5
        assert abs(part.agrees.double().mean() - p) <= 3.3 * deviation  # beyond by chance once in a thousand
        assert torch.equal(part.agrees, part.patch_classes == part.clean_targets)
        if otherwise == "none":
            assert (part.patch_classes[~part.agrees] == NO_PATCH).all()
        else:
            assert (part.patch_classes >= 0).all()


def test_another_patch_is_that_of_any_other_class():
    part = ready(otherwise="other", train_strength=0.0).train_set
    steps = ((part.patch_classes - part.targets) % 10).bincount(minlength=10)
    assert steps[0] == 0
    chi_square = ((steps[1:] - len(part) / 9) ** 2 / (len(part) / 9)).sum()
    assert chi_square < 26.1  # 99.9 % quantile of chi-square with 8 degrees of freedom


def test_the_patch_of_a_digit_depends_on_nothing_else_in_the_data():
    data, other = ready(), ready(train_per_class=20, val_fraction=0.1, test_fraction=0.5, label_noise=0.3, batch_size=7)
    found = [
        {
            i: (c, phase)
            for indices, part in (
                (d.train_indices, d.train_set),
                (d.val_indices, d.val_set),
                (d.test_indices, d.test_set),
            )
            for i, c, phase in zip(indices.tolist(), part.patch_classes.tolist(), part.phases.tolist(), strict=True)
        }
        for d in (data, other)
    ]
    shared = found[0].keys() & found[1].keys()
    assert len(shared) > 900
    assert all(found[0][i] == found[1][i] for i in shared)


def test_digits_that_agree_keep_agreeing_as_the_strength_grows():
    weak, strong = (ready(train_strength=p).train_set.agrees for p in (0.5, 0.8))
    assert not (weak & ~strong).any()
    assert (strong & ~weak).any()


def test_wrong_labels_change_no_image():
    clean, noisy = ready().train_set, ready(label_noise=0.4).train_set
    assert (noisy.targets != noisy.clean_targets).any()
    assert torch.equal(images_of(clean), images_of(noisy))
    assert torch.equal(clean.agrees, noisy.agrees)


def test_colours_can_be_told_apart_by_a_linear_classifier():
    table = colours()
    torch.testing.assert_close(table.square().mean(1), torch.ones(10))
    assert torch.equal((table @ table.T).argmax(1), torch.arange(10))
    assert torch.pdist(table).min() > 1  # on a sphere of radius 1.73


def test_textures_differ_in_power_and_not_in_the_mean():
    classes, phases = torch.arange(10).repeat(16), 2 * torch.pi * torch.arange(16).repeat_interleave(10) / 16
    patches = patch_images("texture", classes, phases)
    assert patches.view(16, 10, -1).mean(0).abs().max() < 1e-6  # 16 even phases cancel to float32
    torch.testing.assert_close(patches.square().mean((1, 2, 3)), torch.ones(160))
    power = torch.fft.fft2(patches[:, 0]).abs().square().flatten(1)
    peaks = [set(power[classes == c].mean(0).topk(2).indices.tolist()) for c in range(10)]  # a frequency and its mirror
    assert all(not a & b for a, b in itertools.combinations(peaks, 2))
    for c in range(10):
        torch.testing.assert_close(power[classes == c][:, list(peaks[c])].sum(1), power[classes == c].sum(1))


@pytest.mark.parametrize("kind", ["colour", "texture"])
def test_no_patch_is_zeros_and_scale_is_how_loud(kind):
    data, loud = ready(kind=kind), ready(kind=kind, patch_scale=3.0)
    patches, others = images_of(data.train_set)[..., 8:], images_of(loud.train_set)[..., 8:]
    absent = ~data.train_set.agrees
    assert (patches[absent] == 0).all()
    assert (patches[~absent].abs().amax((1, 2, 3)) > 0).all()
    torch.testing.assert_close(others, 3 * patches)


def test_variants_change_what_they_say_and_nothing_else():
    data = ready(otherwise="other", kind="texture")
    same = images_of(data.variant("same"))
    images = {name: images_of(data.variant(name)) for name in ("digit", "patch", "shuffled", "conflict")}
    for name in ("digit", "shuffled", "conflict"):
        assert torch.equal(images[name][..., :8], same[..., :8])
    assert (images["digit"][..., 8:] == 0).all()
    assert torch.equal(images["patch"][..., 8:], same[..., 8:])
    assert (images["patch"][..., :8] == images["patch"][0, 0, 0, 0]).all()
    rows = [sorted(map(tuple, images_[..., 8:].flatten(1).tolist())) for images_ in (same, images["shuffled"])]
    assert rows[0] == rows[1]  # the same patches, elsewhere
    assert not data.variant("conflict").agrees.any()
    assert (data.variant("conflict").patch_classes >= 0).all()
    for name in images:
        assert torch.equal(data.variant(name).targets, data.test_set.targets)


def test_shuffled_patches_tell_nothing():
    part = ready(train_strength=1.0, test_fraction=0.5).variant("shuffled")
    assert abs(part.agrees.double().mean() - 0.1) < 3.3 * (0.09 / len(part)) ** 0.5  # once in a thousand


@pytest.mark.parametrize("name", ["same", "digit", "patch", "shuffled", "conflict"])
def test_the_test_loader_gives_the_variant_asked_for(name):
    data = ready(test_variant=name, batch_size=1000)
    assert torch.equal(next(iter(data.test_dataloader()))[0], images_of(data.variant(name)))


def test_validation_has_variants_too():
    data = ready()
    assert torch.equal(data.variant("digit", "val").targets, data.val_set.targets)


@pytest.mark.parametrize(
    ("otherwise", "alone"), [("other", lambda p: max(p, (1 - p) / 9)), ("none", lambda p: p + (1 - p) / 10)]
)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_likelihood_and_what_the_patch_alone_can_reach(otherwise, alone, p):
    events = torch.arange(-1 if otherwise == "none" else 0, 10)
    table = patch_likelihood(events, p, otherwise)  # (events, C)
    torch.testing.assert_close(table.sum(0), torch.ones(10))  # a distribution over patches for each class
    assert float(table.amax(1).sum() / 10) == pytest.approx(alone(p))  # Bayes, ten classes alike


def test_the_odds_that_a_patch_is_worth():
    table = patch_likelihood(torch.tensor([3]), 0.9, "other")[0]
    assert float(table[3] / table[0]) == pytest.approx(81)


def test_moving_down_and_right():
    image = torch.zeros(2, 8, 8)
    image[:, 3, 4] = 1
    image[:, 7, 7] = 1
    moved = shifted(image, torch.tensor([[1, -2], [0, 0]]))
    expected = torch.zeros(8, 8)
    expected[4, 2] = 1  # the corner has left
    assert torch.equal(moved[0], expected)
    assert torch.equal(moved[1], image[1])


def test_augmentation_moves_the_digits_of_training_and_nothing_else():
    plain, data = ready(), ready(max_shift=1)
    torch.manual_seed(0)
    first, second = images_of(data.train_set), images_of(data.train_set)
    assert not torch.equal(first, second)
    assert torch.equal(first[..., 8:], images_of(plain.train_set)[..., 8:])
    moves = torch.tensor(list(itertools.product((-1, 0, 1), repeat=2)))
    allowed = (shifted(plain.train_set.images[:1].repeat(9, 1, 1), moves) - PIXEL_MEAN) / PIXEL_STD
    assert first[0, 0, :, :8].tolist() in allowed.tolist()
    assert torch.equal(images_of(data.test_set), images_of(plain.test_set))


def test_the_clean_loader_is_the_training_part_in_order_without_augmentation():
    plain, data = ready(), ready(max_shift=2, batch_size=100)
    batches = list(data.clean_train_dataloader())
    assert torch.equal(torch.cat([images for images, _ in batches]), images_of(plain.train_set))
    assert torch.equal(torch.cat([targets for _, targets in batches]), plain.train_set.targets)


def test_index_is_the_position_in_the_part():
    data = ready(return_index=True, batch_size=50)
    _, targets, indices = next(iter(data.train_dataloader()))
    assert torch.equal(targets, data.train_set.targets[indices])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "color"}, "kind='color': choose 'colour' or 'texture'"),
        ({"otherwise": "random"}, "otherwise='random'"),
        ({"test_variant": "all"}, "test_variant='all'"),
        ({"train_strength": 1.5}, "train_strength=1.5"),
        ({"val_strength": -0.1}, "val_strength=-0.1"),
        ({"test_strength": 2}, "test_strength=2"),
        ({"patch_scale": -1.0}, "patch_scale=-1.0"),
        ({"max_shift": 9}, "max_shift=9"),
        ({"label_noise": 2.0}, "label_noise=2.0"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpuriousDigitsDataModule(**arguments)


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant 'mixed': choose one of 'same'"):
        ready().variant("mixed")


def test_lightning_can_make_its_loaders_anew(tmp_path):
    module, data = MLPClassifier(384, 10), SpuriousDigitsDataModule(batch_size=32)
    run = trainer(tmp_path)
    run.fit(module, data)
    assert sum(len(batch) for batch in run.predict(module, data)) == len(data.test_set)
