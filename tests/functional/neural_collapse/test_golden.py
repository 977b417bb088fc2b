"""The published code's numbers on the same inputs. Shapes: N = 480 or 470 samples, D = 20, K = 6."""

from pathlib import Path

import numpy
import pytest
import torch

from lightning_feat.functional import neural_collapse as nc

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module", params=["balanced", "imbalanced"])
def golden(request):
    with numpy.load(DATA / f"neural_collapse_{request.param}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def sums(golden):
    return nc.class_sums(golden["features"], golden["labels"], 6)


def close(value, expected, rtol=1e-9):
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-12)


def test_means_and_covariance(golden, sums):
    close(nc.class_means(sums), golden["class_means"])
    close(nc.feature_mean(sums, "classes"), golden["global_mean_of_class_means"])
    close(nc.feature_mean(sums, "samples"), golden["global_mean_of_samples"])
    moment = nc.second_moment(golden["features"])
    close(nc.within_class_covariance(sums, moment), golden["within_class_covariance"])
    close(torch.linalg.vector_norm(nc.centered_class_means(sums), dim=1), golden["mean_norms"])


def test_within_class_measures(golden, sums):
    close(nc.nc1_pinv_over_k(sums, nc.second_moment(golden["features"])), golden["nc1_pinv"])
    residuals = nc.center_sums(golden["features"], golden["labels"], None, nc.class_centers(sums))
    close(nc.nc1_projected_over_k(sums, residuals), golden["nc1_pinv"])
    close(nc.nc1_quotient(sums), golden["nc1_quotient"])


def test_measures_of_means_and_classifier(golden, sums):
    means, weight, bias = nc.centered_class_means(sums), golden["weight"], golden["bias"]
    close(nc.nc2_etf_error(means), golden["nc2_etf_error"])
    close(nc.nc3_duality_error(weight, means), golden["nc3_duality_error"])
    close(nc.nc3_uniform_duality_var(weight, means), golden["nc3_uniform_duality_var"])
    close(nc.bias_duality(weight, bias, nc.feature_mean(sums, "classes")), golden["bias_duality_class_mean"])
    close(nc.bias_duality(weight, bias, nc.feature_mean(sums, "samples")), golden["bias_duality_sample_mean"])


def test_the_collection_names_both_bias_dualities_rightly(golden, sums):
    values = nc.collapse_measures(sums, weight=golden["weight"], bias=golden["bias"], global_mean="samples")
    close(values["bias_duality_classes"], golden["bias_duality_class_mean"])
    close(values["bias_duality_samples"], golden["bias_duality_sample_mean"])


def test_decisions_without_bias(golden, sums):
    logits = golden["features"] @ golden["weight"].T  # the published variant leaves out the bias
    residuals = nc.center_sums(golden["features"], golden["labels"], logits, nc.class_centers(sums))
    close(1 - nc.nc4_mismatch(residuals), golden["nc4_agreement"])


def test_pair_means_up_to_the_float32_that_the_published_code_averages_in(golden, sums):
    means = nc.centered_class_means(sums)
    # These golden values are float32 numbers, of 6e-8 relative rounding, after sums of 15 pairs in float32.
    close(nc.class_distance_normalized_variance(sums), golden["cdnv"], rtol=3e-7)
    close(nc.nc2_distance_mean(means), golden["nc2_distance_kernel_mean"], rtol=3e-7)
    close(nc.nc2_distance_var(means), golden["nc2_distance_kernel_var"], rtol=3e-7)
    close(nc.nc2_log_distance_mean(means), golden["nc2_log_kernel_mean"], rtol=3e-7)


def test_weight_etf_error_with_the_float32_target_of_the_published_code(golden):
    gram = golden["weight"] @ golden["weight"].T
    float32_target = ((torch.eye(6) - torch.ones(6, 6) / 6) / 5**0.5).double()
    close((gram / gram.norm() - float32_target).norm(), golden["weight_etf_error"])
    close(nc.nc2_etf_error(golden["weight"]), golden["weight_etf_error"], rtol=3e-8)  # what that rounding makes
