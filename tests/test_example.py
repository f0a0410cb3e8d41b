import subprocess
import sys

import numpy as np
import tifffile
from conftest import ROOT


def test_the_example_data_is_what_its_script_makes(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "data" / "generate_example_data.py", "--output_folder", tmp_path], check=True
    )
    for kind, dtype in (("images", np.uint16), ("masks", np.uint8)):
        made, kept = (sorted((folder / kind).iterdir()) for folder in (tmp_path, ROOT / "data"))
        assert [path.name for path in made] == [path.name for path in kept] and len(kept) == 40
        for one, other in zip(made, kept):
            array = tifffile.imread(other)
            assert array.shape == (256, 256) and array.dtype == dtype
            # The last digit of a logarithm or sine may differ between machines.
            np.testing.assert_allclose(tifffile.imread(one).astype(int), array, atol=1 if kind == "images" else 0)
    assert sum(path.stat().st_size for path in (ROOT / "data").glob("*s/*.tif")) < 5_000_000
