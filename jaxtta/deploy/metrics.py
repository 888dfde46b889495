"""Counts of what is served, in the text that Prometheus reads.

metrics = Metrics(session)
metrics.count(answers)  # after each batch
content, status, headers = metrics.text(waiting=len(queue))
"""

from collections.abc import Sequence
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from jaxtta.adapters.guard import DECISIONS
from jaxtta.deploy.answers import Answer
from jaxtta.deploy.session import Session

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TENTHS = tuple(n / 10 for n in range(1, 11))


class Metrics:
    """The numbers of one server.

    Attributes:
        requests: by path and status.
        seconds: from a request to its answer, of those that are answered.
        lost: answers and images for review that could not be written.
    """

    def __init__(self, session: Session) -> None:
        """Start at zero."""
        self._session, self._registry = session, CollectorRegistry()
        own: Any = {"registry": self._registry}
        ProcessCollector(registry=self._registry)
        self.requests = Counter("jaxtta_requests", "HTTP requests", ("path", "status"), **own)
        self.seconds = Histogram(
            "jaxtta_request_seconds", "Seconds to an answer", buckets=SECONDS, **own
        )
        self.lost = Gauge("jaxtta_lost", "What could not be written", ("what",), **own)
        self._images = Counter(
            "jaxtta_images", "Images answered, by likeliest class", ("label",), **own
        )
        self._failed = Counter("jaxtta_not_finite", "Images without a finite answer", **own)
        self._disagree = Counter(
            "jaxtta_disagreements", "Images both models label otherwise", **own
        )
        self._confidence = Histogram(
            "jaxtta_confidence", "Probability of the likeliest class", buckets=TENTHS, **own
        )
        self._batches = Counter(
            "jaxtta_batches", "Batches, by the guard's decision", ("decision",), **own
        )
        self._waiting = Gauge("jaxtta_waiting_images", "Images that wait", **own)
        self._updates = Gauge("jaxtta_updates", "Batches learnt from since the source state", **own)
        self._signals = Gauge("jaxtta_signal", "Scalars of the last batch", ("signal",), **own)
        for decision in DECISIONS:  # at zero, so that rates begin there
            self._batches.labels(decision)

    def count(self, answers: Sequence[Answer]) -> None:
        """Count a batch's answers."""
        names, prediction = self._session.class_names, self._session.prediction
        for answer in answers:
            if answer.finite:
                self._images.labels(names[answer.label]).inc()
                self._confidence.observe(answer.confidence)
            else:
                self._failed.inc()
            self._disagree.inc(answer.disagree)
        self._batches.labels(answers[0].decision or "unguarded").inc()
        self._updates.set(self._session.updates)
        for name, value in (prediction.metrics if prediction else {}).items():
            if name not in ("decision", "reason", "updates"):
                self._signals.labels(name).set(float(value))

    def text(self, waiting: int) -> tuple[bytes, int, dict[str, str]]:
        """The numbers as text, with an HTTP status and headers."""
        self._waiting.set(waiting)
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return generate_latest(self._registry), 200, headers
