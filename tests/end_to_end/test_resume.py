"""A run that is killed at any moment and started again ends as one that was left alone: bit for bit."""

import io
import os
import random
import shutil
import signal
from functools import partial

import pytest
from end_to_end_tools import (
    RUN,
    STUDENT,
    assert_same_run,
    copied,
    die,
    in_call,
    kill_at,
    read_checkpoint,
    read_csv,
    snapshot,
    train,
    with_data,
)
from kill_series import kill_series
from omegaconf import OmegaConf

OPTIONS = (
    *STUDENT,
    "method.target_noise=0.1",  # else a step of this method draws no random numbers
    "method.lr=0.1",  # so fast that the held-out loss is best at step 8 and worse at step 12
    "callbacks.ema.averages=[{decay:0.5},{halflife_kimg:1,rampup_ratio:0.05}]",
)
SLOW = pytest.mark.slow
STEP = "lightning_modules:DenoisingStudent.training_step"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, *OPTIONS).ok()
    scores = [float(row["heldout/loss"]) for row in read_csv(folder / RUN / "metrics.csv") if row["heldout/loss"]]
    assert min(scores) == scores[1]
    return folder


def killed_half_way(original, content, file, *args, **kwargs):
    """Half of a checkpoint is on disk."""
    buffer = io.BytesIO()
    original(content, buffer, *args, **kwargs)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    os.fsync(file.fileno())
    die()


def last_step(folder):
    path = folder / RUN / "checkpoints/last.ckpt"
    return read_checkpoint(path)["global_step"] if path.exists() else 0


def left_out(original, *args):
    pass


def of_checkpoint(source, target):
    return str(target).endswith(".ckpt")


# Checkpoints are renamed in this order: last at step 3, best at 4, last at 6, best at 8, last at 9, 12 and 13.
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(kill_at(STEP, 1), id="first step", marks=SLOW),
        pytest.param(kill_at("lightning_modules:DenoisingStudent.validation_step", 2), id="validation", marks=SLOW),
        pytest.param(partial(in_call, "torch:save", 3, killed_half_way), id="half a checkpoint", marks=SLOW),
        pytest.param(kill_at("os:replace", 4, of_checkpoint, after=True), id="best newer than last"),
        pytest.param(kill_at("os:replace", 6, of_checkpoint), id="last newer than best", marks=SLOW),
    ],
)
def test_killed(uninterrupted, tmp_path, before):
    with_data(uninterrupted, tmp_path)
    train(tmp_path, *OPTIONS, before=before).killed()
    step = last_step(tmp_path)
    ended = train(tmp_path, *OPTIONS).ok()
    said = f"runs/run goes on from step {step} of 13 ({16 * step} of 208 images)"
    assert [line for line in ended.out.splitlines() if "goes on from" in line] == [said] * (step > 0)
    assert_same_run(tmp_path / RUN, uninterrupted / RUN)


@pytest.mark.slow
def test_killed_in_the_final_evaluation(uninterrupted, tmp_path):
    """There is last.ckpt and no metrics.json: the run goes on, and trains no step again."""
    with_data(uninterrupted, tmp_path)
    train(tmp_path, *OPTIONS, before=kill_at("launch.run.final:save_records", 1)).killed()
    trained = {name: state for name, state in snapshot(tmp_path / RUN).items() if "ckpt" in name or "csv" in name}
    assert len(trained) == 3
    train(tmp_path, *OPTIONS, before=kill_at(STEP, 1)).ok()
    assert trained.items() <= snapshot(tmp_path / RUN).items()
    assert_same_run(tmp_path / RUN, uninterrupted / RUN)


@pytest.mark.slow
def test_killed_while_pairs_are_made(uninterrupted, tmp_path):
    """The training pairs stay, of the held-out ones nothing is left."""
    solve = "datamodules:TrajectoryStore._solve"  # one batch for each of the two shards
    for number in (1, 2):
        train(tmp_path, *OPTIONS, before=kill_at(solve, number)).killed()
    store = tmp_path / "data" / "trajectories"
    shards = [path.name for path in store.rglob("shard*")]
    assert shards == ["shard-00000-first-64.npy"]
    made = {name: state for name, state in snapshot(store).items() if name.endswith(".npy")}
    assert len(made) == 1
    train(tmp_path, *OPTIONS).ok()
    assert made.items() <= snapshot(store).items()
    for path in (uninterrupted / "data" / "trajectories").rglob("*.npy"):
        assert (store / path.relative_to(uninterrupted / "data" / "trajectories")).read_bytes() == path.read_bytes()
    assert not list(store.rglob("*.tmp*"))
    assert_same_run(tmp_path / RUN, uninterrupted / RUN)


def test_another_batch_size_would_change_the_images_seen(uninterrupted, tmp_path):
    """Refused by the run's config, and by the checkpoint itself where it was put into another run's folder."""
    copied(uninterrupted, tmp_path)
    (tmp_path / RUN / "metrics.json").unlink()
    train(tmp_path, *OPTIONS, "batch_size=32").refused("started with batch_size=16", "this command has batch_size=32")
    other = tmp_path / "runs/other"
    (other / "checkpoints").mkdir(parents=True)
    config = OmegaConf.load(tmp_path / RUN / "config.yaml")
    text = OmegaConf.to_yaml(config).replace("batch_size: 16", "batch_size: 32").replace("runs/run", "runs/other")
    (other / "config.yaml").write_text(text.replace("name: run", "name: other"))
    shutil.copy(tmp_path / RUN / "checkpoints/last.ckpt", other / "checkpoints/last.ckpt")
    refused = train(tmp_path, *OPTIONS, "batch_size=32", "name=other")
    refused.refused("the checkpoint runs/other/checkpoints/last.ckpt is of another configuration", "remove this one")


@pytest.mark.slow
def test_the_comparison_sees_a_difference(uninterrupted, tmp_path):
    """Training noise that is not repeated exactly: the seeding of a single step is left out."""
    with_data(uninterrupted, tmp_path)
    train(
        tmp_path, *OPTIONS, before=partial(in_call, "lightning_modules.components.method:seed_step", 5, left_out)
    ).ok()
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / RUN, uninterrupted / RUN)


@pytest.mark.slow  # a dozen commands
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_short_series_at_random_moments(uninterrupted, tmp_path, number):
    """`python tests/kill_series.py` makes long ones."""
    draw = partial(random.Random(number).uniform, 0.3, 6)
    for count in range(2):
        kill_series(tmp_path / str(count), uninterrupted, OPTIONS, number, kills=3, draw=draw)
