"""A data set whose images and teacher the user brings: from EDM's zip to the final table, with a shrunken network."""

import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_files import edm_zip
from end_to_end_tools import PRETRAIN, RUN, STUDENT, evaluate, read_csv, read_json, train
from published_files import cifar10

from stillhouse.metrics.statistics import save_statistics

SIDE = 16  # pixels
CIFAR = (
    "data=cifar10",
    "data.path=data/cifar10-32x32.zip",
    "data.url=null",
    f"data.resolution={SIDE}",
    "teacher.network.num_blocks=1",
    "teacher.network.channel_mult=[1,1]",
    "evaluation.extractor._target_=cheap_extractor.Cheap",
)
SHORT = (
    "method.kimg=0.08",  # 5 steps
    "evaluation.num_samples=10",
    "evaluation.training.num_samples=10",
    "callbacks.grid=null",
)


def with_zip(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (48, SIDE, SIDE, 3), dtype=np.uint8)
    edm_zip(folder / "data/cifar10-32x32.zip", images, [i % 10 for i in range(48)])
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = with_zip(tmp_path_factory.mktemp("cifar"))
    train(folder, *PRETRAIN, *SHORT, *CIFAR).ok()
    return folder


def test_a_teacher_is_trained_and_measured(pretrained):
    records = {record["subject"]: record for record in read_json(pretrained / RUN / "metrics.json")}
    assert {subject: record["metric"] for subject, record in records.items()} == dict.fromkeys(
        ("student", "real"), "fid_cheap"
    )
    assert records["student"]["fingerprint"]["labels"] == "none"
    meta = json.loads((pretrained / "data/cifar10/meta.json").read_text())
    assert (meta["count"], meta["classes"], meta["source"][:17]) == (48, 10, "cifar10-32x32.zip")
    assert [int(row["step"]) for row in read_csv(pretrained / RUN / "metrics.csv")] == list(range(1, 6))


@pytest.mark.slow
def test_it_is_a_teacher_for_a_student_and_for_evaluation(pretrained, tmp_path):
    with_zip(tmp_path)
    weights = f"teacher.weights={pretrained / RUN / 'student.safetensors'}"
    small = (*CIFAR, "teacher.steps=2", weights)
    train(tmp_path, *STUDENT, *SHORT, *small).ok()
    records = {record["subject"]: record for record in read_json(tmp_path / RUN / "metrics.json")}
    assert {subject: record["nfe"] for subject, record in records.items()} == {"teacher": 3, "student": 1, "real": 0}
    ended = evaluate(
        tmp_path,
        "teacher=cifar10",
        "teacher.network.model_channels=8",
        *small,
        "num_samples=10",
        "blocks=2",
        "device=cpu",
    ).ok()
    assert "fid_cheap" in ended.out
    (measured,) = (r for r in read_json(tmp_path / "runs/teacher-cifar10/metrics.json") if r["subject"] == "teacher")
    assert measured["values"] == pytest.approx(records["teacher"]["values"], rel=1e-5)


def test_what_is_missing_is_said_in_one_line(tmp_path):
    train(tmp_path, *PRETRAIN, *CIFAR).refused("no cifar10 images", "cifar-10-python.tar.gz", "data.path")
    weights = [option for option in STUDENT if not option.startswith("teacher.weights")]
    train(tmp_path, *weights, *CIFAR).refused("no weights at", "weights/edm-cifar10-32x32-uncond-vp.safetensors")
    home = f"evaluation.extractor.weights={tmp_path / 'gone.pth'}"
    train(tmp_path, *PRETRAIN, *CIFAR[:-1], home).refused(
        "no inception-v3-compat weights at", "gone.pth", "add download=true"
    )


@pytest.mark.slow
def test_score_distillation_with_a_gan_reads_the_images(pretrained, tmp_path):
    """Labels and real images from the zip, a classifier on the fake score's encoder, and a path of one node."""
    with_zip(tmp_path)
    gan = "method.gan={generator:1.0,fake:1.0,sigmas:{_target_:stillhouse.diffusion.noise_levels.KarrasGrid}}"
    weights = f"teacher.weights={pretrained / RUN / 'student.safetensors'}"
    disback = ("method=disback", "method.nodes=1", "method.degradation.steps=2", "method.kimg=0.1", weights, gan)
    train(tmp_path, *PRETRAIN[:-1], *SHORT, *CIFAR, "teacher.steps=2", *disback).ok()
    rows = read_csv(tmp_path / RUN / "metrics.csv")
    assert all(float(rows[-1][key]) > 0 for key in ("loss/gan_fake", "loss/gan_generator"))
    state = torch.load(tmp_path / RUN / "checkpoints/last.ckpt", weights_only=True)
    assert {key.partition(".")[0] for key in state["state_dict"]} == {"student", "fake_score", "gan"}


@pytest.mark.slow
def test_a_method_that_needs_no_images_is_trained_and_measured_without_any(tmp_path):
    save_statistics(tmp_path / "refs/cheap.npz", torch.zeros(8), torch.eye(8))
    options = ("method=diff_instruct", "evaluation=edm_cifar10", "evaluation.reference.file=refs/cheap.npz")
    train(tmp_path, *PRETRAIN[:-1], *SHORT, *CIFAR, "teacher.steps=2", *options).ok()
    records = {record["subject"]: record for record in read_json(tmp_path / RUN / "metrics.json")}
    assert records.keys() == {"student", "teacher"}
    reference = hashlib.sha256((tmp_path / "refs/cheap.npz").read_bytes()).hexdigest()
    assert {record["fingerprint"]["reference"] for record in records.values()} == {reference}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["measured"]
    assert any(row["fid_cheap_10/ema_500kimg"] for row in read_csv(tmp_path / RUN / "metrics.csv"))


def test_missing_images_are_said_before_the_first_stage(pretrained, tmp_path):
    weights = f"teacher.weights={pretrained / RUN / 'student.safetensors'}"
    train(tmp_path, *PRETRAIN[:-1], *CIFAR, "teacher.steps=2", "method=disback", weights).refused("no cifar10 images")
    assert not (tmp_path / "data").exists()


def test_the_archive_is_fetched_on_request_packed_and_trained_on(tmp_path):
    """From an address to a teacher: a server on this machine has CIFAR-10's archive, in its published layout."""
    served, here = tmp_path / "served", tmp_path / "here"
    served.mkdir()
    here.mkdir()
    cifar10(served)
    archive = served / "cifar-10-python.tar.gz"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/{archive.name}"
        small = [
            option for option in CIFAR if "resolution" not in option and "path" not in option and "url" not in option
        ]
        options = (*PRETRAIN, *SHORT, *small, f"data.url={url}", "evaluation.extractor.url=null")
        train(here, *options, f"data.sha256={digest}").refused("no cifar10 images", f"add download=true to fetch {url}")
        train(here, *options, f"data.sha256={'0' * 64}", "download=true").refused(
            f"{url} has SHA-256 {digest}, expected 000"
        )
        assert not list(here.glob("data/*"))
        ended = train(here, *options, f"data.sha256={digest}", "download=true").ok()
        http.shutdown()
    assert f"data: fetching {url} to data/cifar-10-python.tar.gz" in ended.out
    assert json.loads((here / "data/cifar10/meta.json").read_text())["count"] == 20
    assert (here / RUN / "metrics.json").exists()
    train(here, *options, f"data.sha256={digest}").ok()  # the address is no more, and not needed
