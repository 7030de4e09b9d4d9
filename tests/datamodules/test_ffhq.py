"""Expected bytes: dataset_tool.py of NVlabs/edm at 008a4e5 with --resolution=64x64 on the same files."""

import numpy as np
import pytest
from edm_files import edm_zip
from picture_files import encoded, folder_of, pattern, zip_of

from datamodules import FFHQ

EDM_HASH = "89f2371eea3b07cef753e4931143ba81df45184b79efb7f2d7aa73079fbd737a"
FILES = {f"00000/{i:05d}.png": encoded(pattern(s, s, shift=i)) for i, s in enumerate((128, 128, 64))}


def module(folder, path, name="toy", **options):
    common = {"batch_size": 4, "resolution": 64, "num_classes": 0}
    return FFHQ(name, str(folder / "data"), path=str(folder / path), **{**common, **options})


def test_folder_zip_and_edms_zip_are_the_same_images(tmp_path):
    folder_of(tmp_path / "thumbnails128x128", FILES | {"LICENSE.txt": b"CC"})
    zip_of(
        tmp_path / "thumbnails128x128.zip", {f"thumbnails128x128/{name}": content for name, content in FILES.items()}
    )
    packed = module(tmp_path, "thumbnails128x128").reference()
    assert packed.hash == EDM_HASH
    assert packed.meta["source"].startswith("thumbnails128x128, 3 pictures in the order of their paths")
    assert module(tmp_path, "thumbnails128x128.zip", "zip").reference().hash == EDM_HASH
    edm_zip(tmp_path / "edm.zip", packed.images.transpose(0, 2, 3, 1))
    assert module(tmp_path, "edm.zip", "edm").reference().hash == EDM_HASH
    assert np.array_equal(packed.images[2].transpose(1, 2, 0), pattern(64, 64, shift=2))


@pytest.mark.parametrize("size", [(128, 120), (32, 32)])
def test_an_odd_size_is_named(tmp_path, size):
    folder_of(tmp_path / "a", FILES | {"00000/00009.png": encoded(pattern(*size))})
    message = f"00009.png has {size[0]}x{size[1]} pixels, no square of 64 or more as FFHQ's are; take it out"
    with pytest.raises(ValueError, match=message):
        module(tmp_path, "a").prepare_data()
    with pytest.raises(ValueError, match="data.num_classes=2: FFHQ has no classes; set data.num_classes=0"):
        module(tmp_path, "a", num_classes=2).prepare_data()
    assert not list((tmp_path / "data").glob("*"))
