import pytest
from end_to_end_tools import STUDENT, train


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with data/ and the complete run runs/run, made once; to be copied by those who change it."""
    folder = tmp_path_factory.mktemp("finished")
    train(folder, *STUDENT).ok()
    return folder
