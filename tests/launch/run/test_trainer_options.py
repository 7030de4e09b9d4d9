"""Options under `trainer`: each works, or is refused with the reason."""

import inspect
import json

import pytest
import pytorch_lightning as pl
import torch
from method_runs import config, train
from omegaconf import OmegaConf, open_dict

from launch.errors import EXPECTED
from launch.run.build import build_seeded, build_trainer
from launch.run.folder import FREE, RunFolder
from launch.run.trainer_options import REFUSED, choose_channels_last

OFFERED = {"accelerator", "strategy", "devices", "num_nodes", "precision", "gradient_clip_val", "log_every_n_steps"}
OFFERED |= {"benchmark"}
PASSED_ON = {"gradient_clip_algorithm", "deterministic", "inference_mode", "detect_anomaly"}

METRICS = {
    "_target_": "callbacks.GenerativeMetrics",
    "every_kimg": 1,
    "num_samples": 10,
    "extractor": {"_target_": "stillhouse.metrics.extractors.Digits"},
    "nfe": [1, 2],
}


def trainer(name="pretrain", **options):
    cfg = config(name, {})
    with open_dict(cfg):
        for key, value in options.items():
            OmegaConf.update(cfg, f"trainer.{key}", value)
    method = build_seeded(cfg.method, cfg.seed)
    return method, build_trainer(cfg, method, RunFolder(cfg.folder))


def test_every_argument_of_lightnings_trainer_is_decided_on():
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert known == OFFERED | PASSED_ON | REFUSED.keys()
    assert len(OFFERED) + len(PASSED_ON) + len(REFUSED) == len(known)


@pytest.mark.parametrize("option", REFUSED)
def test_what_has_no_effect_here_is_refused_with_the_reason(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^trainer\.{option} has no place here: .{{20}}"):
        trainer(**{option: 2})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", sorted(PASSED_ON - {"gradient_clip_algorithm"}))
def test_others_reach_lightning(option):
    trainer(**{option: True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, r"trainer.micro_batch must be an integer of at least 1, got 0; null .* auto"),
        ({"micro_batch": "all"}, r"trainer.micro_batch must be an integer of at least 1, got 'all'; null .* auto"),
        (
            {"compile": "gcc"},
            r"trainer.compile must be true, false, a mode of torch.compile \(reduce-overhead, .* backend, got 'gcc'",
        ),
        ({"compile": 1}, r"trainer.compile must be true, false"),
        ({"compile": "max-autotune"}, r"trainer.compile=max-autotune records CUDA graphs, .* set trainer.compile=true"),
        ({"compile": "cudagraphs"}, r"trainer.compile=cudagraphs records CUDA graphs, .* and this is a CPU"),
        ({"channels_last": "yes"}, r"trainer.channels_last must be one of auto, True, False, got 'yes'"),
        ({"profile": "vtune"}, r"trainer.profile must be one of simple, advanced, torch, got 'vtune'"),
        ({"gradient_clip_val": 0}, r"trainer.gradient_clip_val must be a positive number, or null for no limit, got 0"),
        ({"gradient_clip_algorithm": "value"}, r"trainer.gradient_clip_algorithm needs trainer.gradient_clip_val"),
        (
            {"precision": "bf16-true"},
            r"trainer.precision must be one of 32-true, tf32, bf16-mixed, 16-mixed, got 'bf16-true'",
        ),
        ({"validate_every_n_steps": 0}, "^trainer.validate_every_n_steps must be an integer of at least 1, got 0$"),
        ({"accelerator": "abacus"}, "accelerator='abacus'.*cpu"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(EXPECTED, match=message):
        trainer(**options)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "denoising_student",
            {"method.held_out": 15, "batch_size": 16},
            "method.held_out=15 can't be shared by the 2 processes of trainer.devices",
        ),
        (
            "pretrain",
            {"batch_size": 10**11},
            r"batch_size=100000000000 \(lower it\): .* would take some 2.56e\+04 GB of memory",
        ),
        (
            "progressive",
            {"callbacks.metrics": METRICS, "batch_size": 16, "method.kimg": 1},
            r"callbacks.metrics.nfe=\[1, 2\]: steps=2: the student takes 1, and no other number",
        ),
    ],
)
def test_what_a_run_of_two_processes_can_not_have(name, changes, message):
    """Before its stages are trained or anything is allocated."""
    cfg = config(name, changes | {"trainer.devices": 2})
    with pytest.raises(ValueError, match=f"^{message}"):
        build_trainer(cfg, build_seeded(cfg.method, cfg.seed), RunFolder(cfg.folder))


def test_channels_are_innermost_where_that_is_faster():
    assert choose_channels_last("auto", "cpu", "bf16-mixed", False)
    assert not choose_channels_last("auto", "cpu", "32-true", True)
    assert not choose_channels_last("auto", "cuda", "bf16-mixed", False)
    assert choose_channels_last("auto", "cuda", "16-mixed", "reduce-overhead")
    assert not choose_channels_last("auto", "cuda", "tf32", True)
    for value in (True, False):
        assert choose_channels_last(value, "cuda", "32-true", False) is value


# -- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrain", "diff_instruct", "disback", "sfd"])
def test_gradients_are_clipped_whatever_the_method(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"method.clip": None} if name in ("diff_instruct", "disback") else {}
    norms, step = [], torch.optim.Adam.step

    def measured(optimizer, *arguments, **options):
        result = step(optimizer, *arguments, **options)  # Lightning's closure has made the gradients when it returns
        norms.append(torch.stack([p.grad.norm() for p in optimizer.param_groups[0]["params"]]).norm().item())
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", measured)
    train(name, changes | {"trainer.gradient_clip_val": 1e-3})
    assert norms
    assert max(norms) <= 1.001e-3


def test_one_limit_is_enough():
    cfg = config("diff_instruct", {"method.clip": 2.0, "trainer.gradient_clip_val": 1.0})
    method = build_seeded(cfg.method, cfg.seed)
    with pytest.raises(
        ValueError, match=r"trainer.gradient_clip_val=1.0 and method.clip=2.0 both limit .* one of them to null"
    ):
        build_trainer(cfg, method, RunFolder(cfg.folder))
    with pytest.raises(ValueError, match=r"gradient_clip_algorithm: norms of gradients alone are limited"):
        trainer("diff_instruct", gradient_clip_val=1.0, gradient_clip_algorithm="value")


# -- where time goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("simple", "run_training_batch"),
        pytest.param("advanced", "(training_step)", marks=pytest.mark.slow),
        pytest.param("torch", "aten::", marks=pytest.mark.slow),
    ],
)
def test_a_profile_is_written_into_the_runs_folder(profile, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train("sfd", {"trainer.profile": profile, "method.kimg": 0.06})
    folder = RunFolder(run.trainer.default_root_dir).path / "profile"
    assert says in (folder / f"fit-{profile}.txt").read_text()
    traces = [path for path in folder.iterdir() if path.suffix == ".json"]
    assert len(traces) == (profile == "torch")
    for path in traces:
        assert any(event.get("name", "").startswith("aten::") for event in json.loads(path.read_text())["traceEvents"])


# -- runs that have begun ---------------------------------------------------------------------------------------------


def test_what_moves_a_run_by_rounding_alone_may_change_on_the_way(tmp_path):
    folder = RunFolder(tmp_path)
    method = {"method": {"name": "any"}}
    begun = method | {"trainer": {"precision": "32-true", "micro_batch": None}}
    folder.claim(begun)
    folder.checkpoints.mkdir()
    folder.last.touch()
    changed = {key.removeprefix("trainer."): 4 for key in FREE if key.startswith("trainer.")}
    folder.check(method | {"trainer": {"precision": "32-true"} | changed})
    assert folder.read_config() == begun
    with pytest.raises(
        ValueError, match=r"started with trainer.precision='32-true', but .*'bf16-mixed'; choose another name"
    ):
        folder.check(method | {"trainer": {"precision": "bf16-mixed"} | changed})


def test_a_run_without_checkpoints_keeps_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("sfd", {"callbacks.checkpoints": None})
    assert not list(tmp_path.rglob("*.ckpt"))
