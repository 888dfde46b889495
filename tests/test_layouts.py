"""Every layout is read from files laid out as the public archives are."""

import io
import json
import logging
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxtta import assets, data, models
from jaxtta.cli import continual as command
from jaxtta.data import Domain, layouts
from jaxtta.data.class_names import CIFAR100_CLASSES, IMAGENET_CLASSES
from jaxtta.data.sequences import open_tfds
from jaxtta.models.preprocess import Preprocessing

PREPROCESS = Preprocessing(32, 32, (32, 32))
PREPARED = Path(__file__).parent / "data"
CLEAN, FOG = Domain("clean"), Domain("fog", 5)
WNIDS = ("n01440764", "n01443537", "n01484850")
CLASSES = ("tench", "goldfish", "great white shark")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 2, 40, 44, 3), np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")  # lossless, whatever the suffix says
    return path


def write_folders(root, folders, suffix=".JPEG", pixels=PIXELS):
    for folder, images in zip(folders, pixels, strict=True):
        for i, image in enumerate(images):
            save(root / folder / f"{i}{suffix}", image)
    return root


def write_split(root, json_name, images, names=("abbey", "air_hockey", "zoo")):
    """Entries in another order than by label, so that order is not taken for label."""
    entries = [
        [f"{names[c]}/{i}.jpg", c, names[c]] for i in range(PIXELS.shape[1]) for c in (2, 0, 1)
    ]
    for path, c, _ in entries:
        save(root / images / path, PIXELS[c, int(Path(path).stem)])
    root.mkdir(exist_ok=True)
    lists = {"train": entries[:1], "val": [], "test": entries}
    (root / json_name).write_text(json.dumps(lists))
    return root / json_name


def every_image(dataset):
    """All images by class and number in it, as the model sees them."""
    dataset = pickle.loads(pickle.dumps(dataset))  # as it goes to worker processes
    assert dataset.labels.dtype == np.int32
    assert len(dataset) == len(dataset.labels)
    read = [PREPROCESS(Image.fromarray(dataset[i])) for i in range(len(dataset))]
    classes = range(len(dataset.class_names))
    return np.stack(
        [np.stack([read[i] for i in np.flatnonzero(dataset.labels == c)]) for c in classes]
    )


EXPECTED = np.stack([np.stack([PREPROCESS(Image.fromarray(p)) for p in c]) for c in PIXELS])


@pytest.mark.parametrize("layout", ["folder", "imagenet"])
def test_class_folders(tmp_path, layout):
    write_folders(tmp_path, WNIDS)
    (tmp_path / "README.txt").write_text("as in ImageNet-A and -R")
    if layout == "folder":
        with pytest.raises(ValueError, match=r"n01440764 .*layout imagenet"):
            data.open_dataset(layout, tmp_path)
    names = CLASSES if layout == "folder" else ()
    source = data.open_dataset(layout, tmp_path, names)
    assert source.class_names == CLASSES
    np.testing.assert_array_equal(every_image(source), EXPECTED)


def test_imagenet_classes_are_those_present(tmp_path):
    write_folders(tmp_path, ("n15075141", "n02123045", "n01440764"))
    source = data.open_dataset("imagenet", tmp_path)
    assert source.class_names == ("tench", "tabby cat", "toilet paper")
    np.testing.assert_array_equal(every_image(source), EXPECTED[[2, 1, 0]])
    (tmp_path / "n01440764").rename(tmp_path / "n00000000")
    with pytest.raises(ValueError, match="n00000000 is none of those known, such as n01440764"):
        data.open_dataset("imagenet", tmp_path)


def test_imagenet_v2_folders_are_numbers(tmp_path):
    write_folders(tmp_path, ("2", "10", "0"))
    source = data.open_dataset("imagenet-v2", tmp_path)
    assert source.class_names == ("tench", "great white shark", "brambling")
    np.testing.assert_array_equal(every_image(source), EXPECTED[[2, 0, 1]])
    for wrong in ("1000", "01", "n01440764"):
        (tmp_path / "10").rename(tmp_path / wrong)
        with pytest.raises(ValueError, match=f"folder {wrong} is none of those known"):
            data.open_dataset("imagenet-v2", tmp_path)
        (tmp_path / wrong).rename(tmp_path / "10")


@pytest.fixture
def objectnet(tmp_path):
    framed = np.zeros((3, 2, 44, 48, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    framed[:, :, 2:-2, 2:-2] = PIXELS
    write_folders(tmp_path / "images", ("alarm_clock", "backpack", "tv"), ".png", framed)
    save(tmp_path / "images" / "air_freshener" / "0.png", PIXELS[0, 0])
    labels = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "tv": "TV"}
    overlap = {"Alarm clock": "analog clock; digital clock", "Backpack": "backpack", "TV": "tv"}
    for name, table in (
        ("folder_to_objectnet_label", labels | {"backpack": "Backpack", "absent": "Absent"}),
        ("objectnet_to_imagenet_1k", overlap),
    ):
        (tmp_path / "mappings").mkdir(exist_ok=True)
        (tmp_path / "mappings" / f"{name}.json").write_text(json.dumps(table))
    return tmp_path


def test_objectnet_keeps_imagenets_classes_and_loses_its_border(objectnet):
    source = data.open_dataset("objectnet", objectnet)
    assert source.class_names == ("Alarm clock", "Backpack", "TV")
    np.testing.assert_array_equal(every_image(source), EXPECTED)
    (objectnet / "images" / "tv").rename(objectnet / "images" / "telly")
    with pytest.raises(ValueError, match="folder telly is none of those known"):
        data.open_dataset("objectnet", objectnet)


SPLITS = [
    ("caltech101", "caltech-101", "Caltech101", "101_ObjectCategories"),
    ("oxford-pets", "oxford_pets", "OxfordPets", "images"),
    ("stanford-cars", "stanford_cars", "StanfordCars", "."),
    ("oxford-flowers", "oxford_flowers", "OxfordFlowers", "jpg"),
    ("food101", "food-101", "Food101", "images"),
    ("sun397", "sun397", "SUN397", "SUN397"),
    ("dtd", "dtd", "DescribableTextures", "images"),
    ("eurosat", "eurosat", "EuroSAT", "2750"),
    ("ucf101", "ucf101", "UCF101", "UCF-101-midframes"),
]


@pytest.mark.parametrize(("layout", "folder", "name", "images"), SPLITS)
def test_cross_dataset_sets(tmp_path, layout, folder, name, images):
    write_split(tmp_path / folder, f"split_zhou_{name}.json", images)
    for root in (tmp_path, tmp_path / folder):
        source = data.open_dataset(layout, root)
        assert source.class_names == ("abbey", "air hockey", "zoo")
        np.testing.assert_array_equal(every_image(source), EXPECTED)


@pytest.mark.parametrize(
    ("split", "entries", "message"),
    [
        ("test", [], r"expected \[path, label, class name\] of images for 'test'"),
        ("val", [["a.jpg", 1, "abbey"]], "labels are not 0 to 3 with a name each"),
        ("val", [["a.jpg", 7, "far"]], "labels are not 0 to 3 with a name each"),
        ("val", [["a.jpg", -1, "far"]], "labels are not 0 to 3 with a name each"),
        ("val", [["a.jpg", "zoo"]], r"expected \[path, label, class name\] of images"),
        ("val", 3, r"expected \[path, label, class name\] of images"),
    ],
)
def test_bad_splits_are_refused(tmp_path, split, entries, message):
    path = write_split(tmp_path / "x", "split.json", "images")
    path.write_text(json.dumps(json.loads(path.read_text()) | {split: entries}))
    with pytest.raises(ValueError, match=message):
        layouts.listed_split(path, tmp_path / "images")


@pytest.mark.parametrize(("text", "message"), [("{", "JSON"), ("[]", "a list, expected")])
def test_what_is_no_split_is_refused(tmp_path, text, message):
    with pytest.raises(FileNotFoundError, match=r"split\.json: no such file"):
        layouts.listed_split(tmp_path / "split.json", tmp_path)
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        layouts.listed_split(tmp_path / "split.json", tmp_path)


def test_fgvc_aircraft(tmp_path):
    root, variants = tmp_path / "fgvc_aircraft", ("707-320", "F/A-18", "Cessna 172")
    lines = []
    for i in range(2):
        for c in (1, 0, 2):
            save(root / "images" / f"10{c}{i}.jpg", PIXELS[c, i])
            lines.append(f"10{c}{i} {variants[c]}")
    (root / "variants.txt").write_text("\n".join(variants) + "\n")
    (root / "images_variant_test.txt").write_text("\n".join(lines) + "\n")
    for place in (root, tmp_path):
        source = data.open_dataset("fgvc-aircraft", place)
        assert source.class_names == variants
        np.testing.assert_array_equal(every_image(source), EXPECTED)
    (root / "images_variant_test.txt").write_text("1000 Concorde\n")
    with pytest.raises(ValueError, match="Concorde is none of the 3 variants"):
        data.open_dataset("fgvc-aircraft", root)


def open_c(root, layout="imagenet-c", names=()):
    return data.open_benchmark(layout, root, PREPROCESS, names)


@pytest.mark.parametrize("above", [("", ""), ("noise", "weather")])
def test_imagenet_c(tmp_path, above):
    for group, corruption in zip(above, ("gaussian_noise", "fog"), strict=True):
        for severity in (1, 5):
            pixels = PIXELS + np.uint8(severity * len(corruption))
            write_folders(tmp_path / group / corruption / str(severity), WNIDS, pixels=pixels)
    benchmark = open_c(tmp_path)
    assert data.class_names_of(benchmark) == CLASSES
    for domain in (FOG, Domain("gaussian_noise", 1)):
        shift = np.uint8(domain.severity * len(domain.corruption))
        alone = write_folders(tmp_path / f"alone {domain}", WNIDS, pixels=PIXELS + shift)
        expected = data.open_dataset("imagenet", alone)
        np.testing.assert_array_equal(every_image(benchmark[domain]), every_image(expected))
    for domain, message in (
        (Domain("fog", 3), "fog' of severity 3, expected one of fog-1, fog-5"),
        (Domain("rain", 5), "unknown corruption 'rain' .*, expected one of .*gaussian_noise"),
        (CLEAN, "unknown corruption 'clean'"),
    ):
        with pytest.raises(ValueError, match=message):
            data.select(benchmark, [domain])
    with pytest.raises(ValueError, match=r"has no clean images, only .*fog-1, fog-5"):
        data.open_dataset("imagenet-c", tmp_path)
    (tmp_path / above[1] / "fog" / "5" / WNIDS[1] / "0.JPEG").unlink()
    with pytest.raises(data.UnreadableImageError, match=rf"{WNIDS[1]}/0\.JPEG: cannot be dec"):
        benchmark[FOG][2]
    assert benchmark[FOG].name(2).endswith(f"fog/5/{WNIDS[1]}/0.JPEG")


def test_imagenet_c_with_clean_images_and_other_classes(tmp_path):
    write_folders(tmp_path / "clean", ("a", "b", "c"))
    write_folders(tmp_path / "fog" / "3", ("a", "b", "c"), pixels=PIXELS[::-1])
    benchmark = open_c(tmp_path, names=["x", "y", "z"])
    assert data.class_names_of(benchmark) == ("x", "y", "z")
    np.testing.assert_array_equal(every_image(benchmark[CLEAN]), EXPECTED)
    np.testing.assert_array_equal(every_image(benchmark[Domain("fog", 3)]), EXPECTED[::-1])
    with pytest.raises(ValueError, match="<corruption>/<severity 1 to 5>/<class>, two or more"):
        open_c(tmp_path / "fog" / "3" / "a")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_c(tmp_path / "nowhere")


def heard(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_domain_that_lacks_a_class_does_not_shrink_the_others(tmp_path, caplog):
    """The first domain lacks a class and an image of another; the last has an empty class."""
    for corruption in ("brightness", "fog", "snow"):
        write_folders(tmp_path / corruption / "5", WNIDS)
    shutil.rmtree(tmp_path / "brightness" / "5" / WNIDS[2])
    (tmp_path / "brightness" / "5" / WNIDS[0] / "1.JPEG").unlink()
    shutil.rmtree(tmp_path / "snow" / "5" / WNIDS[0])
    (tmp_path / "snow" / "5" / WNIDS[0]).mkdir()
    (tmp_path / "snow" / "5" / "._n01440764").mkdir()
    caplog.set_level(logging.WARNING)
    benchmark = open_c(tmp_path)
    assert data.class_names_of(benchmark) == CLASSES
    assert list(data.labels_of(benchmark)) == [0, 0, 1, 1, 2, 2]
    for _ in range(2):
        data.select(benchmark, benchmark)
    lacks, there = f"{tmp_path / 'brightness' / '5'}: lacks", "images, unreadable there, such as"
    assert heard(caplog) == [
        f"{lacks} 3 of 6 {there} {WNIDS[0]}/1.JPEG",
        f"{lacks.replace('brightness', 'snow')} 2 of 6 {there} {WNIDS[0]}/0.JPEG",
    ]
    streams = data.make_streams("continual", ["brightness", "fog"], (5,), benchmark[FOG].labels)
    batches = data.Batches(benchmark, tuple(streams), 6, PREPROCESS)
    assert [batch.mask.sum() for batch in batches] == [3, 6]
    np.testing.assert_array_equal(every_image(benchmark[FOG]), EXPECTED)


def test_images_that_the_first_domain_lacks_are_not_left_out(tmp_path, caplog):
    for domain in ("brightness/5", "snow/5", "clean"):
        write_folders(tmp_path / domain, WNIDS)
        save(tmp_path / domain / "overview.png", PIXELS[0, 0])
    (tmp_path / "brightness" / "5" / WNIDS[1] / "1.JPEG").unlink()
    benchmark = open_c(tmp_path)
    data.select(benchmark, [Domain("brightness", 5)])
    for _ in range(2):
        message = f"^{tmp_path / 'snow' / '5'}: has 1 images that other domains lack, such as"
        with pytest.raises(ValueError, match=message):
            data.select(benchmark, [Domain("snow", 5)])
    data.select(benchmark, [CLEAN])  # of which a subset was corrupted
    assert not heard(caplog)


def test_a_corruption_in_two_groups_is_refused(tmp_path):
    for group in ("weather", "more"):
        write_folders(tmp_path / group / "fog" / "5", WNIDS)
    with pytest.raises(ValueError, match=r"fog-5 is in .*/more/fog/5 and in .*/weather/fog/5$"):
        open_c(tmp_path)


def test_imagenet_c_names_what_is_no_wnid_and_what_no_domain_has(tmp_path):
    for corruption in ("fog", "snow"):
        write_folders(tmp_path / corruption / "5", WNIDS)
    (tmp_path / "snow" / "5" / "extra").mkdir()
    with pytest.raises(ValueError, match="extra: class folder without images"):
        open_c(tmp_path, names=[*CLASSES, "other"])
    save(tmp_path / "snow" / "5" / "extra" / "0.JPEG", PIXELS[0, 0])
    with pytest.raises(ValueError, match="folder extra is none of those known, such as n01440764"):
        open_c(tmp_path)


@pytest.mark.parametrize("group", ["", "noise"])
def test_imagenet_c_is_no_folder_of_classes(tmp_path, group):
    for corruption in ("fog", "near_focus"):
        for severity in ("1", "5"):
            write_folders(tmp_path / group / corruption / severity, WNIDS)
    for layout in ("folder", "imagenet"):
        for root in (tmp_path, tmp_path / group / "fog"):
            with pytest.raises(ValueError, match=r"class folders, has .* --layout imagenet-c"):
                data.open_dataset(layout, root)
    assert data.class_names_of(open_c(tmp_path)) == CLASSES


def test_a_class_with_numbered_sub_folders_is_no_corruption(tmp_path):
    for name in ("cat", "dog", "emu"):
        for session in "123":
            save(tmp_path / name / session / "left" / "0.png", PIXELS[0, 0])
    assert data.open_dataset("folder", tmp_path).class_names == ("cat", "dog", "emu")


@pytest.mark.parametrize(
    "splits",
    [
        ("train", "val", "test"),
        ("Training", "Validation"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("train_images", "val_images"),
        ("test",),
    ],
)
def test_splits_are_no_classes(tmp_path, splits):
    for split in splits:
        write_folders(tmp_path / split, WNIDS)
    if len(splits) == 3:
        (tmp_path / "annotations").mkdir()
    named = rf"expected at least two class folders, has .*{splits[0]}.*: give one split"
    for layout in ("folder", "imagenet"):
        with pytest.raises(ValueError, match=named):
            data.open_dataset(layout, tmp_path)
        assert data.open_dataset(layout, tmp_path / splits[0], CLASSES)


def test_a_class_may_be_called_train(tmp_path):
    write_folders(tmp_path, ("bus", "plane", "train"))
    assert data.open_dataset("folder", tmp_path).class_names == ("bus", "plane", "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["fog.npy", "labels.npy"], r"no folders: .* cifar-c or arrays \(\.npy files\)"),
        (["1.0.0/dataset_info.json"], r"1\.0\.0: .* tfds"),
    ],
)
def test_what_a_folder_without_classes_holds_is_said(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=rf"expected at least two class folders, has {message}"):
        data.open_dataset("folder", tmp_path)


@pytest.mark.parametrize("names", ["{}", "{:03}", "c{}", "{} kind"])
@pytest.mark.parametrize("first", [0, 1])
def test_numbers_in_folder_names_are_sorted_as_numbers(tmp_path, caplog, names, first):
    folders = [names.format(number) for number in range(first, first + 12)]
    write_folders(tmp_path, folders, pixels=PIXELS[np.arange(12) % 3])
    called = [f"kind {number}" for number in range(12)]
    caplog.set_level(logging.WARNING)
    source = data.open_dataset("folder", tmp_path, called)
    meant = dict(zip(folders, called, strict=True))
    for file, label in zip(source.files, source.labels, strict=True):
        assert source.class_names[label] == meant[file.parent.name]
    (tmp_path / "names.txt").write_text("\n".join(called))
    listed = data.image_folder(tmp_path).class_names
    assert data.given_class_names([str(tmp_path / "names.txt")], listed) == tuple(called)
    assert not heard(caplog)


@pytest.mark.parametrize("layout", ["folder", "imagenet-c"])
def test_numbers_are_no_class_names(tmp_path, layout):
    root = tmp_path / "fog" / "5" if layout == "imagenet-c" else tmp_path
    write_folders(root, ("cat", "dog", "3"))
    with pytest.raises(ValueError, match="class folder 3 means nothing to a model: set the cla"):
        open_c(tmp_path, layout)
    benchmark = open_c(tmp_path, layout, ["three", "cat", "dog"])
    assert data.class_names_of(benchmark) == ("three", "cat", "dog")
    (root / "3").rename(root / "0.5")
    with pytest.raises(ValueError, match=r"class folder 0\.5 means nothing to a model: set the"):
        open_c(tmp_path, layout)


def test_numbers_in_prompts_are_said_wherever_they_come_from(embedded, caplog):
    model = embedded[0]
    for names, templates, said in (
        (("3", "class_4", "n01440764", "cat"), ("a photo of a {}.",), 3),
        (("3", "0.5", "-1"), ("a photo of a {}.",), 3),
        (("3", "4"), (command.TEMPLATES["mnist"],), 0),
        (("three", "boeing 707", "707-320"), ("a photo of a {}.",), 0),
    ):
        caplog.clear()
        models.zero_shot_task(model, names, templates)
        assert heard(caplog) == [
            f"{said} class names are numbers: 'a photo of a 3.' means nothing to a model"
        ] * bool(said)


@pytest.fixture
def stacked(tmp_path):
    """Five severities of six images, labels five times."""
    images = PIXELS.reshape(6, 40, 44, 3)
    np.save(tmp_path / "fog.npy", np.concatenate([images + np.uint8(s) for s in range(1, 6)]))
    np.save(tmp_path / "clean.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.repeat([0, 1, 2], 2), 5).astype(np.uint8))
    return tmp_path


@pytest.mark.parametrize("repeated", [5, 1])
def test_cifar_c(stacked, repeated):
    np.save(stacked / "labels.npy", np.tile(np.repeat([0, 1, 2], 2), repeated))
    benchmark = open_c(stacked, "cifar-c")
    assert data.class_names_of(benchmark) == data.CIFAR10_CLASSES
    assert list(data.labels_of(benchmark)) == [0, 0, 1, 1, 2, 2]
    benchmark = open_c(stacked, "cifar-c", CLASSES)
    data.select(benchmark, benchmark)
    np.testing.assert_array_equal(every_image(benchmark[CLEAN]), EXPECTED)
    np.testing.assert_array_equal(
        every_image(data.open_dataset("cifar-c", stacked, CLASSES)), EXPECTED
    )
    for s in range(1, 6):
        np.testing.assert_array_equal(benchmark[Domain("fog", s)][3], PIXELS[1, 1] + np.uint8(s))
    for s in (0, 6):
        with pytest.raises(ValueError, match=f"fog' of severity {s}, expected one of fog-1"):
            data.select(benchmark, [Domain("fog", s)])
    assert benchmark[Domain("fog", 2)].name(3).endswith("fog.npy row 9")


def test_cifar_c_files_that_do_not_fit_their_labels(stacked):
    np.save(stacked / "snow.npy", np.load(stacked / "fog.npy")[:29])
    benchmark = open_c(stacked, "cifar-c", CLASSES)
    with pytest.raises(ValueError, match=r"snow\.npy: is .*\(29, .*\(30, .* for 6 labels"):
        data.select(benchmark, [Domain("snow", 1)])
    np.save(stacked / "labels.npy", np.sort(np.arange(30) % 3))
    with pytest.raises(ValueError, match=r"labels\.npy is not the same for each severity"):
        open_c(stacked, "cifar-c", CLASSES)


def test_arrays_of_one_severity(stacked):
    np.save(stacked / "labels.npy", np.repeat([0, 1, 2], 2))
    np.save(stacked / "snow.npy", PIXELS.reshape(6, 40, 44, 3))
    with pytest.raises(ValueError, match=r"arrays .*class"):
        open_c(stacked, "arrays")
    benchmark = open_c(stacked, "arrays", CLASSES)
    for domain in (Domain("snow"), CLEAN):
        np.testing.assert_array_equal(every_image(benchmark[domain]), EXPECTED)
    with pytest.raises(ValueError, match="'snow' of severity 5, expected one of snow"):
        data.select(benchmark, [Domain("snow", 5)])
    with pytest.raises(ValueError, match=r"unknown corruption 'labels' .* clean, fog, snow"):
        data.select(benchmark, [Domain("labels")])


def test_arrays_and_cifar_c_are_told_apart(stacked, caplog):
    open_c(stacked, "cifar-c", CLASSES)
    assert not heard(caplog)
    open_c(stacked, "arrays", CLASSES)
    assert "the same labels five times; --layout cifar-c has five severities" in caplog.text
    np.save(stacked / "labels.npy", np.repeat([0, 1, 2], 2))
    with pytest.raises(ValueError, match=r"\(30, .* \(6, .* for 6 labels; --layout cifar-c"):
        data.select(open_c(stacked, "arrays", CLASSES), [Domain("fog")])
    np.save(stacked / "fog.npy", PIXELS.reshape(6, 40, 44, 3))
    with pytest.raises(ValueError, match="cifar-c has five severities in a file, arrays one"):
        open_c(stacked, "cifar-c", CLASSES)


def test_hidden_arrays_and_domains_are_passed_over(stacked):
    for name in ("fog", "clean", "labels", "snow"):
        (stacked / f"._{name}.npy").write_bytes(b"AppleDouble")
    benchmark = open_c(stacked, "cifar-c", CLASSES)
    assert {domain.corruption for domain in benchmark} == {"clean", "fog"}
    np.testing.assert_array_equal(every_image(benchmark[CLEAN]), EXPECTED)
    for place in ("fog/5", ".fog/5", "__MACOSX/fog/5", "fog/5/@eaDir", "fog/5/.git"):
        write_folders(stacked / "folders" / place, ("a", "b", "c"))
    benchmark = open_c(stacked / "folders")
    assert (data.class_names_of(benchmark), [*benchmark]) == (("a", "b", "c"), [FOG])


def test_cifar100_is_known_by_its_labels(stacked):
    np.save(stacked / "labels.npy", np.tile([0, 1, 2, 3, 4, 99], 5))
    names = data.class_names_of(open_c(stacked, "cifar-c"))
    assert (len(names), names[:2]) == (100, ("apple", "aquarium fish"))
    np.save(stacked / "labels.npy", np.tile([0, 1, 2, 3, 4, 100], 5))
    with pytest.raises(ValueError, match="labels run from 0 to 100, expected 0 to 99"):
        open_c(stacked, "cifar-c")


def prepared(split="test"):
    pytest.importorskip("tensorflow_datasets")
    return open_tfds("tiny_pictures", split, PREPARED)


def test_a_prepared_tensorflow_dataset_is_read_without_tensorflow():
    images = prepared()
    assert images.class_names == ("cat", "dog", "frog")
    assert list(np.bincount(images.labels)) == [4, 4, 4]
    assert len(prepared("test[:50%]").labels) == 6
    source = open_tfds("tiny_pictures:1.0.0", "test", PREPARED)
    read = every_image(source)
    bundled = data.open_dataset("folder", assets.IMAGES)
    for c, name in enumerate(images.class_names):
        numbers = np.flatnonzero(bundled.labels == bundled.class_names.index(name))[:4]
        expected = {PREPROCESS(Image.fromarray(bundled[n])).tobytes() for n in numbers}
        assert {image.tobytes() for image in read[c]} == expected
    assert "tensorflow" not in sys.modules
    assert source.name(3) == "tiny_pictures:1.0.0 test image 3"


def test_a_prepared_folder_is_read_and_is_the_same_wherever_it_is(copied):
    here, there = (open_tfds(str(one)) for one in (PREPARED / "tiny_pictures" / "1.0.0", copied))
    assert here.content() == there.content()
    assert there.name(3) == "tiny_pictures/1.0.0 test image 3"
    assert {*map(len, (here, there, prepared()))} == {12}


def test_another_folder_of_a_dataset_s_name_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "tiny_pictures").mkdir()  # such as the images that it was made of
    monkeypatch.chdir(tmp_path)
    assert len(prepared()) == 12


def test_splits_of_a_dataset_are_told_apart():
    assert prepared().content() == prepared().content() != prepared("test[:50%]").content()


def test_tensorflow_datasets_own_mock_data():
    """Its features and random images, encoded here: by itself it needs TensorFlow for that."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def encoded(builder, split, decoders, **_):
        from tensorflow_datasets.testing import mocking

        assert isinstance(decoders["image"], tfds.decode.SkipDecoding)
        generator = mocking.RandomFakeGenerator(builder.info.features, 5)
        return [example | {"image": png(example["image"])} for example in generator]

    with tfds.testing.mock_data(num_examples=5, as_data_source_fn=encoded):
        images = open_tfds("cifar100", "test")
        assert len(images.class_names) == 100
        assert data.corrupted(images, PREPROCESS)[FOG][4].shape == (32, 32, 3)
        assert len(images.labels) == 5
        with pytest.raises(ValueError, match="'imdb_reviews' as images and labels"):
            open_tfds("imdb_reviews", "test")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("no_such_set", "test", "of 'no_such_set' as images and labels .*not found"),
        ("No Such:", "test", "of 'No Such:'"),
        ("tiny_pictures", "val", "cannot read 'val' of 'tiny_pictures' .*one of .'test'"),
        ("tiny_pictures", "test[:x", r"cannot read 'test\[:x' of"),
        ("cifar10", "test", r"to prepare it: tfds\.builder\('cifar10', file_format='array_rec"),
    ],
)
def test_bad_tensorflow_datasets_are_refused(name, split, message):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=message) as raised:
        open_tfds(name, split, PREPARED)
    assert "\n" not in str(raised.value)


@pytest.fixture
def copied(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    shutil.copytree(PREPARED / "tiny_pictures", tmp_path / "tiny_pictures")
    return tmp_path / "tiny_pictures" / "1.0.0"


def test_tensorflow_datasets_in_another_format_are_refused(copied):
    info = (copied / "dataset_info.json").read_text()
    (copied / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    records = next(copied.glob("*.array_record*"))
    records.rename(copied / records.name.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"FileFormat\.TFRECORD .*file_format='array_record'"):
        open_tfds("tiny_pictures", "test", copied.parents[1])


def test_damaged_tensorflow_datasets_are_refused(copied):
    images = open_tfds("tiny_pictures", "test", copied.parents[1])
    records = next(copied.glob("*.array_record*"))
    records.write_bytes(records.read_bytes()[:70000])
    with pytest.raises(ValueError, match="cannot read 'test' of 'tiny_pictures'"):
        open_tfds("tiny_pictures", "test", copied.parents[1])
    with pytest.raises(data.UnreadableImageError, match="test image 3: cannot be read"):
        pickle.loads(pickle.dumps(images))[3]  # as in another process


def test_names_and_splits_of_tensorflow_datasets_are_told_apart(monkeypatch):
    def opened(name, split):
        return data.ArrayDataset(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, int), (name, split))

    monkeypatch.setattr(layouts, "open_tfds", opened)
    for text, expected in (
        ("cifar10", ("cifar10", "train")),
        ("cifar10:test", ("cifar10", "test")),
        ("cifar10:3.0.2", ("cifar10:3.0.2", "train")),
        ("cifar10:3.0.2:test[:50%]", ("cifar10:3.0.2", "test[:50%]")),
    ):
        assert data.open_dataset("tfds", text, split="train").class_names == expected


def test_the_door_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="unknown layout 'imagnet', expected one of folder, imag"):
        data.open_dataset("imagnet", tmp_path)
    write_folders(tmp_path, ("cat", "dog", "emu"))
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        data.open_dataset("folder", tmp_path, ["cat", "dog"])
    source = data.open_dataset("folder", tmp_path, ["a cat", "a dog", "an emu"])
    assert source.class_names == ("a cat", "a dog", "an emu")


def test_tables():
    assert len(IMAGENET_CLASSES) == 1000
    assert list(IMAGENET_CLASSES) == sorted(IMAGENET_CLASSES)
    assert len(data.imagenet_templates()) == 80
    assert len(CIFAR100_CLASSES) == len(set(CIFAR100_CLASSES)) == 100
    for layout in data.LAYOUTS:
        assert all(template.count("{}") == 1 for template in data.templates_for(layout))
    assert data.templates_for("dtd") == ("{} texture.",)
    assert data.templates_for("imagenet-c") == ("a photo of a {}.",)


def test_mnist_is_asked_with_its_own_prompt(monkeypatch):
    opened = []

    def open_dataset(layout, place, split):
        opened.append((layout, place, split))
        return command.digits()

    monkeypatch.setattr(data, "open_dataset", open_dataset)
    task = command.open_task("mnist")
    assert opened == [("tfds", "mnist", "train"), ("tfds", "mnist", "test")]
    assert task.template == 'a photo of the number: "{}".'
