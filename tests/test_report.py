"""Tables, CSV, plots and the page, made of cells in the format that `Record` writes."""

import base64
import csv
import json
import re
import types
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtta import io
from jaxtta.adapters import Prediction
from jaxtta.data.streams import Batches, make_streams
from jaxtta.evaluate.record import Record, gain
from jaxtta.metrics import ALEXNET_ERRORS
from jaxtta.report import html as page
from jaxtta.report import plots
from jaxtta.report import summary as report

CLASSES = 4
LABELS = np.arange(120) % CLASSES
CORRUPTIONS = ("fog", "snow", "motion_blur")
SKILLS = {"zero_shot": 0.5, "tent": 0.45, "batclip": 0.75}


class Blank:
    """Images that nobody looks at."""

    labels = LABELS
    preprocess = types.SimpleNamespace(image_size=2)

    def read(self, domain, number, seed):
        return np.zeros((2, 2, 3), np.uint8)


def cell_of(adapter, stream, setting, skill, settings=(), unreadable=()):
    """Run a made-up adapter that is right about as often as its skill says."""
    batches = Batches(Blank(), (stream,), 50)
    record = Record.empty(stream, len(batches))
    luck = np.random.default_rng(stream.seed).random((len(stream.segments), len(LABELS)))
    for number in range(len(batches)):
        batch = batches[number]
        batch = batch._replace(mask=batch.mask & ~np.isin(batch.source_index, unreadable))
        chance = [skill(stream.segments[s]) for s in batch.segments]
        right = luck[batch.segments, batch.source_index] < chance
        said = np.where(right, batch.labels, (batch.labels + 1) % CLASSES)
        logits = 3 * jnp.eye(CLASSES)[said] * luck[0, : len(said), None]
        record.add(number, batch, Prediction(logits, {}), 0.01)
    cell = {
        "adapter": adapter,
        "stream": stream.name,
        "seed": stream.seed,
        "setting": setting,
        **record.figures(),
        "peak_memory_gb": 1.25,
        "settings": {"model": "made up", "limit": None, **dict(settings)},
        "about": {"versions": {"jax": "0.0"}, "device": "cpu"},
    }
    for segment in cell["segments"]:
        segment["unreadable"] = [f"image {number}" for number in unreadable]
    return json.loads(json.dumps(cell, allow_nan=False))


def cells_of(
    setting="reset_each_shift",
    corruptions=CORRUPTIONS,
    severities=(5,),
    seeds=(1,),
    skills=SKILLS,
    **options,
):
    return [
        cell_of(
            name,
            stream,
            setting,
            lambda domain, skill=skill: skill - 0.03 * domain.severity,
            **options,
        )
        for seed in seeds
        for stream in make_streams(setting, corruptions, severities, LABELS, seed=seed)
        for name, skill in skills.items()
    ]


def accuracy(cells, adapter, corruption):
    found = [
        s["top1"]
        for c in cells
        if c["adapter"] == adapter
        for s in c["segments"]
        if s["corruption"] == corruption
    ]
    return 100 * np.mean(found)


def row(table, name):
    return next(line for line in table.splitlines() if line.startswith(name))


class Outline(HTMLParser):
    """Checks that tags close, and collects what a page shows and fetches."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.sources, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_the_table_counts_gains_from_zero_shot():
    cells = cells_of()
    table = report.table(cells)
    head, rule, *rows = table.splitlines()
    assert head.split() == ["corruption", "zero_shot", "tent", "batclip"]
    assert set(rule) == {"-"}
    assert [line.split()[0] for line in rows[:3]] == list(CORRUPTIONS)
    fog = {c["adapter"]: c["segments"][0] for c in cells if c["stream"] == "fog-5"}
    expected = gain([fog["batclip"]], [fog["zero_shot"]])
    low, high = (100 * x for x in expected["interval"])
    text = f"{100 * fog['batclip']['top1']:.2f} {100 * expected['top1']:+.2f} "
    assert text + f"[{low:+.2f}, {high:+.2f}]" in row(table, "fog")
    mean = np.mean([accuracy(cells, "batclip", name) for name in CORRUPTIONS])
    base = np.mean([accuracy(cells, "zero_shot", name) for name in CORRUPTIONS])
    assert f"{base:.2f}" in row(table, "mean")
    assert f"{mean:.2f} {mean - base:+.2f} [" in row(table, "mean")
    assert "severities" not in table
    assert "seeds" not in table


def test_the_means_interval_is_the_joint_one():
    cells = cells_of(seeds=(1, 2))
    own, base = (
        [s for c in cells if c["adapter"] == name for s in c["segments"]]
        for name in ("batclip", "zero_shot")
    )
    low, high = (100 * x for x in gain(own, base)["interval"])
    table = report.table(cells)
    assert f"[{low:+.2f}, {high:+.2f}]" in row(table, "mean")
    deviations = [
        np.std(
            [
                np.mean(
                    [
                        accuracy([c for c in cells if c["seed"] == s], name, corruption)
                        for corruption in CORRUPTIONS
                    ]
                )
                for s in (1, 2)
            ],
            ddof=1,
        )
        for name in SKILLS
    ]
    expected = ", ".join(f"{n} {d:.2f}" for n, d in zip(SKILLS, deviations, strict=True))
    assert row(table, "standard deviation").endswith(f"over 2 seeds: {expected}")


def test_datasets_weigh_the_same_whatever_their_size():
    cells = []
    for name, size, skill in (("large", 120, 0.9), ("small", 20, 0.2)):
        (stream,) = make_streams("reset_each_shift", (name,), (0,), LABELS, limit=size)
        for adapter, of in (("zero_shot", 0.5), ("tnt", skill)):
            cells.append(cell_of(adapter, stream, report.DATASETS, lambda _, of=of: of))
    means = [
        np.mean([accuracy(cells, adapter, name) for name in ("large", "small")])
        for adapter in ("zero_shot", "tnt")
    ]
    table = report.table(cells)
    assert table.startswith("dataset ")
    assert f"{means[1]:.2f} {means[1] - means[0]:+.2f} [" in row(table, "mean")
    assert "Averaged over 2 datasets" in report.answer(cells)


def test_an_adapter_that_harms_is_marked():
    table = report.table(cells_of(skills={"zero_shot": 0.9, "tent": 0.5, "batclip": 0.9}))
    assert row(table, "fog").count("!") == 1
    assert "! significantly worse than zero_shot" in table.splitlines()[-1]
    assert "!" not in report.table(cells_of(skills={"zero_shot": 0.5, "batclip": 0.7}))


def test_clean_images_stay_out_of_the_mean():
    cells = cells_of(corruptions=("clean", "fog"))
    table = report.table(cells)
    assert f"{accuracy(cells, 'zero_shot', 'fog'):.2f}" in row(table, "mean")
    assert "mean excludes clean images" in table
    only = cells_of(corruptions=("clean",))
    assert f"{accuracy(only, 'zero_shot', 'clean'):.2f}" in row(report.table(only), "mean")


def test_without_a_baseline_there_are_no_gains():
    cells = cells_of(skills={"tent": 0.5, "batclip": 0.7})
    assert "[" not in report.table(cells)
    assert "batclip has" in report.answer(cells)
    assert "no baseline" in report.answer(cells)
    assert "[" in report.table(cells, baseline="tent")


def test_severities_are_averaged_and_said():
    cells = cells_of(severities=(1, 3))
    table = report.table(cells)
    assert table.startswith("each corruption is the mean over severities 1, 3\n")
    assert f"{accuracy(cells, 'zero_shot', 'fog'):.2f}" in row(table, "fog")


@pytest.mark.parametrize("setting", ["reset_each_shift", "gradual"])
def test_the_mean_corruption_error_needs_all_of_imagenet_c(setting):
    names = tuple(ALEXNET_ERRORS)
    settings = {"layout": "imagenet-c", "images": "50000, labels 0"}
    options = {"severities": (1, 2, 3, 4, 5), "settings": settings}
    cells = cells_of(setting, names, skills={"zero_shot": 0.6}, **options)
    found = {}
    for segment in (s for c in cells for s in c["segments"]):
        found.setdefault((segment["corruption"], segment["severity"]), []).append(segment["top1"])
    errors = [
        1 - np.mean([np.mean(found[name, severity]) for severity in range(1, 6)]) for name in names
    ]
    expected = 100 * np.mean(np.asarray(errors) / list(ALEXNET_ERRORS.values()))
    assert report.corruption_error(cells, "zero_shot") == pytest.approx(expected)
    assert row(report.table(cells), "mean corruption error").endswith(f"{expected:.2f}")
    if setting == "reset_each_shift":
        assert report.corruption_error(cells[1:], "zero_shot") is None
    for change in ({"layout": "arrays"}, {"images": "5000, labels 0"}, {"limit": 100}):
        other = [{**cell, "settings": settings | change} for cell in cells]
        assert "mean corruption error" not in report.table(other)


def test_what_nobody_saw_is_a_dash():
    cells = cells_of()
    lost = cells_of(corruptions=("fog",), unreadable=range(len(LABELS)))
    cells = [*lost, *(c for c in cells if c["stream"] != "fog-5")]
    table = report.table(cells)
    assert row(table, "fog").split()[1:] == ["–"] * 3
    assert "nan" not in table
    assert "nan" not in " ".join(Outline(page.render(cells, {}, "lost")).text)
    assert report.answer(lost).startswith("No image")


@pytest.mark.parametrize(
    ("skills", "said"),
    [
        (SKILLS, "batclip is best"),
        ({"zero_shot": 0.9, "tent": 0.5}, "every adapter is worse than zero_shot"),
        ({"zero_shot": 0.7, "tent": 0.7}, "no adapter is clearly better than zero_shot"),
        ({"zero_shot": 0.7}, "No other adapter"),
    ],
)
def test_the_answer_says_who_is_best(skills, said):
    answer = report.answer(cells_of(skills=skills))
    assert answer.startswith("Averaged over 3 corruptions, ")
    assert said in answer
    assert answer.count(". ") == 1


def test_the_answer_counts_corruptions():
    answer = report.answer(cells_of(skills={"zero_shot": 0.6, "tent": 0.3, "batclip": 0.9}))
    assert "from zero_shot on 3 corruptions: tent better on 0 and worse on 3, " in answer
    assert answer.endswith("batclip better on 3 and worse on 0.")


def test_the_csv_holds_every_segment(tmp_path):
    cells = cells_of("gradual", ("fog", "snow"), unreadable=(3, 5))
    report.summary_csv(cells, tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 2 * 9
    assert [p.name for p in tmp_path.iterdir()] == ["summary.csv"]
    line = next(x for x in lines if x["adapter"] == "batclip" and x["segment"] == "9")
    cell = next(c for c in cells if c["adapter"] == "batclip")
    segment = cell["segments"][9]
    assert (line["corruption"], line["severity"], line["unreadable"]) == ("snow", "1", "2")
    assert float(line["top1"]) == segment["top1"]
    assert [float(line[f"nll_{end}"]) for end in ("low", "high")] == segment["intervals"]["nll"]
    base = next(c for c in cells if c["adapter"] == "zero_shot")["segments"][9]
    assert float(line["gain"]) == gain([segment], [base])["top1"]
    assert float(line["images_per_second"]) == cell["images_per_second"]
    assert next(x for x in lines if x["adapter"] == "zero_shot")["gain"] == ""


@pytest.mark.parametrize("setting", ["reset_each_shift", "continual", "gradual", "mixed"])
def test_every_setting_is_drawn(setting, tmp_path):
    cells = cells_of(
        setting, ("fog", "snow"), severities=(1, 5), skills={"zero_shot": 0.5, "a": 0.6}
    )
    paths = plots.save_all(cells, tmp_path / "plots", "all that $ there_is")
    names = ["accuracy.png", "running.png", "reliability.png", "severity.png"]
    assert [path.name for path in paths] == names
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_bars_are_the_tables_numbers():
    cells = cells_of()
    axes = plots.bars(cells).axes[0]
    heights = np.reshape([bar.get_height() for bar in axes.patches], (len(SKILLS), -1))
    expected = [[accuracy(cells, a, c) for c in CORRUPTIONS] for a in SKILLS]
    np.testing.assert_allclose(heights[:, :-1], expected)
    np.testing.assert_allclose(heights[:, -1], np.mean(expected, 1))
    assert [t.get_text() for t in axes.get_xticklabels()] == ["fog", "snow", "motion blur", "mean"]


def test_curves_end_at_the_accuracy_and_mark_segments():
    cells = cells_of("continual")
    axes, gains = plots.running(cells).axes[:2]
    curves = {line.get_label(): line for line in axes.lines}
    for name in SKILLS:
        expected = np.mean([accuracy(cells, name, c) for c in CORRUPTIONS])
        assert curves[name.replace("_", " ")].get_ydata()[-1] == pytest.approx(expected)
    assert [line.get_xdata()[0] for line in axes.lines[len(SKILLS) :]] == [120, 240]
    assert not gains.lines[0].get_ydata().any()
    assert gains.lines[2].get_ydata()[-1] > 10


def test_severities_are_drawn_only_where_there_are_several():
    assert plots.severity_curves(cells_of()) is None
    figure = plots.severity_curves(cells_of(severities=(1, 3, 5)))
    mean = figure.axes[0].lines[0]
    assert list(mean.get_xdata()) == [1, 3, 5]
    assert mean.get_ydata()[0] > mean.get_ydata()[-1]


def test_an_adapter_keeps_its_colour():
    names = ["zero_shot", *(f"adapter {number}" for number in range(12))]
    styles = plots.styles([{"adapter": name} for name in names])
    assert len(set(styles.values())) == len(names)
    assert plots.styles([{"adapter": "adapter 0"}])["adapter 0"] == styles["adapter 0"]


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path):
    cells = cells_of(severities=(1, 5), unreadable=(7,))
    cells[2]["skipped_steps"] = [1, 2]
    cells[2]["segments"][0]["without_prediction"] = 9
    samples = {name: np.full((32, 32, 3), 99, np.uint8) for name in CORRUPTIONS}
    page.write_report(cells, tmp_path / "report.html", samples, "fog & <snow>")
    text = (tmp_path / "report.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    outline = Outline(text)
    assert "script" not in outline.tags
    assert len(outline.sources) == len(CORRUPTIONS) + 4
    for source in outline.sources:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG")
    assert not re.search(r"url\(|@import|https?://", text)
    shown = " ".join(outline.text)
    assert report.answer(cells) in shown
    for words in ("fog & <snow>", "motion blur", "made up", "versions: jax", "1.25"):
        assert words in shown
    assert "batclip: 2 steps skipped" in shown
    assert "batclip: without a finite prediction, counted as wrong: 9" in shown
    assert "1 image could not be read: image 7." in shown


def test_names_cannot_break_the_page():
    evil = "<script>alert(1)</script>"
    cells = cells_of(skills={"zero_shot": 0.5, evil: 0.6}, corruptions=(evil, "a&b"))
    cells[0]["settings"][evil] = evil
    samples = {evil: np.zeros((200, 200, 3), np.uint8)}
    text = page.render(cells, samples, evil)
    assert "<script" not in text
    Outline(text)


def test_a_worker_without_a_share_reports_nothing(tmp_path):
    assert report.table([]).startswith("corruption")
    assert plots.save_all([], tmp_path) == []
    report.summary_csv([], tmp_path / "summary.csv")
    Outline(page.render([], {}, "nothing"))


def test_names_of_any_bytes_stop_no_report(tmp_path, capsys):
    """A folder's name becomes a corruption's, an image's is listed where it cannot be read."""
    cells = cells_of(corruptions=("fog", "caf\udce9"), unreadable=(3,))
    for cell in cells:
        for segment in cell["segments"]:
            segment["unreadable"] = ["torn\udce9.jpg"]
    samples = {"caf\udce9": np.zeros((4, 4, 3), np.uint8)}
    title = "in \udce9"
    assert report.answer(cells)
    report.summary_csv(cells, tmp_path / "summary.csv")
    page.write_report(cells, tmp_path / "report.html", samples, title)
    plots.save_all(cells, tmp_path, title)
    io.write_text(tmp_path / "table.txt", report.table(cells))
    for name in ("summary.csv", "report.html", "table.txt"):
        assert r"caf\udce9" in (tmp_path / name).read_text(encoding="utf-8")
    assert r"torn\udce9.jpg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert plots.label("caf\udce9_$") == r"caf\xe9 \$"


def test_a_page_says_how_to_repeat_it():
    cells = cells_of(corruptions=("fog",), skills={"zero_shot": 0.5, "tent": 0.5, "tnt-2": 0.6})
    own = {
        "tent": {"optimizer": "sgd(0.001, momentum=0.9)"},
        "tnt-2": {"tnt": {"steps": 2, "learning_rate": 0.01}},
    }
    for cell in cells:
        cell["about"] |= {"command": "python a.py --b '<c>'", "date": "2026-01-02T03:04:05+00:00"}
        cell["about"] |= {"commit": "abc-dirty", "preprocessing": "224 pixels, from p.json"}
        cell["settings"] |= own.get(cell["adapter"], {})
    text = page.how_to_repeat(cells)
    assert "<pre>python a.py --b &#x27;&lt;c&gt;&#x27;</pre>" in text
    for said in (
        "2026-01-02 03:04, commit abc-dirty. Preprocessing: 224 pixels, from p.json",
        "zero_shot: none; tent: sgd(0.001, momentum=0.9); "
        "tnt-2: 2 steps on each image&#x27;s noise map at 0.01.",
    ):
        assert said in text
