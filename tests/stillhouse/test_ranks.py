"""Two gloo processes on one thread each give what one process gives."""

import pytest
import torch
import torch.distributed as dist
from metric_stubs import SHAPE, Packed, Stub, sampler
from process_tools import in_two_processes

from stillhouse.metrics.evaluation import measure_real_images, measure_sampler
from stillhouse.metrics.reference import real_features, reference_statistics
from stillhouse.metrics.sampling import sample_features
from stillhouse.metrics.statistics import RunningGaussian
from stillhouse.ranks import gather_rows, rank_and_world, rank_slice, run_on_rank_zero

SAMPLING = {"shape": SHAPE, "num_classes": 3, "batch_size": 4, "device": "cpu"}


def outcome(folder):
    """Everything that is shared out between ranks, on odd numbers of images."""
    seeds = torch.arange(13)
    reference = reference_statistics(Packed(), Stub(), folder / "cache", batch_size=3)
    whole = reference_statistics(Packed(), Stub(), keep_features=True, batch_size=3)
    options = {"extractor": Stub(), "num_samples": 21, "num_classes": 3, "batch_size": 4, "device": "cpu"}
    options |= {"reference": whole, "metrics": ("fid", "kid", "precision", "is"), "progress": False}
    return {
        "features": sample_features(sampler, Stub(), seeds, **SAMPLING)[0],
        "one": sample_features(sampler, Stub(), seeds[:1], **SAMPLING)[0],
        "real": real_features(Packed(), Stub(), 6, "cpu"),
        "mu": reference.mu,
        "cov": reference.cov,
        "fid": [r.values for r in measure_sampler(sampler, name="a", subject="student", nfe=1, shape=SHAPE, **options)],
        "floor": [r.values for r in measure_real_images(Packed(), name="a", **options)],
    }


def broken_on_one_rank(noise, labels):
    return sampler(noise, labels) * (torch.nan if rank_and_world()[0] == 1 else 1)


def refusal():
    raise ValueError("only rank 0 reads the file")


def slow_to_sample(noise, labels):
    if rank_and_world()[0] == 1:
        torch.arange(2_000_000).double().sort()
    return sampler(noise, labels)


def message_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def child(rank, folder):
    dist.init_process_group("gloo")
    results = outcome(folder)
    sampled = []

    def counted(noise, labels):
        sampled.append(len(noise))
        return sampler(noise, labels)

    sample_features(counted, Stub(), torch.arange(13), **SAMPLING)
    running = RunningGaussian(8)
    running.update(Stub()(Packed().images[rank_slice(40)]))
    merged = running.merged()
    results |= {
        "merged_twice": (running.merged().count, merged.count, running.count),
        "broken": message_of(sample_features, broken_on_one_rank, Stub(), torch.arange(13), **SAMPLING),
        "refusal": message_of(run_on_rank_zero, refusal),
        "value": run_on_rank_zero(lambda: f"of rank {rank}"),
        "seconds": sample_features(slow_to_sample, Stub(), torch.arange(13), **SAMPLING)[1],
        "sampled": sum(sampled),
        "mine": len(gather_rows(torch.ones(7 if rank else 6, 2), 13)),
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(child, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_processes_give_what_one_gives(ranks, tmp_path):
    alone = outcome(tmp_path)
    for results in ranks:
        for name in ("features", "one", "real"):
            assert torch.equal(results[name], alone[name]), name
        torch.testing.assert_close(results["mu"], alone["mu"], rtol=1e-12, atol=0)
        torch.testing.assert_close(results["cov"], alone["cov"], rtol=1e-10, atol=1e-10)
        for name in ("fid", "floor"):
            assert torch.tensor(results[name]).numpy() == pytest.approx(torch.tensor(alone[name]).numpy(), rel=1e-6)


def test_each_rank_samples_its_share_alone(ranks):
    assert [results["sampled"] for results in ranks] == [6, 7]


def test_merging_counts_every_row_once(ranks):
    assert [results["merged_twice"] for results in ranks] == [(40, 40, 20)] * 2


def test_all_ranks_hear_of_what_went_wrong_on_one(ranks):
    for results in ranks:
        assert results["broken"] == "7 of 13 samples contain NaN or infinity: the sampler has diverged"
        assert results["refusal"] == "only rank 0 reads the file"
        assert results["value"] == "of rank 0"
        assert results["mine"] == 13


def test_seconds_are_those_of_the_slowest_rank(ranks):
    assert ranks[0]["seconds"] == ranks[1]["seconds"] > 0.01
