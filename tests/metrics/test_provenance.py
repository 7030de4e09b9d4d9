import hashlib
import subprocess

import pytest
from quality_tools import REAL, students

from stillhouse.metrics import provenance
from stillhouse.metrics.provenance import revision, short_revision, student_provenance, with_provenance


@pytest.fixture(autouse=True)
def _asked_anew():
    revision.cache_clear()
    yield
    revision.cache_clear()


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_revision_says_whether_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PROJECT_ROOT", tmp_path)
    assert revision() is None
    revision.cache_clear()
    git(tmp_path, "init")
    (tmp_path / "a").write_text("a")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert revision() == head
    revision.cache_clear()
    (tmp_path / "a").write_text("b")
    assert revision() == f"{head}-dirty"
    assert [short_revision(each) for each in (head, revision(), None)] == [head[:7], f"{head[:7]}-dirty", "unknown"]


def test_inside_another_project_there_is_no_revision(tmp_path, monkeypatch):
    git(tmp_path, "init")
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(provenance, "PROJECT_ROOT", tmp_path / "site-packages")
    assert revision() is None


def test_records_get_the_hash_of_the_config_file(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (record,) = with_provenance(students({1: 0.5}), tmp_path / "config.yaml", "w" * 64)
    assert record.provenance == {
        "revision": revision(),
        "config": hashlib.sha256(b"seed: 0\n").hexdigest(),
        "weights": "w" * 64,
    }
    assert student_provenance([REAL, record]) == record.provenance
    assert student_provenance([REAL]) is None
