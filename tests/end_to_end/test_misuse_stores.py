"""Kept data that are no longer those that were written: each start says so, and says what to delete."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from end_to_end_tools import STUDENT, copied, train

COMMAND = [option for option in STUDENT if not option.startswith("name=")]


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    return copied(finished, tmp_path_factory.mktemp("stores"))


def array(change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        values = np.load(path)
        change(values)
        np.save(path, values)

    return damage


def last_bit(path: Path) -> None:
    """Of the data of a shard, which its hash follows."""
    data = bytearray(path.read_bytes())
    data[-33] ^= 1
    path.write_bytes(data)


def of_other_numbers(path: Path) -> None:
    with np.load(path) as file:
        content = dict(file)
    np.savez(path, **{**content, "sigma": 1.5 * content["sigma"]})


def of_others(path: Path) -> None:
    with np.load(path) as file:
        content = dict(file)
    np.savez(path, **{**content, "identity": np.array("extractor A, images B")})


@pytest.mark.parametrize("options", [(), ("data.verify=true",)])
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "digits/images.npy",
            array(lambda images: images.__setitem__(..., 7)),
            [
                "data/digits/images.npy is damaged, its SHA-256 is not meta.json's: delete the folder data/digits and run again"
            ],
        ),
        (
            "digits/labels.npy",
            array(lambda labels: labels.__setitem__(..., 3)),
            ["data/digits/labels.npy is damaged, its SHA-256 is not meta.json's: delete the folder data/digits"],
        ),
        (
            "digits/labels.npy",
            array(lambda labels: labels.__setitem__(5, 10)),
            ["data/digits/labels.npy is damaged, labels 0 to 10 of 10 classes: delete the folder data/digits"],
        ),
        (
            "digits/meta.json",
            lambda path: path.write_text("[" * 200_000),
            ["data/digits/meta.json is damaged or of another version: delete the folder data/digits"],
        ),
        (
            "trajectories/*/shard-00000-first-64.npy",
            last_bit,
            [
                "shard-00000-first-64.npy is damaged, its data do not have the recorded SHA-256: delete this file and run again"
            ],
        ),
        (
            "statistics/*.npz",
            of_other_numbers,
            [".npz is damaged", "its numbers have changed: they do not have its SHA-256; delete it"],
        ),
        (
            "statistics/*.npz",
            of_others,
            [".npz is damaged", "it was made of other images or by another extractor; delete it"],
        ),
    ],
)
def test_what_has_changed_is_named_with_the_way_out(folder, options, name, damage, message):
    (path,) = (folder / "data").glob(name)
    before = path.read_bytes()
    damage(path)
    train(folder, *COMMAND, "name=new", *options).refused("error: runs/new: ", *message)
    path.write_bytes(before)


def test_verify_is_no_other_config(folder):
    """A run goes on with it, and shows its table where it is complete."""
    assert "run is complete" in train(folder, *STUDENT, "data.verify=true").ok().out
