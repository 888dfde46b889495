r"""How soon do 32 labels stop an adapter that does harm, and how often one that does not?

    python experiments/guard.py --data FOLDER/test --output runs/guard
    python experiments/guard_canary.py --data FOLDER/test --guard runs/guard --output runs/canary

Two ways to spend the labels, each simulated many times. "review": on images of the stream for which
the two models' answers differ, from what guard.py has stored; in batches where more than a quarter
do (half, for the second half of the labels), one, and four while the bets win. "canary": images of
the same domains, or clean ones, that are held out, and asked about every 64 images of the stream;
each simulation draws 32 of 64. The output has a row for each stream, adapter and way in stops.csv:
the share of simulations that stop within 200 images of where harm begins (the first 200 images that
lose more than 2 points) and at all, the gain if the frozen model answers from then on, and how many
labels the best of all tests would need for a single look, of images drawn at random and of those
where answers differ.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from guard import ZERO_SHOT, Options, Runner, cases, stored
from guard_streams import KINDS
from scipy import stats

from jaxtta import cli, data, evaluate, io
from jaxtta.adapters.guard.labels import Pairs, is_worse
from jaxtta.cli.options import group
from jaxtta.evaluate.store import safe_name

LABELS, POOL, EVERY, SOON, BATCH = 32, 64, 64, 200, 16
CALM, WORRIED = 1, 4  # labels of a batch for review, while the bets lose and while they win
ASK = (1 / 4, 1 / 2)  # share of a batch's answers that differ, to ask at all, early and late
HARM = 0.02  # a loss to be found
NEEDED = 0.8  # power of the test whose labels are counted


@group
class CanaryOptions:
    """Simulate how labels stop adapters."""

    data: Path  # as for guard.py
    guard: Path  # guard.py's --output, of unguarded adapters
    output: Path  # folder for the results; what is there is not computed again
    harmful: tuple[str, ...] = ("tent:lr=0.1", "batclip:lr=1e-2")  # tried on all streams
    friendly: tuple[str, ...] = ("batclip:lr=1e-3",)  # tried on the friendly streams too
    ways: tuple[Literal["review", "canary"], ...] = ("review", "canary")
    streams: tuple[str, ...] = KINDS  # of guard.py
    alpha: float = 0.05  # allowed probability of a stop by mistake
    runs: int = 200  # simulations of a stream's labels; of all friendly streams together


def main(options: CanaryOptions) -> None:
    """Simulate both ways."""
    guard = Options(options.data, options.guard, streams=options.streams)
    options.output.mkdir(parents=True, exist_ok=True)
    model, params = guard.model.load()
    runner, rows = Runner(guard, model, params), []
    tables = stop_tables(options.alpha)
    for kind, benchmark, streams in cases(guard, runner, 1):
        names = [*options.harmful, *(options.friendly if kind == "friendly" else ())]
        size = 1 if kind == "batch_1" else guard.batch_size
        for name in names:
            for number, stream in enumerate(streams):
                own, frozen = (
                    runner.run(x, benchmark, stream, size, kind) for x in (name, ZERO_SHOT)
                )
                rng = np.random.default_rng([stream.seed, number])
                runs = range(-(-options.runs // len(streams)))
                gains, about = facts(own, frozen, options.alpha)
                about = {"stream": kind, "domain": stream.name, "adapter": name, **about}
                found = {}
                if "review" in options.ways:
                    found["review"] = [review(own, frozen, tables[0], rng) for _ in runs]
                if "canary" in options.ways and size > 1:
                    looks = look(options, runner, name, benchmark, stream, kind)
                    for way in dict.fromkeys(key.rsplit(" ", 1)[0] for key in looks):
                        seen = looks[f"{way} wins"], looks[f"{way} losses"]
                        found[way] = [drawn(*seen, tables[1], rng) for _ in runs]
                rows += [
                    about | {"way": w} | summary(x, gains, own["counted"]) for w, x in found.items()
                ]
            io.write_text(
                options.output / "stops.csv", pd.DataFrame(rows).round(4).to_csv(index=False)
            )
    text = report(pd.DataFrame(rows))
    io.write_text(options.output / "table.txt", text)
    print(text)


def stop_tables(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether (wins, losses) stop: by the bets; and the p-value of the sign test."""
    wins, losses = np.meshgrid(range(LABELS + 1), range(LABELS + 1), indexing="ij")
    pairs = Pairs(*(jnp.asarray(x.ravel()) for x in (wins, 0 * wins, losses)))
    bets = jax.vmap(lambda x: is_worse(x, alpha))(pairs)
    tail = stats.binom.sf(losses - 1, wins + losses, 0.5)
    return np.asarray(bets).reshape(wins.shape), tail / alpha


def facts(own: Any, frozen: Any, alpha: float) -> tuple[np.ndarray, dict[str, float]]:
    """The gain of each image that counts, and how many labels the best test needs."""
    known = own["counted"]
    right = [(x["logits"].argmax(-1) == x["label"])[known] for x in (own, frozen)]
    differ = (own["logits"].argmax(-1) != frozen["logits"].argmax(-1))[known]
    wins, losses = right[0] & ~right[1], right[1] & ~right[0]
    among = max(differ.sum(), 1)
    return 1.0 * wins - losses, {
        "gain": wins.mean() - losses.mean(),
        "needed": needed(wins.mean(), losses.mean(), alpha),
        "needed_where_different": needed(wins.sum() / among, losses.sum() / among, alpha),
    }


def needed(wins: float, losses: float, alpha: float) -> float:
    """Labels for a power of `NEEDED`, by the most powerful test of the two shares for one look."""
    if losses <= wins:
        return np.nan
    shares, share = wins + losses, losses / (wins + losses)
    for pairs in range(1, 20000):
        least = stats.binom.isf(alpha, pairs, 0.5) + 1  # losses that refute "as likely as wins"
        if stats.binom.sf(least - 1, pairs, share) >= NEEDED:
            return np.ceil(pairs / shares)
    return np.inf


def review(own: Any, frozen: Any, table: np.ndarray, rng: np.random.Generator) -> float:
    """Images of the stream until the labels stop the adapter; infinite if they do not."""
    mine, other = (x["logits"].argmax(-1) for x in (own, frozen))
    wins = losses = asked = 0
    for start in range(0, len(mine), BATCH):
        place = np.arange(start, min(start + BATCH, len(mine)))
        differ = mine[place] != other[place]
        place = rng.permutation(place[differ])
        if differ.mean() <= ASK[asked >= LABELS // 2] and losses <= wins:
            continue
        place = place[: min(WORRIED if losses > wins else CALM, LABELS - asked)]
        asked += len(place)
        place = place[own["counted"][place]]  # a frame without a class costs a label, in vain
        wins += (mine[place] == own["label"][place]).sum()
        losses += (other[place] == own["label"][place]).sum()
        if table[wins, losses]:
            return start + BATCH
    return np.inf


def drawn(
    wins: np.ndarray, losses: np.ndarray, table: np.ndarray, rng: np.random.Generator
) -> float:
    """Images of the stream until a canary, drawn from the pool, stops the adapter."""
    chosen = rng.permutation(wins.shape[1])[:LABELS]
    for number, (won, lost) in enumerate(zip(wins, losses, strict=True), 1):
        if table[won[chosen].sum(), lost[chosen].sum()] * number * (number + 1) <= 1:
            return number * EVERY
    return np.inf


def look(
    options: CanaryOptions, runner: Runner, name: str, benchmark: Any, stream: Any, kind: str
) -> dict[str, np.ndarray]:
    """Run a stream, and ask the adapted model about held-out images: wins, losses (looks, POOL)."""
    path = options.output / "looks" / safe_name(f"{kind}--{stream.name}--{name}")
    place = [str(options.data), runner.options.model.model, *map(str, stream.segments)]
    identity = {"adapter": name, "images": io.digest_of([stream.items, *place])}
    if (earlier := stored(path, identity)) is not None:
        return earlier
    rng, labels = np.random.default_rng(stream.seed), data.labels_of(benchmark)
    rest = rng.permutation(np.setdiff1d(np.arange(len(labels)), stream.items[:, 1]))[:POOL]
    shown = [d for d in stream.segments if not str(d).endswith("_frames")]
    own = [benchmark[shown[n % len(shown)]][i] for n, i in enumerate(rest)]
    pools = {"canary": np.stack(own)}
    if kind == "friendly":
        clean = [benchmark[data.Domain(data.CLEAN)][i] for i in rest]
        pools["clean canary"] = np.stack(clean)
    names = tuple(data.class_names_of(benchmark))
    adapter, frozen = (runner.adapter(x, names) for x in (name, ZERO_SHOT))

    def right(which: str, state: Any) -> dict[str, np.ndarray]:
        ask = asking(runner, which, names)
        return {way: np.asarray(ask(x, state)) == labels[rest] for way, x in pools.items()}

    before = right(ZERO_SHOT, frozen.init(runner.params))
    state, found = adapter.init(runner.params, jax.random.key(stream.seed)), []
    spec = evaluate.Spec(benchmark, [stream], None, BATCH)
    for number, batch in enumerate(data.read_ahead(spec.batches(runner.model)), 1):
        inputs = evaluate.inputs_of(batch, evaluate.parse_adapter(name))
        state, _ = adapter.step(runner.params, state, inputs)
        if number * BATCH % EVERY == 0:
            found.append(right(name, state))
    result = {}
    for way, known in before.items():
        after = np.stack([each[way] for each in found])
        result |= {f"{way} wins": after & ~known, f"{way} losses": ~after & known}
    path.parent.mkdir(parents=True, exist_ok=True)
    io.save_arrays(path, result, identity)
    return result


@functools.cache
def asking(runner: Runner, name: str, class_names: tuple[str, ...]) -> Callable[..., Any]:
    """An adapter's classes for images (images, height, width, 3) in a state that it keeps."""
    step = runner.adapter(name, class_names).step
    return jax.jit(lambda images, state: step(runner.params, state, images)[1].logits.argmax(-1))


def summary(stops: list[float], gains: np.ndarray, counted: np.ndarray) -> dict[str, float]:
    """Of simulations of one stream: the shares that stop, when, and what is gained until then.

    All in images that count: `stops` are converted.
    """
    before = np.append(0, counted.cumsum())
    ever = np.isfinite(stops)
    at = before[np.minimum(stops, len(counted)).astype(int)]
    so_far, window = np.append(0, gains.cumsum()), min(SOON, len(gains))
    lost = np.flatnonzero(so_far[window:] - so_far[:-window] < -HARM * window)
    return {
        "runs": len(at),
        "begins": lost[0] if len(lost) else np.nan,
        "soon": (ever & (at <= lost[0] + SOON)).mean() if len(lost) else np.nan,
        "ever": ever.mean(),
        "median": np.median(at[ever]) if ever.any() else np.nan,
        "gain_stopped": so_far[at].mean() / len(gains),
    }


def report(rows: pd.DataFrame) -> str:
    """Two tables: streams where the loss is above two points, and friendly streams without one."""
    means = rows.groupby(["adapter", "stream", "way"], sort=False).mean(numeric_only=True)
    harm = means[means["gain"] < -HARM].drop(columns="runs")
    calm = rows[(rows["stream"] == "friendly") & (rows["gain"] >= 0)]
    weighted = calm.assign(mistakes=calm["ever"] * calm["runs"])
    false = weighted.groupby(["adapter", "way"], sort=False)[["runs", "mistakes"]].sum()
    false["share"] = false["mistakes"] / false["runs"]
    text = f"with {LABELS} labels, where the loss is above {100 * HARM:.0f} points\n\n"
    text += harm.round(3).to_string()
    return text + f"\n\nstopped by mistake, where nothing is lost\n\n{false.to_string()}\n"


if __name__ == "__main__":
    cli.run_script(CanaryOptions, main, __doc__)
