"""Which rows are kept where there are too many: a seeded sample that does not depend on batches or processes."""

import torch

from lightning_feat.functional.common.lots import lowest_lots


def chosen_samples(size: int, most: int, seed: int) -> list[int] | None:
    """Places in a data set of this size that the network is run on; None for all of them."""
    return None if size <= most else lowest_lots(torch.arange(size), most, seed).tolist()
