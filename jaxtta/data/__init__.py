"""Images in folders and arrays, corruptions, and streams of numpy batches."""

from jaxtta.data.baselines import reference_points
from jaxtta.data.class_names import (
    CIFAR10_CLASSES,
    TEMPLATES,
    cifar100_classes,
    imagenet_classes,
    imagenet_templates,
    templates_for,
)
from jaxtta.data.corruptions import CLEAN, COMMON, VALIDATION, corrupt
from jaxtta.data.folders import (
    ImageFolder,
    captioned_folder,
    image_folder,
    list_images,
)
from jaxtta.data.layouts import (
    LAYOUTS,
    fgvc_aircraft,
    imagenet,
    imagenet_v2,
    listed_split,
    objectnet,
    open_source,
)
from jaxtta.data.memory import listed_part
from jaxtta.data.sources import (
    CorruptedArrays,
    CorruptedFolders,
    CorruptedOnTheFly,
    Domain,
    Images,
    Named,
    Source,
    contents_of,
    corrupted_arrays,
    corrupted_folders,
)
from jaxtta.data.streams import (
    ORDERS,
    SETTINGS,
    Batches,
    Stream,
    StreamBatch,
    arrange,
    canvas_for,
    make_streams,
    on_canvas,
    read_ahead,
    stream_of,
)
from jaxtta.data.text import given_class_names, read_class_names
from jaxtta.data.tfds import TfdsImages, tfds_images
from jaxtta.images import UnreadableImageError, open_image

__all__ = [
    "CIFAR10_CLASSES",
    "CLEAN",
    "COMMON",
    "LAYOUTS",
    "ORDERS",
    "SETTINGS",
    "TEMPLATES",
    "VALIDATION",
    "Batches",
    "CorruptedArrays",
    "CorruptedFolders",
    "CorruptedOnTheFly",
    "Domain",
    "ImageFolder",
    "Images",
    "Named",
    "Source",
    "Stream",
    "StreamBatch",
    "TfdsImages",
    "UnreadableImageError",
    "arrange",
    "canvas_for",
    "captioned_folder",
    "cifar100_classes",
    "contents_of",
    "corrupt",
    "corrupted_arrays",
    "corrupted_folders",
    "fgvc_aircraft",
    "given_class_names",
    "image_folder",
    "imagenet",
    "imagenet_classes",
    "imagenet_templates",
    "imagenet_v2",
    "list_images",
    "listed_part",
    "listed_split",
    "make_streams",
    "objectnet",
    "on_canvas",
    "open_image",
    "open_source",
    "read_ahead",
    "read_class_names",
    "reference_points",
    "stream_of",
    "templates_for",
    "tfds_images",
]
