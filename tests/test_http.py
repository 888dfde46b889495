"""The HTTP server: answers, statuses, limits and metrics; under load in a slow test."""

import asyncio
import io
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import jaxtta
from jaxtta import adapters, models
from jaxtta.adapters.guard import guarded
from jaxtta.deploy.answers import described
from jaxtta.deploy.http import Limits, make_app
from jaxtta.deploy.listen import parse_address, running
from jaxtta.deploy.metrics import Metrics
from jaxtta.deploy.queue import BatchQueue, answer_all
from jaxtta.deploy.session import Session

CLASSES = jaxtta.data.CIFAR10_CLASSES
BUNDLED = jaxtta.data.open_dataset("folder", jaxtta.assets.IMAGES)
LIMITS = Limits(bytes=20_000, pixels=10_000, images=3, seconds=0.5)


def encoded(image, form="PNG"):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form)
    return file.getvalue()


PNGS = [encoded(BUNDLED[200 * (n % 10) + n // 10]) for n in range(20)]
HEADERS = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def session(short):
    model, params = jaxtta.load(short)
    task = models.task_for(model, CLASSES, ("a photo of a {}.",))
    adapter = guarded(adapters.tent(model, task), adapters.zero_shot(model, task))
    made = Session(model, params, task, adapter, batch_size=4)
    made.compile()
    return made


@pytest.fixture(scope="module")
def alone(short, session):
    """The frozen model's likeliest class of each of `PNGS`."""
    model, params = jaxtta.load(short)
    images = [session.prepare(Image.open(io.BytesIO(png))).pixels for png in PNGS]
    task = models.task_for(model, CLASSES, ("a photo of a {}.",))
    adapter = adapters.zero_shot(model, task)
    logits = adapter.step(params, adapter.init(params), np.stack(images))[1].logits
    return [CLASSES[n] for n in np.argmax(logits, -1)]


@pytest.fixture
def serve(session):
    """Start an application with a thread that answers; gives a client and its queue."""
    queues = []

    def start(answering=True, limit=8, **more):
        queue, metrics = BatchQueue(4, limit, 1), Metrics(session)
        app = make_app(
            session,
            queue,
            lambda answer: described(answer, CLASSES, 2),
            metrics,
            LIMITS,
            wait=0.01,
            **more,
        )
        after = lambda items, answers: metrics.count(answers)  # noqa: E731
        thread = threading.Thread(target=answer_all, args=(queue, session, after))
        if answering:
            thread.start()
        queues.append((queue, thread if answering else None))
        return TestClient(app, base_url="http://127.0.0.1"), queue

    yield start
    for queue, thread in queues:
        queue.close()
        if thread:
            thread.join()


def test_each_image_gets_its_own_answer_in_order(serve, alone):
    client, _ = serve()
    for png, label in zip(PNGS[:6], alone, strict=False):
        reply = client.post("/predict", content=png, headers=HEADERS)
        (answer,) = reply.json()["answers"]
        assert (reply.status_code, answer["file"]) == (200, None)
        assert answer["frozen_label"] == label
        assert 1 > answer["scores"][0] > answer["scores"][1] > 0
        assert {"id", "updates", "decision", "share"} <= answer.keys()
    files = [("a", (f"{n}.png", PNGS[n], "image/png")) for n in (5, 3, 4)]
    answers = client.post("/predict", files=files).json()["answers"]
    assert [x["file"] for x in answers] == ["5.png", "3.png", "4.png"]
    assert [x["frozen_label"] for x in answers] == [alone[n] for n in (5, 3, 4)]
    assert len({x["id"] for x in answers}) == 3


def slim():
    return encoded(Image.new("RGB", (1, 300)))


def bomb():
    """A PNG whose header promises a billion pixels."""
    png = bytearray(PNGS[0])
    png[16:24] = (40_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


REFUSED = [
    (b"", HEADERS, 400, "the body is empty"),
    (b"no image", HEADERS, 400, "cannot be decoded, is it an image?"),
    (PNGS[0][:-300], HEADERS, 400, "cannot be decoded"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", HEADERS, 400, "cannot be decoded"),
    (slim(), HEADERS, 400, "has 1×300 pixels, one side is over 200 times the other"),
    (b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "has no file"),
    (b"?", {"Content-Type": "multipart/form-data"}, 400, "the form cannot be read"),
    (b"{}", {"Content-Type": "application/json"}, 415, "Content-Type is application/json"),
    (b"0" * 20_001, HEADERS, 413, "the body is larger than 20000 bytes"),
    (encoded(Image.new("L", (101, 100))), HEADERS, 413, "has 101×100 pixels, expected at most"),
    (bomb(), HEADERS, 413, "has more than 10000 pixels"),
    (PNGS[0], HEADERS | {"Origin": "http://evil"}, 403, "only with a token"),
    (PNGS[0], HEADERS | {"Host": "evil.example:80"}, 400, "not called 'evil.example'"),
    (PNGS[0], HEADERS | {"Host": "[::1]:8000"}, 200, ""),
]
IDS = [f"{status}-{n}" for n, (*_, status, _) in enumerate(REFUSED)]


@pytest.mark.parametrize(("body", "headers", "status", "sentence"), REFUSED, ids=IDS)
def test_what_is_refused_has_one_sentence(serve, body, headers, status, sentence):
    client, queue = serve()
    reply = client.post("/predict", content=body, headers=headers)
    assert reply.status_code == status
    assert sentence in reply.text
    assert status == 200 or ([*reply.json()] == ["error"] and "\n" not in reply.json()["error"])
    assert len(queue) == 0


def test_a_body_without_a_length_is_limited_too(serve):
    client, _ = serve()
    reply = client.post("/predict", content=iter([b"0" * 15_000] * 2), headers=HEADERS)
    assert (reply.status_code, "larger than 20000" in reply.text) == (413, True)


def test_one_broken_file_of_a_form_is_named(serve):
    client, _ = serve()
    files = [("a", ("1.png", PNGS[1])), ("a", ("br\noken.png", b"no image"))]
    reply = client.post("/predict", files=files)
    assert (reply.status_code, "oken.png: cannot be decoded" in reply.text) == (400, True)
    reply = client.post("/predict", files=[("a", (f"{n}.png", PNGS[n])) for n in range(4)])
    assert (reply.status_code, reply.json()["error"]) == (413, "more than 3 images in one request")
    reply = client.post("/predict", files=[("a", (f"{n}.png", PNGS[n])) for n in range(6)])
    assert (reply.status_code, "Too many files" in reply.text) == (413, True)


def test_a_body_that_does_not_come_is_not_waited_for(serve):
    client, _ = serve()
    sent, headers = [], [(b"host", b"localhost"), (b"content-type", b"image/png")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}

    async def send(message):
        sent.append(message)

    asyncio.run(client.app(scope, lambda: asyncio.sleep(60), send))
    assert sent[0]["status"] == 408
    assert b"the body did not come within 0.5 seconds" in sent[1]["body"]


def test_names_of_files_cannot_harm(serve):
    """One that is no text would end the thread that writes the answers' names."""
    client, _ = serve()
    for charset, name in (("utf-7", b"+2AA-.png"), ("utf-8", b"n" * 999)):
        part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="%s"\r\n\r\n' % name
        kind = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
        reply = client.post("/predict", content=part + PNGS[0] + b"\r\n--x--\r\n", headers=kind)
        assert reply.status_code == 200
        (answer,) = reply.json()["answers"]
        assert answer["file"] in ("?.png", "n" * 255)


def test_bodies_are_counted_until_they_are_answered(serve, monkeypatch):
    """Not until they are read alone: as many as may wait would fill the memory."""
    monkeypatch.setattr("jaxtta.deploy.http.ROOM", 0)
    client, queue = serve(answering=False, limit=20)
    png = PNGS[0] + bytes(19_000 - len(PNGS[0]))  # nine are more than eight of the largest
    post = lambda: client.post("/predict", content=png, headers=HEADERS)  # noqa: E731
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(post) for _ in range(8)]
        while len(queue) < 8 and not any(x.done() for x in waiting):
            time.sleep(0.001)
        reply = post()
        queue.close()
    assert (reply.status_code, "too many large requests" in reply.text) == (503, True)
    assert [x.result().status_code for x in waiting] == [503] * 8


def test_a_token_is_asked_for(serve):
    client, _ = serve(token="sésame", hosts=())
    for given, status in (
        ({}, 401),
        ({"Authorization": "Bearer s"}, 401),
        ({"Authorization": "Bearer sésame".encode()}, 200),
    ):
        sent = HEADERS | given | {"Origin": "http://page", "Host": "cat.example"}
        reply = client.post("/predict", content=PNGS[0], headers=sent)
        assert reply.status_code == status
        assert client.get("/metrics", headers=sent).status_code == status
        assert ("WWW-Authenticate" in reply.headers) == (status == 401)
    assert client.get("/health").status_code == 200


def test_too_many_at_once_are_told_to_come_again(serve, session):
    client, queue = serve(answering=False, limit=2)
    with ThreadPoolExecutor(2) as pool:
        post = lambda n: client.post("/predict", content=PNGS[n], headers=HEADERS)  # noqa: E731
        waiting = [pool.submit(post, n) for n in range(2)]
        while len(queue) < 2:
            time.sleep(0.001)
        reply = post(2)
        assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
        assert reply.json() == {"error": "too many images wait, try again later"}
        assert client.get("/health").json()["waiting"] == 2
        queue.close()  # as at Ctrl-C
        assert [x.result().status_code for x in waiting] == [503, 503]
    assert client.get("/health").json()["status"] == "stopping"
    assert client.post("/predict", content=PNGS[0], headers=HEADERS).status_code == 503


def test_a_failure_of_the_server_is_no_traceback(serve, session, monkeypatch, caplog):
    client, _ = serve()
    monkeypatch.setattr(session, "prepare", lambda image: 1 / 0)
    reply = client.post("/predict", content=PNGS[0], headers=HEADERS)
    assert (reply.status_code, reply.json()) == (
        500,
        {"error": "the server has failed, its log says how"},
    )
    assert "ZeroDivisionError" in caplog.text
    assert client.get("/nothing").json()["error"].startswith("this server has POST /predict")
    assert client.get("/predict").status_code == 405


def test_metrics_are_prometheus_text(serve):
    client, _ = serve()
    for png in PNGS[:5]:
        client.post("/predict", content=png, headers=HEADERS)
    client.post("/predict", content=b"", headers=HEADERS)
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    families, until = {}, time.monotonic() + 20
    total = lambda name, **labels: sum(  # noqa: E731
        s.value
        for s in families[name].samples
        if not s.name.endswith("_created") and labels.items() <= s.labels.items()
    )
    while not families or (total("jaxtta_images") < 5 and time.monotonic() < until):
        text = client.get("/metrics").text  # a batch is counted after its answers
        families = {x.name: x for x in text_string_to_metric_families(text)}
    assert total("jaxtta_images") == 5
    assert total("jaxtta_requests", path="/predict", status="200") == 5
    assert total("jaxtta_requests", path="/predict", status="400") == 1
    assert 2 <= total("jaxtta_batches") <= 5
    assert total("jaxtta_waiting_images") == 0
    assert {s.labels["signal"] for s in families["jaxtta_signal"].samples} >= {"share", "narrowing"}
    assert families["jaxtta_request_seconds"].type == "histogram"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8000", ("127.0.0.1", 8000)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:0", ("::1", 0)),
        ("localhost", None),
        (":99999", None),
        ("a:²", None),
    ],
)
def test_addresses(text, address):
    if address:
        assert parse_address(text) == address
    else:
        with pytest.raises(ValueError, match=r"expected \[HOST:\]PORT"):
            parse_address(text)


def test_an_address_in_use_is_one_sentence():
    with running(None, "127.0.0.1", 0) as url:
        port = int(url.rpartition(":")[2])
        with (
            pytest.raises(OSError, match=f"127.0.0.1:{port}: cannot be listened at"),
            running(None, "127.0.0.1", port),
        ):
            pass
