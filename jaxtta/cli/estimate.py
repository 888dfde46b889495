"""What a sweep would compute: the `--dry-run` of `sweep` and `shifts`."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxtta import evaluate
from jaxtta.evaluate import Spec
from jaxtta.models import Batch, Classifier, Params


def estimate(
    spec: Spec,
    adapters: Sequence[str],
    model: Classifier,
    params: Params,
    config: evaluate.AdapterConfig,
    folder: Path,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Print streams, images and steps, and an estimate of time and memory.

    One batch is read and every adapter takes one step, so that the estimate is of this machine.
    """
    specs = [evaluate.parse_adapter(text) for text in adapters]
    batches = spec.batches(model, specs)
    share = range(shard[0], len(batches.streams), shard[1])
    stored = evaluate.load_predictions(folder) if (folder / "predictions").is_dir() else []
    done = {(result.adapter, result.stream, result.seed) for result in stored}
    left = dict.fromkeys(adapters, 0)
    to_read = 0
    for number in share:
        stream, steps = batches.streams[number], len(batches.of(number))
        missing = [a for a in adapters if (a, stream.name, stream.seed) not in done]
        for text in missing:
            left[text] += steps
        to_read += steps if missing else 0
        computed = f", computed already: {len(adapters) - len(missing)} of {len(adapters)}"
        said = f"{len(stream.items)} images in {steps} steps{computed if stored else ''}"
        print(f"{stream.name} seed {stream.seed}: {said}")
    print(f"{len(share)} streams, batches of {spec.batch_size}, {len(adapters)} adapters")
    start = time.perf_counter()
    batch = batches[batches.of(share[0])[0]]
    reading = (time.perf_counter() - start) * to_read / max(workers, 1)
    stepping = memory = 0.0
    for each in specs:
        if not left[each.text]:
            continue
        adapter = evaluate.make_adapter(each, model, spec.task, config)
        inputs = Batch(batch.images, batch.mask, batch.index)
        if each.needs_originals:
            inputs = Batch(batch.originals, batch.mask, batch.index, batch.sizes)
        state = adapter.init(params, jax.random.key(0))
        step = jax.jit(adapter.step).lower(params, state, inputs).compile()
        jax.block_until_ready(step(params, state, inputs))
        start = time.perf_counter()
        jax.block_until_ready(step(params, state, inputs))
        seconds = time.perf_counter() - start
        sizes = step.memory_analysis()
        used = sizes and (sizes.temp_size_in_bytes + sizes.argument_size_in_bytes) / 1e9
        memory, stepping = max(memory, used or math.nan), stepping + seconds * left[each.text]
        print(
            f"{each.text}: {left[each.text]} steps of about {seconds:.3g} s, {used:.2g} GB"
            if used
            else "memory unknown"
        )
    print(
        f"estimate for what is missing, from one step each: {_minutes(max(reading, stepping))} "
        f"(reading {_minutes(reading)}, adapters {_minutes(stepping)}; they overlap), "
        f"{memory:.2g} GB; compilation is not counted"
    )
