"""The same numbers as torch-fidelity's through Inception with random weights; test_distances.py compares on features."""

import pytest
import torch
from inception_file import write_inception
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from stillhouse.metrics.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from stillhouse.metrics.extractors import Inception
from stillhouse.metrics.statistics import RunningGaussian

GENERATOR = torch.Generator().manual_seed(11)
COUNT = 5  # images on each side: Inception does seven in a second here


def ours(fake, real, logits, splits):
    one, two = (RunningGaussian(fake.shape[1]).update(x) for x in (fake, real))
    precision, recall = precision_recall(fake, real)
    return {
        "frechet_inception_distance": frechet_distance(one.mean, one.cov, two.mean, two.cov).item(),
        # One subset of all samples: drawn subsets depend on the generator of either side.
        "kernel_inception_distance_mean": kernel_distance(fake, real, subsets=1, subset_size=len(fake)).mean().item(),
        "precision": precision.item(),
        "recall": recall.item(),
        "inception_score_mean": inception_score(logits, splits).mean().item(),
    }


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.mark.slow
def test_through_inception(tmp_path):
    weights = write_inception(tmp_path / "inception.pth")
    fake, real = torch.randint(0, 256, (2, COUNT, 3, 32, 32), dtype=torch.uint8, generator=GENERATOR)
    real = (real.float() * 0.7 + 40).to(torch.uint8)
    theirs = calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",  # in the place of VGG16's
        feature_extractor_weights_path=str(weights),
        isc=True,
        kid=True,
        prc=True,
        isc_splits=2,
        kid_subsets=1,
        kid_subset_size=COUNT,
        samples_shuffle=False,
        batch_size=COUNT,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
    )
    extractor = Inception(weights)
    rows = extractor(fake)
    real_rows = extractor(real)
    found = ours(rows, real_rows, extractor.class_logits(rows), 2)
    del found["frechet_inception_distance"]
    kid = "kernel_inception_distance_mean"
    assert found.pop(kid) == pytest.approx(theirs[kid], rel=1e-4), "of few rows theirs is float32 rounding"
    assert found == pytest.approx({key: theirs[key] for key in found}, rel=1e-6)
    # Of 2048 features their eigenvalues take ten seconds.
    one, two = rows[:, :200].double(), real_rows[:, :200].double()
    theirs = fid_statistics_to_metric(fid_features_to_statistics(one), fid_features_to_statistics(two), verbose=False)
    fid = ours(one, two, rows, 2)["frechet_inception_distance"]
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert fid > 1e-3
