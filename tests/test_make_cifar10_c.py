"""CIFAR-10-C's corruptions, and the script that makes arrays of them."""

import pickle
import re

import numpy as np
import pytest
from conftest import errors_in, golden, write_images

from jaxtta import assets, cifar_pickles, data
from jaxtta.corruptions import image_seed
from jaxtta.corruptions_cifar import CONSTANTS, corrupt, corrupt_all, difference

SCRIPT = "make_cifar10_c.py"
RANDOM = {
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "fog"),
    *("motion_blur", "snow", "frost", "elastic_transform", "spatter"),
}
ERRATIC = {"elastic_transform", "frost", "spatter", "saturate"}  # no order, also in the paper


@pytest.fixture(scope="module")
def images():
    return np.load(assets.IMAGES)["images"][::100]


def write_arrays(folder, images, labels):
    folder.mkdir(parents=True)
    np.save(folder / "clean.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder


def test_constants_are_there_for_each_severity():
    assert set(CONSTANTS) == {*data.IMAGENET_C, *data.IMAGENET_C_EXTRA}
    assert {len(values) for values in CONSTANTS.values()} == {5}


@pytest.mark.parametrize("name", CONSTANTS)
def test_laws(name, images):
    before = images[:8].copy()
    made = {level: corrupt_all(before, range(8), name, level) for level in (1, 3, 5)}
    assert np.array_equal(before, images[:8])
    for level, array in made.items():
        assert array.dtype == np.uint8 and array.shape == before.shape
        assert not np.array_equal(array, before) or (name, level) == ("spatter", 1)
    changes = [np.abs(array.astype(int) - before).mean() for array in made.values()]
    steps = changes[1:] if name == "glass_blur" else changes  # the first one hardly blurs
    assert name in ERRATIC or steps == sorted(steps)
    assert np.array_equal(corrupt_all(before[:1], [0], name, 5)[0], made[5][0])
    other = corrupt_all(before[:2], [100, 101], name, 5)
    assert np.array_equal(other, made[5][:2]) == (name not in RANDOM)


def test_numpys_global_state_is_not_used(images):
    np.random.seed(1)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    for name in RANDOM:
        corrupt(images[0], name, 2, 0)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_stored_arrays_are_made_again():
    """Eight CIFAR-10 images at severity 5, made by others with the published functions."""
    stored, found = golden("cifar10_c_severity5"), set()
    for key in stored.files:
        part, name = key.split("/")
        clean = stored[f"{part}/clean"]
        made = corrupt_all(clean, range(len(clean)), name, 5)
        if name in RANDOM:  # as strong
            ratio = (made - clean.astype(float)).std() / (stored[key] - clean.astype(float)).std()
            assert 0.95 < ratio < 1.05, name
        else:
            assert np.array_equal(made, stored[key]), name
        found.add(name)
    assert found >= {*CONSTANTS} - RANDOM


@pytest.mark.parametrize(
    "image, name, severity, said",
    [
        (np.zeros((32, 32, 3), np.uint8), "rain", 1, "unknown corruption 'rain'"),
        (np.zeros((32, 32, 3), np.uint8), "fog", 6, "severity is 6"),
        (np.zeros((64, 64, 3), np.uint8), "fog", 1, "(64, 64, 3)"),
        (np.zeros((32, 32, 3)), "fog", 1, "float64"),
    ],
)
def test_bad_arguments(image, name, severity, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        corrupt(image, name, severity, 0)


@pytest.mark.parametrize("value", [0, 255])
def test_images_of_one_grey(value):
    image = np.full((32, 32, 3), value, np.uint8)
    for name in CONSTANTS:
        for severity in (1, 5):
            with np.errstate(all="raise", under="ignore"):
                assert corrupt(image, name, severity, 3).shape == image.shape


def test_difference():
    clean = np.full((2, 4, 4, 3), 10, np.uint8)
    one, other = clean + np.uint8(2), clean.copy()
    other[0] += 2
    found = difference(clean, one, other)
    assert found["mean_absolute_difference"] == 1 and found["equal"] == 0.5
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / 4))
    assert (found["mean"], found["mean_other"], found["std"]) == (2, 1, 0)
    assert np.isnan(difference(clean, one, one)["psnr"])


def test_arrays_of_the_bundled_images(run_script, tmp_path):
    output = tmp_path / "made"
    given = ["--images", 4, "--validation-images", 3, "--output", output, "--severity", 2]
    assert run_script(SCRIPT, *given)[0] == 0
    for part, names, count in (
        ("test", data.IMAGENET_C, 4),
        ("meta_train", data.IMAGENET_C_EXTRA, 3),
    ):
        opened = data.open_benchmark("arrays", output / part, None, data.CIFAR10_CLASSES)
        assert {x.corruption for x in opened} == {*names, "clean"}
        data.select(opened, opened)
        assert len(data.labels_of(opened)) == count
    bundled = np.load(assets.IMAGES)
    rows = {image.tobytes(): number for number, image in enumerate(bundled["images"])}
    parts = [np.load(output / part / "clean.npy") for part in ("test", "meta_train")]
    test, held = ([rows[image.tobytes()] for image in part] for part in parts)
    assert not {*test} & {*held} and test == sorted(test)
    assert np.array_equal(np.load(output / "test" / "labels.npy"), bundled["labels"][test])
    fog = np.load(output / "test" / "fog.npy")
    seed = image_seed(0, "fog", 2, test[1])
    assert np.array_equal(fog[1], corrupt(bundled["images"][test[1]], "fog", 2, seed))

    # What is there and whole stays; what is not is made again, the same.
    kept, cut = output / "test" / "snow.npy", output / "test" / "fog.npy"
    changed = kept.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:500])
    assert run_script(SCRIPT, *given)[0] == 0
    assert kept.stat().st_mtime_ns == changed and np.array_equal(np.load(cut), fog)
    code, _, errors = run_script(SCRIPT, *given[:-1], 3)
    assert code == 1 and errors_in(errors) == 1 and "choose another" in errors
    (output / "test" / "made.json").unlink()
    assert "choose another" in run_script(SCRIPT, *given)[2]


def layouts(folder, images, labels):
    """The same ten images, by layout."""
    names = np.array(data.CIFAR10_CLASSES)
    np.savez(folder / "own.npz", images=images, labels=labels, class_names=names)
    write_arrays(folder / "arrays", images, labels)
    content = {"data": images.transpose(0, 3, 1, 2).reshape(-1, 3072), "labels": labels.tolist()}
    pickles = folder / "cifar-10-batches-py"
    pickles.mkdir()
    (pickles / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    write_images(folder / "classes", per_class=1)
    return {
        "npz": folder / "own.npz",
        "npy": folder / "arrays" / "clean.npy",
        "arrays": folder / "arrays",
        "pickles": pickles,
        "pickle": pickles / "test_batch",
        "classes": folder / "classes",
    }


def test_layouts(run_script, tmp_path, monkeypatch):
    bundled = np.load(assets.IMAGES)
    first = np.searchsorted(bundled["labels"], np.arange(10))
    images, labels = bundled["images"][first], bundled["labels"][first]
    monkeypatch.setitem(CONSTANTS, "zoom_blur", (1.02,) * 5)  # the slow one
    made = {}
    for layout, path in layouts(tmp_path, images, labels).items():
        output = tmp_path / "made" / layout
        given = ["--data", path, "--validation-images", 8, "--output", output]
        code, _, errors = run_script(SCRIPT, *given)
        assert code == 0, errors
        made[layout] = {x.relative_to(output): x.read_bytes() for x in output.rglob("*.npy")}
    assert len(made["npz"]) == 23
    assert all(arrays == made["npz"] for arrays in made.values())


@pytest.mark.slow
def test_workers_change_nothing(run_script, tmp_path):
    found = []
    for workers in (0, 1):
        output = tmp_path / str(workers)
        given = ["--images", 2, "--validation-images", 1, "--output", output]
        assert run_script(SCRIPT, *given, "--workers", workers)[0] == 0
        found.append({x.relative_to(output): x.read_bytes() for x in output.rglob("*.npy")})
    assert found[0] == found[1]


def test_bad_images(run_script, tmp_path):
    def refused(*given):
        code, _, errors = run_script(SCRIPT, *given, "--output", tmp_path / "made")
        assert code == 1 and errors_in(errors) == 1
        return errors

    assert "1998 images are left for test, expected 1999" in refused(
        "--validation-images", 2, "--images", 1999
    )
    assert "left for meta_train" in refused("--validation-images", 0)
    large = write_arrays(tmp_path / "large", np.zeros((9, 40, 40, 3), np.uint8), np.arange(9))
    assert "(40, 40, 3)" in refused("--data", large, "--validation-images", 2)
    digits = tmp_path / "digits"
    write_images(digits, per_class=1, names=("cat", "dog"))
    assert "expected ('airplane'" in refused("--data", digits)
    assert not (tmp_path / "made").exists()


def test_a_pickle_runs_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("run",))

    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({"data": Harmful(), "labels": []}))
    with pytest.raises(ValueError, match=r"names builtins\.print, which is not run"):
        cifar_pickles.read_batch(path)
    for content in (b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"data": np.zeros(3)})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no file of cifar-10-batches-py"):
            cifar_pickles.read_batch(path)


def test_comparison(run_script, tmp_path, short):
    output, other, table = tmp_path / "made", tmp_path / "other", tmp_path / "data.csv"
    given = ["--images", 4, "--validation-images", 2, "--output"]
    assert run_script(SCRIPT, *given, output)[0] == 0
    stored = np.load(output / "test" / "clean.npy")
    labels = np.load(output / "test" / "labels.npy")
    write_arrays(other / "test", stored[[2, 0]], labels[[2, 0]])
    for name, shift in (("fog", 0), ("snow", 1)):
        array = np.load(output / "test" / f"{name}.npy")[[2, 0]]
        np.save(other / "test" / f"{name}.npy", np.where(array > 200, array - shift, array + shift))
    model = ["--model", short, "--table", table]
    code, _, errors = run_script(SCRIPT, *given, output, "--compare", other, *model)
    assert code == 0, errors
    head, snow, fog = (line.split(",") for line in table.read_text().split("\n")[:3])
    snow, fog = (dict(zip(head, line, strict=True)) for line in (snow, fog))
    assert (snow["corruption"], fog["corruption"]) == ("snow", "fog")
    assert (fog["equal"], fog["psnr"], fog["gain"]) == ("1.00000", "", "0.00000")
    assert (snow["equal"], snow["mean_absolute_difference"]) == ("0.00000", "1.00000")
    assert fog["images"] == snow["images"] == "2"
    np.save(other / "test" / "clean.npy", 0 * stored[:2])
    code, _, errors = run_script(SCRIPT, *given, output, "--compare", other, *model)
    assert code == 1 and "no image with the clean pixels" in errors
