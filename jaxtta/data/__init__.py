"""Where pictures come from: folders, corruptions, streams. Yields numpy batches."""

from jaxtta.data.corruptions import CLEAN, COMMON, VALIDATION, corrupt
from jaxtta.data.folders import (
    ImageFolder,
    UnreadablePictureError,
    image_folder,
    open_picture,
    read_class_names,
)
from jaxtta.data.streams import (
    Batches,
    CorruptedArrays,
    CorruptedOnTheFly,
    Source,
    StreamBatch,
    corrupted_arrays,
    picture_order,
    read_ahead,
)

__all__ = [
    "CLEAN",
    "COMMON",
    "VALIDATION",
    "Batches",
    "CorruptedArrays",
    "CorruptedOnTheFly",
    "ImageFolder",
    "Source",
    "StreamBatch",
    "UnreadablePictureError",
    "corrupt",
    "corrupted_arrays",
    "image_folder",
    "open_picture",
    "picture_order",
    "read_ahead",
    "read_class_names",
]
