"""`jaxtta pilot`: its statistics, the verdict, the staged roll-out, and the command."""

import csv
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from conftest import write_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxtta.deploy import rollout
from jaxtta.deploy.audit import read_log, steps_of
from jaxtta.deploy.pilot import VERDICTS, Criterion, Thresholds, judge
from jaxtta.deploy.shadow import Estimate, Shadow, fit_of, gain_of, pairs_of, to_label
from jaxtta.metrics import expected_calibration_error
from jaxtta.report.pilot import reason

CLASSES = 10


def sure_of(chosen, confidence=0.7):
    """Probabilities (images, classes) of answers with one confidence."""
    scores = np.full((len(chosen), CLASSES), (1 - confidence) / (CLASSES - 1))
    scores[np.arange(len(chosen)), chosen] = confidence
    return scores


def simulated(seed=0, images=1000, accuracy=0.6, wins=0.06, losses=0.02, labels="all", few=100):
    """Answers of two models that differ on known shares of the images."""
    rng = np.random.default_rng(seed)
    truth, draw = rng.integers(0, CLASSES, images), rng.random(images)
    right = rng.random(images) < accuracy
    zero_shot = np.where(right, truth, (truth + rng.integers(1, CLASSES, images)) % CLASSES)
    guarded = np.where(~right & (draw < wins / (1 - accuracy)), truth, zero_shot)
    guarded = np.where(right & (draw < losses / accuracy), (truth + 1) % CLASSES, guarded)
    candidates = {
        "all": np.arange(images),
        "random": rng.permutation(images)[:few],
        "differ": rng.permutation(np.flatnonzero(zero_shot != guarded))[:few],
        "none": np.zeros(0, int),
    }
    known = np.isin(np.arange(images), candidates[labels])
    return Shadow(sure_of(zero_shot), sure_of(guarded), np.where(known, truth, -1))


@pytest.mark.parametrize(
    ("wins", "losses", "verdict"), [(0.12, 0.02, "go"), (0.02, 0.12, "no-go"), (0.04, 0.04, None)]
)
@pytest.mark.parametrize("labels", ["all", "differ"])
def test_verdict_follows_the_truth(wins, losses, verdict, labels):
    found = judge(simulated(wins=wins, losses=losses, labels=labels))
    assert verdict is None or found.verdict == verdict
    assert found.gain.low <= 100 * (wins - losses) <= found.gain.high
    assert found.labelled == ("all" if labels == "all" else "some")


@pytest.mark.parametrize("labels", ["all", "differ", "random"])
def test_go_is_rare_where_nothing_is_gained(labels):
    """2.5 % of the intervals exclude 0 from above; 9 of 100 or more would be one in 1,300."""
    gains = [gain_of(simulated(n, 500, wins=0.08, losses=0.08, labels=labels)) for n in range(100)]
    assert sum(gain.low > 0 for gain in gains) < 9
    assert sum(gain.high < 0 for gain in gains) < 9


def test_labels_count_where_the_models_differ():
    shadow = simulated(labels="random", few=300)
    agree = ~shadow.differ
    more = shadow._replace(labels=np.where(agree, shadow.reference.argmax(1), shadow.labels))
    assert gain_of(shadow) == gain_of(more)
    pairs, share = pairs_of(shadow), shadow.differ.mean()
    known = sum(map(int, pairs))
    assert known == (shadow.differ & (shadow.labels >= 0)).sum() > 0
    gain = 100 * share * int(pairs.wins - pairs.losses) / known
    assert gain_of(shadow).value == pytest.approx(gain)


def test_labels_where_the_models_differ_are_as_good_as_all():
    shadow, whole = simulated(labels="differ", few=1000), simulated(labels="all")
    assert gain_of(shadow) == gain_of(whole)
    assert judge(shadow).accuracy is None  # labels of differing images alone say no accuracy


def test_accuracy_from_labels_of_some_images():
    """Labels of all differing images and a few others: zero-shot's accuracy is not that there."""
    whole, rng = simulated(images=4000), np.random.default_rng(1)
    known = whole.differ | (rng.random(4000) < 0.1)
    found = judge(whole._replace(labels=np.where(known, whole.labels, -1))).accuracy
    for estimate, truth in zip(found, 100 * whole.right().mean(0), strict=True):
        assert estimate.low <= truth <= estimate.high
    assert abs(whole.right()[known].mean(0) - whole.right().mean(0)).max() > 0.05


@given(
    seed=st.integers(0, 10**6),
    wins=st.floats(0, 0.3),
    losses=st.floats(0, 0.3),
    images=st.integers(1, 400),
)
def test_never_go_without_labels(seed, wins, losses, images):
    shadow = simulated(seed, images, wins=wins, losses=losses, labels="none")
    found = judge(shadow, Thresholds(least_images=1))
    assert found.verdict != "go"
    share = shadow.differ.mean()
    assert -100 * share <= found.gain.low + 1e-4 or not share
    allowed = judge(shadow, Thresholds(least_images=1), without_labels=True)
    assert {found.verdict, allowed.verdict} <= {*VERDICTS}


def test_go_without_labels_only_if_asked_for():
    shadow = simulated(labels="none")
    assert judge(shadow).verdict == "undecided"
    assert judge(shadow, without_labels=True).verdict == "go"
    changed_nothing = shadow._replace(served=shadow.reference)
    assert judge(changed_nothing, without_labels=True).verdict == "no-go"


def test_signals_speak_where_labels_do_not():
    shadow = simulated(images=2000, labels="none")
    collapsed = sure_of(np.where(np.arange(2000) % 2, 0, shadow.reference.argmax(1)))
    found = judge(shadow._replace(served=collapsed), without_labels=True)
    failed = {one.name for one in found.criteria if one.status == "failed"}
    assert found.verdict == "no-go" and failed == {"narrowing"}
    stopped = judge(shadow._replace(stopped="it stopped"), without_labels=True)
    assert stopped.verdict == "no-go" and stopped.criteria[0].why == "it stopped"


def test_thresholds_decide():
    shadow = simulated()._replace(seconds=np.full(5, 0.32), batch_size=16)
    gain = gain_of(shadow).value
    for changed, name, status in (
        ({"least_gain": gain + 0.1}, "gain", "open"),
        ({"least_gain": 20.0}, "gain", "failed"),
        ({"most_ms": 19.0}, "time an image", "failed"),
        ({"most_ms": 21.0}, "time an image", "met"),
        ({"most_disagreement": 1.0}, "disagreement", "failed"),
        ({"most_calibration_error": 0.1}, "calibration error", "failed"),
        ({"most_narrowing": 0.5}, "narrowing", "met"),
        ({"least_images": 1001}, "images", "open"),
    ):
        found = judge(shadow, Thresholds(**changed))
        (one,) = (one for one in found.criteria if one.name == name)
        assert one.status == status
        assert found.verdict == {"met": "go", "open": "undecided", "failed": "no-go"}[status]


def test_calibration_error_is_that_of_the_metrics():
    shadow = simulated()
    errors = judge(shadow).calibration
    for number, answers in enumerate((shadow.reference, shadow.served)):
        right = shadow.right()[:, number]
        expected = expected_calibration_error(answers.max(1).astype(np.float32), right)
        assert errors[number].value == pytest.approx(100 * float(expected), abs=1e-3)
    assert errors[2].value == pytest.approx(errors[1].value - errors[0].value)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"least_gain": -2.0, "most_loss": 1.0}, "contradict"),
        ({"least_gain": 5.0, "most_disagreement": 3.0}, "contradict"),
        ({"most_ms": -1.0}, "most_ms is -1"),
        ({"most_loss": float("nan")}, "most_loss is nan"),
        ({"least_images": 0}, "least_images is 0"),
    ],
)
def test_thresholds_that_cannot_be(numbers, words):
    with pytest.raises(ValueError, match=words):
        judge(simulated(), Thresholds(**numbers))


def test_arrays_that_do_not_match():
    shadow = simulated()
    for broken in (
        shadow._replace(labels=shadow.labels[1:]),
        shadow._replace(served=shadow.served[:, 1:]),
        Shadow(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0, int)),
    ):
        with pytest.raises(ValueError, match="expected"):
            judge(broken)


def test_labels_of_the_beginning_alone_decide_nothing():
    shadow, first = simulated(wins=0.2, losses=0.0), np.arange(1000) < 300
    found = judge(shadow._replace(labels=np.where(first, shadow.labels, -1)))
    assert found.verdict == "undecided" and "not spread" in found.criteria[0].why
    spread = np.random.default_rng(0).permutation(first)
    found = judge(shadow._replace(labels=np.where(spread, shadow.labels, -1)))
    assert found.verdict == "go"


def test_images_to_label():
    shadow = simulated(labels="random")
    asked = to_label(shadow)
    assert {*asked} == {*np.flatnonzero(shadow.differ & (shadow.labels < 0))}
    np.testing.assert_array_equal(asked, to_label(shadow))
    assert (np.diff(asked) < 0).any()  # no order of the stream


def test_fit():
    rng = np.random.default_rng(0)
    unknown = np.full(400, -1)
    noise = Shadow(rng.dirichlet(np.full(CLASSES, 50), 400), None, unknown)
    found = judge(noise)
    assert found.verdict == "no-go" and "does not fit" in found.criteria[0].why
    one_class = Shadow(sure_of(np.zeros(400, int), 0.99), None, unknown)
    assert judge(one_class).criteria[0].status == "open"
    right = one_class._replace(labels=np.zeros(400, int))
    assert judge(right).criteria[0].status == "met"
    guessing = Shadow(sure_of(rng.integers(0, CLASSES, 400)), None, rng.integers(0, CLASSES, 400))
    assert judge(guessing).verdict == "no-go"
    few = guessing._replace(labels=np.where(np.arange(400) < 50, guessing.labels, -1))
    assert fit_of(few).recall is None  # they may be of differing images
    assert judge(simulated()._replace(served=None)).criteria[0].status == "met"


@given(name=st.text(), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_chosen_images_stay_chosen(name, shares):
    low, high = sorted(shares)
    assert rollout.chosen(name, low) <= rollout.chosen(name, high)
    assert rollout.chosen(name, 1.0) and not rollout.chosen(name, 0.0)


def test_shares_are_kept():
    for share in (0.01, 0.05, 0.25):
        found = np.mean([rollout.chosen(f"{n}.png", share) for n in range(4000)])
        assert abs(found - share) < 4 * np.sqrt(share / 4000)


STEPS = st.tuples(
    st.integers(1, 300),
    st.sampled_from(["adapt"] * 5 + ["skip", "forget", "roll_back", "stop"]),
    st.none() | st.tuples(st.floats(-0.2, 0.2), st.floats(0, 0.2)),
)


@given(st.lists(STEPS, max_size=60))
def test_roll_out_laws(steps):
    plan = rollout.Plan(calm_images=500, labelled_images=100)
    state, shown = rollout.Rollout(), False
    for images, decision, given_gain in steps:
        gain = given_gain and (given_gain[0], given_gain[0] + given_gain[1])
        after = rollout.after_step(state, plan, images=images, decision=decision, gain=gain)
        shown |= gain is not None and gain[0] >= 0
        assert after.share(plan) <= (1 if shown else plan.share_without_labels)
        assert after.stage <= state.stage + 1
        if state.returned:
            assert after == state
        elif decision == "stop" or (gain and gain[1] < 0):
            assert after.returned and after.share(plan) == 0
        elif decision in rollout.ALARMS:
            assert after == state._replace(images=0)
        state = after


def test_roll_out_reaches_all_images_with_labels_only():
    plan, states = rollout.Plan(), {}
    for gain in (None, (0.01, 0.05), (-0.01, 0.05)):
        state = rollout.Rollout()
        for _ in range(1000):
            state = rollout.after_step(state, plan, images=16, decision="adapt", gain=gain)
        states[gain] = state.share(plan)
    assert states == {None: 0.25, (0.01, 0.05): 1.0, (-0.01, 0.05): 0.25}


@pytest.mark.parametrize(
    "numbers",
    [{"shares": (0.5, 0.1)}, {"shares": ()}, {"shares": (0.0, 1.0)}, {"calm_images": 0},
     {"share_without_labels": 2}],
)  # fmt: skip
def test_plans_that_cannot_be(numbers):
    with pytest.raises(ValueError, match="expected"):
        rollout.Plan(**numbers)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten images of three classes in a flat folder each, and a table of some labels."""
    root = tmp_path_factory.mktemp("pilot")
    folders = write_images(root / "classes", 14, ("airplane", "cat", "ship"))
    (root / "flat").mkdir()
    rows = [("file", "label")]
    for path in sorted(folders.glob("*/*.png")):
        path.with_name(path.name).replace(root / "flat" / f"{path.parent.name}-{path.name}")
        rows.append((f"{path.parent.name}-{path.name}", path.parent.name))
    with (root / "few.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows[::3])
    (root / "flat" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture
def run(run_jaxtta, short, tmp_path):
    """Run the command with a small model; returns code, output, errors and the folder."""

    def run(*options):
        folder = tmp_path / "out"
        usual = ("--model", short, "--class-names", "airplane", "cat", "ship", "--output", folder)
        return *run_jaxtta("pilot", *map(str, options), *usual), folder

    return run


def test_pilot_of_few_labels(run, pictures):
    adapter = ("--adapter", "guarded:tent", "--batch-size", "8")
    code, out, err, folder = run(pictures / "flat", "--labels", pictures / "few.csv", *adapter)
    result = json.loads((folder / "result.json").read_text())
    assert code == result["exit_code"] == VERDICTS[result["verdict"]], err
    assert result["sentence"] in out and result["labelled"] == "some"
    assert result["images"] == 42 and result["labels"] == 14
    assert len(result["unreadable"]) == 1 and "broken.png" in result["unreadable"][0]
    statuses = {one["name"]: one["status"] for one in result["criteria"]}
    assert statuses["images"] == "open" and result["verdict"] != "go"
    header, events = read_log(folder / "log.jsonl")
    assert header["setup"]["adapter"] == adapter[1]
    answered = [name for event in steps_of(events) for name in event["images"]]
    assert answered == sorted(answered) and len(answered) == 42  # a flat folder is in its order
    with (folder / "images.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["file"] for row in rows] == answered
    differ = {row["file"] for row in rows if row["zero_shot"] != row["guarded"]}
    known = {row["file"] for row in rows if row["label"]}
    with (folder / "to_label.csv").open() as file:
        rows = [(row["file"], row["label"]) for row in csv.DictReader(file)]
    assert {file for file, name in rows if not name} == differ - known
    assert dict(rows[:14]) == {file: file.partition("-")[0] for file in known}  # none is lost
    assert result["disagreement"]["value"] == pytest.approx(100 * len(differ) / 42)
    page = (folder / "report.html").read_text()
    assert page.index(result["sentence"][:20]) < page.index("What it rests on")
    assert not re.search(r'src="(?!data:)|href=|@import|url\(', page)  # works offline


def test_pilot_stops_where_the_model_does_not_fit(run, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "ship", "airplane"):
        (tmp_path / "noise" / name).mkdir(parents=True)
        for number in range(14):
            noise = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "noise" / name / f"{number}.png")
    code, out, _, folder = run(tmp_path / "noise")
    result = json.loads((folder / "result.json").read_text())
    assert code == 3 and result["verdict"] == "no-go" and "does not fit" in result["sentence"]
    assert not (folder / "log.jsonl").exists() and "nothing was adapted" in out
    assert result["labelled"] == "all" and result["gain"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--adapter", "batclip"), "guarded:batclip"),
        (("--least-gain", "-3"), "contradict"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--labels", "{few}"), "is not one of --class-names"),
    ],
)
def test_mistakes(run, pictures, tmp_path, options, words):
    few = tmp_path / "odd.csv"
    few.write_text("file,label\nairplane-0000.png,zebra\n")
    code, _, err, _ = run(pictures / "flat", *(text.format(few=few) for text in options))
    assert code == 1 and words in err and err.count("error: ") == 1


def test_verdicts_have_exit_codes_of_their_own():
    assert VERDICTS["go"] == 0 and not {*VERDICTS.values()} & {1, 2, 130, 141}
    assert len({*VERDICTS.values()}) == len(VERDICTS)


def test_thresholds_are_plain_numbers():
    json.dumps(dataclasses.asdict(Thresholds()), allow_nan=False)
    assert jax.tree.leaves(dataclasses.asdict(Thresholds()))


def test_a_measured_loss_is_not_said_as_a_gain():
    for value, low, high, words in [
        (-0.5, -1.2, 0.9, "and a loss of 0.5 points (95 % interval −0.9 to 1.2) was measured"),
        (0.4, -1.2, 0.9, "and 0.4 points (95 % interval −1.2 to 0.9) was measured"),
    ]:
        gain = Criterion("gain", "open", Estimate(value, low, high), 0.5, "points")
        assert reason(gain).endswith(words)
