"""The tables and figures of the documents, each a function that reads docs/results/*.csv.

`docs/render.py` writes what they return between the markers that have their names. Gains are in
points; the files have shares and seconds.
"""

from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).with_name("results")
BASELINE = "zero_shot"
STREAMS = ("reset", "continual", "mixed", "sorted", "few classes", "batch 1", "batch 100")
# What an answer of each method needs beside its image, and what the method changes
METHODS = pd.read_csv(Path(__file__).with_name("methods.csv"), index_col="name")
# The rows of "which method when": the smallest losses, the largest gains with a reset, and one of
# each other kind
WHICH = ("mint:lr=0.021", "mint", "eta", "deyo", "roid", "stata", "tda", "batclip")
WHICH += ("batclip:lr=0.01", "mgtta:lr=0.01", "tnt")
ANSWERS = ("logits", "probabilities", "votes")  # quantities of agreement.csv


def _read(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / name)


def _markdown(frame: pd.DataFrame, left: int = 1) -> str:
    """A table in markdown; the first `left` columns are text, the others stand on the right."""
    cells = frame.astype(object).where(frame.notna(), "").astype(str)
    head = [list(map(str, frame.columns)), ["---"] * left + ["---:"] * (frame.shape[1] - left)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*head, *cells.to_numpy().tolist()])


def _code(names: pd.Index | pd.Series) -> list[str]:
    return [name if name == "mean" else f"`{name}`" for name in names]


def _points(share: float, low: float = np.nan, high: float = np.nan) -> str:
    """A gain in points, with its interval if there is one; nothing if it is missing."""
    if np.isnan(share):
        return ""
    shown = [f"{100 * x:+.1f}".replace("-", "−") for x in (share, low, high)]
    text, *ends = [x if x[1:] != "0.0" else "0.0" for x in shown]
    return text if np.isnan(low) else f"{text} [{', '.join(ends)}]"


def _sweep(file: str) -> str:
    """A line for each adapter of a sweep's summary.csv, over its corruptions and seeds."""
    rows = _read(file)
    rows = rows[rows["corruption"] != "clean"]
    lines = []
    for name, own in rows.groupby("adapter", sort=False):
        tops = own.groupby(["seed", "corruption"])["top1"].mean().groupby("seed").mean()
        spread = f" ± {100 * tops.std():.1f}" if len(tops) > 1 else ""
        better, worse = (own["gain_low"] > 0).sum(), (own["gain_high"] < 0).sum()
        line = {"adapter": f"`{name}`", "top-1 (%)": f"{100 * tops.mean():.1f}{spread}"}
        line |= {"gain": _points(own["gain"].astype(float).mean())}
        known = own["gain"].notna().any()
        line |= {"better, worse": f"{better}, {worse} of {len(own)}" if known else ""}
        line |= {"calibration error (%)": f"{100 * own['ece'].mean():.1f}"}
        lines.append(line)
    return _markdown(pd.DataFrame(lines))


def demo() -> str:
    """`make demo`: accuracy and gain of its adapters."""
    return _sweep("demo.csv")


def mgtta() -> str:
    """MGTTA's objective with three optimisers, BATCLIP and zero-shot."""
    return _sweep("mgtta.csv")


def tnt() -> str:
    """Gain and calibration error of TNT by corruption."""
    rows = _read("tnt.csv")
    groups = rows.groupby(["corruption", "adapter"], sort=False)
    means = groups[["top1", "gain", "gain_low", "gain_high", "ece"]].mean()
    lines = []
    for name in rows["corruption"].unique():
        own = means.loc[name]
        line = {"": name.replace("_", " "), "zero-shot (%)": f"{100 * own.top1[BASELINE]:.1f}"}
        others = own.drop(index=BASELINE)
        gains = others[["gain", "gain_low", "gain_high"]].itertuples()
        line |= {f"gain of `{text}`": _points(*values) for text, *values in gains}
        line |= {f"error of `{text}` (%)": f"{100 * ece:.1f}" for text, ece in own["ece"].items()}
        lines.append(line)
    return _markdown(pd.DataFrame(lines))


def _leaderboard() -> tuple[pd.DataFrame, pd.Series]:
    """Results by adapter and kind of stream, and milliseconds an image by method."""
    rows = _read("leaderboard.csv").set_index(["adapter", "stream"])
    return rows, _read("leaderboard-cost.csv").set_index("adapter")["milliseconds"]


def _least(rows: pd.DataFrame) -> str:
    """The smallest gain of one adapter, and the stream where it is."""
    stream = rows["gain"].idxmin()
    return f"{_points(rows['gain'][stream])} ({stream.replace('_', ' ')})"


def leaderboard() -> str:
    """Gain of every method by kind of stream; bold where the interval is off zero."""
    rows, cost = _leaderboard()
    rows = rows.drop(index=BASELINE)
    means = rows["gain"].groupby(level=0).mean().sort_values(ascending=False, kind="stable")
    lines = []
    for name in means.index:
        own = rows.loc[name]
        line = {"method": f"`{name}`", "ms an image": f"{cost[name.partition(':')[0]]:.1f}"}
        for stream in STREAMS:
            if stream in own.index:
                low, high = own.loc[stream, ["low", "high"]]
                text = _points(own["gain"][stream])
                line[stream] = f"**{text}**" if low > 0 or high < 0 else text
            else:
                line[stream] = "" if len(own) > 1 or name.startswith("watt") else "as reset"
        errors = own["ece"]["reset"]
        lines.append(line | {"worst": _least(own), "calibration error (%)": f"{100 * errors:.1f}"})
    return _markdown(pd.DataFrame(lines))


def which_method() -> str:
    """About ten methods: what they need and change, cost, gain, and where they do harm."""
    rows, cost = _leaderboard()
    lines = []
    for text in (BASELINE, *WHICH):
        name = text.partition(":")[0]
        line = {"method": f"`{text}`", **METHODS.loc[name, ["needs", "changes"]]}
        line |= {"ms an image": f"{cost[name]:.1f}"}
        own = rows.loc[text]
        known = text != BASELINE
        line |= {"gain with a reset": _points(own["gain"]["reset"]) if known else "0"}
        lines.append(line | {"worst gain (stream)": _least(own) if known else "0"})
    return _markdown(pd.DataFrame(lines), left=3)


def methods() -> str:
    """Every method, its paper, and the largest difference from its reference implementation."""
    rows = _read("agreement.csv")
    lines = []
    for name, (title, paper, _, changes) in METHODS.drop(index=BASELINE).iterrows():
        line = {"name": f"`{name}`", "paper": f"[{title}]({paper})", "changes": changes}
        own = rows[(rows["method"] == name) & rows["quantity"].isin(ANSWERS)]
        largest = own.sort_values("difference").tail(1)
        shown = [f"{x:.0e} ({q})" for x, q in largest[["difference", "quantity"]].to_numpy()]
        lines.append({**line, "difference": "".join(shown)})
    return _markdown(pd.DataFrame(lines), left=3)


def agreement() -> str:
    """Largest differences from the reference implementations, by method and quantity."""
    rows = _read("agreement.csv")
    names = ("difference", "scale", "relative", "tolerance")
    numbers = {key: rows[key].map("{:.1e}".format) for key in names}
    return _markdown(rows.assign(**numbers, method=_code(rows["method"])), left=2)


def guard() -> str:
    """Gain of each adapter alone and behind a guard: on average, and where it is worst."""
    rows, second = _read("guard.csv"), _read("guard-second.csv").set_index(["adapter", "stream"])
    rows = rows[rows["adapter"] != BASELINE].set_index(["adapter", "stream"])
    lines = []
    for name in rows.index.unique(0):
        if name.startswith("guarded:"):
            continue
        line = {"adapter": f"`{name}`"}
        for text, suffix in ((name, ""), (f"guarded:{name}", ", guarded")):
            if text in rows.index:
                own = rows.loc[text]
                line |= {f"mean gain{suffix}": _points(own["gain"].mean())}
                line |= {f"worst{suffix}": _least(own)}
        lines.append(line | {"worst, guarded, second set": _least(second.loc[f"guarded:{name}"])})
    return _markdown(pd.DataFrame(lines))


def guard_errors() -> str:
    """Calibration error of zero-shot and of each guarded adapter on each kind of stream."""
    rows = _read("guard.csv")
    rows = rows[rows["adapter"].str.startswith((BASELINE, "guarded:"))]
    errors = 100 * rows.pivot_table("ece", "stream", "adapter", sort=False)
    shown = errors.map("{:.1f}".format).rename(index=lambda name: name.replace("_", " "))
    return _markdown(shown.rename(columns="`{}`".format).rename_axis(None, axis=1).reset_index())


def guard_streams() -> str:
    """Gain on each kind of stream of every adapter, alone → behind a guard."""
    rows = _read("guard.csv").query("adapter != @BASELINE")
    gains = rows.groupby(["stream", "adapter"], sort=False)["gain"].mean().map(_points)
    lines = []
    for stream in gains.index.unique(0):
        own = gains[stream]
        alone = [name for name in own.index if not name.startswith("guarded:")]
        shown = {f"`{n}`": f"{own[n]} → {own.get(f'guarded:{n}', '')}" for n in alone}
        lines.append({"stream": stream.replace("_", " "), **shown})
    return _markdown(pd.DataFrame(lines))


def benchmark() -> str:
    """Seconds, memory and arithmetic of a step, beside PyTorch."""
    rows = _read("benchmark.csv")
    names = ["s/step", "peak GB", "GFLOP", "% of peak", "faster"]
    shown = {key: rows[key].map("{:,.3g}".format).replace("nan", "") for key in names}
    columns = ["adapter", "library", "prompts", "device", "commit", "classes", *names]
    return _markdown(rows.assign(**shown, adapter=_code(rows["adapter"]))[columns], left=5)


def programs() -> str:
    """Steps compiled for an H100: kernels, bytes and memory."""
    both = {"matrix products": "programs.csv", "cuDNN": "programs-fused.csv"}
    rows = pd.concat([_read(file).assign(attention=name) for name, file in both.items()])
    formats = {"kernels": "{:,.0f}", "GF": "{:,.0f}", "HBM GB": "{:,.1f}", "need GB": "{:,.1f}"}
    formats |= {"bound ms": "{:,.1f}", "scatters": "{:,.0f}", "compile s": "{:,.0f}"}
    shown = {key: rows[key].map(how.format) for key, how in formats.items()}
    return _markdown(
        rows.assign(**shown, adapter=_code(rows["adapter"]))[["adapter", "attention", *formats]],
        left=2,
    )


def continual() -> str:
    """Accuracy after the last task and the modality gap: mean ± deviation over seeds."""
    rows = _read("continual.csv")
    rows["set"] = rows["set"].str.removeprefix("retention-")
    last = rows["step"] == rows["step"].max()
    before = rows[rows["step"] == 0].groupby(["seed", "set"], as_index=False).first()
    ends = pd.concat([before.assign(method="before"), rows[last]])
    values = ends.pivot_table("value", ["method", "seed"], "set", sort=False)
    retained = [name for name in ("inside", "outside", "retention") if name in values]
    others = ("modality gap", "image to text", "text to image", *retained)
    tasks = [name for name in values if name not in others]
    values["mean"] = values[tasks].mean(axis=1)
    groups = (100 * values[[*tasks, "mean", *retained]]).groupby(level=0, sort=False)
    shown = groups.mean().map("{:.1f}".format) + groups.std().map(" ± {:.1f}".format)
    shown = shown.replace(" ± (nan|0.0)$", "", regex=True)
    means = values.groupby(level=0, sort=False).mean()
    for name in retained if "fine-tuning" in means.index else ():
        lost = means.loc["before", name] - means.loc["fine-tuning", name]
        kept = (means[name] - means.loc["fine-tuning", name]) / lost
        shown[f"kept, {name}"] = kept.map("{:.2f}".format).replace("nan|inf", "", regex=True)
    shown["modality gap"] = means["modality gap"].map("{:.3f}".format)
    return _markdown(shown.rename_axis(columns=None).rename_axis("method").reset_index())


def data() -> str:
    """How nearly arrays of `make_cifar10_c.py` are those made by another implementation."""
    rows = _read("data.csv")
    gaps = [_points(*values) for values in rows[["gain", "low", "high"]].to_numpy()]
    shown = {
        "corruption": rows["corruption"].str.replace("_", " "),
        "images": rows["images"],
        "mean difference (grey levels)": rows["mean_absolute_difference"].map("{:.2f}".format),
        "equal values (%)": (100 * rows["equal"]).map("{:.1f}".format),
        "zero-shot (%)": (100 * rows["top1"]).map("{:.1f}".format),
        "of the others (%)": (100 * rows["top1_other"]).map("{:.1f}".format),
        "difference": gaps,
    }
    return _markdown(pd.DataFrame(shown))


def gain(adapter: str, stream: str) -> str:
    """The gain of a method of the leaderboard on a kind of stream, in points."""
    return _points(_leaderboard()[0].loc[(adapter, stream), "gain"])
