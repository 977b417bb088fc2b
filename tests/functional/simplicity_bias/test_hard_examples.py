import pytest
import torch

from lightning_feat.functional.simplicity_bias.hard_examples import highest_losses, misclassified, random_examples


def test_highest_losses_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(50, generator=generator).round(decimals=1)  # many are equal
    targets = torch.randint(0, 4, (50,), generator=generator)
    per_class = torch.tensor([3, 0, 100, 5])
    chosen = highest_losses(losses, targets, per_class)
    for c, number in enumerate(per_class.tolist()):
        members = [(-float(losses[i]), i) for i in range(50) if targets[i] == c]
        expected = {i for _, i in sorted(members)[:number]}
        assert {i for i in range(50) if chosen[i] and targets[i] == c} == expected


def test_random_examples_have_the_number_asked_for_and_depend_on_the_seed():
    targets = torch.arange(60) % 3
    first, again, other = (random_examples(targets, torch.tensor([4, 7, 0]), seed) for seed in (0, 0, 1))
    assert [int((first & (targets == c)).sum()) for c in range(3)] == [4, 7, 0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_misclassified():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert misclassified(logits, torch.tensor([0, 0, 1])).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("losses", "per_class", "text"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1, 1]), "1 of 2 losses are NaN"),
        (torch.zeros(3), torch.tensor([1, 1]), r"targets must be \(N,\) with N = 3, got \(2,\)"),
        (torch.zeros(2), torch.tensor([1]), "there is a target 1"),
    ],
)
def test_what_does_not_fit_is_refused(losses, per_class, text):
    with pytest.raises(ValueError, match=text):
        highest_losses(losses, torch.tensor([0, 1]), per_class)
