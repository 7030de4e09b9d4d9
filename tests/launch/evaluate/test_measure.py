"""What a kept measurement of a teacher is known by, and what measures nothing."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from launch.evaluate.measure import Evaluation, check_results, checked, leave_out_measurement
from stillhouse.diffusion.preconditioning import EDM, Epsilon
from stillhouse.diffusion.schedules import karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import SongUNet


def teacher(preconditioning=None, seed=0, name="t", solver="heun", **options) -> Teacher:
    torch.manual_seed(seed)
    sizes = {"model_channels": 8, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": ()}
    return Teacher(name, SongUNet(8, 1, 1, **sizes, **options), preconditioning or EDM(), karras, solver=solver)


def reference(real: str, held_out: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(hash=real, held_out_hash=held_out)


def key(teacher: Teacher, steps: int | None = None, **changes) -> str:
    evaluation = Evaluation.__new__(Evaluation)
    evaluation.extractor, evaluation.reference = SimpleNamespace(hash="e"), reference("r")
    evaluation.device, evaluation.settings = torch.device("cpu"), {"num_samples": 10}
    evaluation.first_seed = 0
    vars(evaluation).update(changes)
    return evaluation._teacher_key(teacher, steps)


def test_a_teachers_measurement_is_known_by_all_that_decides_it_and_not_by_names():
    assert key(teacher()) == key(teacher(name="other"))
    filtered = teacher(resample_filter=(1, 3, 3, 1))
    assert filtered.hash == teacher().hash  # the weights are the same, the network is another
    others = [
        key(filtered),
        key(teacher(seed=1)),
        key(teacher(EDM(0.6))),
        key(teacher(Epsilon())),
        key(teacher(Epsilon(beta_end=0.01))),
        key(teacher(solver="euler")),
        key(teacher(), steps=3),
        key(teacher(), extractor=SimpleNamespace(hash="f")),
        key(teacher(), reference=reference("s")),
        key(teacher(), reference=reference("r", "h")),
        key(teacher(), reference=reference("r", "i")),
        key(teacher(), settings={"num_samples": 11}),
        key(teacher(), first_seed=10),
    ]
    assert len({key(teacher()), *others}) == len(others) + 1


def test_the_weights_in_memory_are_hashed_and_not_their_file():
    one, changed = teacher(), teacher()
    with torch.no_grad():
        next(changed.denoiser.network.parameters()).flatten()[0] += 1e-3
    assert key(one) != key(changed)


@pytest.mark.parametrize("callbacks", [{"metrics": {"every_kimg": 1}, "grid": None}, {"grid": None}, None])
def test_without_a_measurement_there_is_none_on_the_way_either(callbacks):
    cfg = OmegaConf.create({"evaluation": {"extractor": None, "metrics": None}, "callbacks": callbacks})
    OmegaConf.set_struct(cfg, True)
    leave_out_measurement(cfg)
    assert (cfg.callbacks or {}).get("metrics") is None


def test_an_evaluation_without_an_extractor_is_refused_with_the_ways_out():
    settings = {"extractor": None, "metrics": ["fid"]}
    message = (
        r"^evaluation.extractor=null: without one nothing can be measured; evaluation=pixels needs no weights .*=none"
    )
    with pytest.raises(ValueError, match=message):
        leave_out_measurement(OmegaConf.create({"evaluation": settings, "callbacks": None}))
    with pytest.raises(ValueError, match=message):
        checked(settings, data=None)


def test_results_that_could_not_be_written_are_refused_before_they_are_measured(tmp_path):
    check_results(tmp_path / "new/evaluation")
    for name in ("samples.png", "interpolation.png", "quality.png"):
        (tmp_path / name).mkdir()
        with pytest.raises(OSError, match=f"^cannot write .*/{name}: it is a folder"):
            check_results(tmp_path)
        (tmp_path / name).rmdir()
    (tmp_path / "metrics.json").write_text("[{")
    with pytest.raises(ValueError, match=r"/metrics.json is damaged or no list of metrics"):
        check_results(tmp_path)
    with pytest.raises(OSError, match="^cannot write .*/metrics.json/metrics.json: Not a directory"):
        check_results(tmp_path / "metrics.json")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
