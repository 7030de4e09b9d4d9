"""EMA against closed forms computed here, and what a checkpoint, an exception, two processes or a resume do to it."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from method_runs import train
from process_tools import in_two_processes
from tiny_module import TWO, TinyMethod, trainer

from callbacks.checkpoint import Checkpoints, read_checkpoint
from callbacks.ema import EMA, Average, relative_width, student_state, student_weights

RULES = [{"decay": 0.9}, {"halflife_kimg": 0.02, "rampup_ratio": 0.5}, {"halflife_kimg": 0.01, "rampup_ratio": None}]
RULES.append({"gamma": 6.94})
NAMES = ["ema_0.9", "ema_0.02kimg", "ema_0.01kimg", "ema_gamma6.94"]


def fit(folder, steps, *callbacks, module=None, ckpt_path=None, **options):
    module = module or TinyMethod()
    ema = EMA(RULES)
    t = trainer(folder, steps, [ema, *callbacks], **options)
    t.fit(module, ckpt_path=ckpt_path)
    return module, ema, t


def closed_form(start, states, betas):
    """Sum over updates of (1 - beta_i) times the later betas times the weights, in float64."""
    total = start.double() * torch.tensor(betas, dtype=torch.float64).prod()
    for i, state in enumerate(states):
        later = torch.tensor(betas[i + 1 :], dtype=torch.float64).prod()
        total = total + (1 - betas[i]) * later * state.double()
    return total


def expected(module, updates, rule):
    if "gamma" in rule:  # of the n-th of N updates the integral of (gamma + 1) t^gamma over its share of [0, 1]
        ends = [(n / len(updates)) ** (rule["gamma"] + 1) for n in range(len(updates) + 1)]
        return sum((b - a) * s["0.weight"].double() for (a, b), s in zip(pairwise(ends), updates, strict=True))
    start = TinyMethod().student.state_dict()["0.weight"]
    betas = []
    for i in range(len(updates)):
        if "decay" in rule:
            betas.append(rule["decay"])
        else:
            halflife = 1000 * rule["halflife_kimg"]
            if rule["rampup_ratio"]:
                halflife = min(halflife, i * module.batch_size * rule["rampup_ratio"])
            betas.append(2.0 ** (-module.batch_size / halflife) if halflife else 0.0)
    return closed_form(start, [s["0.weight"] for s in updates], betas)


def test_averages_are_the_closed_form(tmp_path):
    module, ema, _ = fit(tmp_path, 12)
    assert ema.names == NAMES
    averages = ema.state_dict()["averages"]
    for name, rule in zip(NAMES, RULES, strict=True):
        assert averages[name]["0.weight"].dtype == torch.float32
        assert averages[name].keys() == dict(module.student.named_parameters()).keys()  # the student and nothing else
        torch.testing.assert_close(
            averages[name]["0.weight"].double(), expected(module, module.student_states, rule), rtol=1e-5, atol=1e-6
        )
    # the ramp-up matters: without it, the initial weights would still be in the average
    assert not torch.allclose(averages[NAMES[1]]["0.weight"], averages[NAMES[2]]["0.weight"])


def test_a_width_is_the_power_rule_whose_profile_has_it():
    t = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for sigma_rel, gamma in ((0.05, 16.97), (0.1, 6.94), (relative_width(0), 0.0)):
        average = Average(sigma_rel=sigma_rel)
        assert average.exponent == pytest.approx(gamma, abs=0.005)  # the paper's rounded pairs
        profile = (average.exponent + 1) * t**average.exponent
        mean = (profile * t).mean()
        assert (profile * (t - mean).square()).mean().sqrt().item() == pytest.approx(sigma_rel, rel=1e-9)
        assert average.beta(64, 16) == pytest.approx(0.8 ** (average.exponent + 1), rel=1e-12)  # the fifth update
    assert Average(sigma_rel=0.05).name == "ema_sigma_rel0.05"


def test_batches_without_a_student_step_do_not_count(tmp_path):
    skip = {1, 2, 5, 6, 7}
    module, ema, _ = fit(tmp_path, 12, module=TinyMethod(skip=skip))
    updates = [s for i, s in enumerate(module.student_states) if i not in skip]
    assert ema.state_dict()["updates"] == len(updates)
    for name, rule in zip(NAMES, RULES, strict=True):
        torch.testing.assert_close(
            ema.state_dict()["averages"][name]["0.weight"].double(),
            expected(module, updates, rule),
            rtol=1e-5,
            atol=1e-6,
        )


def test_only_a_new_optimiser_step_updates(tmp_path):
    module, ema, t = fit(tmp_path, 3)
    ema.on_train_start(t, module)
    ema.on_train_batch_end(t, module, {}, None, 0)  # global_step has not moved
    assert ema.updates == 3


def test_averages_and_checkpoints_hold_what_follows_an_update(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = []

    def halve(method):
        with torch.no_grad():
            states.append({name: p.mul_(0.5).clone() for name, p in method.student.named_parameters()})

    monkeypatch.setattr("lightning_modules.components.method.Method.after_update", halve)
    changes = {
        "callbacks.ema": {"_target_": "callbacks.EMA", "averages": [{"decay": 0.0}]},
        "callbacks.checkpoints": {"_target_": "callbacks.Checkpoints", "every_n_steps": 1},
    }
    run = train("pretrain", changes, data="eight_gaussians")
    (ema,) = (callback for callback in run.trainer.callbacks if isinstance(callback, EMA))
    checkpoint = read_checkpoint(next(tmp_path.rglob("last.ckpt")))
    stored = {name: checkpoint["state_dict"][f"student.{name}"] for name in states[-1]}
    for found in (ema.state_dict()["averages"]["ema_0.0"], stored):
        torch.testing.assert_close(found, states[-1], rtol=0, atol=0)


def test_validation_sees_the_first_average_and_training_goes_on_with_the_weights(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            (ema,) = (c for c in trainer.callbacks if isinstance(c, EMA))
            seen.append(torch.equal(pl_module.student[0].weight, ema.state_dict()["averages"]["ema_0.9"]["0.weight"]))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            # assigned in inference mode, a weight could no longer be trained
            assert not pl_module.student[0].weight.is_inference()

    validated, _, t = fit(tmp_path / "a", 6, Look(), validate_every=2)
    plain, _, _ = fit(tmp_path / "b", 6)
    assert seen == [True] * 6
    torch.testing.assert_close(validated.student.state_dict(), plain.student.state_dict(), rtol=0, atol=0)
    t.validate(validated, verbose=False)
    assert len(seen) == 8
    assert all(seen)
    torch.testing.assert_close(validated.student.state_dict(), plain.student.state_dict(), rtol=0, atol=0)


def test_applied_swaps_nests_and_restores_on_exceptions(tmp_path):
    module, ema, _ = fit(tmp_path, 4)
    weight, averages = module.student[0].weight, ema.state_dict()["averages"]
    raw, identity, buffer = weight.detach().clone(), id(weight), module.student[1].running_mean.clone()
    with pytest.raises(KeyError), ema.applied(module, NAMES[1]):
        assert torch.equal(weight, averages[NAMES[1]]["0.weight"])
        assert weight.data_ptr() == averages[NAMES[1]]["0.weight"].data_ptr()  # no copy
        with ema.applied(module, "raw"):
            assert torch.equal(weight, raw)
        with ema.applied(module):
            assert torch.equal(weight, averages[NAMES[0]]["0.weight"])
        assert torch.equal(weight, averages[NAMES[1]]["0.weight"])
        raise KeyError
    assert torch.equal(weight, raw)
    assert id(module.student[0].weight) == identity
    assert torch.equal(module.student[1].running_mean, buffer)
    with (
        pytest.raises(ValueError, match=r"no average is called 'ema_9'; there are \['ema_0.9'"),
        ema.applied(module, "ema_9"),
    ):
        pass


def test_applied_reaches_autocast_and_a_compiled_student(tmp_path):
    module, ema, _ = fit(tmp_path, 4)
    module.student.eval()
    x = torch.randn(2, 1, 4, 4)
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with torch.no_grad(), ema.applied(module):
            with context:
                want = module.student(x)
        with torch.no_grad(), context:
            raw = module.student(x)
            with ema.applied(module):
                assert torch.equal(module.student(x), want)
            assert torch.equal(module.student(x), raw)
            assert not torch.equal(raw, want)
    with torch.no_grad(), ema.applied(module):
        want = module.student(x)
    module.student.compile(backend="eager")
    with torch.no_grad():
        raw = module.student(x)
        with ema.applied(module):
            assert torch.equal(module.student(x), want)
        assert torch.equal(module.student(x), raw)
    assert next(iter(module.student.state_dict())) == "0.weight"


def test_low_precision_weights_have_float32_averages(tmp_path):
    module, ema, _ = fit(tmp_path, 4, precision="bf16-true", module=TinyMethod().bfloat16())
    average = ema.state_dict()["averages"]["ema_0.9"]["0.weight"]
    assert average.dtype == torch.float32
    assert not torch.equal(average, average.bfloat16().float())
    with ema.applied(module):
        assert torch.equal(module.student[0].weight, average.bfloat16())


def test_resume_is_exact(tmp_path):
    fit(tmp_path / "a", 9, Checkpoints(4))
    fit(tmp_path / "b", 4, Checkpoints(4))
    fit(tmp_path / "b", 9, Checkpoints(4), ckpt_path=tmp_path / "b/checkpoints/last.ckpt")
    one, two = (read_checkpoint(tmp_path / run / "checkpoints/last.ckpt") for run in "ab")
    assert one["global_step"] == two["global_step"] == 9
    for key in ("state_dict", "callbacks", "optimizer_states"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)


def test_training_goes_on_after_a_validation_that_laid_the_averages_out_anew(tmp_path):
    def module():
        return TinyMethod(channels=2)

    fit(tmp_path, 3, Checkpoints(3), module=module())
    path = tmp_path / "checkpoints/last.ckpt"
    # other strides, as after training on the CPU and going on on a GPU
    student, ema = module().to(memory_format=torch.channels_last), EMA(RULES)
    t = trainer(tmp_path, 6, [ema], validate_every=1)
    t.validate(student, ckpt_path=path, verbose=False)  # Lightning does this in inference mode
    t.fit(student)
    weights = [average["0.weight"] for average in ema.state_dict()["averages"].values()]
    assert ema.updates == 3 + 6
    assert all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_inference() for w in weights)


def test_student_state_reads_any_copy_from_a_checkpoint(tmp_path):
    module, ema, _ = fit(tmp_path, 5, Checkpoints(5))
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert not any("teacher" in key for key in checkpoint["state_dict"])
    with ema.applied(module, NAMES[1]):
        want = {k: v.clone() for k, v in module.student.state_dict().items()}
    asked = [None, *NAMES, "raw"]
    names, states = zip(*(student_state(checkpoint, name) for name in asked), strict=True)
    assert list(names) == [NAMES[0], *NAMES, "raw"]
    torch.testing.assert_close(states[2], want, rtol=0, atol=0)
    torch.testing.assert_close(states[-1], dict(module.student.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    TinyMethod().student.load_state_dict(states[0])
    for unknown in ("ema_1", 5):
        with pytest.raises(ValueError, match=f"no weights called {unknown!r}; it has .*{NAMES[0]}.*'raw'"):
            student_state(checkpoint, unknown)
    assert student_state({"state_dict": {"student.w": 1, "other.w": 2}}) == ("raw", {"w": 1})


def test_no_checkpoint_of_swapped_weights(tmp_path):
    module, ema, t = fit(tmp_path, 3)
    with ema.applied(module), pytest.raises(RuntimeError, match=r"holds the average ema_0\.9 now"):
        t.save_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()
    t.save_checkpoint(tmp_path / "x.ckpt")


def test_other_averages_than_the_checkpoint_are_refused(tmp_path):
    fit(tmp_path, 2, Checkpoints(2))
    ema = EMA({"decay": 0.5})
    with pytest.raises(ValueError, match=r"the checkpoint holds \['ema_0.9'.*the config asks for \['ema_0.5'\]"):
        trainer(tmp_path, 4, [ema]).fit(TinyMethod(), ckpt_path=tmp_path / "checkpoints/last.ckpt")


def test_an_average_of_another_student_is_refused(tmp_path):
    _, ema, t = fit(tmp_path, 2)
    other = EMA(RULES)
    other.load_state_dict(ema.state_dict())
    module = TinyMethod()
    module.student = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match=r"averages another student: only one of them has \['1.bias', '1.weight'\]"):
        other.on_train_start(t, module)


def test_a_callback_evaluates_any_weights(tmp_path):
    class User(pl.Callback):
        pass

    user, ema, module = User(), EMA(RULES), TinyMethod()
    t = trainer(tmp_path, 3, [ema, user])
    t.fit(module)
    raw = module.student[0].weight.detach().clone()
    assert list(student_weights(t, user, None)) == NAMES[:1]
    for name, applied in student_weights(t, user, ["raw", NAMES[2]]).items():
        with applied(module):
            want = raw if name == "raw" else ema.state_dict()["averages"][name]["0.weight"]
            assert torch.equal(module.student[0].weight, want)
    with pytest.raises(ValueError, match=r"User: ema_names must be some of \['ema_0.9', .*, 'raw'\], got \['ema_1'\]"):
        student_weights(t, user, ["ema_1"])
    with pytest.raises(ValueError, match="User must come after EMA in callbacks"):
        student_weights(trainer(tmp_path, 3, [user, ema]), user, None)
    assert list(student_weights(trainer(tmp_path, 3, [user]), user, None)) == ["raw"]


@pytest.mark.parametrize(
    ("averages", "message"),
    [
        ([], "one or several different rules"),
        ([{"decay": 0.9}, {"decay": 0.9}], "one or several different rules"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"halflife_kimg": 0}, "halflife_kimg must be positive, got 0"),
        ({"halflife_kimg": 1, "rampup_ratio": -1}, "rampup_ratio must be positive or null, got -1"),
        ({"decay": 0.9, "rampup_ratio": 0.1}, "either"),
        ({"decay": 0.9, "halflife_kimg": 1}, "either"),
        ({"rate": 0.9}, "either"),
        ({"gamma": 7, "sigma_rel": 0.1}, "either"),
        ({"gamma": 7, "rampup_ratio": 0.1}, "either"),
        ({"gamma": -1}, "gamma must not be negative, got -1"),
        ({"sigma_rel": 0.3}, r"sigma_rel must lie in \(0, 0.2887\], got 0.3"),
        ([0.9], "either"),
    ],
)
def test_misuse(averages, message):
    with pytest.raises(ValueError, match=message):
        EMA(averages)


def _train_rank(rank, folder):
    module = TinyMethod()
    module.seed = rank  # other noise, other gradients
    ema = EMA(RULES)
    trainer(folder, 5, [ema], **TWO).fit(module)
    torch.save([ema.state_dict(), module.student_states[0]], folder / f"{rank}.pt")


def test_two_processes_have_equal_averages(tmp_path):
    in_two_processes(_train_rank, tmp_path)
    (one, first), (two, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["updates"] == 5
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    # the batch norm statistics are each rank's own: the two did see different noise
    assert not torch.equal(first["1.running_mean"], second["1.running_mean"])
