"""CIFAR-10 as its authors publish it: pickles of arrays, read without running what they name."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

_KNOWN = {
    *(("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")),
    *(("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")),
}


class _Arrays(pickle.Unpickler):
    """Makes arrays, and refuses whatever else a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a file of `cifar-10-batches-py`, such as `test_batch`.

    Args:
        path: the file.

    Returns:
        Images (images, 32, 32, 3) uint8, and labels (images,) int32.

    Raises:
        ValueError: if it is damaged, or names anything but arrays.
    """
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()  # arrays of Python 2
        images = content["data"].astype(np.uint8, casting="safe", copy=False)
        images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, np.asarray(content["labels"], np.int32)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise any
        raise ValueError(f"{path}: is no file of cifar-10-batches-py ({error})") from error
