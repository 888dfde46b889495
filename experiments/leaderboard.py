r"""Which methods help, at which cost, and where do they harm? All named methods, the same streams.

    unzip cifar10-c-severity5.zip -d DATA
    python experiments/leaderboard.py --data DATA/cifar10-c-severity5 --output runs/leaderboard

`--data` has the folders `test` and `meta_train`, each with a `<corruption>.npy` for every
corruption and `labels.npy`. Each method runs with its published settings, and with the learning
rate that is the most accurate on the four validation corruptions of `meta_train`, which has other
images. `--part cost` times one step of every method, on a machine that does nothing else. A run
that was stopped goes on; `--part report` makes the tables (CSV) and the plot again.

Methods that begin anew at every image have one kind of stream, since the others only change the
order of the images. CLIPArTT and WATT begin anew at every batch, and have two kinds and one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from jaxtta import adapters, assets, cli, data, evaluate, metrics, models
from jaxtta.adapters.named import optimizer_of
from jaxtta.adapters.watt import WATT_TEMPLATES
from jaxtta.cli.options import ModelOptions, group
from jaxtta.io import read_json, write_json
from jaxtta.optim import load_mgg, meta_gradient_generator

CLASSES_A_BATCH = 3  # in the streams of few classes
MULTIPLES = (0.1, 1.0, 3.0, 10.0, 30.0)  # of the published rate, to choose from
VIEWS = ("tnt", "zero", "vte", "mta", "tpt", "ctpt")  # begin anew at every image
SLOW = ("clipartt", "watt")  # begin anew at every batch, with many passes
ONLINE = ("tent", "batclip", "mgtta", "sar", "eta", "deyo", "roid", "rotta", "mint")
UNTRAINED = ("tda", "lame", "t3a", "stata", "transclip")


class Cell(NamedTuple):
    """A kind of stream: the setting and order, images a batch, images of each corruption."""

    setting: str
    order: str
    batch_size: int
    images: int


CELLS = {
    "reset": Cell("reset_each_shift", "shuffled", 16, 96),
    "continual": Cell("continual", "shuffled", 16, 48),
    "mixed": Cell("mixed", "shuffled", 16, 48),
    "sorted": Cell("continual", "correlated", 16, 48),
    "few classes": Cell("reset_each_shift", "few", 16, 48),
    "batch 1": Cell("continual", "shuffled", 1, 32),
    "batch 100": Cell("continual", "shuffled", 100, 100),
}
IMAGES = {"views": 16, "slow": 16}  # of each corruption, for methods of many passes


@group
class Options:
    """Run all methods over the same streams."""

    data: Path  # folder with `test` and `meta_train`
    output: Path = Path("runs/leaderboard")  # of all results
    results: Path = Path("docs/results")  # of the tables, as CSV, and the plot
    part: Literal["all", "rates", "streams", "cost", "report"] = "all"
    seeds: tuple[int, ...] = (1, 2, 3)  # of the order and the choice of images
    validation_images: int = 128  # of each validation corruption
    model: ModelOptions = ModelOptions()


def main(options: Options) -> None:
    """Choose rates, run the streams, time the steps, and report."""
    loaded = options.model.load()
    parts: dict[str, Callable[[], None]] = {
        "rates": partial(choose_rates, options, loaded),
        "streams": partial(run_streams, options, loaded),
        "cost": partial(time_steps, options, loaded),
        "report": partial(write_results, options),
    }
    for name in parts if options.part == "all" else [options.part]:
        parts[name]()


def few_classes(stream: data.Stream, labels: np.ndarray, batch_size: int) -> data.Stream:
    """The same images in another order: each batch has few classes, as many as there are left."""
    rng = np.random.default_rng([stream.seed, 2])

    def reordered(part: np.ndarray) -> np.ndarray:
        left = {name: [*np.flatnonzero(labels[part[:, 1]] == name)] for name in np.unique(labels)}
        order: list[int] = []
        while any(left.values()):
            counts = np.array([len(rows) for rows in left.values()])
            some = min(CLASSES_A_BATCH, int((counts > 0).sum()))
            chosen = rng.choice([*left], some, replace=False, p=counts / counts.sum())
            rows = rng.permutation([row for name in chosen for row in left[name]])[:batch_size]
            order += rows.tolist()
            left = {name: [row for row in own if row not in rows] for name, own in left.items()}
        return part[order]

    return stream._replace(parts=tuple(map(reordered, stream.parts)))


def spec_of(
    options: Options,
    model: Any,
    cells: Sequence[str],
    images: int | None = None,
    part: str = "test",
    seeds: Sequence[int] = (),
    templates: Sequence[str] = (),
) -> evaluate.Spec:
    """What to run on: the streams of these cells, whose batches have the same size."""
    benchmark = data.open_benchmark(
        "arrays", str(options.data / part), model.preprocessing, data.CIFAR10_CLASSES
    )
    labels, size = data.labels_of(benchmark), CELLS[cells[0]].batch_size
    corruptions = data.IMAGENET_C if part == "test" else data.IMAGENET_C_EXTRA
    streams = []
    for name in cells:
        setting, order, _, limit = CELLS[name]
        how: Any = {"order": order if order != "few" else "shuffled", "limit": images or limit}
        for seed in seeds or options.seeds:
            for each in data.make_streams(setting, corruptions, (0,), labels, seed=seed, **how):
                few = few_classes(each, labels, size) if order == "few" else each
                streams.append(few._replace(name=f"{name}, {each.name}"))
    templates = templates or data.templates_for("arrays")
    task = evaluate.task_for(model, data.class_names_of(benchmark), templates)
    return evaluate.Spec(benchmark, streams, task, size, templates=templates)


def choose_rates(options: Options, loaded: Any) -> None:
    """Choose learning rates on the validation corruptions; methods without are measured there."""
    file = options.output / "rates.json"
    chosen = read_json(file) if file.exists() else {}
    for name in (*ONLINE, *UNTRAINED, *SLOW, *VIEWS):
        if name in chosen:
            continue
        images = IMAGES["slow" if name in SLOW else "views"]
        images = options.validation_images if name in (*ONLINE, *UNTRAINED) else images
        templates = WATT_TEMPLATES if name == "watt" else ()
        spec = spec_of(options, loaded[0], ["reset"], images, "meta_train", (1,), templates)
        folder = options.output / "validation" / name
        if evaluate.has_rate(name):
            method = evaluate.parse_adapter(name)
            published = optimizer_of(method, evaluate.AdapterConfig()).args[-1]
            rates = [float(f"{many * published:.3g}") for many in MULTIPLES]
            choice = evaluate.tune_learning_rate(name, rates, spec, *loaded, folder)
            rate, tops = choice.rate, choice.accuracies
        else:
            published = rate = None
            found = evaluate.sweep(spec, [name], *loaded, folder)
            tops = {"": np.mean([each.top1.mean() for each in found])}
        base = evaluate.sweep(spec, ["zero_shot"], *loaded, folder)
        zero_shot = np.mean([each.top1.mean() for each in base])
        gains = {str(each): float(top1 - zero_shot) for each, top1 in tops.items()}
        chosen[name] = {"published": published, "rate": rate, "gains": gains}
        write_json(file, chosen)


def compositions(rates: dict[str, Any]) -> dict[str, Callable[..., adapters.Adapter]]:
    """Methods made of two, with the rate chosen for the first."""
    rate = rates["batclip"]["rate"]
    adamw = adapters.BATCLIP_PRESETS["cifar10-c"].optimizer

    def optimizer() -> Any:
        return adamw.func(rate, **adamw.keywords)

    objective = adapters.batclip_objective
    phi = load_mgg(assets.PHI)[0]

    def on_batclip(method: Callable[..., Any], model: models.CLIP, task: Any) -> adapters.Adapter:
        return method(model, task, on=adapters.batclip(model, task, optimizer=optimizer()))

    return {
        "batclip, steps of sar": lambda model, task: adapters.sar(
            model, task, objective=objective, optimizer=optimizer()
        ),
        "batclip, filter of deyo": lambda model, task: adapters.deyo(
            model, task, objective=objective, optimizer=optimizer()
        ),
        "tda on batclip": partial(on_batclip, adapters.tda),
        "stata on batclip": partial(on_batclip, adapters.stata),
        "sar, generator of mgtta": lambda model, task: adapters.sar(
            model, task, optimizer=meta_gradient_generator(phi, rates["mgtta"]["rate"])
        ),
    }


def methods(options: Options, names: Sequence[str]) -> list[evaluate.AdapterSpec]:
    """Published settings, and chosen rates where these are others."""
    rates = read_json(options.output / "rates.json")
    texts = ["zero_shot", *names]
    for name in names:
        if (rate := rates[name]["rate"]) != rates[name]["published"]:
            texts.append(evaluate.with_rate(name, rate))
    found = [evaluate.parse_adapter(text) for text in texts]
    if "batclip" in names:
        found += [evaluate.AdapterSpec(t, t, {}, make) for t, make in compositions(rates).items()]
    return found


def run_streams(options: Options, loaded: Any) -> None:
    """Run every method over the streams on which its answers can differ."""
    of_16 = [name for name, cell in CELLS.items() if cell.batch_size == 16]
    quick = methods(options, (*ONLINE, *UNTRAINED))

    def run(name: str, cells: Sequence[str], specs: Any, images: int | None, **how: Any) -> None:
        spec = spec_of(options, loaded[0], cells, images, **how)
        evaluate.sweep(spec, specs, *loaded, options.output / name)

    run("batch-16", of_16, quick, None)
    run("views", ["reset"], methods(options, VIEWS), IMAGES["views"])
    run("batch-1", ["batch 1"], quick, None)
    run("batch-100", ["batch 100"], quick, None)
    for name in SLOW:
        templates = WATT_TEMPLATES if name == "watt" else ()
        cells = ["reset", "few classes"]  # whose batches have all classes, and few
        cells = cells if name == "clipartt" else cells[:1]  # WATT takes 80 passes
        run(name, cells, methods(options, [name]), IMAGES["slow"], templates=templates)


def time_steps(options: Options, loaded: Any, batch_size: int = 16, seconds: float = 2.0) -> None:
    """Time the steps of every method along a stream, in one run; zero-shot first and last."""
    model, params = loaded
    lines = []
    everything = methods(options, (*ONLINE, *UNTRAINED, *SLOW, *VIEWS))
    plain = [each for each in everything if each.own or not each.settings]
    for each in [*plain, plain[0]]:
        templates = WATT_TEMPLATES if each.name == "watt" else ()
        spec = spec_of(options, model, ["reset"], batch_size, seeds=(1,), templates=templates)
        adapter = evaluate.make_adapter(each, model, spec.task)
        step, state = jax.jit(adapter.step), adapter.init(params, jax.random.key(0))
        batch: Any = spec.batches(model, [each])[0]
        inputs = evaluate.inputs_of(batch, each)
        state, _ = jax.block_until_ready(step(params, state, inputs))
        times: list[float] = []
        while sum(times) < seconds or len(times) % 4:  # RoTTA learns in one step of four
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(params, state, inputs))
            times.append(time.perf_counter() - start)
        lines.append({"adapter": each.text, "milliseconds": 1e3 * np.mean(times) / batch_size})
        print(f"{each.text}: {lines[-1]['milliseconds']:.2f} ms an image")
    pd.DataFrame(lines).to_csv(options.output / "cost.csv", index=False)


def write_results(options: Options) -> None:
    """Write the table, the times and the plot."""
    lines = [
        line
        for folder in ("batch-16", "batch-1", "batch-100", "views", *SLOW)
        for line in lines_of(evaluate.load_predictions(options.output / folder))
    ]
    table = pd.DataFrame(lines)
    cost = pd.read_csv(options.output / "cost.csv").groupby("adapter")["milliseconds"].min()
    options.results.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.results / "leaderboard.csv", index=False, float_format="%.5f")
    cost.to_csv(options.results / "leaderboard-cost.csv", float_format="%.3f")
    plot(table, cost, options.results / "leaderboard.png")
    print(f"results: {options.results}; python docs/render.py writes the tables of the documents")


def lines_of(found: Sequence[evaluate.Predictions]) -> Iterator[dict[str, Any]]:
    """A line for each kind of stream and adapter; zero-shot has a line for each run."""
    frames: dict[tuple[str, str], dict[Any, pd.DataFrame]] = {}
    for each in found:
        own = frames.setdefault((each.stream.partition(", ")[0], each.adapter), {})
        for number, domain in enumerate(each.domains):
            own[each.stream, each.seed, number, domain.corruption] = each.segment(number)
    for (name, text), own in frames.items():
        base = frames[name, "zero_shot"]
        rows = pd.concat(own.values())
        line = {"adapter": text, "stream": name, "batch_size": CELLS[name].batch_size}
        line |= {"images": len(rows), "top1": rows["top1"].mean()}
        finite = rows[np.isfinite(rows["nll"])]
        scores = (finite[key].to_numpy() for key in ("confidence", "top1"))
        line["ece"] = float(metrics.expected_calibration_error(*scores))
        if text != "zero_shot":
            gain = evaluate.paired_gain([*own.values()], [base[key] for key in own])
            low, high = (gain and gain.interval) or (np.nan, np.nan)
            line |= {"gain": gain and gain.top1, "low": low, "high": high}
            means = pd.Series(
                {key: x["top1"].mean() - base[key]["top1"].mean() for key, x in own.items()}
            )
            means = means.groupby(level=3).mean()  # over the seeds
            line |= {"worst": means.min(), "worst_corruption": means.idxmin()}
        yield line


def plot(table: pd.DataFrame, cost: pd.Series, path: Path) -> None:
    """Gain against cost: the mean over the kinds of streams, and a line to the worst of them."""
    rows = table[table["adapter"] != "zero_shot"].groupby("adapter")["gain"].agg(["mean", "min"])
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for text, (mean, least) in (100 * rows).iterrows():
        milliseconds = cost[text.partition(":")[0]]
        colour = "tab:blue" if ":" not in text else "tab:orange"
        axes.plot([milliseconds] * 2, [mean, least], color=colour, alpha=0.4, linewidth=1)
        axes.plot(milliseconds, mean, "o", color=colour, markersize=5)
        axes.annotate(text, (milliseconds, mean), (4, 3), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xscale="log", yscale=("symlog"), xlabel="milliseconds an image (2 CPU cores, batch 16)"
    )
    axes.set_ylabel("gain over zero-shot in points; the line ends at the worst kind of stream")
    axes.set_yticks(
        [-50, -20, -10, -5, -2, -1, 0, 1, 2, 5], [-50, -20, -10, -5, -2, -1, 0, 1, 2, 5]
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
