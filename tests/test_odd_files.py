"""Files and folders as other systems, tools and people leave them among images."""

import logging
import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from jaxtta import data, images
from jaxtta.data.layouts import listed_split
from jaxtta.models.preprocess import Preprocessing

PREPROCESS = Preprocessing(32, 32, (32, 32))
CLEAN, FOG = data.Domain("clean"), data.Domain("fog", 5)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 44, 3), np.uint8)
COLOUR = Image.fromarray(PIXELS)
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture
def folder(tmp_path):
    """Two classes with two images each."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            COLOUR.save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def said(caplog):
    """What is logged, from WARNING."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def listed(folder):
    found = data.image_folder(folder)
    return [
        f"{found.class_names[c]}/{p.name}" for c, p in zip(found.labels, found.files, strict=True)
    ]


PLAIN = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
SYSTEM = (
    *(".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "#recycle", "lost+found"),
    *("System Volume Information", "$RECYCLE.BIN"),
)


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_the_system_are_passed_over_in_silence(folder, name, said):
    for place in (folder, folder / "cat", folder / "dog" / name):
        shutil.copytree(folder / "cat", place / name)
    assert listed(folder) == PLAIN
    assert not said()


def test_files_of_the_system_are_passed_over_in_silence(folder, said):
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "Icon\r", ".hidden.jpg"):
        for place in (folder, folder / "cat"):
            (place / name).write_bytes(b"no image")
    assert listed(folder) == PLAIN
    assert not said()


def test_other_files_are_counted_and_named_by_suffix(folder, said):
    (folder / "README.txt").write_text("about the images")
    COLOUR.save(folder / "alone.png")
    for name in ("cat/a.HEIC", "dog/b.heic", "cat/c.txt", "cat/d.mp4", "cat/e"):
        (folder / name).write_bytes(b"")
    assert listed(folder) == PLAIN
    assert said() == [
        f"{folder}: 1 images outside the class folders passed over",
        f"{folder}: 5 files passed over: 2 .heic, 1 .txt, 1 .mp4, 1 without a suffix",
    ]
    (folder / "eel").mkdir()
    (folder / "eel" / "1.dng").write_bytes(b"")
    with pytest.raises(ValueError, match=r"eel: class folder without images .*\.dng': 1"):
        data.image_folder(folder)


def test_class_names_may_be_given_by_folder(folder, tmp_path, said):
    (folder / "cat" / "a.txt").touch()
    (tmp_path / "names.json").write_text('{"dog": "a hound", "cat": "a tom"}')
    dataset = data.open_dataset("folder", folder, [str(tmp_path / "names.json")])
    assert dataset.class_names == ("a tom", "a hound")
    assert said() == [f"{folder}: 1 files passed over: 1 .txt"]


def test_every_suffix_counts_in_any_case(folder, said):
    for suffix in images.SUFFIXES:
        shutil.copy(folder / "cat" / "0.png", folder / "dog" / f"x{suffix}")
        shutil.copy(folder / "cat" / "0.png", folder / "dog" / f"y{suffix.upper()}")
    assert len(listed(folder)) == 4 + 2 * len(images.SUFFIXES)
    assert not said()


def test_a_folder_named_like_an_image_is_a_folder(folder):
    (folder / "cat" / "2.png").mkdir()
    shutil.copy(folder / "dog" / "0.png", folder / "cat" / "2.png" / "inside.png")
    assert listed(folder) == ["cat/0.png", "cat/1.png", "cat/inside.png", "dog/0.png", "dog/1.png"]


def test_images_in_sub_folders_are_said(folder, said):
    shutil.copytree(folder / "cat", folder / "cat" / "morning")
    assert len(listed(folder)) == 6
    assert said() == [
        f"{folder}: 2 images are of the class folder's class though in a folder below it: "
        "cat/morning/0.png"
    ]


def test_links_are_followed_once(folder, tmp_path, said):
    shutil.move(folder / "dog", tmp_path / "elsewhere")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "all").symlink_to(folder)
    (folder / "cat" / "self").symlink_to(folder / "cat")
    (folder / "dog" / "0b.png").symlink_to(folder / "dog" / "0.png")
    assert listed(folder) == [*PLAIN[:3], "dog/0b.png", "dog/1.png"]
    assert not said()


def test_broken_links_are_unreadable_images(folder):
    (folder / "cat" / "2.png").symlink_to(folder / "gone.png")
    (folder / "cat" / "3.png").symlink_to("3.png")  # to itself
    (folder / "eel").symlink_to(folder / "gone")
    dataset = data.open_dataset("folder", folder)
    assert dataset.class_names == ("cat", "dog")
    assert list(dataset.labels) == [0, 0, 0, 0, 1, 1]
    for number in (2, 3):
        with pytest.raises(data.UnreadableImageError, match=rf"cat/{number}\.png: cannot be dec"):
            dataset[number]


def test_a_pipe_is_no_image(folder):
    os.mkfifo(folder / "cat" / "2.png")
    assert listed(folder) == PLAIN
    (folder / "cat" / "3.png").symlink_to("2.png")
    for name in ("2.png", "3.png"):  # waited for without end
        with pytest.raises(data.UnreadableImageError, match=rf"{name}: cannot be dec.* \(no file"):
            data.open_image(folder / "cat" / name)


def test_names_in_either_unicode_form_are_the_same(folder, tmp_path, said):
    (folder / "cat").rename(folder / NFD)
    assert data.image_folder(folder).class_names == (NFC, "dog")
    (tmp_path / "names.json").write_text(f'{{"{NFC}": "a café", "dog": "{NFD} dog"}}')
    for folders in ((NFC, "dog"), (NFD, "dog")):
        names = data.given_class_names([str(tmp_path / "names.json")], folders)
        assert names == ("a café", f"{NFC} dog")
    (folder / "captions.csv").write_text(f"file,caption\n{NFD}/0.png,{NFD}\ndog/0.png,dog\n")
    assert data.captioned_folder(folder).class_names == (NFC, "dog")


ODD_NAMES = (
    "with space.png",
    "a 'quoted\" one.png",
    "line\nbreak.png",
    "caf\udce9.png",
    "%s {}.png",
)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_file_names_may_hold_anything(folder, name):
    COLOUR.save(folder / "cat" / "2.png")
    (folder / "cat" / "2.png").rename(folder / "cat" / name)
    dataset = data.open_dataset("folder", folder)
    number = next(n for n, file in enumerate(dataset.files) if file.name == name)
    np.testing.assert_array_equal(dataset[number], PIXELS)
    (folder / "cat" / name).write_bytes(b"broken")
    with pytest.raises(data.UnreadableImageError) as raised:
        dataset[number]
    for text in (str(raised.value), dataset.name(number)):
        assert "\n" not in text
        text.encode()  # as it is printed


def test_a_class_folder_whose_name_is_no_text_needs_class_names(folder):
    (folder / "cat").rename(folder / "caf\udce9")
    with pytest.raises(ValueError, match=r"class folder caf\\xe9 means nothing to a model: set"):
        data.open_dataset("folder", folder)
    dataset = data.open_dataset("folder", folder, ["a cat", "a dog"])
    assert dataset.class_names == ("a cat", "a dog")


TEXTS = {
    "plain": lambda text: text.encode(),
    "byte-order mark": lambda text: text.encode("utf-8-sig"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "old Mac": lambda text: text.replace("\n", "\r").encode(),
    "blank lines at the end": lambda text: f"{text}\n \n\n".encode(),
}
NAMES = {
    "names.txt": "cat’s\ncafé\n",
    "list.json": '["cat’s",\n"café"]\n',
    "object.json": '{"dog": "café",\n"cat": "cat’s"}\n',
    "upper.TXT": "cat’s\ncafé\n",
}


@pytest.mark.parametrize("how", TEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_class_names_in_every_kind_of_utf8(tmp_path, how, name):
    (tmp_path / name).write_bytes(TEXTS[how](NAMES[name]))
    names = data.given_class_names([str(tmp_path / name)], ["cat", "dog"])
    assert names == ("cat’s", "café")


@pytest.mark.parametrize("how", TEXTS)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_captions_in_every_kind_of_utf8(folder, how, separator):
    text = "file,caption\ncat/0.png,cat’s\ndog/0.png,café\n,\n".replace(",", separator)
    (folder / "captions.csv").write_bytes(TEXTS[how](text))
    assert data.captioned_folder(folder).class_names == ("café", "cat’s")


def test_a_caption_with_a_comma_is_not_cut_off(folder):
    table = folder / "captions.csv"
    for caption in ("cat, sitting", '"cat, sitting",,'):
        table.write_text(f"file,caption\ndog/0.png,dog\ncat/0.png,{caption}\n")
        if '"' in caption:
            assert data.captioned_folder(folder).class_names == ("cat, sitting", "dog")
        else:
            with pytest.raises(ValueError, match=r"csv: line 3 has more than 2 .* ',' needs quot"):
                data.captioned_folder(folder)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_other_encodings_are_refused_with_the_files_name(folder, tmp_path, encoding):
    path = folder / "captions.csv"
    path.write_bytes("file,caption\ncat/0.png,café\n".encode(encoding))
    with pytest.raises(ValueError, match=r"captions\.csv: is not UTF-8 text .*, save it as UTF-8"):
        data.captioned_folder(folder)
    (tmp_path / "names.txt").write_bytes("café\n".encode(encoding))
    with pytest.raises(ValueError, match=r"names\.txt: is not UTF-8 text .*, save it as UTF-8"):
        data.given_class_names([str(tmp_path / "names.txt")], ["cat"])
    (tmp_path / "variants.txt").write_bytes("café\n".encode(encoding))
    with pytest.raises(ValueError, match=r"variants\.txt: is not UTF-8 text"):
        data.open_dataset("fgvc-aircraft", tmp_path)
    (tmp_path / "split.json").write_bytes('{"test": [["a.jpg", 0, "café"]]}'.encode(encoding))
    with pytest.raises(ValueError, match=r"split\.json: is not UTF-8 text"):
        listed_split(tmp_path / "split.json", tmp_path)


def test_lists_of_benchmarks_with_a_byte_order_mark_and_crlf(tmp_path):
    (tmp_path / "variants.txt").write_bytes(b"\xef\xbb\xbf707-320\r\nF/A-18\r\n\r\n")
    (tmp_path / "images_variant_test.txt").write_bytes(b"\xef\xbb\xbf1 F/A-18\r\n2 707-320\r\n\r\n")
    found = data.open_dataset("fgvc-aircraft", tmp_path)
    assert (found.class_names, [*found.labels]) == (("707-320", "F/A-18"), [1, 0])
    (tmp_path / "split.json").write_bytes(b'\xef\xbb\xbf{"test": [["a.jpg", 0, "cat"]]}\r\n')
    assert listed_split(tmp_path / "split.json", tmp_path).class_names == ("cat",)


@pytest.mark.parametrize("name", ["names", "names.csv"])
def test_a_file_of_names_with_another_suffix_is_no_class(tmp_path, name):
    (tmp_path / name).write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=rf"{name}: expected class names in a \.txt or \.json fi"):
        data.given_class_names([str(tmp_path / name)])


def test_an_empty_name_within_a_list_is_refused(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match=r"names\.txt: has an empty name"):
        data.given_class_names([str(tmp_path / "names.txt")], [])
    (tmp_path / "names.json").write_text("[]")  # not the bundled model's classes
    with pytest.raises(ValueError, match=r"names\.json: has an empty name or no names"):
        data.given_class_names([str(tmp_path / "names.json")])


def test_equal_names_in_a_file_are_said_with_its_name(tmp_path, said):
    (tmp_path / "names.txt").write_text("crane\nmaillot\nCrane \ndog\n")
    expected = "several classes are called ['crane']; a tie counts for the first"
    assert len(data.given_class_names([str(tmp_path / "names.txt")], [])) == 4
    assert said() == [f"{tmp_path / 'names.txt'}: {expected}"]


def turned(path):
    """Save an image as a phone does: turned, with a tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    COLOUR.transpose(Image.Transpose.ROTATE_90).save(path, "PNG", exif=exif)


def test_own_images_are_upright_and_those_of_benchmarks_as_they_are_stored(tmp_path):
    stored = np.asarray(COLOUR.transpose(Image.Transpose.ROTATE_90))
    for place in ("own/a", "own/b", "net/n01440764", "net/n01443537", "v2/0", "v2/1"):
        turned(tmp_path / place / "0.png")
    for corruption in ("fog", "snow"):
        shutil.copytree(tmp_path / "net", tmp_path / "net-c" / corruption / "5")
    (tmp_path / "own" / "captions.csv").write_text("file,caption\na/0.png,cat\nb/0.png,dog\n")
    (tmp_path / "own" / "split.json").write_text('{"test": [["a/0.png", 0, "cat"]]}')
    for dataset, expected in (
        (data.open_dataset("folder", tmp_path / "own"), PIXELS),
        (data.captioned_folder(tmp_path / "own"), PIXELS),
        (data.open_dataset("imagenet", tmp_path / "net"), stored),
        (data.open_dataset("imagenet-v2", tmp_path / "v2"), stored),
        (data.open_benchmark("imagenet-c", tmp_path / "net-c", PREPROCESS)[FOG], stored),
        (listed_split(tmp_path / "own" / "split.json", tmp_path / "own"), stored),
    ):
        np.testing.assert_array_equal(dataset[0], expected)


def write_everything(root):
    """Two classes with every odd file that can be read, beside those that cannot be."""
    for name in ("a cat", NFD):
        (root / name).mkdir(parents=True)
    cat, cafe = root / "a cat", root / NFD
    grey = COLOUR.convert("L")
    layer = COLOUR.copy()
    layer.putalpha(grey)
    deep = np.asarray(grey).astype(np.uint16) * 257
    for number, (image, suffix, options) in enumerate(
        (
            *(
                (COLOUR, suffix, {})
                for suffix in (".JPG", ".jfif", ".webp", ".jp2", ".bmp", ".tga")
            ),
            *((COLOUR.convert("CMYK"), suffix, {}) for suffix in (".jpg", ".tif")),
            *((Image.fromarray(deep), suffix, {}) for suffix in (".png", ".tif")),
            (Image.fromarray(deep.astype(np.int32)), ".tif", {}),
            (Image.fromarray((deep / 65535).astype(np.float32)), ".tif", {}),
            (layer, ".png", {}),
            (layer.convert("LA"), ".png", {}),
            (COLOUR.quantize(8), ".png", {"transparency": 0}),
            (grey.convert("1"), ".png", {}),
            (COLOUR, ".gif", {"save_all": True, "append_images": [grey]}),
            (COLOUR, ".png", {"save_all": True, "append_images": [grey.convert("RGB")]}),
            (COLOUR, ".tif", {"save_all": True, "append_images": [grey]}),
        )
    ):
        image.save(cat / f"{number}{suffix}", **options)
    readable = number + 1
    turned(cat / "phone.png")
    (cat / "link.png").symlink_to(cat / "phone.png")
    for name in ODD_NAMES:
        shutil.copy(cat / "phone.png", cafe / name)
    shutil.copytree(cat, root / "__MACOSX" / "a cat")
    shutil.copytree(cat, cat / "@eaDir" / "0.JPG")
    shutil.copytree(cat, cafe / ".ipynb_checkpoints")
    (cafe / "more.png").mkdir()
    shutil.copy(cat / "phone.png", cafe / "more.png" / "1.PNG")
    (cafe / "round").symlink_to(root)
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "._phone.png",
        "a.heic",
        "b.cr2",
        "c.txt",
    ):
        (cat / name).write_bytes(b"no image")
    (cafe / "gone.png").symlink_to(root / "nowhere.png")
    (cafe / "empty.png").write_bytes(b"")
    (cafe / "short\udcff.jpg").write_bytes((cat / "0.JPG").read_bytes()[:-99])
    Image.fromarray(np.full((40, 40), np.nan, np.float32)).save(cafe / "nan.tif")
    Image.fromarray(np.full((40, 40), -5, np.int32)).save(cafe / "negative.tif")
    return {"a cat": readable + 2, NFC: len(ODD_NAMES) + 1}


def test_a_folder_with_one_of_everything(tmp_path, said):
    expected = write_everything(tmp_path / "images")
    dataset = data.open_dataset("folder", tmp_path / "images")
    assert dataset.class_names == ("a cat", NFC)
    assert said() == [
        f"{tmp_path / 'images'}: 3 files passed over: 1 .heic, 1 .cr2, 1 .txt",
        f"{tmp_path / 'images'}: 1 images are of the class folder's class though in a folder below "
        f"it: {NFD}/more.png/1.PNG",
    ]
    streams = data.make_streams("continual", ("clean",), (0,), dataset.labels, order="stored")
    batches = data.Batches({CLEAN: dataset}, tuple(streams), len(dataset), PREPROCESS)
    (batch,) = batches
    read = batch.mask
    counts = np.bincount(dataset.labels[batch.source_index[read]])
    assert dict(zip(dataset.class_names, counts, strict=True)) == expected
    assert [dataset.name(number).split("/")[-1] for number in np.flatnonzero(~read)] == [
        *("empty.png", "gone.png", "nan.tif", "negative.tif", r"short\xff.jpg")
    ]
    assert (batch.images[read].std((1, 2, 3)) > 5).all()  # none is black or white


def test_classifying_a_folder_with_one_of_everything(tmp_path, run_jaxtta, short):
    expected = write_everything(tmp_path / "images")
    command = ("--model", short, "--adapter", "zero_shot", "--batch-size", 8)
    code, out, err = run_jaxtta("classify", tmp_path / "images", *command)
    assert code == 3  # as documented: some images could not be read
    assert len(out.splitlines()) == sum(expected.values())
    for name in ("empty.png", "gone.png", "nan.tif", "negative.tif", r"short\xff.jpg"):
        assert f"{name}: cannot be decoded" in err
    assert f"5 of {sum(expected.values()) + 5} images have no answer" in err


def test_labels_of_target_images_in_every_kind_of_utf8(tmp_path, run_jaxtta, folder):
    (folder / "cat" / "0.png").rename(folder / "cat" / f"{NFD}.png")
    table = tmp_path / "labels.csv"
    command = ("--target", folder / "cat", "--class-names", "cat", NFC, "--output", tmp_path / "o")
    for encoding, message in (
        ("cp1252", "labels.csv: is not UTF-8 text"),
        ("utf-8-sig", "has a label already"),
    ):
        rows = f"image;class\r\n{NFC}.png;{NFC}\r\n{NFC}.png;cat\r\n;\r\n"
        table.write_bytes(rows.encode(encoding))
        code, _, err = run_jaxtta("diagnose", *command, "--target-labels", table)
        assert code == 1
        assert message in err
