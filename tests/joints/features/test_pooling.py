import pytest
import torch

from lightning_feat.joints.features.pooling import pool

X, TOKENS, MAPS = torch.randn(2, 4), torch.randn(2, 3, 4), torch.randn(2, 4, 3, 5)


@pytest.mark.parametrize(
    ("features", "pooling", "expected"),
    [
        (X, None, X),
        (X[:, :, None, None], None, X),
        (TOKENS, "mean", TOKENS.mean(1)),
        (TOKENS, "max", TOKENS.amax(1)),
        (TOKENS, "first", TOKENS[:, 0]),
        (TOKENS, "last", TOKENS[:, -1]),
        (TOKENS, "flatten", TOKENS.reshape(2, 12)),
        (TOKENS, "tokens", TOKENS.reshape(6, 4)),
        (MAPS, "mean", MAPS.mean((2, 3))),
        (MAPS, "max", MAPS.amax((2, 3))),
        (MAPS, "flatten", MAPS.reshape(2, 60)),
        (MAPS, "tokens", MAPS.permute(0, 2, 3, 1).reshape(30, 4)),
        (MAPS, "channels_last_mean", MAPS.mean((1, 2))),
    ],
)
def test_pooling(features, pooling, expected):
    torch.testing.assert_close(pool(features, pooling), expected)


@pytest.mark.parametrize(
    ("features", "pooling", "text"),
    [
        (TOKENS, None, "shape \\(2, 3, 4\\) with pooling=None.*'first'"),
        (MAPS, None, "'channels_last_mean'"),
        (MAPS, "first", "pooling='first'"),
        (MAPS, "last", "pooling='last'"),
        (torch.zeros(2, 2, 2, 2, 2), "mean", "name another layer"),
    ],
)
def test_a_pooling_that_is_missing_or_does_not_fit(features, pooling, text):
    with pytest.raises(ValueError, match=text):
        pool(features, pooling)


MASK = torch.tensor([[1, 1, 0], [0, 0, 0]])


def test_the_last_token_that_counts_stands_before_padding_or_behind_it():
    left_and_right = torch.tensor([[0, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(pool(TOKENS, "last", mask=left_and_right), torch.stack([TOKENS[0, 2], TOKENS[1, 0]]))
    padded = TOKENS.clone()
    padded[~MASK.bool()] = torch.nan
    torch.testing.assert_close(pool(padded, "last", mask=MASK), torch.stack([TOKENS[0, 1], torch.zeros(4)]))


def test_padding_is_in_no_pool():
    padded = TOKENS.clone()
    padded[~MASK.bool()] = torch.nan
    torch.testing.assert_close(pool(padded, "mean", mask=MASK)[0], TOKENS[0, :2].mean(0))
    torch.testing.assert_close(pool(padded, "max", mask=MASK)[0], TOKENS[0, :2].amax(0))
    assert not pool(padded, "mean", mask=MASK)[1].any()  # a sample of padding alone
    assert not pool(padded, "max", mask=MASK)[1].any()
    with pytest.raises(ValueError, match=r"gives \(2, 3\) tokens, but the mask is \(2, 2\): set mask_key"):
        pool(TOKENS, "mean", mask=MASK[:, :2])


@pytest.mark.parametrize("mask", [None, torch.ones(1, 4096)])
def test_a_mean_of_half_precision_is_taken_in_float32(mask):
    many = (1 + torch.arange(4096) % 2 / 128).bfloat16()[None, :, None]  # in bfloat16 the mean would be 1 or 1.0078
    mean = pool(many, "mean", mask=mask)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.full((1, 1), 1 + 1 / 256))
    assert pool(many.half(), "mean").dtype == torch.float32
