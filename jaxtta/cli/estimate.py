"""What a sweep would compute: the `--dry-run` of `sweep` and `shifts`."""

import contextlib
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax

from jaxtta import evaluate
from jaxtta.evaluate import AdapterSpec, Spec
from jaxtta.models import Batch


def estimate(
    options: Any,
    spec: Spec,
    adapters: Sequence[AdapterSpec],
    loaded: tuple[Any, Any],
    folder: Path,
    shard: tuple[int, int],
) -> None:
    """Print streams, images and steps; estimate time and memory from one step each."""
    model, params = loaded
    batches, stored = spec.batches(model, adapters), []
    with contextlib.suppress(FileNotFoundError):  # nothing is finished yet
        stored = evaluate.load_predictions(folder)
    done = {(result.adapter, result.stream, result.seed) for result in stored}
    left, to_read = dict.fromkeys((each.text for each in adapters), 0), 0
    for number in range(shard[0], len(spec.streams), shard[1]):
        stream, steps = batches.streams[number], len(batches.of(number))
        missing = [name for name in left if (name, stream.name, stream.seed) not in done]
        left |= {name: left[name] + steps for name in missing}
        to_read += steps * bool(missing)
        known = f", to do: {', '.join(missing) or 'nothing'}" if done else ""
        shape = f"{len(stream.items)} images, {steps} steps of {spec.batch_size}"
        print(f"{stream.name}, seed {stream.seed}: {shape}{known}")
    batches[0]  # the first imports what it needs
    start = time.perf_counter()
    batch: Any = batches[min(1, len(batches) - 1)]  # a stream's last batch may be small
    reading = (time.perf_counter() - start) * to_read / max(options.run.workers, 1)
    total = peak = 0.0
    for each in adapters:
        if not left[each.text]:
            continue
        adapter = evaluate.make_adapter(each, model, spec.task, options.adapters.config)
        state, inputs = adapter.init(params), Batch(batch.images, batch.mask, batch.index)
        if each.needs_originals:
            inputs = Batch(batch.originals, batch.mask, batch.index, batch.sizes)
        step = jax.jit(adapter.step).lower(params, state, inputs).compile()
        for _ in range(2):  # the first call loads the program
            start = time.perf_counter()
            jax.block_until_ready(step(params, state, inputs))
        seconds, sizes = time.perf_counter() - start, step.memory_analysis()
        used = (sizes.temp_size_in_bytes + sizes.argument_size_in_bytes) / 1e9 if sizes else 0
        total, peak = total + seconds * left[each.text], max(peak, used)
        print(f"{each.text}: {left[each.text]} steps of {seconds:.2g} s, {used:.2g} GB")
    times = [timedelta(seconds=round(x)) for x in (max(reading, total), reading, total)]
    print("estimate for what is left, from one step each and without compilation:")
    print(f"{times[0]} (reading {times[1]} beside steps of {times[2]}), {peak:.2g} GB")
