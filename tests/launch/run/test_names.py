import pytest

from launch.run.names import data_of, run_folder


@pytest.mark.parametrize(
    ("teacher", "data"),
    [
        ("digits", "digits"),
        ("digits_rf12", "digits"),
        ("cifar10_cond_ve", "cifar10"),
        ("cifar10_baseline_vp", "cifar10"),
        ("celebahq256_ddpm", "celebahq256"),
        ("runs/NAME_rf1", "runs/NAME_rf1"),
        ("lsun_church", "lsun_church"),
        ("five_veils", "five_veils"),
    ],
)
def test_a_teachers_data_is_its_name_without_what_it_is(teacher, data):
    assert data_of(teacher) == data


@pytest.mark.parametrize("name", ["", "../../outside", "a/../../conf", "/tmp/elsewhere", "a" * 256])
def test_a_name_that_is_refused_later_makes_no_folder_elsewhere_before(name):
    """Hydra makes a job's folder first."""
    assert run_folder("a/b") == "runs/a/b"
    assert run_folder(name) == "runs"
