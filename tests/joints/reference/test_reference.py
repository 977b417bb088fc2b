import copy

import pytest
import torch
from torch import nn

from lightning_feat.joints.features.taps import FeatureTap, TapError
from lightning_feat.joints.reference import (
    CachedStart,
    FrozenStart,
    StartWeights,
    TowerComparison,
    WithoutPrompts,
    compare_towers,
    silence,
    text_tokens,
)
from tests.callbacks.feature_shift.monitor_ddp_cases import IDS, Prompted
from tests.helpers import Plain, points


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Keywords(Plain):
    """Calls its network with a keyword, and twice in a step."""

    def __init__(self):
        super().__init__()
        self.net = WithScale()

    def training_step(self, batch, batch_idx):
        return self.net(batch[0], scale=2.0).sum() + self.net(batch[0] + 1, scale=3.0).sum()


class WithScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, *, scale):
        return self.fc(self.body(scale * x))


def step(module, reference, batch):
    reference.attach(module)
    reference.listen()
    module.training_step(batch, 0)
    return reference.features(module, batch)


def batch(size=6):
    return list(points(size).tensors)


def test_the_copy_is_run_on_what_the_network_was_run_on():
    module, reference = Keywords(), FrozenStart(["net.body"])
    x = batch()[0]
    expected = torch.cat([module.net.body(2.0 * x), module.net.body(3.0 * (x + 1))]).detach()
    reference.attach(module)
    with torch.no_grad():
        module.net.body.weight.zero_()
    torch.testing.assert_close(step(module, reference, batch())["net.body"], expected)


@pytest.mark.parametrize(
    ("layers", "kwargs", "trunk"),
    [
        (["net.body.0", "net.body"], {}, "net"),
        ([None], {}, "net"),  # the input of net.fc
        (["net"], {}, "net"),
        (["net.body"], {"trunk": "net.body"}, "net.body"),
        (["net.body"], {"trunk": ""}, ""),
        (["net.body"], {"forward": lambda module, batch: module(batch[0])}, ""),
        (["net", "more"], {}, ""),  # of two children of the module
        (["net"], {"read": "input"}, ""),  # not inside itself
    ],
)
def test_the_trunk_holds_all_layers_and_is_as_small_as_is_safe(layers, kwargs, trunk):
    module, reference = Plain(), FrozenStart(layers, **kwargs)
    module.more = nn.Linear(2, 2)
    reference.attach(module)
    assert reference.state()["trunk"] == trunk


def test_the_input_of_the_classifier_is_that_of_the_copys_classifier():
    module, reference = Plain(), FrozenStart([None])
    features = step(module, reference, batch())
    torch.testing.assert_close(features["penultimate"], module.net.body(batch()[0]).detach())


def test_a_copy_of_the_whole_module_is_run_on_the_batch():
    module, reference = Plain(), FrozenStart(["net.body"], trunk="")
    features = step(module, reference, batch())
    torch.testing.assert_close(features["net.body"], module.net.body(batch()[0]).detach())
    assert reference._frozen.net is not module


def test_random_layers_and_statistics_stand_still_and_no_gradient_is_kept():
    module, reference = Plain(), FrozenStart(["net.body"])
    module.net.body.extend([nn.BatchNorm1d(8), nn.Dropout(0.9)])
    features = step(module, reference, batch())["net.body"]
    assert torch.equal(features, reference._frozen.net.body.eval()(batch()[0]))
    assert not features.requires_grad
    assert reference._frozen.net.body[2].num_batches_tracked == 0
    assert module.net.body[2].num_batches_tracked == 1


def test_a_trunk_that_is_not_called_is_an_error_with_the_way_out():
    class Parts(Plain):
        def training_step(self, batch, batch_idx):
            return self.net.fc(self.net.body(batch[0])).sum()

    with pytest.raises(TapError, match=r"'net' was not called.*trunk=''"):
        step(Parts(), FrozenStart(["net.body"]), batch())


def test_the_state_restores_the_start_after_training():
    module, first = Plain(), FrozenStart(["net.body"])
    start = step(module, first, batch())["net.body"]
    state = copy.deepcopy(first.state())
    with torch.no_grad():
        module.net.body[0].weight.mul_(2.0)
    again = FrozenStart(["net.body"])
    again.restore(state)
    assert torch.equal(step(module, again, batch())["net.body"], start)
    other = FrozenStart(["net.body"], trunk="net.body")
    other.restore(state)
    with pytest.raises(ValueError, match=r"has a reference of 'net', but the layers lie in 'net\.body'"):
        other.attach(module)


def test_a_removed_reference_keeps_the_start_in_host_memory_and_no_hook():
    module, reference = Plain(), FrozenStart(["net.body"])
    start = step(module, reference, batch())["net.body"]
    reference.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert reference._frozen.net is None
    with torch.no_grad():
        module.net.body[0].weight.zero_()
    assert torch.equal(step(module, reference, batch())["net.body"], start)
    reference.begin()
    assert not torch.equal(step(module, reference, batch())["net.body"], start)


def test_a_copy_is_lent_only_to_those_who_have_the_same_start():
    module, lender = Plain(), FrozenStart(["net.body"])
    lender.attach(module)
    borrower = FrozenStart(["net.body.0"])
    borrower.attach(module, lender)
    assert borrower._frozen.net is lender._frozen.net
    other = FrozenStart(["net.body"])
    other.restore({"trunk": "net", "weights": {n: w + 1 for n, w in lender.state()["weights"].items()}})
    other.attach(module, lender)
    assert other._frozen.net is not lender._frozen.net
    elsewhere = FrozenStart(["net.body"], trunk="net.body")
    elsewhere.attach(module, lender)
    assert elsewhere._frozen.net is not lender._frozen.net


def test_a_copy_of_the_module_with_its_reference_shares_the_frozen_network():
    module, reference = Plain(), FrozenStart(["net.body"])
    reference.attach(module)
    assert copy.deepcopy(reference)._frozen is reference._frozen


def test_silence_stops_all_ears_and_lets_them_hear_again():
    module, tap = Plain(), FeatureTap("net.body")
    tap.attach(module)
    tap.listen()
    with silence(module):
        module(batch()[0])
    module(batch()[0][:2])
    assert len(tap.take()) == 2


def test_start_weights_are_those_that_are_named_and_not_new():
    module = Plain()
    module.net.body[0].bias.requires_grad_(False)
    weights = StartWeights(["net"], ["net.fc"])
    weights.attach(module)
    assert sorted(weights.start) == ["net.body.0.bias", "net.body.0.weight"]
    old, new = weights.split(module)
    assert (sorted(old), sorted(new)) == (["net.body.0.weight"], ["net.fc.bias", "net.fc.weight"])
    module.net.body[0].bias.requires_grad_(True)  # let go later in the run
    assert len(weights.split(module)[0]) == 2
    other = StartWeights(None, [])
    other.restore(weights.state())
    with pytest.raises(ValueError, match=r"no start for net\.fc\.weight and 1 more"):
        other.attach(module)


def test_cached_features_are_found_by_index():
    cached = CachedStart(["net.body"], None, None, index_key=1)
    rows = drawn(10, 3, 8)  # three tokens of each example
    cached.restore({"rows": {"net.body": rows}})
    found = cached._look_up(Plain(), [None, torch.tensor([7, 2])])["net.body"]
    assert torch.equal(found, torch.cat([rows[7], rows[2]]))
    with pytest.raises(ValueError, match="index 10, but features of 10 are cached"):
        cached._look_up(Plain(), [None, torch.tensor([10])])
    with pytest.raises(ValueError, match="not to one integer for each example"):
        cached._look_up(Plain(), [None, torch.tensor([0.5])])
    with pytest.raises(ValueError, match="resume with the layers"):
        CachedStart(["net.fc"], None, None, index_key=1).restore({"rows": {"net.body": rows}})


def test_text_tokens_are_sos_the_words_after_the_prompts_and_eos():
    expected = [[1, 0, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 0, 0]]
    for module in (Prompted(), Plain()):  # a known tower, and an unknown one
        assert text_tokens(module, IDS, 2).int().tolist() == expected
    assert text_tokens(Plain(), IDS, 0).sum() == 5 + 6 + 5


def comparison(sequence_first):
    """Towers that have heard tokens of 3 texts and 2 images, with two prompts at the end of an image."""
    made = TowerComparison(["text"], ["image"], WithoutPrompts(["text"], ["image"]), keep_graph=False)
    text, image = drawn(3, 7, 4), drawn(2, 6, 5)
    layers = nn.ModuleDict({"text": nn.Identity(), "image": nn.Identity()})
    for tap, tokens in ((made.text[0], text), (made.image[0], image)):
        tap.attach(layers)
        tap.listen()
        layers[tap.layer](tokens.transpose(0, 1) if sequence_first else tokens)
    return made, text, image


@pytest.mark.parametrize("sequence_first", [False, True])
def test_masks_follow_the_order_of_tokens(sequence_first):
    made, text, image = comparison(sequence_first)
    mask = text_tokens(Plain(), IDS, 2)
    rows = made.text[0].take()[made.text[0].spread(mask)]
    assert torch.equal(rows.sort(0).values, text[mask].sort(0).values)
    rows = made.image[0].take()[made.image[0].without_last(2, drawn(2, 3, 8, 8))]
    assert torch.equal(rows.sort(0).values, image[:, :4].flatten(0, 1).sort(0).values)
    with pytest.raises(ValueError, match="do not fit texts"):
        made.text[0].spread(mask[:, :5])


def test_towers_without_layers_are_those_of_a_known_clip():
    made = compare_towers(Prompted(), None, None, True, None, None, None, keep_graph=False)
    assert made.labels[0] == "clip.transformer.resblocks.0"
    assert made.labels[-1] == "clip.visual.transformer.resblocks.2"
    with pytest.raises(ValueError, match="holds no model"):
        compare_towers(Plain(), None, None, True, None, None, None, keep_graph=False)


def test_words_that_nobody_embeds_are_an_error():
    made = comparison(False)[0]
    with pytest.raises(ValueError, match="0 layers that could embed the words"):
        made.begin(Plain(), None)
