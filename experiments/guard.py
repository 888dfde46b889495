r"""How much does an adapter gain or lose on streams that do it harm, with and without a guard?

    python experiments/guard.py --data FOLDER/test --output runs/guard \
        --adapters tent tent:lr=0.1 guarded:tent guarded:tent:lr=0.1

FOLDER/test has <corruption>.npy, clean.npy and labels.npy (CIFAR-10-C at severity 5, say). The
output has a row for each stream and adapter in results.csv, with the gain over zero-shot and its
paired 95 % interval over images, table.txt, gains.png, and each image's answers in predictions/.
What is there is not computed again. Choose thresholds on FOLDER/meta_train with another output.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from guard_streams import BLANK, KINDS, NOISE, make_streams, with_frames
from matplotlib.figure import Figure

from jaxtta import adapters, bootstrap, cli, data, evaluate, io, metrics, models
from jaxtta.adapters.guard.policy import DECISIONS, Policy
from jaxtta.cli.options import ModelOptions, group
from jaxtta.data import CIFAR10_CLASSES
from jaxtta.evaluate.store import safe_name

ZERO_SHOT, TEXTILE = "zero_shot", "textile"
STOPPED = [DECISIONS.index(name) for name in ("stop", "stopped")]


@group
class Options:
    """Run adapters over friendly and hostile streams, and compare them with zero-shot."""

    data: Path  # folder of <corruption>.npy, clean.npy and labels.npy
    output: Path  # folder for the results; a run that was stopped goes on where it was
    adapters: tuple[str, ...] = ("batclip:lr=1e-2", "tent:lr=0.1")  # by name; guarded:NAME too
    # textile: images of conformal-clip-data, of which the model knows nothing; it is not among the
    # default ones, since it is the same for every FOLDER
    streams: tuple[str, ...] = KINDS
    images: int = 240  # of each domain
    limit: int | None = None  # images of a stream (default: all); for slow adapters
    seeds: tuple[int, ...] = (1,)  # each is a set of streams of its own
    batch_size: int = 16  # images per step; batch_1 has 1
    class_names: tuple[str, ...] = CIFAR10_CLASSES  # in label order
    model: ModelOptions = ModelOptions()


def main(options: Options) -> None:
    """Run what is missing, and report all that is there."""
    model, params = options.model.load()
    runner = Runner(options, model, params)
    rows = []
    for seed in options.seeds:
        for kind, benchmark, streams in cases(options, runner, seed):
            batch_size = 1 if kind == "batch_1" else options.batch_size
            frozen = [runner.run(ZERO_SHOT, benchmark, s, batch_size, kind) for s in streams]
            for name in dict.fromkeys((ZERO_SHOT, *options.adapters)):
                start = time.perf_counter()
                found = [runner.run(name, benchmark, s, batch_size, kind) for s in streams]
                rows.append({"stream": kind, "seed": seed, "adapter": name, **line(found, frozen)})
                if time.perf_counter() - start > 5:
                    shown = {k: f"{v:.3g}" for k, v in rows[-1].items() if isinstance(v, float)}
                    print(kind, seed, name, shown, flush=True)
                write(options.output, pd.DataFrame(rows), final=False)
    write(options.output, pd.DataFrame(rows), final=True)


def cases(options: Options, runner: "Runner", seed: int) -> Any:
    """(kind, benchmark, streams) of one set."""
    read = runner.model.preprocessing
    kinds = [kind for kind in options.streams if kind != TEXTILE]
    if kinds:
        opened = data.open_benchmark("arrays", options.data, read, options.class_names)
        benchmark = with_frames(opened)

        def right(domain: data.Domain, images: np.ndarray) -> np.ndarray:
            stream = data.stream_of(str(domain), [domain], images, seed)
            found = runner.run(ZERO_SHOT, benchmark, stream, options.batch_size, "to_order")
            return found["logits"].argmax(-1) == found["label"]

        made = make_streams(benchmark, options.images, seed, right, kinds)
        yield from ((kind, benchmark, streams) for kind, streams in made.items())
    if TEXTILE in options.streams:
        from jaxtta.cli.continual import textile

        clean, images = data.Domain(data.CLEAN), textile()
        numbers = np.random.default_rng(seed).permutation(len(images))[: 5 * options.images]
        yield TEXTILE, {clean: images}, [data.stream_of(TEXTILE, [clean], numbers, seed)]


class Runner:
    """Runs adapters over streams; each is compiled once, and what a folder has is not run again."""

    def __init__(self, options: Options, model: models.CLIP, params: models.Params) -> None:
        self.options, self.model, self.params = options, model, params
        self.made: dict[tuple[str, tuple[str, ...]], adapters.Adapter] = {}

    def adapter(self, name: str, class_names: tuple[str, ...]) -> adapters.Adapter:
        """The adapter, with a compiled step."""
        if (name, class_names) not in self.made:
            task = evaluate.task_for(
                self.model, class_names, self.options.model.templates_for("arrays")
            )
            made = evaluate.make_adapter(evaluate.parse_adapter(name), self.model, task)
            compiled = jax.jit(made.step, donate_argnums=1)
            self.made[name, class_names] = adapters.Adapter(jax.jit(made.init), compiled)
        return self.made[name, class_names]

    def run(
        self, name: str, benchmark: data.Benchmark, stream: data.Stream, size: int, kind: str
    ) -> dict[str, np.ndarray]:
        """One adapter on one stream.

        Returns:
            By name, in stream order: image and segment, label, counted (a frame without a label is
            not), logits (images, classes), those of a guard's two models, its metrics and all other
            scalars of a step for each of its images; and the seconds, ().
        """
        text = f"{kind}--{stream.name}--seed{stream.seed}--{size}--{name}"
        path = self.options.output / "predictions" / f"{safe_name(text)}.safetensors"
        items = stream.items[: self.options.limit]
        place = [str(self.options.data), self.options.model.model, *map(str, stream.segments)]
        own = evaluate.parse_adapter(name)
        identity = {"adapter": name, "images": io.digest_of([items, *place])}
        identity |= {"policy": dataclasses.asdict(Policy())} if own.guard else {}
        if (earlier := stored(path, identity)) is not None:
            return earlier
        adapter = self.adapter(name, tuple(data.class_names_of(benchmark)))
        cut = stream._replace(parts=(items,))
        spec = evaluate.Spec(benchmark, [cut], None, size)
        state = adapter.init(self.params, jax.random.key(stream.seed))
        found, seconds = [], 0.0
        for batch in data.read_ahead(spec.batches(self.model, [own])):
            start = time.perf_counter()
            inputs = evaluate.inputs_of(batch, own)
            state, prediction = adapter.step(self.params, state, inputs)
            prediction = jax.device_get(prediction)
            seconds += time.perf_counter() - start
            answers = getattr(prediction, "answers", None)
            rows = {"logits": prediction.logits, **(answers._asdict() if answers else {})}
            rows |= {k: np.full(size, v) for k, v in prediction.metrics.items() if np.ndim(v) == 0}
            rows |= {"image": batch.source_index, "segment": batch.segments, "label": batch.labels}
            found.append({key: np.asarray(value)[batch.mask] for key, value in rows.items()})
        whole = {key: np.concatenate([each[key] for each in found]) for key in found[0]}
        unlabelled = [domain in (NOISE, BLANK) for domain in stream.segments]
        whole["counted"] = ~np.asarray(unlabelled)[whole["segment"]]
        whole["seconds"] = np.asarray(seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        io.save_arrays(path, whole, identity)
        return whole


def stored(path: Path, identity: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """What a file has, if it is there; a ValueError if it was made of something else."""
    if not path.is_file():
        return None
    found, about = io.load_arrays(path)
    if {**identity, **about} != identity:  # earlier files say less about themselves
        raise ValueError(
            f"{path}: is of another model, policy or other images, choose another --output"
        )
    return found


def line(found: list[dict[str, np.ndarray]], frozen: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """A row of the results: one adapter on all streams of a kind, and zero-shot on the same."""
    shown, confidence = [], []
    for own, other in zip(found, frozen, strict=True):
        keep = own["counted"]
        right = [x["logits"].argmax(-1) == x["label"] for x in (own, other)]
        shown.append(np.stack([own["image"], *right, np.ones(len(keep))], 1)[keep].astype(float))
        top = [jax.nn.softmax(x["logits"]).max(-1)[keep] for x in (own, other)]
        confidence.append(np.stack(top, 1))
    rows, tops = np.concatenate(shown), np.concatenate(confidence)
    sums = pd.DataFrame(rows).groupby(0).sum().to_numpy()  # of an image, over its domains
    means = bootstrap.bootstrap(sums[:, :2], sums[:, [2, 2]])
    low, high = bootstrap.interval(means[:, 0] - means[:, 1]) or (np.nan, np.nan)
    errors = [
        float(metrics.expected_calibration_error(top, right))
        for top, right in zip(tops.T, rows[:, 1:3].T.astype(bool), strict=True)
    ]
    ends = [np.isin(own.get("decision", ()), STOPPED) for own in found]
    stops = [int(end.argmax()) for end in ends if end.any()]
    return {
        "images": len(rows),
        "top1": rows[:, 1].mean(),
        "gain": rows[:, 1].mean() - rows[:, 2].mean(),
        "low": low,
        "high": high,
        "ece": errors[0],
        "ece_zero_shot": errors[1],
        "share": float(np.mean([own["share"].mean() for own in found if "share" in own] or [1])),
        "streams": len(found),
        "stopped": len(stops),
        "stopped_at": float(np.mean(stops)) if stops else np.nan,  # images seen before, on average
        "seconds": float(sum(own["seconds"] for own in found)),
    }


def write(folder: Path, rows: pd.DataFrame, final: bool) -> None:
    """Write the rows, and at the end a table and a plot of the gains in points."""
    io.write_text(folder / "results.csv", rows.round(5).to_csv(index=False))
    if not final:
        return
    points = rows.assign(gain=100 * rows["gain"], ece=100 * rows["ece"])
    order = {key: dict.fromkeys(rows[key]) for key in ("stream", "adapter")}
    tables = {}
    for value in ("gain", "ece"):
        table = points.pivot_table(value, "stream", "adapter", sort=False)
        tables[value] = table.reindex(index=[*order["stream"]], columns=[*order["adapter"]])
    gains = tables["gain"].drop(columns=ZERO_SHOT)
    text = "gain over zero-shot in points\n\n" + gains.to_string(float_format="{:+.1f}".format)
    text += f"\n\nworst\n{gains.min().to_string(float_format='{:+.1f}'.format)}"
    text += "\n\ncalibration error in %\n\n" + tables["ece"].to_string(float_format="{:.1f}".format)
    io.write_text(folder / "table.txt", text + "\n")
    figure = Figure(figsize=(1.2 + 0.5 * len(gains), 4), layout="constrained")
    axes = figure.subplots()
    gains.plot(ax=axes, style="o", xticks=range(len(gains)), ylabel="gain over zero-shot (points)")
    axes.set_xticklabels(gains.index, rotation=90)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=5)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "gains.png", dpi=150)
    print(text, f"\nresults: {folder}", sep="\n")


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
