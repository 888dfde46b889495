"""An ASGI application that listens at an address of this machine.

with running(app, *parse_address("8000")) as url:
    print(url)  # http://127.0.0.1:8000
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of [HOST:]PORT; the host is 127.0.0.1 by default.

    Raises:
        ValueError: if it is anything else.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        raise ValueError(f"--http is {text!r}, expected [HOST:]PORT such as 8000 or 0.0.0.0:8000")
    return host.strip("[]") or LOOPBACK[0], int(port)


@contextlib.contextmanager
def running(app: Any, host: str, port: int) -> Iterator[str]:
    """Run an application in a thread.

    Args:
        app: an ASGI application.
        host: the name or address to listen at.
        port: its port; 0 for a free one.

    Yields:
        Its URL; it takes connections until the block ends, and then ends the requests at hand.

    Raises:
        OSError: if the address is in use, or not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{host}:{port}: cannot be listened at ({reason})") from error
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
    )
    thread.start()
    try:
        address = f"[{host}]" if ":" in host else host
        yield f"http://{address}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
