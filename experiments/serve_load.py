"""`jaxtta serve` under load: 2,000 requests of 16 clients, broken, huge and empty ones among them.

python experiments/serve_load.py
python experiments/serve_load.py --requests 200 --clients 4 --adapter zero_shot

Starts a server of its own on a free port, and says whether each image got its own answer (by the
digest of the file, and by the frozen model's score, computed here too), which statuses the requests
had, the latency, whether memory was flat over the last half, and whether the metrics parse. The
exit code is 1 if one of these is not as it should be.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx2 as httpx
import jax
import numpy as np
import psutil
import tyro
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import jaxtta
from jaxtta import models

MAX_BYTES = 100_000
ODD = {"broken": 400, "empty": 400, "huge": 413, "pixels": 413, "text": 415}
"""The status of each kind of bad request; each kind is one request in forty."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Load a server."""

    requests: int = 2000  # of all clients together; one in eight is a bad one
    clients: int = 16  # each sends its next request once it has its answer
    adapter: str = "guarded:batclip"  # of the server
    model: str = str(jaxtta.assets.MODEL)
    batch_size: int = 8
    limit: float = 0.05  # by which memory may differ from its mean over the last half


@contextlib.contextmanager
def server(options: Options) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server; yields its URL and process, and ends it by Ctrl-C."""
    command = [sys.executable, "-m", "jaxtta", "serve", "--http", "0"]
    command += ["--adapter", options.adapter, "--batch-size", str(options.batch_size)]
    command += ["--model", options.model, "--max-bytes", str(MAX_BYTES)]
    command += ["--max-pixels", "90000", "--format", "jsonl"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if found := re.match("listening at (.*)", line):
                break
        else:
            raise RuntimeError(f"the server did not start: {said}")
        reader = threading.Thread(target=lambda: said.extend(process.stderr))
        reader.start()
        try:
            yield found[1], psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
            reader.join()
            print("the server ended with code", code, "and said", said)


def content_of(image: np.ndarray, number: int) -> bytes:
    """An image as a PNG file of its own, with its number in it."""
    pixels = image.copy()
    pixels[0, 0] = number % 256, number // 256 % 256, number // 65536  # no two are the same
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def alone(options: Options, files: list[bytes]) -> np.ndarray:
    """The frozen model's probabilities for each file."""
    model, params = jaxtta.load(options.model)
    classes = jaxtta.data.CIFAR10_CLASSES
    task = models.task_for(model, classes, jaxtta.data.templates_for("folder"))
    context = model.init_context(params, task)
    forward = jax.jit(lambda batch: jax.nn.softmax(model(params, context, batch).logits))
    scores = []
    for start in range(0, len(files), 50):
        images = [Image.open(io.BytesIO(x)) for x in files[start : start + 50]]
        batch = models.Batch.padded(model.preprocess(images), 50)
        scores.append(np.asarray(forward(batch))[: len(images)])
    return np.concatenate(scores)


def main(options: Options) -> int:
    """Load a server and print what was found; the exit code."""
    bundled = jaxtta.data.open_dataset("folder", jaxtta.assets.IMAGES)
    files = [content_of(bundled[n % len(bundled)], n) for n in range(options.requests)]
    expected, classes = alone(options, files), jaxtta.data.CIFAR10_CLASSES
    big = io.BytesIO()
    Image.new("RGB", (400, 400)).save(big, "PNG")
    bad = {
        "broken": (files[0][:-200], "image/png"),
        "empty": (b"", "image/png"),
        "huge": (b"0" * (2 * MAX_BYTES), "image/png"),
        "pixels": (big.getvalue(), "image/png"),
        "text": (b"cat", "text/plain"),
    }
    kinds = itertools.cycle([None] * 7 + ["broken"] + [None] * 7 + ["empty"] + [None] * 7 + ["huge"]
        + [None] * 7 + ["pixels"] + [None] * 7 + ["text"])  # fmt: skip
    plan = list(itertools.islice(zip(itertools.count(), kinds), options.requests))
    seconds, memory, wrong = [], [], collections.Counter[str]()
    statuses = collections.Counter[str]()
    stop, counting = threading.Event(), threading.Lock()

    def ask(client: httpx.Client, number: int, kind: str | None) -> None:
        content, form = bad[kind] if kind else (files[number], "image/png")
        start = time.perf_counter()
        reply = client.post("/predict", content=content, headers={"Content-Type": form})
        with counting:
            count(reply, number, kind, time.perf_counter() - start)

    def count(reply: httpx.Response, number: int, kind: str | None, passed: float) -> None:
        statuses[f"{kind or 'image'} {reply.status_code}"] += 1
        if kind is not None:
            wrong["status"] += reply.status_code != ODD[kind]
            wrong["sentence"] += [*reply.json()] != ["error"]
            return
        seconds.append(passed)
        if reply.status_code != 200:
            wrong["status"] += 1
            return
        (answer,) = reply.json()["answers"]
        own = expected[number]
        label = answer.get("frozen_label", answer["labels"][0])
        score = answer.get("frozen_score", answer["scores"][0])
        digest = hashlib.blake2b(files[number], digest_size=8).hexdigest()
        wrong["digest"] += answer["id"] != digest
        wrong["answer"] += label != classes[own.argmax()] or abs(score - own.max()) > 1e-4

    def work(part: list[tuple[int, str | None]]) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            for number, kind in part:
                ask(client, number, kind)

    def watch(process: psutil.Process) -> None:
        while not stop.wait(0.2):
            memory.append(process.memory_info().rss / 2**20)

    with server(options) as (url, process):
        watcher = threading.Thread(target=watch, args=(process,))
        watcher.start()
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
            parts = [plan[n :: options.clients] for n in range(options.clients)]
            for done in [pool.submit(work, part) for part in parts]:
                done.result()
        whole = time.perf_counter() - begin
        stop.set()
        watcher.join()
        good, until = sum(kind is None for _, kind in plan), time.monotonic() + 10
        counted, families = -1.0, []
        while counted < good and time.monotonic() < until:  # a batch is counted after its answers
            families = list(text_string_to_metric_families(httpx.get(f"{url}/metrics").text))
            samples = [x for family in families for x in family.samples]
            counted = sum(x.value for x in samples if x.name == "jaxtta_images_total")
    half = memory[len(memory) // 2 :]
    off = max(abs(x / statistics.mean(half) - 1) for x in half)
    print(f"{options.requests} requests of {options.clients} clients in {whole:.1f} s, {good} good")
    print("statuses:", dict(sorted(statuses.items())))
    print("wrong:", dict(+wrong) or "none")
    low, middle, high = np.quantile(seconds, (0.5, 0.95, 0.99))
    print(f"latency: median {low:.3f} s, 95 % {middle:.3f} s, 99 % {high:.3f} s")
    print(f"memory: {memory[0]:.0f} MiB at first, last half {min(half):.0f} to {max(half):.0f}")
    print(f"metrics: {len(families)} families, {counted:.0f} images counted")
    return int(sum(wrong.values()) > 0 or off > options.limit or counted != good)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
