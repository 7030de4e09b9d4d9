import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from metric_stubs import SHAPE, Packed, Stub, sampler, stub_reference

from stillhouse.analysis.tables import records_text
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise, sample_uniforms
from stillhouse.metrics.distances import (
    frechet_distance,
    gaussian_kernel_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    wasserstein_distance,
)
from stillhouse.metrics.evaluation import check_feature_memory, measure_real_images, measure_sampler, split_real_images
from stillhouse.metrics.fidelity import NO_WEIGHTS_ADVICE
from stillhouse.metrics.images import to_uint8
from stillhouse.metrics.reference import load_reference, real_features, reference_statistics
from stillhouse.metrics.sampling import sample_features
from stillhouse.metrics.statistics import RunningGaussian, save_statistics

SAMPLING = {"shape": SHAPE, "num_classes": 3, "batch_size": 16, "device": "cpu"}
ALL = ("fid", "kid", "precision", "recall", "is")


def measured(sample=sampler, reference=None, **changes):
    options = {
        "name": "run",
        "subject": "student",
        "nfe": 1,
        "num_samples": 30,
        "progress": False,
        **SAMPLING,
        **changes,
    }
    return measure_sampler(sample, reference=reference or stub_reference(), extractor=Stub(), **options)


def expected_rows(seeds):
    return Stub()(to_uint8(sampler(sample_noise(seeds, SHAPE), sample_labels(seeds, 3))))


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_features_are_those_of_each_seed_in_order_whatever_the_batch(batch_size):
    seeds = torch.tensor([5, 3, 900, 0, 12, 7, 8, 2, 1])
    rows, seconds = sample_features(sampler, Stub(), seeds, **SAMPLING | {"batch_size": batch_size})
    torch.testing.assert_close(rows, expected_rows(seeds))
    assert seconds > 0


def test_seconds_count_sampling_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Slow(Stub):
        def __call__(self, images):
            now[0] += 50
            return super().__call__(images)

    def sample(noise, labels):
        now[0] += 2
        return sampler(noise, labels)

    _, seconds = sample_features(sample, Slow(), torch.arange(30), **SAMPLING | {"batch_size": 10})
    assert seconds == 6
    times = iter([100, 1, 1])  # the first block compiles

    def compiled(noise, labels):
        now[0] += next(times)
        return sampler(noise, labels)

    assert measured(compiled, batch_size=30)[0].images_per_second == 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_on_a_gpu_are_those_on_the_cpu():
    seeds = torch.arange(30)
    rows, seconds = sample_features(sampler, Stub(), seeds, **SAMPLING | {"device": "cuda"})
    torch.testing.assert_close(rows.cpu(), expected_rows(seeds), rtol=1e-3, atol=1e-3)
    assert seconds > 0


def test_extraction_is_outside_an_autocast_around_it():
    plain, _ = sample_features(sampler, Stub(), torch.arange(20), **SAMPLING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within, _ = sample_features(sampler, Stub(), torch.arange(20), **SAMPLING)
    assert torch.equal(within, plain)


def test_diverged_samples_are_counted_not_measured():
    def diverged(noise, labels):
        images = sampler(noise, labels)
        images[0, 0, 0, 0] = torch.nan
        return images

    with pytest.raises(ValueError, match="3 of 30 samples contain NaN or infinity: the sampler has diverged"):
        sample_features(diverged, Stub(), torch.arange(30), **SAMPLING | {"batch_size": 10})


def test_measure_gives_every_metric_of_every_block():
    reference = stub_reference()
    records = {record.metric: record for record in measured(metrics=ALL, blocks=2, weights="ema", steps=1)}
    assert list(records) == [f"{metric}_stub" for metric in ALL]
    for block in range(2):
        rows = expected_rows(torch.arange(30 * block, 30 * block + 30))
        gaussian = RunningGaussian(8).update(rows)
        precision, recall = precision_recall(rows, reference.features)
        expected = {
            "fid": frechet_distance(gaussian.mean, gaussian.cov, reference.mu, reference.cov),
            "kid": kernel_distance(rows, reference.features).mean(),
            "precision": precision,
            "recall": recall,
            "is": inception_score(rows[:, :3]).mean(),
        }
        assert precision_recall(rows, reference.features, radii=reference.to("cpu").radii) == (precision, recall)
        for metric, value in expected.items():
            assert records[f"{metric}_stub"].values[block] == pytest.approx(value.item(), rel=1e-5), metric
    assert reference.to("cpu") is reference  # with its radii
    fid = records["fid_stub"]
    assert fid.mean == pytest.approx(sum(fid.values) / 2)
    assert fid.std == pytest.approx(statistics.stdev(fid.values))
    assert (fid.subject, fid.nfe, fid.steps, fid.name) == ("student", 1, 1, "run")
    assert fid.images_per_second > 0
    assert fid.fingerprint == {
        "extractor": "stub",
        "extractor_hash": Stub.hash,
        "reference": Packed.hash,
        "num_samples": 30,
        "seeds": [0, 59],
        "labels": "uniform over 3 by seed",
        "uint8": "x*127.5+128, clipped",
        "precision": "32-true",
        "weights": "ema",
    }


def test_measured_values_do_not_depend_on_the_batch_size():
    one, other = (measured(batch_size=size, metrics=ALL) for size in (4, 90))
    for a, b in zip(one, other, strict=True):
        assert a.values == pytest.approx(b.values, rel=1e-6), a.metric


def test_a_single_block_has_no_spread():
    (record,) = measured(blocks=1)
    assert record.std is None
    assert record.mean == record.values[0]


def test_real_floor_draws_with_replacement_and_shares_the_table():
    records = measure_real_images(
        Packed(), name="data", reference=stub_reference(), extractor=Stub(), num_samples=30, num_classes=3, batch_size=16,
        device="cpu", metrics=("fid", "kid"), progress=False,
    )  # fmt: skip
    student = measured(metrics=("fid", "kid"))
    assert [r.metric for r in records] == ["fid_stub", "kid_stub"]
    assert (records[0].subject, records[0].nfe, records[0].images_per_second) == ("real", 0, None)
    assert records[0].comparable == student[0].comparable
    assert records_text([*records, *student]).count("fingerprint") == 1
    seeds, real_classes = torch.arange(90), Packed().labels  # 14, 13 and 13 images: each draw has the class of its seed
    places = [np.flatnonzero(real_classes == label) for label in sample_labels(seeds, 3)]
    draws = torch.tensor([place[int(u * len(place))] for place, u in zip(places, sample_uniforms(seeds), strict=True)])
    assert len(draws[:30].unique()) < 30
    gaussian = RunningGaussian(8).update(Stub()(Packed().images[draws[60:]]))
    expected = frechet_distance(gaussian.mean, gaussian.cov, stub_reference().mu, stub_reference().cov)
    assert records[0].values[2] == pytest.approx(expected.item(), rel=1e-9)
    assert records[0].mean < student[0].mean


def test_memorisation_is_of_training_against_held_out_images_and_the_floor_is_the_latters():
    """A sampler of training images scores 1, of held-out ones 0; of these themselves their own place does not count."""
    training, held_out = Packed(30), Packed(12)
    held_out.images = 255 - held_out.images
    reference = reference_statistics(training, Stub(), keep_features=True, held_out=held_out)
    assert torch.equal(reference.held_out, Stub()(held_out.images))
    assert reference.to("meta").held_out_hash == held_out.hash
    settings = {"metrics": ("fid", "memorisation"), "num_samples": 12, "blocks": 2}

    def of(images):
        return lambda noise, labels: images[: len(noise)] / 127.5 - 1

    copies = (measured(of(packed.images), reference, **settings) for packed in (training, held_out))
    assert [records[1].mean for records in copies] == [1.0, 0.0]
    options = {"name": "d", "num_classes": 0, "batch_size": 16, "device": "cpu", "extractor": Stub(), "progress": False}
    real = measure_real_images(training, held_out=held_out, reference=reference, **settings, **options)
    draws = sample_labels(torch.arange(24), 12)
    rows, apart = reference.held_out[draws].double(), torch.arange(12) != draws[:, None]
    nearest = torch.cdist(rows, reference.features.double()).amin(1)
    other = torch.cdist(rows, reference.held_out.double()).where(apart, torch.inf).amin(1)
    assert real[1].mean == pytest.approx((nearest < other).double().mean().item())
    assert real[0].mean > measured(of(training.images), reference, **settings)[0].mean


def test_w2_and_mmd_compare_with_as_many_real_rows_always_the_same():
    reference = stub_reference()
    records = measured(metrics=("w2", "mmd"), num_samples=16, blocks=2)
    assert [record.metric for record in records] == ["w2_stub", "mmd_stub"]
    chosen, others = split_real_images(40, 16)
    assert sorted([*chosen.tolist(), *others.tolist()]) == list(range(40))
    real = reference.features[chosen]
    for block in range(2):
        rows = expected_rows(torch.arange(16 * block, 16 * block + 16))
        assert records[0].values[block] == pytest.approx(wasserstein_distance(rows, real), rel=1e-6)
        assert records[1].values[block] == pytest.approx(gaussian_kernel_distance(rows, real).item(), rel=1e-6)


def test_the_floor_of_w2_is_of_other_real_images():
    """Drawn among all, real rows would be paired with themselves at no distance."""
    fetched = []

    class Watched(Packed):
        def fetch(self, indices):
            fetched.extend(indices.tolist())
            return super().fetch(indices)

    options = {"num_samples": 16, "num_classes": 3, "batch_size": 16, "device": "cpu", "progress": False}
    records = measure_real_images(
        Watched(), name="data", reference=stub_reference(), extractor=Stub(), metrics=("w2", "mmd"), **options
    )
    chosen, others = split_real_images(40, 16)
    assert len(fetched) == 48
    assert set(fetched) <= set(others.tolist())
    rows = Stub()(Packed().images[fetched[:16]])
    assert records[0].values[0] == pytest.approx(
        wasserstein_distance(rows, stub_reference().features[chosen]), rel=1e-6
    )
    assert records[0].comparable == measured(metrics=("w2",), num_samples=16)[0].comparable


def few_real(count):
    whole = stub_reference()
    return replace(whole, features=whole.features[:count])


def broken():
    whole = stub_reference()
    return replace(whole, cov=whole.cov.where(whole.cov > 0, torch.nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metrics": ()},
            rf"evaluation.metrics must be a list of some of fid, .*, got \(\); {re.escape(NO_WEIGHTS_ADVICE)}",
        ),
        ({"metrics": ("fid", "lpips")}, "metrics lpips are unknown; choose among fid, kid"),
        ({"num_samples": 5}, "evaluation.num_samples must be a whole number of at least 10, got 5"),
        ({"blocks": 1e11}, "evaluation.blocks must be a whole number of at least 1, got 100000000000.0"),
        (
            {"num_samples": 10**12},
            r"evaluation.num_samples=1000000000000 in blocks=3 are more than the 2,147,483,648 seeds .*; lower them",
        ),
        (
            {"reference": few_real(3), "metrics": ("recall",)},
            "recall compares with 4 real images at least, and the data set has 3",
        ),
        ({"reference": broken()}, r"statistics of the real images contain NaN or infinity: make or fetch them again"),
        (
            {"metrics": ("kid",), "reference": stub_reference(False)},
            "kid compare with the features .*leave them out of the metrics, or set evaluation.reference=null",
        ),
        (
            {"metrics": ("w2", "mmd"), "reference": stub_reference(False)},
            "mmd, w2 compare with the features .*or set evaluation.reference=null",
        ),
        (
            {"metrics": ("memorisation",)},
            "memorisation compares with real images that no training sees, and this data set",
        ),
        ({"metrics": ("w2",), "num_samples": 5001}, "w2 takes at most 5000 samples, got num_samples=5001"),
        ({"metrics": ("w2",), "num_samples": 21}, "num_samples=21 is more than half of the 40 real ones"),
    ],
)
def test_what_would_fail_after_sampling_is_refused_before(options, message):
    def never(noise, labels):
        raise AssertionError("sampling has begun")

    with pytest.raises(ValueError, match=message):
        measured(never, **options)


def test_features_that_fit_into_no_memory_are_refused():
    message = r"^evaluation.num_samples=500000000 in blocks=3 \(lower them\): features of 1,500,000,000 images .* 2.46e\+04 GB"
    with pytest.raises(ValueError, match=message):
        check_feature_memory(2048, 500_000_000, 3, has_images=True)


def test_a_reference_of_another_extractor_is_refused():
    other = stub_reference()
    other = type(other)(other.mu[:5], other.cov[:5, :5], other.hash)
    with pytest.raises(ValueError, match="the reference has 5 features, the stub extractor 8"):
        measured(reference=other)


def test_reference_statistics_are_cached_by_both_hashes_and_damage_is_refused(tmp_path):
    class Counting(Packed):
        fetched = 0

        def fetch(self, indices):
            self.fetched += len(indices)
            return super().fetch(indices)

    packed = Counting()
    first = reference_statistics(packed, Stub(), tmp_path, batch_size=7)
    torch.testing.assert_close(first.cov, stub_reference().cov, rtol=1e-10, atol=1e-10)
    assert first.features is None
    (file,) = tmp_path.iterdir()
    assert file.name == f"stub-{'5' * 16}-{'a' * 16}.npz"
    again = reference_statistics(packed, Stub(), tmp_path)
    assert packed.fetched == 40
    assert torch.equal(again.cov, first.cov)
    assert again.hash == first.hash == Packed.hash
    kept = reference_statistics(packed, Stub(), tmp_path, keep_features=True, batch_size=7)
    torch.testing.assert_close(kept.features, stub_reference().features)
    assert torch.equal(kept.features, real_features(packed, Stub(), 7, "cpu"))
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        reference_statistics(packed, Stub(), tmp_path)
    assert file.read_bytes() == b"junk"


def test_published_reference_is_named_by_its_file(tmp_path):
    reference = stub_reference()
    save_statistics(tmp_path / "a.npz", reference.mu, reference.cov)
    save_statistics(tmp_path / "b.npz", reference.mu, 2 * reference.cov)
    one, other = load_reference(tmp_path / "a.npz"), load_reference(tmp_path / "b.npz")
    assert torch.equal(one.mu, reference.mu)
    assert one.hash != other.hash
    assert len(one.hash) == 64
    assert measured(reference=one)[0].comparable_id != measured(reference=other)[0].comparable_id
