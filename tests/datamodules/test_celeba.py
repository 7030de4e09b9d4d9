import numpy as np
import pytest
from picture_files import encoded, folder_of, pattern, zip_of
from PIL import Image
from torchvision.transforms import Compose, Lambda, Resize
from torchvision.transforms.functional import crop

from datamodules import CelebA

PICTURES = [pattern(178, 218, shift=i) for i in range(6)]
TRAINING = [0, 1, 3, 5]
NAMES = [f"{i:06d}.jpg" for i in range(1, 7)]
FILES = {name: encoded(picture) for name, picture in zip(NAMES, PICTURES, strict=True)}
PARTITION = "".join(f"{name} {0 if i in TRAINING else 1 + i % 2}\n" for i, name in enumerate(NAMES))
ATTRIBUTES = "6\nBald Smiling Male\n" + "".join(f"{n}  {-1 if i % 3 else 1:2d} -1  1\n" for i, n in enumerate(NAMES))


def write(folder, files=FILES, partition=PARTITION, attributes=ATTRIBUTES, zipped=False):
    folder.mkdir(exist_ok=True)
    if zipped:
        zip_of(
            folder / "img_align_celeba.zip", {f"img_align_celeba/{name}": content for name, content in files.items()}
        )
    else:
        folder_of(folder / "img_align_celeba", files)
    for name, text in (("list_eval_partition.txt", partition), ("list_attr_celeba.txt", attributes)):
        if text is not None:
            (folder / name).write_text(text)
    return folder


def module(folder, path="celeba", name="toy", **options):
    common = {"batch_size": 4, "resolution": 64, "num_classes": 0}
    return CelebA(name, str(folder / "data"), path=str(folder / path), **{**common, **options})


def test_the_training_faces_are_cut_as_in_ddims_code(tmp_path):
    write(tmp_path / "celeba")
    write(tmp_path / "zipped", zipped=True)
    theirs = Compose([Lambda(lambda image: crop(image, 121 - 64, 89 - 64, 128, 128)), Resize(64)])
    expected = np.stack([np.asarray(theirs(Image.fromarray(PICTURES[i]))).transpose(2, 0, 1) for i in TRAINING])
    paths = ("celeba", "celeba/img_align_celeba", "zipped", "zipped/img_align_celeba.zip")
    packed = [module(tmp_path, path, f"toy{i}").reference() for i, path in enumerate(paths)]
    assert np.array_equal(packed[0].images, expected)
    assert len({one.hash for one in packed}) == 1
    assert packed[0].labels is None


def test_an_attribute_is_the_class(tmp_path):
    write(tmp_path / "celeba")
    data = module(tmp_path, attribute="Bald", num_classes=2)
    assert data.reference().labels.tolist() == [1, 0, 1, 0]
    assert data.reference().meta["source"].endswith(", class 1: Bald")
    with pytest.raises(
        ValueError,
        match="data.attribute=Male, but .*toy was packed with Bald: delete the folder .*toy .* or set data.name",
    ):
        module(tmp_path, attribute="Male", num_classes=2).reference()


@pytest.mark.parametrize(
    ("written", "options", "error", "message"),
    [
        ({"partition": None}, {}, FileNotFoundError, "list_eval_partition.txt is missing; get it from CelebA's page"),
        (
            {"files": {n: FILES[n] for n in NAMES[:3]}},
            {},
            FileNotFoundError,
            "img_align_celeba lacks 2 training images of list_eval_partition.txt, 000004.jpg the first; get it again",
        ),
        (
            {"files": FILES | {NAMES[3]: encoded(pattern(170, 218))}},
            {},
            ValueError,
            "000004.jpg has 170x218 pixels instead of 178x218; set data.path to the aligned images",
        ),
        (
            {"partition": PARTITION + f"{NAMES[0]} 2\n"},
            {},
            ValueError,
            "list_eval_partition.txt gives 000001.jpg both 0 and 2; get it again",
        ),
        ({"attributes": None}, {"attribute": "Bald"}, FileNotFoundError, "list_attr_celeba.txt is missing"),
        (
            {},
            {"attribute": "Tall"},
            ValueError,
            "data.attribute=Tall is not in .*txt; choose among Bald, Smiling, Male",
        ),
        ({"attributes": ATTRIBUTES[:-40]}, {"attribute": "Bald"}, OSError, "gives 000006.jpg no value of Bald; get it"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path, written, options, error, message):
    write(tmp_path / "celeba", **written)
    with pytest.raises(error, match=message) as caught:
        module(tmp_path, **options, num_classes=2 if options else 0).prepare_data()
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("*"))


@pytest.mark.parametrize("options", [{"attribute": "Bald"}, {"num_classes": 2}])
def test_attribute_and_classes_belong_together(tmp_path, options):
    with pytest.raises(ValueError, match="an attribute has 2 classes and null has 0; correct the options"):
        module(tmp_path, **options)


def test_another_list_of_attributes_is_seen(tmp_path):
    write(tmp_path / "celeba")
    module(tmp_path, attribute="Bald", num_classes=2).reference()
    write(tmp_path / "celeba", attributes=ATTRIBUTES.replace("  1 -1", " -1 -1", 1))
    with pytest.raises(ValueError, match=r"celeba has changed since .*toy was packed .*; now other classes\): delete"):
        module(tmp_path, attribute="Bald", num_classes=2).check_source()
