import errno
import multiprocessing
import os
import signal

import pytest

from stillhouse.file_locks import hold_lock, try_lock, wait_for_lock

FORK = multiprocessing.get_context("fork")


def hold(path, held):
    lock = try_lock(path)
    held.set()
    signal.pause()
    lock.release()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "lock" until it is killed."""
    held = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "lock", held))
    process.start()
    assert held.wait(20)
    yield process
    process.kill()
    process.join()


def test_one_process_holds_a_lock_and_a_kill_frees_it(holder, tmp_path):
    assert try_lock(tmp_path / "lock") is None
    with pytest.raises(ValueError, match="in use"), hold_lock(tmp_path / "lock", ValueError("in use")):
        pytest.fail("both have it")
    holder.kill()
    wait_for_lock(tmp_path / "lock", "waiting").release()
    with hold_lock(tmp_path / "lock", ValueError("in use")):
        assert try_lock(tmp_path / "lock") is None
    assert try_lock(tmp_path / "lock") is not None


def test_a_child_does_not_keep_the_lock(tmp_path):
    """Workers that load data are forked by the process that trains."""
    lock = try_lock(tmp_path / "lock")
    child = FORK.Process(target=signal.pause)
    child.start()
    lock.release()
    other = try_lock(tmp_path / "lock")
    assert other is not None
    other.release()
    child.kill()
    child.join()


def test_a_disk_without_locks_is_named_or_done_without(tmp_path, monkeypatch):
    def unsupported(lock, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(OSError, match=rf"{tmp_path} lies on a disk without file locks \(No locks available\); set a.b"):
        try_lock(tmp_path / "lock", "set a.b")
    try_lock(tmp_path / "lock").release()
