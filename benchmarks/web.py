"""Time from a file to the first answer of `hoyer-det web`, without a browser, and the memory of its server over images.

Requests go through the page's own queue, as a browser sends them: upload, ask, explain.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from common import add_log_option, print_table, run_benchmark, write_log
from PIL import Image

from detection.cli.web import build_parser, prepare
from detection.data.synthetic import draw_scene

SIZE = (640, 480)  # of BCCD's images
WARM = 20  # images before the memory counts


def resident() -> int:
    """Return the memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Visitor:
    """What a browser does, without the browser."""

    def __init__(self, address: str) -> None:
        self.client = httpx.Client(base_url=address, timeout=60)
        config = self.client.get("/config").json()
        self.parts = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        self.values = {part["id"]: part["props"].get("value") for part in config["components"]}
        self.events = config["dependencies"]

    def event(self, wanted: int | None, after: int | None = None) -> dict[str, Any]:
        """Return the event of the image, or that which follows another one."""
        return next(
            event
            for event in self.events
            if (after is None and [wanted, "input"] in [list(target) for target in event["targets"]])
            or (after is not None and event.get("trigger_after") == after)
        )

    def send(self, event: dict[str, Any], given: dict[int, Any]) -> None:
        """Send an event and wait for its end."""
        data = [given.get(part, self.values.get(part)) for part in event["inputs"]]
        body = {"data": data, "fn_index": event["id"], "session_hash": "benchmark"}
        if not event.get("queue", True):
            self.client.post("/gradio_api/run/predict", json=body).raise_for_status()
            return
        self.client.post("/gradio_api/queue/join", json=body).raise_for_status()
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "benchmark"}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return

    def give(self, content: bytes, name: str) -> tuple[float, float]:
        """Return the seconds until the boxes are there, and until everything is."""
        started = time.perf_counter()
        (path,) = self.client.post("/gradio_api/upload", files={"files": (name, content, "image/jpeg")}).json()
        image = self.parts["image"]
        given = {image: {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}}
        busy = self.event(image)
        answer = self.event(None, busy["id"])
        self.send(busy, given)
        self.send(answer, given)
        first = time.perf_counter() - started
        self.send(self.event(None, answer["id"]), given)
        return first, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="zoo:bccd_retinanet_resnet18_spiking", help="(default: the BCCD detector)")
    parser.add_argument("--images", type=int, default=300, help="(default: 300)")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    add_log_option(parser, "web", picture=False)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    server = prepare(build_parser(None).parse_args([options.run, "--port", "0"]))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.server.started:
        time.sleep(0.1)
    visitor, rows, memory = Visitor(server.address), [], []
    for number in range(options.images):
        file = io.BytesIO()
        picture = draw_scene(max(SIZE), 5, np.random.default_rng(number)).image[: SIZE[1]]
        Image.fromarray(picture).save(file, "JPEG", quality=95)
        rows.append(visitor.give(file.getvalue(), f"{number}.jpg"))
        memory.append(resident())
    server.server.should_exit = True
    thread.join()
    first, whole = zip(*rows, strict=True)
    half = WARM + (len(memory) - WARM) // 2
    row = {
        "run": options.run,
        "threads": options.threads,
        "images": len(rows),
        "very_first_seconds": first[0],
        "first_answer_seconds": statistics.median(first[1:]),
        "everything_seconds": statistics.median(whole[1:]),
        "warm_bytes": statistics.median(memory[WARM:half]),
        "end_bytes": statistics.median(memory[half:]),
        "each_first_answer_seconds": first,
        "each_bytes": memory,
    }
    keys = ("very_first_seconds", "first_answer_seconds", "everything_seconds", "warm_bytes", "end_bytes")
    shown = [f"{row[key] / 2**20:.0f} MiB" if key.endswith("bytes") else f"{row[key]:.2f} s" for key in keys]
    columns = ("network", "the very first", "boxes", "everything", "memory, first half", "memory, second half")
    print_table(f"{len(rows)} images, {options.threads} threads", columns, [(options.run, *shown)])
    write_log(options.log, {"rows": [row]})


if __name__ == "__main__":
    run_benchmark(main)
