"""The report of a pilot: files for people and for programs; its words are in the templates."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from jaxtta.adapters.guard import DECISIONS
from jaxtta.data import ImageFolder
from jaxtta.deploy.pilot import VERDICTS, Criterion, Judgement, Thresholds
from jaxtta.deploy.shadow import Estimate, Trial, ms_of, pairs_of, to_label
from jaxtta.images import printable
from jaxtta.io import atomic_write, write_json, write_text
from jaxtta.report.diagnosis import sentences
from jaxtta.report.pilot_plots import NAMES, PLOTS, plots_of
from jaxtta.report.text import NONE, aligned, counted
from jaxtta.report.write import png, render

WORDS = {
    "adapt": "learnt from {}",
    "skip": "left out {}",
    "forget": "began anew at {}, as the images had changed",
    "roll_back": "went back to an earlier state at {}",
    "stop": "stopped adapting at {}",
    "stopped": "no longer adapted at {}",
}
"""What the guard did, and with how many batches."""
STATUSES = {"failed": "✗ failed", "open": "? open", "met": "✓ met"}
SHOWN = 12  # examples


def write_pilot(
    folder: Path,
    found: Judgement,
    trial: Trial,
    images: ImageFolder,
    thresholds: Thresholds,
    made: dict[str, Any],
) -> None:
    """Print the verdict and write all files; `made` has `settings` and `about`."""
    for name, table in tables_of(found, trial, images).items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.4f"))
    adapter = made["settings"]["adapter"]
    told: dict[str, Any] = {
        "found": found,
        "trial": trial,
        "adapter": adapter,
        "pairs": pairs_of(trial.shadow),
        "counts": {} if trial.shadow.served is None else decisions(trial),
        "waiting": len(to_label(trial.shadow)),
        "words": WORDS,
        "reason": reason,
        "say": say,
        "plain": plain,
    }
    said, steps = sentences("pilot.txt.j2", **told), sentences("pilot-next.txt.j2", **told)
    criteria, numbers = table_of_criteria(found), table_of_numbers(found, trial)
    plots = plots_of(trial, images.class_names)
    for name in PLOTS:
        if name in plots:
            with atomic_write(folder / f"{name}.png") as temporary:
                temporary.write_bytes(png(plots[name]))
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier pilot
    title = f"Pilot of {adapter} on {printable(images.root.resolve().name)}"
    shown = examples(found, trial, images)
    page = render(
        "pilot.html.j2",
        title=title,
        sentences=said[:1],
        basis=said[1:],
        steps=steps,
        found=found,
        trial=trial,
        criteria=criteria,
        numbers=numbers,
        plots=plots,
        examples=shown,
        settings=[made["settings"]],
        abouts=[made["about"]],
    )
    write_json(folder / "result.json", content_of(found, trial, thresholds, said, steps) | made)
    write_text(folder / "report.html", page)
    blocks = [
        "\n".join(
            aligned([[str(table.index.name), *map(str, table)], *table.itertuples(name=None)])
        )
        for table in (criteria, numbers)
    ]
    print(*[title, *said[:1], *blocks, *said[1:], "\n".join(f"- {x}" for x in steps)], sep="\n\n")
    print(f"\nresults: {folder / 'report.html'}")


def content_of(
    found: Judgement, trial: Trial, thresholds: Thresholds, said: list[str], steps: list[str]
) -> dict[str, Any]:
    """What result.json holds beside settings and provenance."""
    content = dataclasses.asdict(found) | {
        "criteria": [with_estimate(one) for one in found.criteria],
        "fit": with_estimate(found.fit) | {"predicted": found.fit.predicted.tolist()},
    }
    for name in ("accuracy", "calibration"):
        given = content[name]
        columns = (*NAMES, "difference")
        pairs = zip(columns, given, strict=False) if given else ()
        content[name] = {key: one._asdict() for key, one in pairs} or None
    for name in ("gain", "disagreement", "narrowing"):
        content[name] = content[name] and content[name]._asdict()
    verdict = content.pop("verdict")
    return {
        "verdict": verdict,
        "exit_code": VERDICTS[verdict],
        "sentence": said[0],
        "sentences": said[1:],
        "next": steps,
        "thresholds": dataclasses.asdict(thresholds),
        **content,
        "zero_shot_ms": trial.zero_shot_ms,
        "decisions": {} if trial.shadow.served is None else decisions(trial),
        "unreadable": [*trial.unreadable],
        "not_finite": trial.not_finite,
    }


def with_estimate(row: Any) -> dict[str, Any]:
    """A NamedTuple's fields, estimates among them as dictionaries."""
    return {k: v._asdict() if isinstance(v, Estimate) else v for k, v in row._asdict().items()}


def say(estimate: Estimate | None, unit: str = "%", sign: str = "") -> str:
    """Format an estimate with its interval."""
    if estimate is None:
        return NONE
    digits = {"nats": 3, "images": 0}.get(unit, 1)
    value, low, high = (
        "" if x is None else f"{x:{sign},.{digits}f}".replace("-", "−") for x in estimate
    )
    between = f"[{low}, {high}]" if low else ""
    return f"{value or 'not known, within'} {between}".rstrip()


def plain(estimate: Estimate) -> str:
    """A gain or loss in points, as a sentence has it."""
    value = estimate.value or 0.0
    low, high = sorted(bound if value >= 0 else -bound for bound in estimate.bounds)
    said = f"{abs(value):.1f} points (95 % interval {low:.1f} to {high:.1f})"
    return said.replace("-", "−")


def reason(one: Criterion) -> str:
    """Why a criterion failed or is open, as the end of a sentence."""
    if one.why:
        return one.why
    limit, known = (
        number(one.threshold),
        one.measured is not None and one.measured.value is not None,
    )
    gain = one.measured or Estimate(None)
    value = say(gain, one.unit, "+" if one.unit == "points" else "")
    if one.name == "gain" and not known:
        return "without labels nobody can tell which model is right where they differ"
    if one.name == "gain" and one.status == "failed":
        most = f"{gain.bounds[1]:.1f}".replace("-", "−")
        return f"a gain of {limit} points is asked for, and at most {most} are possible"
    if one.name == "gain":
        what = "a loss of " if (gain.value or 0) < 0 else ""
        return f"a gain of {limit} points is asked for, and {what}{plain(gain)} was measured"
    if one.name == "loss" and one.status == "failed":
        return f"accuracy falls by {plain(gain)}"
    if one.name == "loss":
        worst = f"{-gain.bounds[0]:.1f}"
        return f"a loss of up to {worst} points is not ruled out, {limit} are allowed"
    if one.name == "images":
        return f"{counted(int(value.replace(',', '')), 'image')} are too few, {limit} are asked for"
    if not known:
        return f"{one.name} is not known, and a threshold is given for it"
    return f"{one.name} is {value} {one.unit}, and {limit} {one.unit} are allowed"


def number(threshold: float | None) -> str:
    """Format a threshold."""
    return "" if threshold is None else f"{threshold:g}".replace("-", "−")


def decisions(trial: Trial) -> dict[str, int]:
    """How often the guard decided what, for what occurred."""
    counts = trial.steps["decision"].astype(int).value_counts()
    return {name: int(counts[n]) for n, name in enumerate(DECISIONS) if n in counts}


def table_of_criteria(found: Judgement) -> pd.DataFrame:
    """Each criterion with what is asked for, what was measured, and its status."""
    rows = {}
    for one in found.criteria:
        asked, measured = "yes", {"met": "yes", "failed": "no", "open": "not known"}[one.status]
        if one.threshold is not None:
            least = "at least" if one.name in ("gain", "images") else "at most"
            asked = f"{least} {number(one.threshold)} {one.unit}"
            measured = say(one.measured, one.unit, "+" if one.unit == "points" else "")
        if one.name == "loss" and one.measured:
            measured = f"gain of {say(Estimate(one.measured.low), sign='+')} at worst"
        rows[one.name] = (STATUSES[one.status], asked, measured or NONE)
    frame = pd.DataFrame.from_dict(rows, "index", columns=["result", "asked for", "measured"])
    return frame.rename_axis("condition")


def table_of_numbers(found: Judgement, trial: Trial) -> pd.DataFrame:
    """Both models' numbers, as text."""
    shadow, calibration = trial.shadow, found.calibration
    both = [shadow.reference] if shadow.served is None else [shadow.reference, shadow.served]
    sure = [f"{100 * answers.max(1).mean():.1f}" for answers in both]
    used = [str(len(np.unique(answers.argmax(1)))) for answers in both]
    accuracy = [*map(say, found.accuracy)] if found.accuracy else [NONE, NONE]
    rows = {"accuracy (%)": accuracy[: len(both)]}
    if calibration:
        rows["calibration error (%)"] = [*map(say, calibration[:2])]
    rows |= {"mean confidence (%)": sure, "classes predicted": used}
    alone = ms_of(shadow) if len(both) == 1 else trial.zero_shot_ms
    times = [NONE if x is None else f"{x:.1f}" for x in (alone, found.ms)]
    rows["time an image (ms)"] = times[: len(both)]
    columns = [*NAMES[: len(both)]]
    if found.gain is not None:
        columns.append("difference")
        rows["accuracy (%)"].append(say(found.gain, "points", "+"))
        if calibration:
            rows["calibration error (%)"].append(say(calibration[2], "points", "+"))
    cells = [[*row, *[""] * (len(columns) - len(row))] for row in rows.values()]
    return pd.DataFrame(cells, [*rows], columns).rename_axis("measure")


def tables_of(found: Judgement, trial: Trial, images: ImageFolder) -> dict[str, pd.DataFrame]:
    """The answers to all images, and those images whose labels would tell most."""
    shadow, names = trial.shadow, np.array([*map(printable, images.class_names)])
    files = np.array([printable(images.paths[number]) for number in trial.numbers])
    columns = {"file": files, "label": np.where(shadow.labels < 0, "", names[shadow.labels])}
    for name, answers in (("zero_shot", shadow.reference), ("guarded", shadow.served)):
        if answers is not None:
            columns[name] = names[answers.argmax(1)]
            columns[f"{name}_confidence"] = answers.max(1)
    columns["step"] = trial.step_of
    tables = {"images": pd.DataFrame(columns)}
    if found.labelled != "all" and shadow.served is not None:
        # Those with a label first: the file may be the one that they were read from.
        pairs = zip(images.paths, images.labels, strict=True)
        rows = [(path, images.class_names[n]) for path, n in pairs if n >= 0]
        rows += [(images.paths[n], "") for n in trial.numbers[to_label(shadow)]]
        tables["to_label"] = pd.DataFrame(rows, columns=["file", "label"])
    return tables


def examples(
    found: Judgement, trial: Trial, images: ImageFolder
) -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    """Images with both models' answers, by heading: those that tell most."""
    shadow, names = trial.shadow, images.class_names
    rng, differ, right = np.random.default_rng(0), shadow.differ, shadow.right()
    if shadow.served is None:
        groups = {"Examples": np.ones(len(differ), bool)}
    elif found.labelled == "all":
        better, worse = right[:, 1] & ~right[:, 0], right[:, 0] & ~right[:, 1]
        groups = {"Right with adaptation only": better, "Right without adaptation only": worse}
    else:
        groups = {"Examples on which the two models differ": differ}
    shown = []
    for heading, which in groups.items():
        pictures = []
        for place in rng.permutation(np.flatnonzero(which))[: SHOWN // len(groups)].tolist():
            number, known = int(trial.numbers[place]), shadow.labels[place] >= 0
            both = zip(NAMES, (shadow.reference, shadow.served), strict=True)
            said = [
                f"{name}: {names[scores[place].argmax()]} {100 * scores[place].max():.0f} %"
                for name, scores in both
                if scores is not None
            ]
            said += [f"label: {names[shadow.labels[place]]}"] * bool(known)
            small = Image.fromarray(images[number])
            small.thumbnail((160, 160))
            caption = "; ".join([printable(images.paths[number]), *said])
            pictures.append((caption, np.asarray(small)))
        if pictures:
            shown.append((heading, pictures))
    return shown
