"""Tables, CSV, plots and pages of a sweep, made of synthetic predictions."""

import base64
import dataclasses
import functools
import io
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from jaxtta import report
from jaxtta.adapters import AdapterConfig, parse_adapter
from jaxtta.bootstrap import bootstrap
from jaxtta.data import Domain
from jaxtta.data.streams import make_streams
from jaxtta.evaluate.predictions import Predictions, score
from jaxtta.metrics import ALEXNET_ERRORS
from jaxtta.report import plots, text
from jaxtta.report.summary import summarise

CLASSES = 7
LABELS = np.arange(120) % CLASSES
CORRUPTIONS = ("fog", "snow", "motion_blur")
SKILLS = {"zero_shot": 1.2, "tent": 0.9, "batclip": 2.0}
UNREADABLE = (3, 5)


def result_of(adapter, stream, setting, skill, unreadable=UNREADABLE):
    """Predictions from random logits that favour the label by the adapter's skill."""
    rng = np.random.default_rng([stream.seed, zlib.crc32(stream.name.encode())])
    segments, images = stream.items.T
    labels = LABELS[images]
    logits = rng.normal(size=(len(images), CLASSES)).astype(np.float32)
    strength = np.array([skill - 0.1 * d.severity for d in stream.segments], np.float32)
    logits += strength[segments][:, None] * np.eye(CLASSES, dtype=np.float32)[labels]
    logits *= 1.5 if adapter == "batclip" else 1
    if adapter == "tent":
        logits[7] = np.nan
    seen = ~np.isin(images, unreadable)
    scores = {k: np.where(seen, v, 0 * v) for k, v in score(logits, labels).items()}
    rows = {"segment": segments, "image": images, "label": labels, **scores, "seen": seen}
    batches = sum(-(-len(part) // 50) for part in stream.parts)
    return Predictions(
        adapter,
        stream.name,
        stream.seed,
        setting,
        stream.segments,
        tuple(f"class {number}" for number in range(CLASSES)),
        pd.DataFrame(rows),
        pd.DataFrame({"seconds": [0.01] * batches, "skipped": [False] * batches}),
        tuple(f"image {number}" for number in unreadable),
        {"model": {"name": "made up"}, "adapter": {"name": adapter}},
        {"versions": {"jax": "0.0"}, "device": "cpu"},
        1.25,
    )


def results_of(
    setting="reset_each_shift",
    corruptions=CORRUPTIONS,
    severities=(5,),
    seeds=(1,),
    skills=SKILLS,
    **options,
):
    return [
        result_of(adapter, stream, setting, skill, **options)
        for seed in seeds
        for stream in make_streams(setting, corruptions, severities, LABELS, seed=seed)
        for adapter, skill in skills.items()
    ]


@pytest.fixture(scope="module")
def summary():
    return summarise(results_of(corruptions=("clean", "fog", "snow"), severities=(1, 3)))


def row(table, name):
    return next(line for line in table.splitlines() if line.startswith(name))


class Outline(HTMLParser):
    """Checks that tags close, and collects what a page shows and fetches."""

    VOID = ("meta", "img")

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.sources, self.tags = [], [], [], []
        self.feed(page)
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


OLD_TABLE = """\
clean       44.49      36.02 -8.47 [-12.29, -5.08] !   70.76 +26.27 [+20.76, +31.36]
fog         40.68      30.93 -9.75 [-12.72, -6.99] !   67.80 +27.12 [+23.52, +31.14]
snow        43.64      31.78 -11.86 [-14.83, -9.32] !  69.70 +26.06 [+22.46, +30.08]
mean        42.16      31.36 -10.81 [-12.82, -8.58] !  68.75 +26.59 [+23.73, +29.56]"""
OLD_ANSWER = (
    "Averaged over 2 corruptions, batclip is best with 68.75 %, +26.59 [+23.73, +29.56] points "
    "over zero_shot's 42.16 %. Significant differences from zero_shot on 2 corruptions: tent "
    "better on 0 and worse on 2, batclip better on 2 and worse on 0."
)

OLD_CSV = """\
adapter stream top1 top1_low top1_high top5 nll nll_low nll_high brier brier_high
zero_shot clean 0.415254 0.322034 0.5 0.932203 1.502045 1.354438 1.662908 0.709494 0.774724
tent clean 0.338983 0.254237 0.415254 0.872881 1.716803 1.544454 1.88651 0.788644 0.851927
batclip clean 0.661017 0.584746 0.745763 0.983051 0.910228 0.756254 1.089487 0.450909 0.534524
zero_shot snow-3 0.372881 0.279661 0.449153 0.940678 1.600241 1.464591 1.736565 0.748853 0.805508
tent snow-3 0.279661 0.194915 0.355932 0.872881 1.810606 1.659581 1.967559 0.823638 0.881213
batclip snow-3 0.661017 0.576271 0.754237 1.0 0.969246 0.820092 1.121336 0.482839 0.560547

adapter stream ece gain gain_low
tent clean 0.141705 -0.076271 -0.127119
batclip clean 0.055961 0.245763 0.169492
tent snow-3 0.120436 -0.09322 -0.144068
batclip snow-3 0.140299 0.288136 0.20339
"""


def test_figures_are_those_of_version_0_2():
    """The table, answer and CSV that jaxtta 0.2 wrote of the same logits."""
    results = results_of(corruptions=("clean", "fog", "snow"), severities=(1, 3), seeds=(1, 2))
    summary = summarise(results)
    table, old = report.text_table(summary), [line.split() for line in OLD_TABLE.splitlines()]
    assert [row(table, line[0]).split() for line in old] == old
    assert report.answer(summary) == OLD_ANSWER
    assert row(table, "standard deviation").split()[-3:] == ["2.10", "1.50", "2.85"]
    assert "The mean is over 2 corruptions at severity 1, 3." in table
    segments = summary.segments[summary.segments["seed"] == 2]
    for part in OLD_CSV.split("\n\n"):
        old = pd.read_csv(io.StringIO(part), sep=" ")
        found = old[["adapter", "stream"]].merge(segments, how="left")
        for name in old.columns[2:]:
            np.testing.assert_allclose(found[name], old[name], atol=2e-6, err_msg=name)


def test_the_csv_has_a_line_for_every_segment(tmp_path):
    results = results_of("gradual", ("fog", "snow"))
    report.write_report(results, tmp_path, "gradual")
    lines = pd.read_csv(tmp_path / "summary.csv")
    assert len(lines) == 3 * 2 * 9
    line = lines[(lines["adapter"] == "batclip") & (lines["segment"] == 9)].iloc[0]
    assert (line["corruption"], line["severity"], line["unreadable"]) == ("snow", 1, 2)
    rows = results[2].segment(9)
    assert line["top1"] == rows["top1"][rows["seen"]].mean()
    assert line["seconds_per_image"] == pytest.approx(0.01 * 54 / (18 * 118))
    tent = lines[lines["adapter"] == "tent"]
    assert tent["without_prediction"].tolist() == [1] + [0] * 17
    assert lines["gain"].isna().sum() == 18


def test_recall_and_confusions_are_by_class(summary):
    own = [r for r in summary.results if r.adapter == "tent" and r.stream != "clean"]
    rows = pd.concat([result.rows[result.rows["seen"]] for result in own])
    counts = np.zeros((CLASSES, CLASSES + 1), int)
    np.add.at(counts, (rows["label"], rows["prediction"]), 1)  # the last column: no prediction
    found = summary.classes[summary.classes["adapter"] == "tent"].set_index("label")
    np.testing.assert_allclose(found["accuracy"], np.diag(counts) / counts.sum(1))
    assert found["images"].tolist() == counts.sum(1).tolist()
    wrong = counts[:, :CLASSES] * (1 - np.eye(CLASSES, dtype=int))
    for label in range(CLASSES):
        mistaken = int(found["mistaken_for"][label].removeprefix("class "))
        assert wrong[label, mistaken] == wrong[label].max()
        share = found["mistaken_share"][label]
        assert share == pytest.approx(wrong[label].max() / counts[label].sum())
    segment = summary.segments.iloc[0]
    rows = summary.results[0].segment(0)
    recalls = [rows["top1"][rows["seen"] & (rows["label"] == c)].mean() for c in range(CLASSES)]
    assert segment["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    worst = text.worst_classes(summary)
    means = summary.classes.groupby("class")["accuracy"].mean()
    assert worst.index[0] == means.idxmin()
    assert re.fullmatch(r"\d+\.\d\d \(class \d: \d+\.\d\d\)", worst.iloc[0, 0])


def test_datasets_weigh_the_same_and_keep_their_classes():
    results = []
    for name, size, skill in (("large", 120, 2.0), ("small", 20, 0.2)):
        (stream,) = make_streams("reset_each_shift", (name,), (0,), LABELS, limit=size)
        for adapter, of in (("zero_shot", 1.0), ("tnt", skill)):
            results.append(result_of(adapter, stream, report.DATASETS, of, unreadable=()))
    summary = summarise(results)
    tops = summary.table["top1"].unstack()
    assert summary.means["top1"]["tnt"] == tops["tnt"].mean()
    assert summary.means["gain"]["tnt"] == pytest.approx((tops["tnt"] - tops["zero_shot"]).mean())
    assert report.text_table(summary).startswith("dataset ")
    assert "Averaged over 2 datasets" in report.answer(summary)
    assert set(summary.classes["dataset"]) == {"large", "small"}
    assert text.worst_classes(summary).index[0].startswith(("large: class", "small: class"))


@pytest.mark.parametrize(
    ("skills", "said"),
    [
        (SKILLS, "batclip is best"),
        ({"zero_shot": 3.0, "tent": 1.0}, "every adapter is worse than zero_shot"),
        ({"zero_shot": 1.0, "tnt": 1.0}, "no adapter is clearly better than zero_shot"),
        ({"zero_shot": 1.0}, "No gain is known"),
        ({"tnt": 1.0, "batclip": 2.0}, "batclip is best with"),
    ],
)
def test_the_answer_says_who_is_best(skills, said):
    summary = summarise(results_of(skills=skills))
    answer, table = report.answer(summary), report.text_table(summary)
    assert answer.startswith("Averaged over 3 corruptions, ")
    assert said in answer
    assert answer.count(". ") == 1
    assert ("[" in table) == bool(summary.compared)
    assert ("significantly worse" in table.lower()) == ("tent" in skills)
    assert ("gain" in plots.figures(summary)) == bool(summary.compared)


def test_another_baseline_can_be_chosen():
    results = results_of(skills={"tent": 1.0, "batclip": 2.0})
    assert "No gain is known" in report.answer(summarise(results))
    summary = summarise(results, baseline="tent")
    assert "over tent's" in report.answer(summary)
    with pytest.raises(ValueError, match="no results"):
        summarise([])


def test_the_mean_corruption_error_needs_all_of_imagenet_c(monkeypatch):
    few = functools.partial(bootstrap, resamples=20)  # nobody reads the intervals
    monkeypatch.setattr("jaxtta.evaluate.predictions.bootstrap", few)
    options = {"severities": (1, 2, 3, 4, 5), "skills": {"zero_shot": 1.5, "tent": 1.6}}
    results = [
        dataclasses.replace(result, settings={"streams": {"layout": "imagenet-c"}})
        for result in results_of("continual", ("clean", *ALEXNET_ERRORS), **options)
    ]
    alone = results[::2]  # zero-shot's
    assert "corruption error" not in report.text_table(summarise(alone))
    monkeypatch.setattr("jaxtta.report.summary.IMAGENET_C_IMAGES", len(LABELS))
    summary = summarise(results)
    for adapter, own in summary.segments.groupby("adapter"):
        errors = 1 - own.groupby("corruption")["top1"].mean()
        expected = np.mean([errors[name] / x for name, x in ALEXNET_ERRORS.items()])
        assert summary.means["corruption_error"][adapter] == pytest.approx(expected)
    expected = 100 * summary.means["corruption_error"]["zero_shot"]
    assert f"{expected:.2f}" in row(report.text_table(summary), "mean corruption error (%)")
    lone = summarise(results[:1] + results[1::2]).means["corruption_error"]  # tent at one severity
    assert lone.isna().tolist() == [True, False]
    other = [dataclasses.replace(result, settings={}) for result in alone]
    for changed in (other, results_of("continual", ("fog",), **options)):
        assert "corruption error" not in report.text_table(summarise(changed))


def test_results_of_several_sweeps_are_not_mixed():
    """A folder of sweeps has streams of the same name; shards are one sweep."""
    results = results_of()

    def changed(**streams):
        return [dataclasses.replace(each, settings={"streams": streams}) for each in results[-3:]]

    assert len(summarise(changed(images="1", domains=[1])).means) == 3
    for several, said in (
        ([*results, results[0]], "zero_shot on fog-5 with seed 1 twice"),
        ([*results, *results_of("continual")], "setting 'reset_each_shift'"),
        ([*changed(order="stored")[:2], *changed(order="shuffled")[2:]], "order 'stored'"),
    ):
        with pytest.raises(ValueError, match=said):
            summarise(several)


def test_what_nobody_saw_is_a_dash(tmp_path):
    lost = results_of(corruptions=("fog",), unreadable=range(len(LABELS)))
    results = [*lost, *results_of(corruptions=("snow",))]
    report.write_report(results, tmp_path, "lost")
    table = (tmp_path / "table.txt").read_text()
    assert row(table, "fog").split()[1:] == ["–"] * 3
    assert "nan" not in table
    assert "nan" not in " ".join(Outline((tmp_path / "report.html").read_text()).text)
    report.write_report(lost, tmp_path, "lost")
    assert report.answer(summarise(lost)).startswith("No image")


@pytest.mark.parametrize("setting", ["reset_each_shift", "continual", "gradual", "mixed"])
def test_every_setting_is_drawn(setting, tmp_path):
    skills = {"zero_shot": 0.5, "a": 0.6}
    results = results_of(setting, ("fog", "snow"), severities=(1, 5), skills=skills)
    report.write_report(results, tmp_path, "all that $ there_is")
    names = ["gain.png", "reliability.png", "running.png", "severity.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_plots_show_the_tables_numbers(summary):
    (axes,) = plots.dots(summary).axes
    for adapter, drawn in zip(summary.compared, axes.containers, strict=True):
        gains = [
            *summary.table["gain"].xs(adapter, level="adapter"),
            summary.means["gain"][adapter],
        ]
        np.testing.assert_allclose(drawn[0].get_xdata().astype(float), 100 * np.array(gains))
        (segments,) = (line.get_segments() for line in drawn[2])
        ends = 100 * summary.means.loc[adapter, ["low", "high"]]
        np.testing.assert_allclose(segments[-1][:, 0], ends.astype(float))
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["clean", "fog", "snow", "mean"]
    panel = plots.severity(summary).axes[0]
    means = summary.segments[summary.segments["corruption"] != "clean"]
    means = means[means["adapter"] == "batclip"].groupby("severity")["top1"].mean()
    np.testing.assert_allclose(panel.lines[2].get_ydata(), 100 * means)
    summary = summarise(results_of("continual"))
    axes, gains = plots.running(summary).axes[:2]
    curves = {line.get_label(): line.get_ydata() for line in axes.lines}
    for name in SKILLS:
        assert curves[name.replace("_", " ")][-1] == pytest.approx(
            100 * summary.means["top1"][name]
        )
    assert axes.get_xticks().tolist() == [118, 236, 354]
    assert not gains.lines[0].get_ydata().any()


def test_an_adapter_keeps_its_colour():
    names = ["zero_shot", *(f"adapter {number}" for number in range(12))]
    styles = plots.styles(names)
    assert len({(look["color"], look["linestyle"]) for look in styles.values()}) == len(names)
    assert plots.styles(["adapter 0"])["adapter 0"] == styles["adapter 0"]


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path, capsys):
    results = results_of(severities=(1, 5))
    steps = results[2].steps.assign(skipped=True)
    about = {"command": "python a.py --b '<c>'", "date": "2026-01-02T03:04:05+00:00"}
    about |= {"commit": "abc-dirty", "preprocessing": "224 pixels", "versions": {"jax": "0.0"}}
    tnt = {"adapter": {"tnt": {"steps": 2, "learning_rate": 0.01}}}
    results[2] = dataclasses.replace(results[2], steps=steps, about=about)
    results[-1] = dataclasses.replace(results[-1], settings=results[-1].settings | tnt)
    samples = {name: np.full((32, 32, 3), 99, np.uint8) for name in CORRUPTIONS}
    report.write_report(results, tmp_path, "fog & <snow>", samples)
    page = (tmp_path / "report.html").read_text()
    outline = Outline(page)
    assert not {"script", "link"} & set(outline.tags)
    assert len(outline.sources) == len(CORRUPTIONS) + 4
    for source in outline.sources:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG")
    assert not re.search(r"url\(|@import|https?://", page)
    shown = " ".join(" ".join(outline.text).split())
    printed = capsys.readouterr().out
    warnings = (
        "2 images could not be read: image 3, image 5.",
        "batclip: 3 steps skipped",
        "tent: without a finite prediction, counted as wrong: 6.",
    )
    for words in (report.answer(summarise(results)), *warnings):
        assert words in shown
        assert words in printed
    for words in ("fog & <snow>", "motion blur", "made up", "versions: jax", "1.25", "class 6"):
        assert words in shown
    assert "<pre>python a.py --b &#39;&lt;c&gt;&#39;</pre>" in page
    assert "date: 2026-01-02T03:04:05+00:00. commit: abc-dirty. preprocessing: 224 pixels" in shown
    assert "adapter: batclip: tnt: learning rate 0.01" in shown


def test_names_of_any_kind_stop_no_report(tmp_path):
    """A folder's name becomes a corruption's, an image's is listed where it cannot be read."""
    evil = "<script>alert(1)</script>"
    results = results_of(skills={"zero_shot": 0.5, evil: 0.6, "$x$" * 30: 0.7}, corruptions=(evil,))
    domains = (Domain("caf\udce9\n_$"),)
    results = [
        dataclasses.replace(
            result,
            domains=domains,
            class_names=("<b>", "$", "\udce9", "a\nb", "long" * 50, *result.class_names[5:]),
            unreadable=("torn\udce9.jpg",),
            settings={evil: {"caf\udce9": [evil]}},
        )
        for result in results
    ]
    samples = {"caf\udce9": np.zeros((200, 200, 3), np.uint8)}
    report.write_report(results, tmp_path, f"in \udce9 {evil}", samples)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    Outline(page)
    assert r"torn\xe9.jpg" in page
    for name in ("summary.csv", "report.html", "table.txt"):
        assert r"caf\xe9\n" in (tmp_path / name).read_text(encoding="utf-8")
    assert plots.label("caf\udce9_$") == r"caf\xe9 \$"


def test_functions_of_users_are_told_apart(tmp_path, capsys):
    """Long names that differ in their last setting; one lacks a seed, as in unfinished sweeps."""
    names = [f"research.methods.prompts:make:lr={rate}" for rate in ("1e-3", "1e-4")]
    skills = {"zero_shot": 0.5, names[0]: 0.6, names[1]: 0.9}
    results = results_of("continual", skills=skills, seeds=(1, 2))[:-1]
    results = [dataclasses.replace(r, about={"place": [n, 0]}) for n, r in enumerate(results)]
    summary = report.write_report(results, tmp_path / "new" / "folder", "users")
    assert summary.compared == names
    assert len({plots.label(name) for name in names}) == 2
    printed = capsys.readouterr().out
    assert f"{names[1]}: no results on continual-5 (seed 2)" in printed
    assert row(printed, "standard deviation").endswith("–")
    page = " ".join(Outline((tmp_path / "new" / "folder" / "report.html").read_text()).text)
    assert all(name in page for name in names)
    assert "place" not in page
    assert "\\n" not in page
    assert len(plots.running(summary).legends[0].get_texts()) == 3


def test_folders_are_put_side_by_side(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name / "predictions").mkdir(parents=True)
        for number, result in enumerate(results_of(corruptions=("fog", name), seeds=(seed,))):
            own = {"adapter": {"optimizer": f"sgd({seed})"}}
            result = dataclasses.replace(result, settings=own, about={"command": "x"})
            result.save(tmp_path / name / "predictions" / f"{number}.safetensors")
    report.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    printed = capsys.readouterr().out
    assert row(printed, "corruption ").split()[1::2] == ["a:"] * 3 + ["b:"] * 3
    assert row(printed, "a ").split()[-3:] == ["–"] * 3  # the other folder lacks it
    assert "means are over different corruptions" in printed
    lone = report.text_table(summarise(results_of(corruptions=("fog", "a"))))
    shown = row(printed, "fog").split()
    assert shown[: len(shown) // 2 + 1] == row(lone, "fog").split()
    assert "a: batclip is best" in printed
    assert "b: batclip is best" in printed
    table = pd.read_csv(tmp_path / "both" / "summary.csv")
    assert len(table) == 2 * 2 * 3
    page = "".join(Outline((tmp_path / "both" / "report.html").read_text()).text)
    assert "a: tent: optimizersgd(1)" in page
    assert "b: tent: optimizersgd(2)" in page
    assert (tmp_path / "both" / "gain.png").exists()


def test_examples_need_tnt_of_single_images_and_zero_shot():
    specs = [parse_adapter(name) for name in ("zero_shot", "tnt:steps=2", "tnt:online=true")]
    report.check_examples(specs[:2], AdapterConfig())
    for wrong, said in ((specs[:1], "tnt"), (specs[1:2], "zero_shot"), (specs[::2], "online")):
        with pytest.raises(ValueError, match=said):
            report.check_examples(wrong, AdapterConfig())
