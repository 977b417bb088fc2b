import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from lightning_feat.joints.clip.towers import find_clip_towers, remove_hooks
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from lightning_feat.layers.feature_shift.surgery import SurgeryBlock, attach_surgery
from tests.joints.clip.models import LIBRARIES, NUM_FEATURES, features, images, logits, make, texts


def block(num_features=NUM_FEATURES, seed=0, **kwargs):
    torch.manual_seed(seed)
    return SurgeryBlock(num_features, **kwargs)


def some_features(n=4, width=NUM_FEATURES):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0))


def test_it_mixes_features_with_their_adapted_copy():
    surgery, f = block(ratio=0.3), some_features()
    hidden = nn.functional.layer_norm(f, (NUM_FEATURES,), surgery.norm.weight, surgery.norm.bias)
    hidden = hidden @ surgery.expand.weight.T + surgery.expand.bias
    hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    adapted = f + hidden @ surgery.contract.weight.T + surgery.contract.bias
    # The released code's r A(f) + (1 - r) f, in float32
    torch.testing.assert_close(surgery(f), 0.3 * adapted + 0.7 * f, rtol=0, atol=1e-6)


def test_its_size_is_that_of_the_paper():
    parameters = sum(p.numel() for p in SurgeryBlock(512).parameters())
    assert parameters == 2 * 512 + (512 * 2048 + 2048) + (2048 * 512 + 512)  # 2.1 million
    assert not torch.equal(block()(some_features()), some_features())  # it does not start at the identity


def test_the_ratio_is_saved_and_not_trained():
    surgery = block()
    assert {"ratio", "strengthened"} <= set(surgery.state_dict())
    assert "ratio" not in dict(surgery.named_parameters())
    surgery(some_features()).sum().backward()
    assert not surgery.ratio.requires_grad


def test_it_is_strengthened_once_by_the_mean_gram_norm_also_after_a_save():
    surgery, norms = block(ratio=0.1), torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert surgery.strengthen(0.02, norms)
    assert surgery.ratio.item() == pytest.approx(0.1 + 0.02 * 3)
    assert not surgery.strengthen(0.02, norms)
    file = io.BytesIO()
    torch.save(surgery.state_dict(), file)
    file.seek(0)
    other = block(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert not other.strengthen(0.02, norms)
    assert torch.equal(other(some_features()), surgery(some_features()))


def test_it_takes_the_norms_of_deep_prompts():
    prompts, surgery = DeepPrompts(text_width=16, image_width=24, depth=3), block()
    surgery.strengthen(0.005, prompts.gram_norms("image"))
    assert surgery.ratio.item() == pytest.approx(0.1 + 0.005 * prompts.gram_norms("image").mean().item())
    with pytest.raises(ValueError, match="no Gram norms"):
        block().strengthen(0.02, torch.zeros(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_ratio_keeps_its_precision_in_half_a_model(dtype):
    surgery = block().to(dtype)
    assert surgery.ratio.dtype == torch.float32
    assert surgery(some_features().to(dtype)).dtype == dtype
    assert surgery.double().ratio.dtype == torch.float64


def test_under_autocast_features_keep_their_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block()(some_features()).dtype == torch.float32
        assert block()(some_features().bfloat16()).dtype == torch.bfloat16


# In a model


@pytest.mark.parametrize("library", LIBRARIES)
def test_it_changes_the_features_of_both_towers_before_they_are_normalised(library):
    model, text, image = make(library), block(seed=1), block(seed=2, ratio=0.5)
    f_image, f_text = features(model, images(), texts())
    before, state = logits(model, images(), texts()), set(model.state_dict())
    attachment = attach_surgery(find_clip_towers(model), text=text, image=image)
    expected = model.logit_scale.exp() * normalize(image(f_image), dim=-1) @ normalize(text(f_text), dim=-1).T
    # float32 rounding of a normalisation in another order; logits reach 14
    torch.testing.assert_close(logits(model, images(), texts()), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().mean() > 0.1
    assert set(model.state_dict()) == state
    with attachment.paused():
        torch.testing.assert_close(logits(model, images(), texts()), before, rtol=0, atol=1e-5)
    attachment.remove()
    assert torch.equal(logits(model, images(), texts()), before)
    assert "encode_text" not in model.__dict__


@pytest.mark.parametrize("library", ["open_clip", "huggingface"])
def test_a_copy_has_a_block_of_its_own(library):
    model = make(library)
    text = block()
    attach_surgery(find_clip_towers(model), text=text)
    expected = logits(model, images(), texts())
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    text.ratio += 1
    for twin in twins:
        assert torch.equal(logits(twin, images(), texts()), expected)
        remove_hooks(twin)
        assert torch.equal(logits(twin, images(), texts()), logits(make(library), images(), texts()))


def test_one_tower_alone_leaves_the_other():
    model = make()
    f_text = features(model, images(), texts())[1]
    attach_surgery(find_clip_towers(model), image=block())
    assert torch.equal(features(model, images(), texts())[1], f_text)


def test_features_that_come_with_tokens_leave_with_them():
    model = make("open_clip_custom")
    model.visual.output_tokens = True
    pooled, tokens = model.visual(images())
    surgery = block()
    attach_surgery(find_clip_towers(model), image=surgery)
    changed, same = model.visual(images())
    assert torch.equal(changed, surgery(pooled))
    assert torch.equal(same, tokens)


def test_what_does_not_fit_is_refused_and_nothing_attached():
    model = make()
    towers = find_clip_towers(model)
    with pytest.raises(ValueError, match="the image features are 12 wide, but the block has num_features=8"):
        attach_surgery(towers, text=block(), image=block(8))
    assert not towers.text.hooks()
    with pytest.raises(ValueError, match="a block for the text tower, the image tower, or both"):
        attach_surgery(towers)
    attach_surgery(towers, text=block())
    with pytest.raises(ValueError, match="the text tower has a SurgeryBlock already"):
        attach_surgery(towers, text=block())
    with pytest.raises(ValueError, match="the features are 8 wide, but num_features=12"):
        block()(some_features(width=8))
    with pytest.raises(ValueError, match="must be positive"):
        SurgeryBlock(0)
