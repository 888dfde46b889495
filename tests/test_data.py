"""Datasets and benchmarks: corruption, subsets, digests, and other libraries' sequences."""

import dataclasses
import os

import grain
import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from jaxtta import assets, data
from jaxtta.corruptions import image_seed
from jaxtta.data import Domain, arrays
from jaxtta.io import digest_files
from jaxtta.models.preprocess import Preprocessing

PREPROCESS = Preprocessing(32, 32, (32, 32))
CLEAN = Domain("clean")
NAMES = ("cat", "dog")
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 40, 44, 3), np.uint8)
LABELS = [0, 0, 1, 1]


@pytest.fixture
def folder(tmp_path):
    """Two classes, five images, of several sizes."""
    rng = np.random.default_rng(0)
    for name, count in (("cat", 3), ("dog", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (40 + 4 * i, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / ".hidden").mkdir()
    (tmp_path / "images" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_image_folder(folder):
    listed = data.image_folder(folder)
    assert listed.class_names == NAMES
    assert list(listed.labels) == [0, 0, 0, 1, 1]
    assert [path.name for path in listed.files] == ["0.png", "1.png", "2.png", "0.png", "1.png"]
    assert data.name_of(listed, 4) == str(folder / "dog" / "1.png")
    np.testing.assert_array_equal(listed[1], np.asarray(Image.open(listed.files[1])))


def test_bad_folders_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.image_folder(tmp_path / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: class folder without images"):
        data.image_folder(folder)
    with pytest.raises(ValueError, match="expected at least two class folders, has no folders"):
        data.image_folder(folder / "empty")


@pytest.mark.parametrize("name", [*data.IMAGENET_C, *data.IMAGENET_C_EXTRA])
@pytest.mark.parametrize("size", [32, 45])
def test_every_corruption_is_repeatable_and_leaves_global_state_alone(name, size):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = data.corrupt(image, name, 3, seed=5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert (first.shape, first.dtype) == (image.shape, np.uint8)
    assert np.any(first != image)
    np.testing.assert_array_equal(first, data.corrupt(image, name, 3, seed=5))


@pytest.mark.parametrize(
    ("side", "name", "severity", "message"),
    [
        (40, "rain", 3, "'rain', expected one of gaussian_noise"),
        (40, "fog", 0, "severity is 0, expected 1 to 5"),
        (40, "fog", 6, "severity is 6"),
        (20, "fog", 5, "smaller than 32 pixels"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(side, name, severity, message):
    with pytest.raises(ValueError, match=message):
        data.corrupt(np.zeros((side, 40, 3), np.uint8), name, severity, 0)


def test_spatter_without_a_drop_leaves_the_image_as_it_is():
    """The library divides by the largest drop, and makes a black image of none."""
    image = np.full((32, 32, 3), 120, np.uint8)
    spattered = [data.corrupt(image, "spatter", 1, seed) for seed in range(60)]
    assert min(other.mean() for other in spattered) > 60
    assert any(np.array_equal(other, image) for other in spattered)


def test_images_have_seeds_of_their_own():
    seeds = {
        image_seed(s, name, severity, number)
        for s in range(3)
        for name in data.IMAGENET_C
        for severity in (1, 5)
        for number in range(20)
    }
    assert len(seeds) == 3 * 15 * 2 * 20


def batch_of(benchmark, domain, preprocess, numbers, seed=0):
    stream = data.stream_of("s", [domain], np.asarray(numbers), seed)
    return data.Batches(benchmark, (stream,), len(numbers), preprocess)[0]


@pytest.mark.parametrize("side", [32, 96])
def test_images_are_corrupted_at_the_smaller_resolution(folder, side):
    """Before a small image is enlarged, and after a large one is cropped."""
    preprocess = Preprocessing(side, side + 8, (side, side))
    listed = data.image_folder(folder)
    benchmark = data.corrupted(listed, preprocess)
    seeds = [image_seed(seed, "pixelate", 5, 1) for seed in (0, 3)]
    images = listed[1] if side == 96 else preprocess(Image.fromarray(listed[1]))
    made = [data.corrupt(images, "pixelate", 5, seed) for seed in seeds]
    np.testing.assert_array_equal(benchmark[Domain("pixelate", 5)][1], made[0])
    few = data.subset(benchmark, [4, 1])  # the seed is of the image's index in the whole dataset
    batch = batch_of(few, Domain("pixelate", 5), preprocess, [1], seed=3)
    expected = preprocess(Image.fromarray(made[1])) if side == 96 else made[1]
    np.testing.assert_array_equal(batch.images[0], expected)


@pytest.mark.parametrize("spoil", ["truncate", "empty", "text", "small"])
def test_unreadable_images_are_masked(folder, spoil):
    path = folder / "cat" / "1.png"
    content = path.read_bytes()
    if spoil == "small":
        Image.new("RGB", (20, 20)).save(path)
    else:
        path.write_bytes({"truncate": content[:200], "empty": b"", "text": b"hello"}[spoil])
    benchmark = data.open_benchmark("folder", folder, PREPROCESS)
    batch = batch_of(benchmark, Domain("fog", 5), PREPROCESS, range(3))
    assert list(batch.mask) == [True, False, True]
    assert not batch.images[1].any()
    assert data.name_of(benchmark[Domain("fog", 5)], 1).endswith("1.png")


def test_domains_that_are_not_there_are_refused(folder):
    benchmark = data.open_benchmark("folder", folder, PREPROCESS)
    assert len(benchmark) == 1 + 19 * 5
    data.select(benchmark, [CLEAN, *(Domain(name, 5) for name in data.IMAGENET_C)])
    for domain, message in (
        (
            Domain("rain", 3),
            "unknown corruption 'rain' of severity 3, expected one of clean, gaussian_",
        ),
        (Domain("fog", 6), "fog' of severity 6, expected one of fog-1, fog-2, fog-3, fog-4, fog-5"),
        (Domain("fog"), "fog' of severity 0, expected one of fog-1"),
    ):
        with pytest.raises(ValueError, match=message):
            data.select(benchmark, [CLEAN, domain])
        with pytest.raises(ValueError, match=message):
            batch_of(benchmark, domain, PREPROCESS, [0])
    small = data.open_benchmark("folder", folder, Preprocessing(16, 16, (16, 16)))
    with pytest.raises(ValueError, match="smaller than 32 pixels"):
        small[Domain("fog", 1)][0]


def test_a_natural_shift_is_a_domain_of_its_own_name(folder):
    dataset = data.open_dataset("folder", folder)
    shop = {Domain("shop"): dataset}
    batch = batch_of(shop, Domain("shop"), PREPROCESS, [1])
    np.testing.assert_array_equal(batch.images[0], PREPROCESS(Image.fromarray(dataset[1])))
    with pytest.raises(ValueError, match="'clean' of severity 0, expected one of shop"):
        data.select(shop, [CLEAN])


@pytest.fixture
def stored(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("fog", "snow"):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (4, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.array(LABELS))
    return tmp_path


def test_stored_arrays(stored):
    benchmark = data.open_benchmark("arrays", stored, PREPROCESS, NAMES)
    data.select(benchmark, benchmark)
    assert [*benchmark] == [Domain("fog"), Domain("snow")]
    fog = benchmark[Domain("fog")]
    np.testing.assert_array_equal(fog[2], np.load(stored / "fog.npy")[2])
    assert list(fog.labels) == LABELS
    with pytest.raises(ValueError, match="has no clean images, only fog, snow"):
        data.open_dataset("arrays", stored, NAMES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels", np.array([0, 1, 2, 0]), "labels run from 0 to 2, expected 0 to 1"),
        ("labels", np.array([0, -1, 1, 0]), "labels run from -1 to 1"),
        ("labels", np.zeros(4), "labels are float64"),
        ("labels", np.zeros(0, int), r"of shape \(0,\), expected one or more integers"),
        ("labels", np.array([{}]), "cannot be read as an array"),
        ("fog", np.zeros((4, 32, 32, 3)), "is float64 of shape"),
        ("fog", np.zeros((4, 3, 32, 32), np.uint8), r"shape \(4, 3, 32, 32\), expected"),
        ("fog", np.zeros((5, 32, 32, 3), np.uint8), r"\(5, .* expected .* \(4, .* for 4 labels"),
    ],
)
def test_bad_arrays_are_refused(stored, name, content, message):
    np.save(stored / f"{name}.npy", content)
    with pytest.raises(ValueError, match=message):
        data.select(data.open_benchmark("arrays", stored, PREPROCESS, NAMES), [Domain("fog")])


def test_missing_arrays_are_refused(stored):
    for name in ("fog", "snow"):
        (stored / f"{name}.npy").unlink()
    with pytest.raises(ValueError, match=r"has no <corruption>\.npy files"):
        data.open_benchmark("arrays", stored, PREPROCESS, NAMES)
    (stored / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.npy"):
        data.open_benchmark("cifar-c", stored, PREPROCESS)


def test_the_bundled_images_are_balanced_and_real():
    bundled = data.open_dataset("folder", assets.IMAGES)
    assert bundled.class_names == data.CIFAR10_CLASSES
    assert list(bundled.labels) == [*np.repeat(range(10), 200)]
    assert len(bundled) == 2000
    assert bundled[7].shape == (32, 32, 3)
    assert data.content_of(bundled) == "bytes ef9c3a1688823b5e"  # published figures are of these
    assert data.name_of(bundled, 7) == "cifar10-test-2000.npz image 7"
    assert assets.IMAGES.stat().st_size < 10e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 1, 2, 0])}, "run from 0 to 2, expected 0 to 1"),
        ({"labels": np.array([0, 1])}, r"\(4, 40, 44, 3\), expected .*\(2, .* for 2 labels"),
        ({"images": PIXELS[..., 0]}, r"uint8 of shape \(4, 40, 44\), expected"),
        ({"class_names": None}, "expected images, labels and class_names"),
        (None, "expected images, labels and class_names"),
    ],
)
def test_bad_files_of_images_are_refused(tmp_path, change, message):
    content = {"images": PIXELS, "labels": np.array(LABELS), "class_names": np.array(NAMES)}
    path = tmp_path / "some.npz"
    np.savez(path, **{k: v for k, v in (content | (change or {})).items() if v is not None})
    if change is None:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"some\.npz.*: .*{message}"):
        data.open_dataset("folder", path)
    with pytest.raises(FileNotFoundError, match=r"other\.npz"):
        data.open_dataset("folder", tmp_path / "other.npz")


def test_a_file_of_images_may_have_its_names_in_bytes_but_is_no_npy(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, images=PIXELS, labels=LABELS, class_names=np.array([b"cat", b"dog"]))
    assert data.open_dataset("folder", path).class_names == NAMES
    with path.open("wb") as file:
        np.save(file, PIXELS)
    with pytest.raises(ValueError, match=r"some\.npz: expected images, labels and class_names"):
        data.open_dataset("folder", path)


DICTS = [{"image": Image.fromarray(x), "label": y} for x, y in zip(PIXELS, LABELS, strict=True)]
PAIRS = [(image["image"], image["label"]) for image in DICTS]


class Torchvision:
    """As torchvision's datasets are."""

    classes, targets = [*NAMES], LABELS

    def __len__(self):
        return len(PAIRS)

    def __getitem__(self, number):
        return PAIRS[number]


class Fewer(Torchvision):
    """One image of it, with all labels."""

    def __len__(self):
        return 1


def hugging_face(folder):
    datasets = pytest.importorskip("datasets")
    for number, (image, label) in enumerate(PAIRS):
        (folder / NAMES[label]).mkdir(exist_ok=True, parents=True)
        image.save(folder / NAMES[label] / f"{number}.png")
    cache = {"cache_dir": str(folder / "cache"), "split": "train"}
    return datasets.load_dataset("imagefolder", data_dir=str(folder), **cache)


KEYS = {"image": 0, "label": 1}
SEQUENCES = {
    "dicts": (lambda _: DICTS, {"class_names": NAMES}),
    "tuples": (lambda _: PAIRS, {"class_names": NAMES, **KEYS}),
    "names": (lambda _: [(image, NAMES[label]) for image, label in PAIRS], KEYS),
    "arrays": (lambda _: [*zip(PIXELS, LABELS, strict=True)], {"class_names": NAMES, **KEYS}),
    "torchvision": (lambda _: Torchvision(), KEYS),
    "grain": (lambda _: grain.MapDataset.source(DICTS), {"class_names": NAMES}),
    "hugging face": (hugging_face, {}),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences_of_other_libraries_are_datasets(kind, tmp_path):
    make, options = SEQUENCES[kind]
    dataset = data.from_sequence(make(tmp_path / "images"), **options)
    assert (len(dataset), dataset.class_names, list(dataset.labels)) == (4, NAMES, LABELS)
    benchmark = data.corrupted(dataset, PREPROCESS)
    stream = data.stream_of("s", [CLEAN], np.arange(4), 0)
    workers = 1 if kind in ("grain", "hugging face") else 0
    (batch,) = data.read_ahead(data.Batches(benchmark, (stream,), 4, PREPROCESS), workers)
    expected = [PREPROCESS(Image.fromarray(pixels)) for pixels in PIXELS]
    np.testing.assert_array_equal(batch.images, expected)


def test_images_of_sequences_may_be_files_or_grey(folder):
    file, grey = folder / "cat" / "0.png", PIXELS[0, :, :, 0]
    items = [(image, 0) for image in (str(file), file.read_bytes(), grey, b"broken")]
    items += [(np.zeros((3, 8, 8), np.float32), 1)]
    items += [({"bytes": x, "path": y}, 0) for x, y in ((file.read_bytes(), None), (None, file))]
    dataset = data.from_sequence(items, 0, 1, NAMES)
    for number in (0, 1, 5, 6):
        np.testing.assert_array_equal(dataset[number], data.image_folder(folder)[0])
    np.testing.assert_array_equal(dataset[2], np.stack([grey] * 3, -1))
    with pytest.raises(data.UnreadableImageError, match="image 3: cannot be decoded"):
        dataset[3]
    with pytest.raises(TypeError, match=r"image 4 is float32 of shape \(3, 8, 8\), expected .*PIL"):
        dataset[4]


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (DICTS, {}, "0 class names for 0 classes: set class_names"),
        (DICTS, {"image": "img"}, r"items have \['image', 'label'\], not 'img' and 'label': set"),
        (PAIRS, {}, r"items have \[0, 1\], not 'image'"),
        (DICTS, {"class_names": ["cat"]}, "labels run from 0 to 1, expected 0 to 0"),
        ([{"image": 0, "label": "emu"}], {"class_names": NAMES}, "labels run from -1 to -1"),
        ([{"image": 0, "label": 0.5}], {"class_names": NAMES}, "labels are float64 of"),
        ([(0, "cat"), (0, None)], KEYS, "expected an index or a name as the label of every item"),
        ([(0, 1), (0, None)], {"class_names": NAMES, **KEYS}, "expected an index or a name"),
        (Torchvision(), {"class_names": [*NAMES, "emu"], **KEYS}, "3 class names for 2 classes"),
        (Fewer(), KEYS, r"has \d+ labels for 1 images"),
        ({"train": DICTS}, {}, "sequence of images and labels, not a dict"),
        (iter(DICTS), {}, "sequence of images and labels, not a list_iterator"),
    ],
)
def test_bad_sequences_are_refused(items, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        data.from_sequence(items, **options)


class Broken(Torchvision):
    """Its first file is damaged; its classes have synonyms, as ImageNet's in torchvision."""

    features = np.zeros(4)
    classes = tuple((name, "synonym") for name in NAMES)

    def __getitem__(self, number):
        if number == 0:
            raise OSError("cannot identify image file")
        return PAIRS[number]


def test_a_damaged_image_of_a_sequence_is_unreadable_and_not_the_end():
    dataset = data.from_sequence(Broken(), **KEYS)
    assert (dataset.class_names, list(dataset.labels)) == (NAMES, LABELS)
    with pytest.raises(data.UnreadableImageError, match="image 0: cannot be read"):
        dataset[0]
    with pytest.raises(data.UnreadableImageError, match=r"image 1: cannot be read \(is missing\)"):
        data.from_sequence([(PIXELS[0], 0), (None, 1)], 0, 1, NAMES)[1]
    dataset.items.target_transform = int  # then labels are those of the items
    with pytest.raises(OSError, match="cannot identify image file"):
        data.from_sequence(dataset.items, **KEYS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I;16", "I", "F"])
def test_images_of_sequences_are_of_any_mode(mode):
    grey = {"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode)
    image = Image.fromarray(PIXELS[0])
    if grey is None:
        image = (image.convert("P") if mode == "PA" else image).convert(mode)
    else:
        image = Image.fromarray(PIXELS[0, ..., 0].astype(grey) * (257 if mode == "I;16" else 1))
    read = data.from_sequence([(image, "cat")], 0, 1)[0]
    assert (read.shape, read.dtype) == ((40, 44, 3), np.uint8)
    assert read.std() > 40


def test_class_names_of_sequences_may_be_in_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for names in (tmp_path / "names.txt", str(tmp_path / "names.txt"), [tmp_path / "names.txt"]):
        assert data.from_sequence(DICTS, class_names=names).class_names == NAMES


def test_datasets_are_python_sequences(tmp_path, stored):
    """Also past their last image: the next one in a file of severities is of another severity."""
    images = np.concatenate([PIXELS[:, :32, :32] + np.uint8(s) for s in range(5)])
    np.save(stored / "fog.npy", images)
    fog = data.open_benchmark("cifar-c", stored, PREPROCESS, NAMES)[Domain("fog", 2)]
    source = data.from_sequence(grain.MapDataset.source(DICTS), class_names=NAMES)
    noise = data.Corrupted(source, "gaussian_noise", 3, PREPROCESS)
    for dataset in (fog, source, noise, data.Subset(source, [3, 1])):
        read = [*dataset]
        assert len(read) == len(dataset)
        np.testing.assert_array_equal(dataset[-1], read[-1])
    np.testing.assert_array_equal([*fog], images[4:8])


def test_subsets_may_be_masks():
    clean = {CLEAN: data.ArrayDataset(PIXELS, np.array(LABELS), NAMES)}
    dogs = data.subset(clean, clean[CLEAN].labels == 1)
    assert list(data.labels_of(dogs)) == [1, 1]
    np.testing.assert_array_equal([*dogs[CLEAN]], PIXELS[2:])
    assert len(data.Subset(clean[CLEAN], [])) == 0
    with pytest.raises(IndexError, match="4 is out of bounds"):
        data.subset(clean, [4])


def imagenet_c(root):
    for corruption in ("fog", "snow"):
        write_images(root / corruption / "5", 1, NAMES)
    return data.open_benchmark("imagenet-c", root, PREPROCESS, NAMES)


def test_each_domain_has_its_own_digest(tmp_path, stored):
    benchmarks = (
        data.open_benchmark("arrays", stored, PREPROCESS, NAMES),
        imagenet_c(tmp_path / "folders"),
    )
    before = [[data.content_of(d) for d in benchmark.values()] for benchmark in benchmarks]
    for file in [stored / "fog.npy", *(tmp_path / "folders" / "fog").rglob("*.png")]:
        file.write_bytes(file.read_bytes() + b"0")
    for benchmark, (fog, snow) in zip(benchmarks, before, strict=True):
        # a subset's digest is the whole dataset's
        after = [data.content_of(d) for d in data.subset(benchmark, [0]).values()]
        assert after[0] != fog
        assert after[1] == snow
    assert data.content_of(DICTS) is None
    images = data.image_folder(tmp_path / "folders" / "fog" / "5")
    others = (dataclasses.replace(images, raw=True), dataclasses.replace(images, border=1))
    assert len({folder.content() for folder in (images, *others)}) == 3


def test_a_file_of_five_severities_is_read_once(tmp_path, monkeypatch):
    np.save(tmp_path / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(2))
    read = []
    monkeypatch.setattr(arrays, "digest_files", lambda files: read.append(files) or "digest")
    benchmark = data.open_benchmark("cifar-c", tmp_path, PREPROCESS)
    assert [data.content_of(dataset) for dataset in benchmark.values()] == ["digest"] * 5
    assert len(read) == 1


def test_many_bytes_are_told_apart_by_size_and_time(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    os.utime(file, (0, 0))
    before = digest_files([file], read_up_to=2)
    assert before.startswith("sizes and times")
    file.write_bytes(b"two")
    os.utime(file, (0, 0))
    assert digest_files([file], read_up_to=2) == before  # documented: not read
    os.utime(file, (9, 9))
    assert digest_files([file], read_up_to=2) != before
    assert digest_files([file]) != digest_files([tmp_path / "missing"])


def test_a_list_of_images_chooses_them_in_its_order(tmp_path):
    benchmark = imagenet_c(tmp_path / "data")
    fog = Domain("fog", 5)
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, reversed(benchmark[fog].files))))
    part = data.listed_subset(benchmark, listed)
    assert data.labels_of(part).tolist() == [1, 0]
    assert data.class_names_of(part) == NAMES
    np.testing.assert_array_equal(part[fog][0], benchmark[fog][1])
    listed.write_text("cat/nothing.jpg\n")
    with pytest.raises(ValueError, match=r"list.txt: 1 of 1 images .*, such as \['cat/nothing"):
        data.listed_subset(benchmark, listed)
    with pytest.raises(ValueError, match="5000 of 5000 images"):
        data.listed_subset(benchmark, "imagenet-c-5000")
    bundled = data.open_benchmark("folder", assets.IMAGES, PREPROCESS)
    with pytest.raises(ValueError, match=r"list\.txt: 1 of 1 images .* in 0 files"):
        data.listed_subset(bundled, listed)


def test_a_name_that_is_there_twice_is_not_guessed(tmp_path):
    for place in ("cat/2020", "dog/2020", "cat/2021"):
        folder = tmp_path / "data" / place
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
    benchmark = data.open_benchmark("folder", tmp_path / "data", PREPROCESS)
    listed = tmp_path / "list.txt"
    listed.write_text("cat/2021/1.png \r\n\n")
    assert data.labels_of(data.listed_subset(benchmark, listed)).tolist() == [0]
    for lines in ("cat/2020/1.png\n", "2021/1.png\n2021/1.png\n"):
        listed.write_text(lines)
        with pytest.raises(ValueError, match=r"list.txt: 1 of . images are not once in the list"):
            data.listed_subset(benchmark, listed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as class names"),
        ('{"n1": "cat"}', "KeyError.*n2"),
        ("[1]", "names"),
    ],
)
def test_bad_class_names_are_refused(tmp_path, content, message):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        data.given_class_names([str(tmp_path / "names.json")], ["n1", "n2"])
