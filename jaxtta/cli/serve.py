r"""Label a stream of images with a model that adapts while it runs, behind a guard.

    jaxtta serve FOLDER_OR_IMAGES… --class-names cat dog      # as jaxtta classify, but adapting
    find . -name '*.jpg' | jaxtta serve - --format jsonl      # paths on stdin, one a line
    jaxtta serve --watch INCOMING --append answers.jsonl --format jsonl --state state.safetensors
    jaxtta serve --http 8000 --state state.safetensors --audit log.jsonl --review unsure

    curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict
    curl -F a=@cat.jpg -F b=@dog.png http://127.0.0.1:8000/predict; curl …/health; curl …/metrics

Each batch is answered, then learnt from. The guard serves a mixture of the frozen model and the
adapted one, and skips, takes back or stops what does harm; every answer says what it decided.
Without a guard (`--adapter batclip`) an adapter may lose tens of points on a bad stream.

Images of several sources share one queue and one model. A batch is answered when it is full, or
when its first image has waited `--max-wait` seconds: longer waits give larger batches, and batches
of fewer than `--min-adapt` images are not learnt from. Files and folders alone wait for full ones.

What is kept: with `--state` the model goes on where it was, with `--append` no file in the answers
is answered again, also after a crash. Ctrl-C and SIGTERM answer the batch at hand, save and end.

HTTP listens to this machine alone; to listen to others (`--http 0.0.0.0:8000`) it needs a token,
best in the variable JAXTTA_TOKEN, that clients send as "Authorization: Bearer TOKEN".

In the review folder a person may write labels.csv, with the columns file and label. Once they show
that the adapted model is less accurate than the frozen one, the frozen one answers. `--share 0.05`
lets the guarded model answer 5 % of the images; it learns from all. `--roll-out` begins with 1 %
and raises the share while all is calm, or labels show no loss; it returns to none if they do.

TNT needs no batch: it optimises a small noise map for each image, at the cost of more than a
hundred forward passes. A map can be learnt once for a camera, and then applied as it is:

    jaxtta serve IMAGES… --adapter tnt --learn-noise camera.safetensors
    jaxtta serve FOLDER --adapter tnt --noise camera.safetensors

Exit codes: those of jaxtta classify; 130 for Ctrl-C; after SIGTERM 0, or 143 if files were left.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtta import assets, evaluate
from jaxtta.cli import classify
from jaxtta.cli.options import group
from jaxtta.deploy.answers import Answer, AnswersFile, described
from jaxtta.deploy.audit import AuditLog
from jaxtta.deploy.queue import NEVER, BatchQueue, Item, answer_all, signals
from jaxtta.deploy.review import Review
from jaxtta.deploy.rollout import chosen
from jaxtta.deploy.session import Session
from jaxtta.deploy.setup import Setup, header_of
from jaxtta.deploy.sources import Reader, Watcher, paths_on_stdin
from jaxtta.deploy.staged import Staged
from jaxtta.images import printable

STDIN = Path("-")
TERMINATED = 143  # exit code, as the shell says for programs that SIGTERM ends
NEWS = 60.0  # seconds between two lines of progress


def say(text: str) -> None:
    """Tell the person at the terminal; where that is a file, its full disk ends nothing."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


@group
class Options(classify.Options):
    """Label images with a model that adapts."""

    adapter: str = "guarded:batclip"  # guarded:tent:lr=1e-4, batclip (unguarded), tnt, …
    batch_size: int = 8  # images per step
    # state and settings to start with, of jaxtta bundle: they replace class names, adapter, batch
    # size and templates, and the model unless --model says where it is
    bundle: Path | None = None
    share: float = 1.0  # of the images that the guarded model answers; the frozen one the others
    roll_out: bool = False  # begin with a small share and raise it in stages
    watch: Path | None = None  # answer the images that come to this folder, until Ctrl-C
    http: str | None = None  # answer requests at [HOST:]PORT; port 0 for a free one
    token: str = ""  # that requests must bring (better: the variable JAXTTA_TOKEN)
    # seconds that an image waits for others (default: 0.05 over HTTP, 2 in a watched folder)
    max_wait: float | None = None
    max_queue: int = 256  # images that may wait; requests above that are told to come again
    max_bytes: int = 20 * 2**20  # of a request
    max_pixels: int = 50_000_000  # of an image in a request
    append: Path | None = None  # file for the answers, jsonl or csv, which is continued
    state: Path | None = None  # file to go on from, and to save the adapted state to
    save_every: int = 32  # steps between two savings
    audit: Path | None = None  # log with a record of every step, for jaxtta replay
    review: Path | None = None  # folder for copies of images that a person should label
    review_below: float = 0.5  # least probability of an answer that needs no review
    review_limit: int = 1000  # images in that folder


class Served:
    """What is done with the answers of each batch.

    Attributes:
        seen: number of images answered.
        answered: number of those with a finite answer.
        unprinted: number of answers that stdout did not take, of a full disk for one.
        lines: the file that answers are appended to; None where they are printed.
        metrics: of the HTTP server; None without.
        done: names of the images in that file.
    """

    def __init__(self, options: Options, session: Session, width: int) -> None:
        """Open what the answers go to."""
        self.seen = self.answered = self.unprinted = 0
        self.metrics: Any = None
        self._review, self._worse, self._save_failed = None, False, False
        self._options, self._session, self._news = options, session, time.monotonic()
        header, self._line = classify.lines_of(options, session, width)
        self.lines = AnswersFile(options.append, header) if options.append else None
        self.done = self.lines.names() if self.lines else set[str]()
        if self.lines is None:
            print(header, end="", flush=True)
        if options.review:
            limits = options.review_below, options.review_limit
            self._review = Review(options.review, session.class_names, *limits)
        self._staged = None
        if options.roll_out:
            kept = options.state and options.state.with_name(f"{options.state.name}.rollout.json")
            self._staged = Staged(session, file=kept)
        elif options.share < 1:
            session.served = lambda name: chosen(name, options.share)
        self._heed_labels()

    def _heed_labels(self) -> None:
        """Let the frozen model answer once labels show that the adapted one is less accurate."""
        if self._review and not self._worse and self._review.adapted_is_worse():
            self._worse, self._session.served = True, lambda name: False
            say("labels show that the adapted model is less accurate: the frozen one answers")

    def after(self, items: Sequence[Item], answers: Sequence[Answer]) -> None:
        """Write, count and copy a batch's answers, and save the state from time to time."""
        session, options = self._session, self._options
        for item, answer in zip(items, answers, strict=True):
            if self.lines:
                self.lines.write(self._line(answer))
            else:
                self._print(self._line(answer))
            self.seen, self.answered = self.seen + 1, self.answered + answer.finite
            if self._review:
                self._review.offer(item, answer)
        self._heed_labels()
        gain = self._review.gain if self._review else None
        if self._staged and (news := self._staged.after(answers, gain)):
            say(news)
        if self.metrics:
            self.metrics.count(answers)
            self.metrics.lost.labels("answers").set(self.lost)
            self.metrics.lost.labels("review").set(self._review.lost if self._review else 0)
        if options.state and session.steps % options.save_every == 0:
            try:
                self.save()
                self._save_failed = False
            except OSError as error:
                if not self._save_failed:
                    say(f"{options.state}: {error.strerror}; the state is not saved")
                self._save_failed = True
        if time.monotonic() - self._news > NEWS:
            self._news, last = time.monotonic(), answers[-1]
            decision = f", {last.decision}" if last.decision else ""
            say(f"{session.seen} images, {session.updates} updates{decision}")

    def _print(self, line: str) -> None:
        try:
            print(line, end="", flush=True)
        except BrokenPipeError:  # nobody reads on
            raise
        except OSError as error:
            if not self.unprinted:
                say(f"stdout: {error.strerror}; answers are lost, the server goes on")
            self.unprinted += 1

    @property
    def lost(self) -> int:
        """How many answers were not written."""
        return self.lines.lost if self.lines else self.unprinted

    def save(self) -> None:
        """Save the state, and the stage of a roll-out beside it, once an image was answered."""
        if self._options.state and self.seen:  # or a start that fails would write an older state
            self._session.save(self._options.state)
            if self._staged:
                self._staged.save()


def session_of(options: Options) -> tuple[Options, Setup, Session]:
    """The options, which a bundle may replace, and the session they make."""
    audit = bool(options.audit)
    if not options.bundle:
        return options, *classify.session_of(options, digests=audit)
    from jaxtta.deploy.bundle import load_bundle, setup_of

    given = options.model.model
    setup = setup_of(options.bundle, None if given == str(assets.MODEL) else given)
    model, params = setup.load()
    session = load_bundle(options.bundle, model, params).session(model, params, digests=audit)
    say(f"{printable(options.bundle)}: {setup.adapter}, after {session.seen} images")
    names = ("adapter", "batch_size", "min_adapt", "class_names")
    own = {name: getattr(setup, name) for name in names}
    return dataclasses.replace(options, **own), setup, session


def run(options: Options) -> int:
    """Answer all sources until they end, or for ever; return the exit code."""
    stdin, endless = STDIN in options.images, bool(options.watch or options.http)
    files = [] if stdin or (endless and not options.images) else classify.files_of(options)
    check(options)
    address = token_and_address(options)
    options, setup, session = session_of(options)
    if options.state and options.state.exists():
        session.load(options.state)
        say(f"{options.state}: goes on after {session.steps} steps and {session.seen} images")
    say(f"compiling {options.adapter} …")
    session.compile()
    served = Served(options, session, max((len(printable(file)) for file in files), default=0))
    sources = sum((bool(files), stdin, bool(options.watch), bool(options.http)))
    queue = BatchQueue(options.batch_size, options.max_queue, sources)
    reader = Reader(queue, session, say, classify.shown, served.done)
    wait = 2.0 if options.max_wait is None else options.max_wait
    with contextlib.ExitStack() as stack:
        if options.audit:
            session.log = stack.enter_context(AuditLog(options.audit, header_of(session, setup)))
        if served.lines:
            stack.callback(served.lines.close)
        if options.state:
            stack.callback(served.save)
        if address:
            stack.enter_context(listening(options, session, queue, served, *address))
        came = stack.enter_context(signals(queue))
        stack.callback(reader.join)
        if files:
            reader.start(lambda: reader.read(files, NEVER))
        if stdin:
            reader.start(lambda: reader.read(paths_on_stdin(queue), wait))
        if options.watch:
            say(f"watching {printable(options.watch)}")
            skip = served.done | {classify.shown(file) for file in files}
            watcher = Watcher(options.watch, skip, classify.shown)
            reader.start(lambda: reader.follow(watcher, wait))
        answer_all(queue, session, served.after)
        if served.seen:
            classify.keep_noise(options, setup, session)
    if signal.SIGINT in came:
        raise KeyboardInterrupt
    if signal.SIGTERM in came:
        return 0 if endless else TERMINATED
    if reader.skipped:
        say(f"{reader.skipped} images were answered before, in {printable(options.append)}")
    if reader.named and not served.seen:
        raise ValueError(f"none of the {reader.named} images could be read")
    return classify.code_of(served.answered - served.lost, reader.named)


def check(options: Options) -> None:
    """Raise an error for options that contradict each other or name what is not there."""
    least = {"save_every": 1, "max_queue": 1, "max_bytes": 1, "max_pixels": 1, "review_limit": 1}
    for name, low in least.items():
        evaluate.require_at_least(**{name: (getattr(options, name), low)})
    if STDIN in options.images and len(options.images) > 1:
        raise ValueError("- stands for a list of paths on stdin, files beside it go into the list")
    if options.max_wait is not None and not 0 <= options.max_wait < NEVER:
        raise ValueError(f"--max-wait is {options.max_wait}, expected seconds, at least 0")
    if not 0 <= options.review_below <= 1:
        raise ValueError(f"--review-below is {options.review_below}, expected 0 to 1")
    if not 0 <= options.share <= 1:
        raise ValueError(f"--share is {options.share}, expected 0 to 1")
    if options.bundle and (options.class_names or options.noise or options.learn_noise):
        raise ValueError("--bundle has class names and a noise map of its own, give none beside it")
    if options.share < 1 and options.roll_out:
        raise ValueError("--share and --roll-out both say a share, expected one of them")
    staged = options.share < 1 or options.roll_out
    if staged and not options.bundle and not evaluate.parse_adapter(options.adapter).guard:
        raise ValueError(
            f"--share is for adapters with a guard: --adapter guarded:{options.adapter}"
        )
    if options.append and options.format == "text":
        raise ValueError("--append needs --format jsonl or csv")
    if options.watch and not options.watch.is_dir():
        raise FileNotFoundError(f"{options.watch}: no such folder")
    for path in filter(None, (options.state, options.append, options.audit)):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder")
    if options.watch and options.review:
        watch, review = options.watch.resolve(), options.review.resolve()
        if review.is_relative_to(watch):
            raise ValueError("--review is within --watch, its images would be answered again")


def token_and_address(options: Options) -> tuple[str, str, int] | None:
    """The token, host and port; None without `--http`."""
    if options.http is None:
        return None
    try:
        from jaxtta.deploy import http  # noqa: F401  all that it needs is here
        from jaxtta.deploy.listen import LOOPBACK, parse_address
    except ModuleNotFoundError as error:
        raise ImportError(f"--http needs {error.name}: pip install 'jaxtta[serve]'") from error
    host, port = parse_address(options.http)
    token = options.token or os.environ.get("JAXTTA_TOKEN", "")
    if host not in LOOPBACK and not token:
        raise ValueError(
            f"--http {options.http} is open to other machines and needs a token: set JAXTTA_TOKEN"
        )
    return token, host, port


@contextlib.contextmanager
def listening(
    options: Options,
    session: Session,
    queue: BatchQueue,
    served: Served,
    token: str,
    host: str,
    port: int,
) -> Iterator[None]:
    """Take requests until the block ends."""
    from jaxtta.deploy.http import Limits, make_app
    from jaxtta.deploy.listen import LOOPBACK, running
    from jaxtta.deploy.metrics import Metrics

    places = min(options.top_k, len(session.class_names))
    served.metrics = metrics = Metrics(session)
    app = make_app(
        session,
        queue,
        lambda answer: described(answer, session.class_names, places),
        metrics,
        Limits(options.max_bytes, options.max_pixels),
        token=token,
        hosts=LOOPBACK if host in LOOPBACK else (),
        wait=0.05 if options.max_wait is None else options.max_wait,
        keep=options.review is not None,
    )
    with running(app, host, port) as url:
        say(f"listening at {url}")
        yield
