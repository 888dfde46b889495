"""Reading and writing the image processors of transformers.

Values are read as transformers 5 reads them: what is absent is the default of the file's own class
of image processor. Operations that jaxtta has not are refused by name.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from jaxtta.models.checkpoints.files import PREPROCESSING_FILES, read_json
from jaxtta.models.clip import CLIP
from jaxtta.models.preprocess import CLIP_MEAN, CLIP_STD, DEFAULTS, HALF_MEAN, Preprocessing
from jaxtta.models.supervised import ImageClassifier

M = TypeVar("M", CLIP, ImageClassifier)
log = logging.getLogger(__name__)

BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)


class _Processor(NamedTuple):
    """What an image processor of transformers does where its file does not say.

    Attributes:
        square: whether a number as `size` means a square; the shorter side otherwise.
        size: as a file would give it.
        crop_size: likewise; None for no crop.
        resample: PIL's number of the filter.
        image_mean: per channel.
        image_std: per channel.
    """

    square: bool
    size: Mapping[str, int]
    crop_size: int | None
    resample: int
    image_mean: tuple[float, ...] = HALF_MEAN
    image_std: tuple[float, ...] = HALF_MEAN

    def default(self, key: str) -> Any:
        """The value of a setting that the file leaves out."""
        flags = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
        known = flags | {"do_center_crop": self.crop_size is not None, "rescale_factor": 1 / 255}
        return known[key] if key in known else getattr(self, key)


_SHORTER, _SQUARE = {"shortest_edge": 224}, {"height": 224, "width": 224}
_PROCESSORS = {
    "CLIPImageProcessor": _Processor(False, _SHORTER, 224, BICUBIC, CLIP_MEAN, CLIP_STD),
    "BitImageProcessor": _Processor(False, _SHORTER, 224, BICUBIC, CLIP_MEAN, CLIP_STD),
    "ViTImageProcessor": _Processor(True, _SQUARE, None, BILINEAR),
    "DeiTImageProcessor": _Processor(True, {"height": 256, "width": 256}, 224, BICUBIC),
    "SiglipImageProcessor": _Processor(False, _SQUARE, None, BICUBIC),
}
_FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def read_preprocessing(
    folder: Path, default: Preprocessing, kind: str = "CLIPImageProcessor"
) -> tuple[Preprocessing, str]:
    """Read a checkpoint's image processor.

    Args:
        folder: the checkpoint's.
        default: what holds where the checkpoint has no such file; of the model's size.
        kind: transformers' class of image processor where the file names none.

    Returns:
        The settings, and the file that they are from.

    Raises:
        ValueError: if the file cannot be read, names something that jaxtta does not do, or gives
            images of another size than the model's.
    """
    path, config = _find(folder)
    if path is None:
        origin = DEFAULTS if kind.startswith("CLIP") else f"the defaults of {kind}"
        log.warning(
            "%s: has neither %s: %s are taken (%s)",
            folder,
            " nor ".join(PREPROCESSING_FILES),
            origin,
            default,
        )
        return default, origin
    try:
        return _parse(path, config, default.image_size, kind), str(path)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: cannot be read as preprocessing settings ({error})") from error


def with_preprocessing(model: M, folder: Path, kind: str = "CLIPImageProcessor") -> M:
    """A model with the image processor of its folder; the rest is as in `read_preprocessing`."""
    found, origin = read_preprocessing(folder, model.preprocessing, kind)
    return dataclasses.replace(model, preprocessing=found, preprocessing_origin=origin)


def _find(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The file that transformers 5 takes, and its settings."""
    nested, plain = (folder / name for name in PREPROCESSING_FILES)
    if nested.exists():
        whole = read_json(nested)
        config = whole.get("image_processor")
        if config is None and "image_processor_type" in whole and not plain.exists():
            config = whole
        if config is not None:
            if not isinstance(config, dict):
                raise ValueError(f"{nested}: image_processor is {config!r}, expected an object")
            _report_conflict(nested, config, plain)
            return nested, config
    return (plain, read_json(plain)) if plain.exists() else (None, {})


def _report_conflict(nested: Path, config: dict[str, Any], plain: Path) -> None:
    """Log where the file that transformers 4 reads says something else."""
    other = read_json(plain) if plain.exists() else {}
    keys = {*config} & {*other} - {"image_processor_type", "processor_class"}
    if differ := sorted(key for key in keys if config[key] != other[key]):
        log.warning("%s is read; %s has another %s", nested, plain, ", ".join(differ))


def _parse(path: Path, config: dict[str, Any], image_size: int, kind: str) -> Preprocessing:
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or kind
    name = str(name).replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil")
    if name not in _PROCESSORS:
        raise ValueError(f"image_processor_type is {name!r}, known are {', '.join(_PROCESSORS)}")
    processor = _PROCESSORS[name]
    for key, value in config.items():
        if key.startswith("do_") and value and key not in _FLAGS:
            raise ValueError(f"{key} is {value!r}, which is not supported")
    missing: list[str] = []

    def get(key: str) -> Any:
        # In transformers a flag that is null is off; what a filter that is null means differs.
        asked = key in config and (key.startswith("do_") or key == "resample")
        if asked or config.get(key) is not None:
            return config[key]
        if not key.startswith("do_") and key != "rescale_factor":
            missing.append(key)
        return processor.default(key)

    resize, crop, resample = None, None, BICUBIC
    if get("do_resize"):
        square = config.get("default_to_square")
        resize = _size(get("size"), "size", processor.square if square is None else bool(square))
        resample = _resample(get("resample"))
    if get("do_center_crop"):
        crop = _pair(_size(get("crop_size"), "crop_size", True))
    if not get("do_rescale") or abs(_number(get("rescale_factor")) * 255 - 1) > 1e-3:
        raise ValueError("only images scaled by 1/255 are supported")
    mean, std = (0.0,) * 3, (1.0,) * 3
    if get("do_normalize"):
        mean, std = _numbers(get("image_mean")), _numbers(get("image_std"))
    if not len(mean) == len(std) == 3 or min(std) <= 0:
        raise ValueError("mean and std need three numbers each, std above 0")
    taken = ", ".join(f"{key} {processor.default(key)}" for key in missing)
    final = crop or resize
    if final != (image_size, image_size):
        size = "images of different sizes"
        if isinstance(final, tuple):
            size = f"images of {final[0]}×{final[1]}"
        sizes = ", ".join(f"{key} {processor.default(key)}" for key in missing if "size" in key)
        because = f" ({name}'s default is {sizes})" if sizes else ""
        raise ValueError(f"gives {size}{because}, the model takes {image_size}×{image_size}")
    if taken:
        log.warning("%s: says nothing of some settings; %s's are taken: %s", path, name, taken)
    return Preprocessing(image_size, resize, crop, resample, mean, std)


def _size(size: Any, name: str, square: bool) -> int | tuple[int, int]:
    """A size in one of the forms that transformers accepts: an integer is the shorter side."""
    if _is_side(size):
        return (size, size) if square else size
    if isinstance(size, list) and len(size) == 2 and all(map(_is_side, size)):
        return size[0], size[1]
    given = {key: value for key, value in size.items() if value} if isinstance(size, dict) else {}
    if all(map(_is_side, given.values())):
        if set(given) == {"shortest_edge"}:
            return given["shortest_edge"]
        if set(given) == {"height", "width"}:
            return given["height"], given["width"]
    if set(given) == {"shortest_edge", "longest_edge"}:
        raise ValueError(
            f"{name} is {size!r}, which transformers 4 and 5 read differently: leave out "
            "longest_edge, or give height and width"
        )
    raise ValueError(f"{name} is {size!r}, expected shortest_edge, or height and width, in pixels")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        raise ValueError("crop_size has a shortest_edge, expected height and width")
    return size


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _resample(value: Any) -> int:
    """PIL's number of a filter that is given by number or name."""
    if isinstance(value, str) and value.upper() in Image.Resampling.__members__:
        return int(Image.Resampling[value.upper()])
    if isinstance(value, int) and not isinstance(value, bool) and value in set(Image.Resampling):
        return value
    names = ", ".join(f"{int(x)} ({x.name.lower()})" for x in Image.Resampling)
    raise ValueError(f"resample is {value!r}, expected one of {names}")


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{value!r} stands where a number is expected")
    return float(value)


def _numbers(value: Any) -> tuple[float, ...]:
    """A number for each colour; one number is for all three."""
    return tuple(map(_number, value if isinstance(value, list | tuple) else [value] * 3))


def processor_settings(preprocessing: Preprocessing) -> dict[str, Any]:
    """The `preprocessor_config.json` that transformers' CLIP reads.

    Args:
        preprocessing: the settings.

    Returns:
        The file's content. Every size is written, since transformers refuses empty ones.

    Raises:
        ValueError: if transformers' CLIP cannot do it.
    """
    if preprocessing.resize_longer:
        raise ValueError(
            "a resize of the longer side cannot be saved: transformers' image processors for CLIP "
            "have none"
        )
    side = preprocessing.image_size
    resize, crop = preprocessing.resize or side, preprocessing.crop or (side, side)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": preprocessing.resize is not None,
        "size": {"shortest_edge": resize}
        if isinstance(resize, int)
        else {"height": resize[0], "width": resize[1]},
        "resample": preprocessing.resample,
        "do_center_crop": preprocessing.crop is not None,
        "crop_size": {"height": crop[0], "width": crop[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing.mean,
        "image_std": preprocessing.std,
    }
