"""Two processes against one, on the same samples."""

import pytest
import torch
import torch.distributed

from lightning_feat.functional.common.class_sums import repeated_by_sampler
from lightning_feat.metrics import ClassDistanceNormalizedVariance, NeuralCollapse
from tests.pairs import two_processes

C, D, SIZE, PROCESSES = 5, 8, 41, 2  # an odd number of samples: the sampler repeats one


def samples():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(SIZE) % 3  # the last two classes stay empty
    features = torch.randn(C, D, generator=generator)[targets] + 0.2 * torch.randn(SIZE, D, generator=generator)
    weight, bias = torch.randn(C, D, generator=generator), torch.randn(C, generator=generator)
    return features, targets, weight, bias


def measure(places, process=0, processes=1):
    """Two passes over the samples at these places, in batches of 6, as process number `process`."""
    features, targets, weight, bias = samples()
    metric, pairs = NeuralCollapse(C, D, second_moment=True), ClassDistanceNormalizedVariance(C, D)
    metric.set_classifier(weight, bias)
    batches = [
        (part, repeated_by_sampler(6 * number, len(part), process, processes, SIZE))
        for number, part in enumerate(places.split(6))
    ]
    for part, repeated in batches:
        metric.update(features[part], targets[part], repeated)
        pairs.update(features[part], targets[part], repeated)
    metric.start_second_pass()
    for part, repeated in batches:
        metric.update_second_pass(features[part], targets[part], features[part] @ weight.T + bias, repeated)
    values = metric.compute()
    metric.compute()  # a second time: the sums of one process are back in place, and not added up again
    return {**values, "pairs": pairs.compute(), "local_samples": metric.counts.sum()}


def worker(process, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process, world_size=PROCESSES
    )
    order = torch.arange(SIZE)
    order = torch.cat([order, order[: -SIZE % PROCESSES]])  # what DistributedSampler does
    torch.save(measure(order[process::PROCESSES], process, PROCESSES), f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    two_processes(worker, str(folder))
    return [torch.load(folder / f"{process}.pt") for process in range(PROCESSES)]


def test_two_processes_are_one_and_the_repeated_sample_counts_once(of_two):
    expected = measure(torch.arange(SIZE))
    assert [values.pop("local_samples") for values in of_two] == [21, 20]
    assert expected.pop("local_samples") == SIZE
    for values in of_two:
        assert values.keys() == expected.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14, msg=f"{name} differs")


def test_both_processes_agree_to_the_bit(of_two):
    assert all(of_two[0][name].equal(of_two[1][name]) for name in of_two[0] if name != "local_samples")
