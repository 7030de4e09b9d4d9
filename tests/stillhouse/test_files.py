"""Files appear whole or not at all, and what killed processes left of them goes."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from stillhouse.files import atomic_write, check_folder_name, check_writable, remove_leftovers, write_file

FORK = multiprocessing.get_context("fork")


def under_way(path: Path, begun) -> None:
    with atomic_write(path) as temporary:
        temporary.mkdir() if path.suffix == "" else temporary.write_bytes(b"half")
        begun.set()
        time.sleep(100)


@pytest.fixture
def leave(tmp_path):
    """leave(name): the process that is writing it, still alive."""
    started = []

    def start(name):
        begun = FORK.Event()
        started.append(FORK.Process(target=under_way, args=(tmp_path / name, begun)))
        started[-1].start()
        assert begun.wait(20)
        return started[-1]

    yield start
    for process in started:
        process.kill()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def names(folder):
    return sorted(path.name.partition(".tmp-")[0] for path in folder.iterdir())


def test_the_next_to_write_a_file_removes_what_a_killed_one_left_of_it(tmp_path, leave):
    living = leave("curves.png")
    kill(leave("curves.png"))
    kill(leave("config.yaml"))
    assert names(tmp_path) == ["config.yaml", "curves.png", "curves.png"]
    write_file(tmp_path / "curves.png", b"whole")
    assert names(tmp_path) == ["config.yaml", "curves.png", "curves.png"]
    assert (tmp_path / "curves.png").read_bytes() == b"whole"
    kill(living)
    kill(leave("folder"))
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_of_another_machine_a_file_is_left_for_a_day(tmp_path):
    fresh, old = (tmp_path / f"{name}.tmp-1-00000000" for name in ("a", "b"))
    fresh.touch()
    old.touch()
    os.utime(old, times=(time.time() - 90_000,) * 2)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [fresh]


def test_an_error_leaves_nothing_and_the_file_as_it_was(tmp_path):
    write_file(tmp_path / "a", b"1")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a") as temporary:
        temporary.write_bytes(b"2")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"1"
    with pytest.raises(OSError, match="cannot write .*/a/b.* choose another folder"):
        write_file(tmp_path / "a" / "b", b"")


@pytest.mark.parametrize(
    "name", ["", " ", "..", "../a", "a/../../b", "/tmp/a", "a//b", "a/", "a\nb", "a" * 256, "\N{EURO SIGN}" * 86]
)
def test_names_that_would_lead_elsewhere_or_nowhere_are_refused(name):
    rule = "not empty, without .. and at most 255 long"
    with pytest.raises(ValueError, match="^name=") as refused:
        check_folder_name("name", name, "runs", several=True)
    assert str(refused.value) == f"name={name!r} must name a folder, or one in others (a/b), below runs/, {rule}"
    with pytest.raises(ValueError, match=f"must name one folder below data/, {rule}$"):
        check_folder_name("data.name", name, "data")


def test_a_name_may_be_several_folders_where_it_is_said_so():
    check_folder_name("name", "a/b c/..d", "runs", several=True)
    check_folder_name("data.name", "a" * 255, "data")
    with pytest.raises(ValueError, match="^data.name='a/b' must name one folder below data/"):
        check_folder_name("data.name", "a/b", "data")


def test_what_can_not_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    check_writable(tmp_path / "new/folder/a.json")
    with pytest.raises(OSError, match="^cannot write .*/folder: it is a folder; move it away or choose another place$"):
        check_writable(tmp_path / "folder")
    with pytest.raises(
        OSError, match=r"^cannot write .*/file/a.json: Not a directory \(.*/file\); choose another place$"
    ):
        check_writable(tmp_path / "file/a.json")
    assert names(tmp_path) == ["file", "folder"]
