import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_feat.callbacks import UniformityRegularizer
from lightning_feat.functional.spectrum import gaussian_uniformity, koleo, wasserstein_uniformity
from tests.callbacks.spectrum.test_monitor import fit
from tests.helpers import Plain, equal, loader, trainer, weights

LOSSES = {"wasserstein": wasserstein_uniformity, "gaussian": gaussian_uniformity, "koleo": koleo}


class Written(Plain):
    """The term as one writes it by hand."""

    loss = "wasserstein"

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.net.body(x)
        return cross_entropy(self.net.fc(h), y) + 0.3 * LOSSES[self.loss](h)


@pytest.mark.parametrize("loss", LOSSES)
def test_training_is_that_of_the_term_written_by_hand(tmp_path, loss):
    class Mine(Written):
        pass

    Mine.loss = loss
    _, by_hand = fit(tmp_path, make=Mine)
    run, module = fit(tmp_path, UniformityRegularizer(loss, 0.3, "net.body"))
    assert equal(weights(module), weights(by_hand))
    assert f"uniformity_{loss}/loss/net.body" in run.callback_metrics


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_one_sample_adds_nothing(tmp_path, loss):
    torch.manual_seed(0)
    plain, module = Plain(), Plain()
    module.load_state_dict(plain.state_dict())
    trainer(tmp_path).fit(plain, loader(3, batch_size=1))
    trainer(tmp_path, callbacks=[UniformityRegularizer(loss, layer="net.body")]).fit(module, loader(3, batch_size=1))
    assert equal(weights(module), weights(plain))


def test_it_spreads_what_had_collapsed(tmp_path):
    def spread(module):
        x = loader(64).dataset.tensors[0]
        with torch.no_grad():
            return float(wasserstein_uniformity(module.net.body(x)))

    _, plain = fit(tmp_path, max_epochs=5)
    _, module = fit(tmp_path, UniformityRegularizer(weight=5.0, layer="net.body"), max_epochs=5)
    assert spread(module) < spread(plain) - 0.05


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="wasserstein"):
        UniformityRegularizer("even")
