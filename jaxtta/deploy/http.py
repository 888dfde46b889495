"""A small HTTP server in front of a queue of images: `/predict`, `/health` and `/metrics`.

    app = make_app(session, queue, describe, metrics, Limits(), token="…")
    with running(app, "127.0.0.1", 8000) as url:
        answer_all(queue, session, metrics.count)  # in this thread, until the queue stops

`POST /predict` takes an image as the body (Content-Type: image/…), or images as the files of a form
(multipart/form-data), and answers {"answers": […]}, one for each image in their order. Anything
else gets its status and {"error": "one sentence"}.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import io
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxtta.deploy.answers import Answer
from jaxtta.deploy.listen import LOOPBACK
from jaxtta.deploy.metrics import Metrics
from jaxtta.deploy.queue import BatchQueue, Item
from jaxtta.deploy.session import Prepared, Session
from jaxtta.deploy.sources import load
from jaxtta.images import FORMATS, UnreadableImageError, printable

log = logging.getLogger(__name__)

RETRY = {"Retry-After": "1"}  # seconds
NAME = 255  # characters of a file's name that are kept
ROOM = 2**28  # bytes of all bodies at hand, or eight of the largest if that is more


class Limits(NamedTuple):
    """What a request may ask for.

    Attributes:
        bytes: of its body.
        pixels: of an image.
        images: in it.
        seconds: for its body to come.
        threads: that decode images.
    """

    bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    images: int = 32
    seconds: float = 30.0
    threads: int = 2


class Refused(Exception):
    """A request that is answered by a status and a sentence."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        """Say why."""
        super().__init__(sentence)
        self.status, self.headers = status, headers


def make_app(
    session: Session,
    queue: BatchQueue,
    describe: Callable[[Answer], dict[str, Any]],
    metrics: Metrics,
    limits: Limits = Limits(),  # noqa: B008  immutable
    *,
    token: str = "",
    hosts: tuple[str, ...] = LOOPBACK,
    wait: float = 0.05,
    keep: bool = False,
) -> Starlette:
    """Make the application.

    Args:
        session: prepares the images; another thread answers them.
        queue: where they wait for it.
        describe: an answer in JSON.
        metrics: what `/metrics` says.
        limits: what is refused.
        token: that requests must bring, as "Authorization: Bearer TOKEN"; "" for none.
        hosts: names that the server may be called by; () for any. Without a token, pages in a
            browser are refused too.
        wait: seconds that an image waits for others to fill its batch.
        keep: whether a file's content goes to the queue with its image.

    Returns:
        An ASGI application.
    """
    service = _Service(session, queue, describe, metrics, limits, token, hosts, wait, keep)
    routes = [
        Route("/predict", service.answered(service.predict), methods=["POST"]),
        Route("/health", service.answered(service.health)),
        Route("/metrics", service.answered(service.metric)),
    ]
    handlers: dict[Any, Any] = {HTTPException: _unknown}
    return Starlette(routes=routes, lifespan=service.lifespan, exception_handlers=handlers)


@dataclasses.dataclass(eq=False)
class _Service:
    """The endpoints of a server; its fields are the arguments of `make_app`."""

    session: Session
    queue: BatchQueue
    describe: Callable[[Answer], dict[str, Any]]
    metrics: Metrics
    limits: Limits
    token: str
    hosts: tuple[str, ...]
    wait: float
    keep: bool

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.limits.threads, "decode")
        self._reading = 0  # requests that are read and decoded
        self._held: dict[Request, int] = {}  # bytes of each body, from its first to its answer
        self._room = max(8 * self.limits.bytes, ROOM)  # of all bodies together

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Let the threads that decode images end with the server."""
        del app
        yield
        self._pool.shutdown(cancel_futures=True)

    def admit(self, request: Request) -> None:
        """Refuse whom the server does not serve."""
        host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]")
        if self.hosts and host not in self.hosts:
            raise Refused(400, f"this server is not called {printable(host)!r}")
        given = request.headers.get("authorization", "").encode("latin-1")  # its bytes
        if self.token and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise Refused(
                401,
                "the token is missing or wrong, expected the header Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )
        if not self.token and "origin" in request.headers:
            raise Refused(403, "pages in a browser are answered only with a token")

    async def body_of(self, request: Request) -> bytes:
        """The body, if it is small enough."""
        too_large = Refused(413, f"the body is larger than {self.limits.bytes} bytes")
        length, body = request.headers.get("content-length", ""), bytearray()
        if length.isdecimal() and int(length) > self.limits.bytes:
            raise too_large
        async for chunk in request.stream():
            if len(body) + len(chunk) > self.limits.bytes:
                raise too_large
            if sum(self._held.values()) + len(chunk) > self._room:
                raise Refused(503, "too many large requests at once, try again later", RETRY)
            body += chunk
            self._held[request] = len(body)
        if not body:
            raise Refused(400, "the body is empty, expected an image")
        return bytes(body)

    async def files_of(self, request: Request) -> list[tuple[str, bytes]]:
        """The names and contents of the images that a request has."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            if kind and not kind.startswith("image/") and kind != "application/octet-stream":
                raise Refused(
                    415,
                    f"Content-Type is {printable(kind)}, expected image/…, "
                    "application/octet-stream or multipart/form-data",
                )
            return [("", await self.body_of(request))]
        form = Request(request.scope, _once(await self.body_of(request)))
        count = self.limits.images
        try:
            async with form.form(max_files=count + 1, max_fields=count) as parts:
                found = [x for _, x in parts.multi_items() if isinstance(x, UploadFile)]
                files = [(_name_of(x), await x.read()) for x in found]
        except HTTPException as error:  # of a form that is none, or has more files still
            status = 413 if error.detail.startswith("Too many files") else 400
            raise Refused(status, f"the form cannot be read ({printable(error.detail)})") from error
        if not files:
            raise Refused(400, "the form has no file, expected images as its files")
        if len(files) > min(count, self.queue.limit):
            raise Refused(413, f"more than {min(count, self.queue.limit)} images in one request")
        return files

    def decoded(self, name: str, content: bytes) -> tuple[str, Prepared]:
        """An image's digest, and the image as the model takes it."""
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        name = name or "the image"
        check(printable(name), content, self.limits)
        try:
            return digest, load(self.session, io.BytesIO(content), name)
        except UnreadableImageError as error:
            raise Refused(400, str(error)) from error

    async def predict(self, request: Request) -> Response:
        """Answer the images of a request."""
        self.admit(request)
        try:
            return await self.answer_to(request)
        finally:
            self._held.pop(request, None)

    async def answer_to(self, request: Request) -> Response:
        """The same, for a request that is admitted."""
        start, loop = time.monotonic(), asyncio.get_running_loop()
        if self.queue.stopping or len(self.queue) + self._reading >= self.queue.limit:
            raise Refused(503, "too many images wait, try again later", RETRY)
        self._reading += 1
        try:
            async with asyncio.timeout(self.limits.seconds):
                files = await self.files_of(request)
            jobs = [loop.run_in_executor(self._pool, self.decoded, *file) for file in files]
            ready = await asyncio.gather(*jobs)
        finally:
            self._reading -= 1
        futures: list[asyncio.Future[Answer | None]] = [loop.create_future() for _ in files]
        due, items = time.monotonic() + self.wait, []
        for (name, content), (digest, image), future in zip(files, ready, futures, strict=True):
            original = content if self.keep else None
            items.append(
                Item(f"http:{digest}/{name}", image, _replier(loop, future), original, due)
            )
        if not self.queue.offer(items):
            raise Refused(503, "too many images wait, try again later", RETRY)
        described = []
        for (name, _), (digest, _), future in zip(files, ready, futures, strict=True):
            if (answer := await future) is None:
                raise Refused(503, "the server stops, try again later", RETRY)
            described.append({"file": name or None, "id": digest, **self.describe(answer)})
        self.metrics.seconds.observe(time.monotonic() - start)
        return JSONResponse({"answers": described})

    async def health(self, request: Request) -> Response:
        """Whether it runs."""
        del request
        counts = {
            "steps": self.session.steps,
            "images": self.session.seen,
            "updates": self.session.updates,
        }
        status = "stopping" if self.queue.stopping else "ok"
        content = {"status": status, "waiting": len(self.queue), **counts}
        return JSONResponse(content, 503 if self.queue.stopping else 200)

    async def metric(self, request: Request) -> Response:
        """The counts as text."""
        self.admit(request)
        return Response(*self.metrics.text(len(self.queue)))

    def answered(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """An endpoint whose errors are one sentence in JSON."""

        async def safe(request: Request) -> Response:
            response = await _outcome(endpoint, request, self.limits)
            self.metrics.requests.labels(request.scope["path"], response.status_code).inc()
            return response

        return safe


async def _unknown(request: Request, error: HTTPException) -> Response:
    del request
    sentence = "this server has POST /predict, GET /health and GET /metrics"
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


async def _outcome(
    endpoint: Callable[[Request], Any], request: Request, limits: Limits
) -> Response:
    try:
        return await endpoint(request)
    except Refused as refused:
        status, sentence, headers = refused.status, str(refused), refused.headers
    except TimeoutError:
        status, headers = 408, None
        sentence = f"the body did not come within {limits.seconds:g} seconds"
    except ClientDisconnect:
        return Response(status_code=400)  # which nobody reads
    except Exception:
        log.exception("%s %s", request.method, request.scope["path"])
        status, sentence, headers = 500, "the server has failed, its log says how", None
    with contextlib.suppress(Exception):  # what a client still sends, or it would not read
        async with asyncio.timeout(1):
            left = 4 * limits.bytes
            async for chunk in request.stream():
                left -= len(chunk)
                if left < 0:
                    break
    return JSONResponse({"error": sentence}, status, headers)


def check(name: str, content: bytes, limits: Limits) -> None:
    """Refuse, before it is decoded, what is no image or has too many pixels."""
    if not content:
        raise Refused(400, f"{name}: is empty, expected an image")
    known = [form for form in FORMATS if form in Image.OPEN]  # others may run programs
    try:
        with Image.open(io.BytesIO(content), formats=known) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise Refused(413, f"{name}: has more than {limits.pixels} pixels") from error
    except Exception as error:  # Pillow may raise any exception on damaged files
        raise Refused(400, f"{name}: cannot be decoded, is it an image?") from error
    if width * height > limits.pixels:
        sentence = f"{name}: has {width}×{height} pixels, expected at most {limits.pixels}"
        raise Refused(413, sentence)


def _name_of(file: UploadFile) -> str:
    """A file's name as a client gives it, cut, and without what is no text in UTF-8."""
    return (file.filename or "")[:NAME].encode("utf-8", "replace").decode()


def _once(body: bytes) -> Callable[[], Any]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _replier(loop: asyncio.AbstractEventLoop, future: Any) -> Callable[[Answer | None], None]:
    """A function that gives a future its answer, from another thread."""

    def settle(answer: Answer | None) -> None:
        if not future.done():  # the client may be gone
            future.set_result(answer)

    def reply(answer: Answer | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, answer)

    return reply
