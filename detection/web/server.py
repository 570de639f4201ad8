"""The server of the page: what it lets through, and what it never does."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detection.records import Weights

if TYPE_CHECKING:
    from detection.web.answers import Network

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MEGABYTE = 2**20
MOST_STORED = 2**31  # bytes of files that visitors have left
BROKEN_OFF = 3600  # seconds in which nothing more came
# What the page asks for. Gradio has more: routes that fetch other addresses, or that tell of the server.
OPEN = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json)?|/(assets|static)/.+|/gradio_api/"
    r"(info|app_id|startup-events|upload|upload_progress|queue/(join|data)|run/predict|cancel|reset|heartbeat/\w+|file=.+)"
)
HEADERS = {
    # The browser, too, asks nobody else for anything, whatever a file of Gradio's names.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
FULL = "The server keeps as much as it may; come back in an hour."


class Gate:
    """An ASGI application in front of another one, which lets through what the page needs, and nothing else.

    Args:
        app: the application behind it.
        folder: where uploaded and drawn files are: the only ones that are served or taken.
        most_bytes: of an upload.
        any_host: whether it may be called by any name, and not by those of this machine alone.
    """

    def __init__(self, app: Any, folder: Path, most_bytes: int, *, any_host: bool = False) -> None:
        self.app, self.folder, self.most_bytes, self.any_host = app, folder.resolve(), most_bytes, any_host

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"]
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope["method"], path, headers)
        body = None
        if refusal is None and scope["method"] == "POST":
            upload = path == "/gradio_api/upload"
            limit = self.most_bytes if upload else MEGABYTE
            most = limit + MEGABYTE * upload  # what is sent around the file
            if int(headers.get("content-length", "0") or 0) > most:
                refusal = (413, f"More than {limit / MEGABYTE:g} MB are not taken here.")
            elif upload:
                receive = _at_most(receive, most)
            else:
                body = await _whole(receive, most)
                if body is None or not self._names_own_files(body):
                    refusal = (403, "Not a request of this page.")
        if refusal is not None:
            from starlette.responses import JSONResponse

            status, text = refusal
            await JSONResponse({"detail": text}, status)(scope, receive, send)
            return
        await self.app(scope, receive if body is None else _replay(body, receive), _with_headers(send))

    def _refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and sentence for a request that goes no further."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0].strip("[]") if re.search(r":\d+$", host) else host.strip("[]")
        # Another page that has got this machine's address for its own name, or that sends forms here.
        if not self.any_host and name not in LOOPBACK:
            return 421, "This page is there for this machine alone; --host makes it public."
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Not a request of this page."
        if method not in ("GET", "HEAD", "POST") or not OPEN.fullmatch(path):
            return 404, "No such page."
        if path.startswith("/gradio_api/file=") and not self._is_own(path.partition("=")[2]):
            return 404, "No such file."
        if path == "/gradio_api/upload" and self._stored() > MOST_STORED:
            return 507, FULL
        return None

    def _is_own(self, path: str) -> bool:
        return "\0" not in path and Path(path).is_absolute() and Path(path).resolve().is_relative_to(self.folder)

    def _names_own_files(self, body: bytes) -> bool:
        """Return whether every file that a request names is one that was given to this server."""
        try:
            paths = list(_paths(json.loads(body or b"null")))
        except (ValueError, RecursionError):
            return False
        return all(isinstance(path, str) and self._is_own(path) for path in paths)

    def _stored(self) -> int:
        """Return the bytes of all files; those that are removed meanwhile may count or not."""
        total = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with suppress(FileNotFoundError):
                    status = os.stat(path := os.path.join(folder, name))
                    if folder == str(self.folder) and time.time() - status.st_mtime > BROKEN_OFF:
                        os.unlink(path)  # of an upload that broke off: others have folders
                    else:
                        total += status.st_size
        return total


def _paths(value: Any) -> Iterator[Any]:
    """Yield what is called a path anywhere in JSON."""
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _paths(each)


async def _whole(receive: Any, most: int) -> bytes | None:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            return None
        more = message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Any) -> Any:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return waiting.pop() if waiting else await receive()

    return replay


def _at_most(receive: Any, most: int) -> Any:
    """Cut off what a browser sends without having said how long it is."""
    seen = 0

    async def count() -> Any:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return message if seen <= most else {"type": "http.disconnect"}

    return count


def _with_headers(send: Any) -> Any:
    async def add(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *((k.encode(), v.encode()) for k, v in HEADERS.items())]
        await send(message)

    return add


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; port 0 takes a free one.

    Raises:
        OSError: the port is taken, or this machine has no such address.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: not free here ({error.strerror}); name another --port") from None


def keep_quiet(folder: Path) -> None:
    """Set what Gradio reads when it is imported: no analytics, no look at the network, files in `folder`."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_SSR_MODE": "False",
        "GRADIO_MCP_SERVER": "False",
        "HF_HUB_OFFLINE": "1",
    }


def open_networks(runs: Sequence[str], weights: Weights, device: str | None, data_root: Path | None) -> list[Network]:
    """Return the networks of some runs; their names do not say where they lie, which visitors need not know.

    Raises:
        FileNotFoundError, ValueError: see `Predictor`, or a run is given twice.
    """
    from detection.report.words import run_names
    from detection.runs import Run
    from detection.web.answers import Network

    opened = [Run.open(run, data_root) for run in runs]
    if len({run.folder.resolve() for run in opened}) < len(opened):
        raise ValueError(f"{', '.join(runs)}: a run is given twice")
    own = run_names([run.folder for run in opened])
    names = [run.address if run.address.startswith("zoo:") else name for run, name in zip(opened, own, strict=True)]
    return [Network(run, name, weights, device) for run, name in zip(opened, names, strict=True)]


class PageServer:
    """A page that is ready to be served.

    Args:
        runs: run folders or zoo:NAME.
        weights, device, data_root: of `Network`.
        host, port: where it listens.
        most_bytes: of an upload.
        most_pixels: of a picture.

    Attributes:
        address: to type into a browser.
        names: of the networks.

    Raises:
        FileNotFoundError, ValueError: of a run that cannot be opened, see `Predictor`.
        ModuleNotFoundError: Gradio is not installed.
        OSError: the port is taken.
    """

    def __init__(
        self,
        runs: Sequence[str],
        *,
        weights: Weights,
        device: str | None,
        data_root: Path | None,
        host: str,
        port: int,
        most_bytes: int,
        most_pixels: int,
    ) -> None:
        self.socket = listen(host, port)
        self.folder = tempfile.TemporaryDirectory(prefix="hoyer-det-web-")
        folder = Path(self.folder.name).resolve()
        keep_quiet(folder)
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"the page needs {error.name}: pip install hoyer-det[web]") from None
        networks = open_networks(runs, weights, device, data_root)
        self.names = [network.name for network in networks]
        self._thread = ThreadPoolExecutor(1, "networks")  # one thing at a time: networks are watched while they run
        app = self._application(networks, folder, most_bytes, most_pixels)
        gate = Gate(app, folder, most_bytes, any_host=host not in LOOPBACK)
        port = self.socket.getsockname()[1]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        settings = {"log_level": "warning", "timeout_graceful_shutdown": 2, "server_header": False}
        self.server = uvicorn.Server(uvicorn.Config(gate, **settings))

    def _application(self, networks: Sequence[Network], folder: Path, most_bytes: int, most_pixels: int) -> Any:
        """Return the page as an ASGI application."""
        import fastapi
        import gradio

        from detection.web.page import CSS, Page, theme
        from detection.web.sources import examples_of
        from detection.web.visits import Visits

        examples = {
            network.name: examples_of(network.predictor, folder / "examples" / str(index))
            for index, network in enumerate(networks)
        }
        visits = Visits(folder, lambda function: self._thread.submit(function).result())
        blocks = Page(networks, examples, visits, most_pixels).build()
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None),
            blocks,
            "/",
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=most_bytes,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=theme(),
            css=CSS,
        )
        blocks.has_launched = True  # or Gradio would not look whether a file is one of its own
        return app

    def run(self) -> None:
        """Serve until Ctrl-C, or until `server.should_exit` is set."""
        try:
            self.server.run(sockets=[self.socket])
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self.folder.cleanup()
