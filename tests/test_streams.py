"""What an adapter meets, in which order, and how it is cut into batches."""

import dataclasses
import inspect
import subprocess
import sys
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from jaxtta import data
from jaxtta.data import Domain
from jaxtta.models.preprocess import Preprocessing

PREPROCESS = Preprocessing(32, 32, (32, 32))


LABELS = np.array([0, 1, 1, 0, 1, 2, 2], np.int32)


@dataclasses.dataclass
class Fake:
    """Images whose pixels say which they are; number 3 cannot be read."""

    domain: Domain
    labels, class_names = LABELS, ("a", "b", "c")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        if number == 3:
            raise data.UnreadableImageError("broken")
        image = np.full((32, 32, 3), number, np.uint8)
        image[0, 0] = len(self.domain.corruption), self.domain.severity, 9
        return image


BENCHMARK = {
    domain: Fake(domain) for domain in (Domain(n, s) for n in ("fog", "snow") for s in range(1, 6))
}


settings = st.sampled_from(data.streams.SETTINGS)
orders = st.sampled_from(data.streams.ORDERS)


@hypothesis.given(settings, orders, st.integers(1, 9), st.integers(0, 3), st.integers(1, 8))
@hypothesis.settings(deadline=None)
def test_every_setting_shows_every_image_once_a_segment(setting, order, size, seed, limit):
    severities = (1, 2, 3, 4, 5) if setting == "gradual" else (2, 5)
    streams = data.make_streams(
        setting, ("fog", "snow"), severities, LABELS, order=order, seed=seed, limit=limit
    )
    assert len({stream.name for stream in streams}) == len(streams)
    expected = {"reset_each_shift": 4, "continual": 2, "gradual": 1, "mixed": 2}[setting]
    assert len(streams) == expected
    batches = data.Batches(BENCHMARK, tuple(streams), size, PREPROCESS)
    for number, stream in enumerate(streams):
        read = [batches[i] for i in batches.of(number)]
        shown = np.concatenate([b.source_index for b in read])
        segments = np.concatenate([b.segments for b in read])
        index = np.concatenate([b.index for b in read])[shown >= 0]
        np.testing.assert_array_equal(index, np.arange(len(stream.items)))
        images = set(shown[shown >= 0].tolist())
        assert len(images) == min(limit, 7)
        for segment in range(len(stream.segments)):
            assert sorted(shown[segments == segment].tolist()) == sorted(images)
        for batch in read:
            valid = batch.source_index >= 0
            np.testing.assert_array_equal(batch.mask, valid & (batch.source_index != 3))
            np.testing.assert_array_equal(batch.labels[valid], LABELS[batch.source_index[valid]])
            np.testing.assert_array_equal(
                batch.images[batch.mask][:, 5, 5, 0], batch.source_index[batch.mask]
            )
            for k in np.flatnonzero(batch.mask):
                domain = stream.segments[batch.segments[k]]
                assert batch.images[k, 0, 0].tolist() == [len(domain[0]), domain[1], 9]
            if setting != "mixed":
                assert len(set(batch.segments[valid].tolist())) == 1


def test_gradual_goes_up_and_down_again():
    (stream,) = data.make_streams("gradual", ("fog", "clean"), (), np.zeros(2, int))
    assert [domain.severity for domain in stream.segments] == [1, 2, 3, 4, 5, 4, 3, 2, 1, 0]


def test_mixed_in_stored_order_interleaves():
    (stream,) = data.make_streams("mixed", ("fog", "snow"), (5,), np.zeros(3, int), order="stored")
    assert stream.items.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]]


def test_every_corruption_is_met_in_the_same_order():
    a, b = data.make_streams("reset_each_shift", ("fog", "snow"), (5,), np.zeros(50, int), seed=4)
    np.testing.assert_array_equal(a.items, b.items)
    (c, _) = data.make_streams("reset_each_shift", ("fog", "snow"), (5,), np.zeros(50, int), seed=5)
    assert np.any(a.items != c.items)


@pytest.mark.parametrize("order", data.streams.ORDERS)
def test_a_stream_does_not_depend_on_what_other_streams_there_are(order):
    labels = np.arange(30) % 4
    alone, among = (
        data.make_streams("reset_each_shift", names, (5,), labels, order=order)[-1]
        for names in (("fog",), ("snow", "frost", "fog"))
    )
    assert alone.name == among.name == "fog-5"
    np.testing.assert_array_equal(alone.items, among.items)


@pytest.mark.parametrize("setting", ["continual", "mixed"])
def test_correlated_is_sorted_by_class(setting):
    labels = np.random.default_rng(0).integers(0, 4, 40)
    (stream,) = data.make_streams(setting, ("fog", "snow"), (5,), labels, order="correlated")
    for part in stream.parts:
        assert np.all(np.diff(labels[part[:, 1]]) >= 0)


def test_the_dirichlet_order_lies_between_shuffled_and_sorted():
    labels = np.repeat(np.arange(10), 100)

    def neighbours(order, concentration=1.0):
        rng = np.random.default_rng(0)
        arranged = labels[data.order_indices(labels, order, rng, concentration)]
        return (np.diff(arranged) == 0).mean()

    shares = [neighbours("dirichlet", c) for c in (0.05, 1.0, 1e4)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(neighbours("shuffled"), abs=0.05)
    assert shares[0] > 0.3 > 0.15 > shares[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setting": "weekly"}, "unknown setting 'weekly', expected one of reset_each_shift"),
        ({"order": "random"}, "unknown order 'random', expected one of shuffled"),
        ({"limit": 0}, "limit 0 and concentration 0.1 must be above 0"),
        ({"concentration": 0.0}, "limit None and concentration 0.0 must be above 0"),
    ],
)
def test_bad_streams_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        data.make_streams(
            options.pop("setting", "mixed"), ("fog",), (5,), np.zeros(2, int), **options
        )


@pytest.mark.parametrize(
    ("workers", "canvas", "size", "side"), [(0, None, 4, 32), (0, 40, 5, 48), (2, 64, 2, 48)]
)
def test_workers_and_where_reading_begins_change_nothing(workers, canvas, size, side):
    images = np.random.default_rng(0).integers(0, 256, (6, 40, 44, 3), np.uint8)
    dataset = data.ArrayDataset(images, np.arange(6) % 2, ("cat", "dog"))
    preprocess = Preprocessing(side, side, (side, side))
    benchmark = data.corrupted(dataset, preprocess)
    corruptions = ("snow", "glass_blur", "clean")
    streams = data.make_streams("reset_each_shift", corruptions, (3,), dataset.labels, seed=2)
    batches = data.Batches(benchmark, tuple(streams), size, preprocess, canvas)
    numbers = range(1, len(batches))
    read = list(data.read_ahead(batches, workers, numbers))
    assert len(read) == len(numbers)
    for number, batch in zip(numbers, read, strict=True):
        assert batch.images.shape == (size, side, side, 3)
        assert not batch.images[~batch.mask].any()
        for x, y in zip(batch, batches[number], strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_domain_says_its_severity_where_it_has_one():
    assert [str(Domain("fog", 3)), str(Domain("fog"))] == ["fog-3", "fog"]


@pytest.mark.parametrize("workers", [0, 1])
def test_originals_lie_in_a_corner_of_a_canvas(tmp_path, workers):
    for name, size in (("cat", (40, 44)), ("dog", (33, 100))):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    dataset = data.open_dataset("folder", tmp_path)
    streams = data.make_streams("continual", ("clean", "fog"), (3,), dataset.labels, order="stored")
    assert data.canvas_for(dataset) == 100
    assert data.canvas_for(dataset, greatest=64) == 64
    batches = data.Batches(data.corrupted(dataset, PREPROCESS), tuple(streams), 3, PREPROCESS, 64)
    clean, fog = data.read_ahead(batches, workers)
    assert clean.sizes.tolist() == [[40, 44], [21, 64], [1, 1]]  # 33×100 is shrunk to fit
    np.testing.assert_array_equal(clean.originals[0, :40, :44], dataset[0])
    assert not clean.originals[0, 40:].any()
    assert not clean.originals[0, :, 44:].any()
    # photographs are corrupted after resize and crop: there is no larger original
    assert fog.sizes.tolist() == [[32, 32], [32, 32], [1, 1]]
    np.testing.assert_array_equal(fog.originals[:2, :32, :32], fog.images[:2])


READER = """
import numpy as np
from jaxtta import data

class Images:
    def __init__(self, number):
        self.labels = np.zeros(20_000, np.int64)  # more than a pipe between processes holds
        self.image_size, self.number = 4, number
    def __call__(self, image):
        return np.asarray(image)
    def __getitem__(self, image):
        return np.full((4, 4, 3), self.number + image, np.uint8)

images, domain = Images(7), data.Domain("a")
stream = data.stream_of("a", [domain], np.arange(5), 0)
batches = data.Batches({domain: images}, (stream,), 2, images)
"""


def run_python(script, **options):
    command = [sys.executable, script]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_a_script_without_a_main_guard_reads_its_images(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"{READER}\nfor batch in data.read_ahead(batches): print(batch.images.max())")
    done = run_python(script)
    assert (done.returncode, done.stdout.split()) == (0, ["8", "10", "11"])


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_a_script_that_cannot_have_processes_ends_with_a_sentence(tmp_path, where):
    """It waited for ever, for a process that had ended."""
    script = tmp_path / "script.py"
    script.write_text(f"{READER}\nfor batch in data.read_ahead(batches, 2): print(batch)")
    with script.open() as lines:
        done = run_python("-" if where == "stdin" else script, stdin=lines)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ChildProcessError: a process that reads images has ended: memory")
    if where == "file":
        assert "if __name__ == '__main__':" in done.stderr


def test_a_guarded_script_reads_in_processes(tmp_path):
    script = tmp_path / "script.py"
    guarded = "    for batch in data.read_ahead(batches, 2): print(batch.images.max())"
    script.write_text(f'{READER}\nif __name__ == "__main__":\n{guarded}')
    done = run_python(script)
    assert (done.returncode, done.stdout.split()) == (0, ["8", "10", "11"])


def test_a_dataset_that_no_process_can_open_is_said():
    dataset = Fake(Domain("a"))
    dataset.lock = threading.Lock()
    stream = data.stream_of("a", [dataset.domain], np.arange(3), 0)
    batches = data.Batches({dataset.domain: dataset}, (stream,), 2, PREPROCESS)
    assert len(list(data.read_ahead(batches))) == 2
    with pytest.raises(TypeError, match="lock"):
        next(data.read_ahead(batches, 1))


def test_no_library_function_starts_processes_unasked():
    assert inspect.signature(data.read_ahead).parameters["workers"].default == 0
