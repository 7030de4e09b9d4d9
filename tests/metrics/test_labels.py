"""Samples and the row of real images have classes by one distribution, and a perfect sampler scores like real images."""

import numpy as np
import pytest
import torch
from metric_stubs import SHAPE, Packed, Stub
from scipy import stats

from stillhouse.diffusion.random_numbers import sample_labels
from stillhouse.metrics.evaluation import measure_real_images, measure_sampler
from stillhouse.metrics.images import from_uint8
from stillhouse.metrics.labels import check_class_shares, count_classes, draw_real_images, sampling_class_counts
from stillhouse.metrics.reference import reference_statistics

SEEDS = torch.arange(6000)


class Imbalanced(Packed):
    """900 dark and 100 light images, as packed data and as a datamodule."""

    name, num_classes = "dark_and_light", 2

    def __init__(self):
        super().__init__(1000)
        self.labels = (np.arange(1000) % 10 == 0).astype(np.int64)
        self.images = self.images // 2 + torch.from_numpy(100 * self.labels)[:, None, None, None].to(torch.uint8)

    def reference(self):
        return self

    def held_out(self):
        return None

    def perfect(self, noise, labels):
        """A real image of the class, chosen by the noise."""
        chosen = []
        for number, label in zip(torch.special.ndtr(noise[:, 0, 0, 0].double()), labels, strict=True):
            own = np.flatnonzero(self.labels == label.item())
            chosen.append(own[int(number * len(own))])
        return from_uint8(self.images[chosen])


def test_with_balanced_classes_both_distributions_are_the_same_to_the_last_bit():
    labels = np.arange(60) % 3
    assert torch.equal(sample_labels(SEEDS, 3, (20, 20, 20)), sample_labels(SEEDS, 3))
    for counts in (None, (20, 20, 20)):
        assert torch.equal(draw_real_images(SEEDS, labels, torch.arange(60), 3, counts), sample_labels(SEEDS, 60))


def test_labels_have_the_shares_of_the_data():
    counts = count_classes(np.repeat([0, 1, 2, 3], [7, 0, 2, 1]), 4)
    drawn = torch.bincount(sample_labels(SEEDS, 4, counts), minlength=4)
    assert drawn[1] == 0
    assert stats.chisquare(drawn[[0, 2, 3]].numpy(), np.array([0.7, 0.2, 0.1]) * len(SEEDS)).pvalue > 0.01


def test_real_images_are_drawn_by_the_distribution_of_the_samples():
    data = Imbalanced()
    by_class = draw_real_images(SEEDS, data.labels, torch.arange(1000), 2, None)
    assert np.array_equal(data.labels[by_class], sample_labels(SEEDS, 2))
    for number in range(2):  # within a class all are equally likely
        drawn = np.bincount(by_class[data.labels[by_class] == number], minlength=1000)[data.labels == number]
        assert stats.chisquare(drawn).pvalue > 0.01
    as_data = draw_real_images(SEEDS, data.labels, torch.arange(1000), 2, (900, 100))
    assert stats.binomtest(int(data.labels[as_data].sum()), len(SEEDS), 0.1).pvalue > 0.01
    few = torch.arange(0, 1000, 7)
    assert set(draw_real_images(SEEDS, data.labels, few, 2, None).tolist()) == set(few.tolist())


def test_images_of_a_split_with_other_shares_have_the_classes_of_the_samples():
    labels, among = np.repeat([0, 1, 2], [20, 70, 10]), torch.arange(100)
    for counts in ((900, 50, 50), (0, 0, 7), None):  # of the training images, of a class alone, uniform
        drawn = draw_real_images(SEEDS, labels, among, 3, counts)
        assert np.array_equal(labels[drawn], sample_labels(SEEDS, 3, counts))
        ones = np.bincount(drawn, minlength=100)[labels == 2]
        assert stats.chisquare(ones).pvalue > 0.01
    same = draw_real_images(SEEDS, labels, among, 3, (400, 1400, 200))  # the split's own shares
    assert torch.equal(same, sample_labels(SEEDS, 100))


@pytest.fixture(scope="module")
def values():
    """{distribution: (of a perfect conditional sampler, of real images)}, each the Frechet distances of four blocks."""
    data, extractor = Imbalanced(), Stub()
    reference = reference_statistics(data, extractor)
    found = {}
    for distribution in ("uniform", "data"):
        common = {
            "reference": reference,
            "extractor": extractor,
            "num_samples": 1000,
            "blocks": 4,
            "num_classes": 2,
            "class_counts": sampling_class_counts(distribution, data),
            "batch_size": 1000,
            "device": "cpu",
            "progress": False,
        }
        sampled = measure_sampler(data.perfect, name="a", subject="student", nfe=1, shape=SHAPE, **common)
        real = measure_real_images(data, name="b", **common)
        assert sampled[0].comparable == real[0].comparable
        found[distribution] = np.array(sampled[0].values), np.array(real[0].values), real[0].fingerprint["labels"]
    return found


@pytest.mark.parametrize("distribution", ["uniform", "data"])
def test_a_perfect_conditional_sampler_scores_like_real_images(values, distribution):
    sampled, real, _ = values[distribution]
    spread = np.hypot(sampled.std(ddof=1), real.std(ddof=1))
    assert abs(sampled.mean() - real.mean()) < 2 * spread
    # Labels drawn uniformly beside real images as the data has them:
    mismatched = abs(values["uniform"][0].mean() - values["data"][1].mean())
    assert mismatched > 10 * spread


def test_the_fingerprint_names_the_distribution(values):
    assert values["uniform"][2] == "uniform over 2 by seed"
    assert values["data"][2].startswith("shares of the data's 2 classes by seed, ")


def test_other_shares_than_the_datas_are_said_in_one_line(capsys):
    check_class_shares("uniform", Imbalanced())
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        "samples have 2 classes equally often, and of the images that they are compared with each has 10% to 90%"
        in line
    )
    assert "evaluation.labels=data" in line
    balanced = Imbalanced()
    balanced.labels = np.arange(1000) % 2
    for distribution, data in (("data", Imbalanced()), ("uniform", balanced)):
        check_class_shares(distribution, data)
    assert capsys.readouterr().out == ""


def test_a_class_without_images_is_refused(monkeypatch):
    data = Imbalanced()
    data.num_classes = 3
    with pytest.raises(ValueError, match=r"class 2 of 3 has no real image among 1,000.*or set evaluation.labels=data"):
        check_class_shares("uniform", data)
    data.num_classes, test = 2, Imbalanced()
    test.labels = np.zeros(1000, np.int64)
    monkeypatch.setattr(data, "held_out", lambda: test)
    for distribution, way in (("uniform", "set evaluation.labels=data"), ("data", "complete the test images")):
        with pytest.raises(ValueError, match=f"class 1 of 2 has no real image among 1,000, .*, or {way}"):
            check_class_shares(distribution, data)
    with pytest.raises(ValueError, match="class 1 of 2 has no real image among 9"):
        draw_real_images(SEEDS, data.labels, torch.arange(1, 10), 2, None)
    with pytest.raises(ValueError, match="evaluation.labels must be one of uniform, data, got 'law'"):
        sampling_class_counts("law", data)
