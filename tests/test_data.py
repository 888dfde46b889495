import numpy as np
import pytest
from PIL import Image

from jaxtta import data
from jaxtta.data.corruptions import image_seed
from jaxtta.models.preprocess import Preprocessing

PREPROCESS = Preprocessing(32, 32, (32, 32))


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
    assert listed.class_names == ("cat", "dog")
    assert list(listed.labels) == [0, 0, 0, 1, 1]
    assert [path.name for path in listed.files] == ["0.png", "1.png", "2.png", "0.png", "1.png"]


def test_bad_folders_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        data.image_folder(tmp_path / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: class folder without images"):
        data.image_folder(folder)
    with pytest.raises(ValueError, match="has 0 class folders, expected at least two"):
        data.image_folder(folder / "empty")


@pytest.mark.parametrize("name", [*data.COMMON, *data.VALIDATION])
@pytest.mark.parametrize("size", [32, 45])
def test_every_corruption_is_repeatable_and_keeps_its_hands_off_global_state(name, size):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = data.corrupt(image, name, 3, seed=5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert first.shape == image.shape
    assert first.dtype == np.uint8
    assert np.any(first != image)
    np.testing.assert_array_equal(first, data.corrupt(image, name, 3, seed=5))


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
        for name in data.COMMON
        for severity in (1, 5)
        for number in range(20)
    }
    assert len(seeds) == 3 * 15 * 2 * 20


def test_images_smaller_than_the_model_are_corrupted_before_they_are_enlarged(folder):
    large = Preprocessing(96, 96, (96, 96))
    listed = data.image_folder(folder)
    source = data.CorruptedOnTheFly(listed, large)
    original = np.asarray(Image.open(listed.files[0]))
    seed = image_seed(3, "pixelate", 5, 0)
    expected = large(Image.fromarray(data.corrupt(original, "pixelate", 5, seed)))
    np.testing.assert_array_equal(source.read(data.Domain("pixelate", 5), 0, 3), expected)


@pytest.mark.parametrize("spoil", ["truncate", "empty", "text", "small"])
def test_unreadable_images_are_masked(folder, spoil):
    path = folder / "cat" / "1.png"
    content = path.read_bytes()
    if spoil == "small":
        Image.new("RGB", (20, 20)).save(path)
    else:
        path.write_bytes({"truncate": content[:200], "empty": b"", "text": b"hello"}[spoil])
    source = data.CorruptedOnTheFly(data.image_folder(folder), PREPROCESS)
    streams = data.make_streams("continual", ("fog",), (5,), source.labels, order="stored")
    batch = data.Batches(source, tuple(streams), 3)[0]
    assert list(batch.mask) == [True, False, True]
    assert not batch.images[1].any()
    assert source.name(streams[0].segments[0], batch.source_index[1]).endswith("1.png")


@pytest.fixture
def arrays(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "fog.npy", rng.integers(0, 256, (4, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.array([0, 1, 1, 0]))
    return tmp_path


def test_ready_arrays(arrays):
    source = data.corrupted_arrays(arrays, PREPROCESS, ["cat", "dog"])
    fog = data.Domain("fog")
    source.check(fog)
    np.testing.assert_array_equal(source.read(fog, 2, 0), np.load(arrays / "fog.npy")[2])
    assert list(source.labels) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels", np.array([0, 1, 2, 0]), "labels run from 0 to 2, expected 0 to 1"),
        ("labels", np.array([0, -1, 1, 0]), "labels run from -1 to 1"),
        ("labels", np.zeros(4), "expected integers"),
        ("labels", np.zeros(0, int), "no labels"),
        ("labels", np.array([{}]), "cannot be read as an array"),
        ("fog", np.zeros((4, 32, 32, 3)), "is float64 of shape"),
        ("fog", np.zeros((4, 3, 32, 32), np.uint8), r"shape \(4, 3, 32, 32\), expected"),
        ("fog", np.zeros((5, 32, 32, 3), np.uint8), "has 5 images, expected 4 for 4 labels"),
        ("snow", np.zeros(0), "unknown corruption 'rain', .* has fog, snow"),
    ],
)
def test_bad_arrays_are_refused(arrays, name, content, message):
    np.save(arrays / f"{name}.npy", content)
    with pytest.raises(ValueError, match=message):
        data.corrupted_arrays(arrays, PREPROCESS, ["cat", "dog"]).check(
            data.Domain("rain" if name == "snow" else "fog")
        )


def test_missing_labels_are_refused(arrays):
    (arrays / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.npy: no such file"):
        data.corrupted_arrays(arrays, PREPROCESS, ["cat", "dog"])


def test_unknown_corruptions_and_severities_are_refused(folder):
    source = data.CorruptedOnTheFly(data.image_folder(folder), PREPROCESS)
    with pytest.raises(ValueError, match="unknown corruption 'rain', expected one of gaussian_"):
        source.check(data.Domain("rain", 3))
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity is {severity}, expected 1 to 5"):
            source.check(data.Domain("fog", severity))
    source.check(data.Domain("clean"))


def test_the_embedded_images_are_balanced():
    from jaxtta import assets

    listed = data.image_folder(assets.IMAGES)
    assert list(np.bincount(listed.labels)) == [200] * 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"n2": "dog", "n1": "cat"}'),
        ("b.json", '["cat", "dog"]'),
        ("c.txt", "cat\ndog\n"),
    ],
)
def test_class_names_from_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert data.read_class_names(tmp_path / name, ["n1", "n2"]) == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as class names"),
        ('{"n1": "cat"}', "has no name for n2"),
        ("[1]", "names"),
    ],
)
def test_bad_class_names_are_refused(tmp_path, content, message):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        data.read_class_names(tmp_path / "names.json", ["n1", "n2"])
