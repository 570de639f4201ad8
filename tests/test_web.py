"""The page of `hoyer-det web` in a browser, its server, and the noise that it shows."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import nn

import detection
from backbones import energy, record_layers
from detection.cli import main
from detection.cli.web import build_parser, prepare
from detection.config import parse_recipe
from detection.data.events import draw_classified, draw_recordings
from detection.data.synthetic import draw_scene
from detection.records import RunInfo
from detection.report.words import format_energy
from detection.robustness.corruptions import corrupt
from detection.robustness.noise import potential_noise
from detection.runs import Run
from detection.tasks import task_of
from detection.web.answers import Network
from detection.web.page import Page
from detection.web.server import Gate
from detection.web.sources import Source, examples_of
from detection.web.visits import Visit, Visits

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")
SPIKING, ANALOGUE_HEAD, CLASSES = (f"zoo:{name}" for name in (
    "bccd_retinanet_resnet18_spiking", "bccd_retinanet_resnet18", "cifar10_vgg11"))  # fmt: skip
MARKUP = ["<b>bold</b>", "<img src=x onerror=document.title='run'>", "${1+1} {{2+2}}", "$x^2$", "a&amp;b"]
BACKBONE = {"name": "resnet18", "width": 0.125, "activation": "hoyer"}
NAMED = {
    "task": "classification",
    "model": {"backbone": {**BACKBONE, "stem": "cifar"}},
    "data": {"format": "folder", "size": 32, "classes": MARKUP},
}
EVENTS = {
    "task": "detection",
    "model": {
        "backbone": BACKBONE,
        "neck": {"levels": ["c3", "c4"], "extra_levels": 0, "out_channels": 16},
        "head": {"num_convs": 1, "max_detections": 5},
        "min_size": [64],
        "max_size": 64,
    },
    "data": {"format": "synthetic_events", "classes": ["one", "two"], "events": {"steps": 1, "window": 0.25}},
}
READY = "() => !/[\u2026\u2013]/.test(document.querySelector('#summary').innerText.replace(/^.*$/m, ''))"


def make_run(folder: Path, values: dict) -> Path:
    """A run that has learnt nothing; of a detector, every place is as likely an object as not."""
    config = parse_recipe({**values, "data": {**values["data"], "root": str(folder), "workers": 0}}, "test")
    torch.manual_seed(0)
    model = task_of(config).build_model()
    for name, parameter in model.named_parameters():
        if name.endswith("cls_logits.bias"):
            nn.init.zeros_(parameter)
    run = Run.create(folder, config, RunInfo(command="test"))
    run.save(model, "last")
    return folder


def write_film(path: Path, number: int) -> Path:
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (320, 240))
    for seed in range(number):
        film.write(cv2.resize(draw_scene(240, 3, np.random.default_rng(seed % 5)).image, (320, 240)))
    film.release()
    return path


def write_bomb(path: Path, side: int = 30_000) -> Path:
    """A PNG file of one bit for each of side x side pixels, all black."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory, real_data) -> Iterator[object]:
    folder = tmp_path_factory.mktemp("web")
    draw_recordings(folder / "data", num_train=1, num_val=1, size=64, seed=0)
    (folder / "data" / "BCCD").symlink_to(real_data("bccd") / "bccd" / "BCCD")
    runs = [
        SPIKING,
        ANALOGUE_HEAD,
        CLASSES,
        str(make_run(folder / "classifier", NAMED)),
        str(make_run(folder / "events_detector", EVENTS)),
    ]
    server = prepare(
        build_parser(None).parse_args([*runs, "--port", "0", "--max-mb", "8", "--data.root", str(folder / "data")])
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.server.should_exit = True
    thread.join(20)
    assert not thread.is_alive() and not Path(server.folder.name).exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Debian's Chromium; where there is none, a test is skipped, or fails if it must not be."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        (pytest.fail if os.environ.get("REQUIRE_REAL_DATA") else pytest.skip)("no Chromium: apt-get install chromium")
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def new_page(browser, server) -> Iterator[Callable[..., object]]:
    """new_page() -> the page for a visitor of its own; nothing on it asks another host, or is missing or broken."""
    wrong: list[str] = []
    contexts = []

    def open_page(width: int = 1400, height: int = 1000):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(90_000)
        page.on(
            "request", lambda each: each.url.startswith((server.address, "data:", "blob:")) or wrong.append(each.url)
        )
        page.on("response", lambda each: each.status < 400 or wrong.append(f"{each.status} {each.url}"))
        page.on("pageerror", lambda each: wrong.append(str(each)))
        page.goto(server.address)
        page.wait_for_selector("#said")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def page(new_page):
    return new_page()


@pytest.fixture(scope="module")
def cells(real_data) -> list[Path]:
    return sorted((real_data("bccd") / "bccd" / "BCCD" / "JPEGImages").glob("*.jpg"))[:2]


def until(page, condition: str) -> None:
    """Wait until a condition holds; it is looked at ten times a second, also on a page that is not in front."""
    page.wait_for_function(condition, polling=100)


def give(page, path: Path, *words: str, part: str = "image") -> str:
    """Give a file; return what is said of it, once it has these words and, without an error, all numbers are there."""
    page.set_input_files(f"#{part} input[type=file]", str(path))
    return wait_said(page, path.name, *words)


def wait_said(page, *words: str) -> str:
    said = f"() => {json.dumps(words)}.every(word => document.querySelector('#said').innerText.includes(word))"
    until(page, said)
    if not page.locator("#said .wrong").count():
        until(page, READY)
    return page.inner_text("#said .said")


def choose(page, part: str, name: str) -> None:
    page.locator(f"#{part}").get_by_label(name, exact=True).check()


def set_slider(page, part: str, value: float) -> None:
    page.fill(f"#{part} input[type=number]", str(value))
    page.keyboard.press("Enter")


def rows_of(page) -> dict[str, list[str]]:
    """What the table of the networks has."""
    rows = page.locator("#summary tr").all()
    return {row.locator("th").first.inner_text(): row.locator("td").all_inner_texts() for row in rows}


def download(page, part: str) -> Path:
    with page.expect_download() as found:
        page.click(f"#{part}")
    return Path(found.value.path())


# In a browser


def test_boxes_slider_and_files_are_those_of_predict(page, cells):
    predictor = detection.load(SPIKING)
    expected = {score: predictor.predict(cells[0], score_threshold=score) for score in (0.3, 0.5)}
    assert len(expected[0.3]) > len(expected[0.5]) > 3
    assert str(expected[0.3]) in give(page, cells[0])
    assert rows_of(page)["found"] == [str(expected[0.3])]
    with record_layers(predictor.model) as measured:
        predictor.predict(cells[0])
    networks = energy(measured).networks
    assert rows_of(page)["energy of the operations"] == [format_energy(networks["spiking"].total_pj)]
    assert rows_of(page)["analogue twin's"][0].startswith(format_energy(networks["twin"].total_pj))
    assert rows_of(page)["8-bit twin's"][0].startswith(format_energy(networks["twin_int8"].total_pj))
    assert all(row[0].endswith(" ms") for name, row in rows_of(page).items() if name.startswith(("time", "from")))
    set_slider(page, "score", 0.5)
    wait_said(page, str(expected[0.5]))
    found = json.loads(download(page, "json").read_text())
    assert found["categories"] == [
        {"id": number + 1, "name": name} for number, name in enumerate(predictor.class_names)
    ]
    (image,), rows = found["images"], found["annotations"]
    assert (image["file_name"], image["width"], image["height"]) == (cells[0].name, 640, 480)
    keys = ("image_id", "category_id", "bbox", "score")
    assert [{key: row[key] for key in keys} for row in rows] == expected[0.5].to_results(1)
    assert np.array_equal(Image.open(download(page, "picture")).size, (640, 480))


def test_one_steps_through_the_stages(page, cells):
    def shown() -> str:
        return page.locator("#maps-first img").get_attribute("src")

    stages = page.locator("#stage label").all_inner_texts()
    assert stages[0] == "all stages" and {"c2", "c5", "neck c3"} < set(stages)
    seen = [shown()]
    for number in (1, 2):
        page.click("#next")
        until(page, f"document.querySelector('#maps-first img')?.getAttribute('src') !== '{seen[-1]}'")
        assert page.locator("#stage input:checked").get_attribute("value") == stages[number]
        seen.append(shown())
    page.locator("#back").press("Enter")
    until(page, f"document.querySelector('#maps-first img')?.getAttribute('src') !== '{seen[-1]}'")
    assert page.locator("#stage input:checked").get_attribute("value") == stages[1]
    page.get_by_role("tab", name="What it costs").click()
    layers = page.locator("#costs tbody tr").all_inner_texts()
    modules = detection.load(SPIKING).model.modules()
    assert len(layers) == sum(isinstance(module, nn.Conv2d | nn.Linear) for module in modules)
    assert all(network in page.inner_text("#costs") for network in ("analogue twin", "8-bit twin", "8-bit weights"))


def test_two_networks_side_by_side_and_noise(new_page, cells):
    page = new_page()
    give(page, cells[0])
    set_slider(page, "score", 0.5)
    page.click("#noise button")
    choose(page, "beside", ANALOGUE_HEAD)
    wait_said(page, "beside")
    clean = {name: detection.load(name).predict(cells[0], score_threshold=0.5) for name in (SPIKING, ANALOGUE_HEAD)}
    assert rows_of(page)["found"] == [str(each) for each in clean.values()]
    page.get_by_role("tab", name="Where it fires").click()
    page.wait_for_selector("#maps-second img")
    assert page.locator("#drawn-second img").is_visible() and page.locator("#maps-second img").is_visible()
    set_slider(page, "membrane", 0.4)
    until(page, "document.querySelector('#summary').innerText.includes('of these')")
    until(page, READY)
    found = []
    for name in clean:
        predictor = detection.load(name)
        with potential_noise(predictor.model, "membrane", 0.4, 0):
            found.append(str(predictor.predict(cells[0], score_threshold=0.5)))
    assert rows_of(page)["found"] == found != [str(each) for each in clean.values()]
    assert all("of the spikes vanish" in each for each in rows_of(page)["outputs that the noise flips"])


@pytest.mark.attempt("mutated images", 4)
def test_what_is_no_picture_gets_a_sentence(page, cells, tmp_path):
    page.reload()
    page.wait_for_selector("#said .said")
    (tmp_path / "notes.png").write_text("these are notes")
    said = give(page, tmp_path / "notes.png", "known format")
    assert said.startswith("notes.png: no image of a known format (allowed: JPEG")
    said = give(page, write_bomb(tmp_path / "bomb.png"), "pixels")
    assert re.fullmatch(r"bomb.png: more than [\d,]+ pixels", said)
    said = give(page, write_bomb(tmp_path / "large.png", 8_000), "pixels")
    assert said == "large.png: 8000x8000 pixels; at most 50,000,000 pixels are taken here"
    (tmp_path / "broken.mp4").write_bytes(b"no film" * 99)
    assert give(page, tmp_path / "broken.mp4", "video", part="film") == "broken.mp4: no readable video"
    assert str(detection.load(SPIKING).predict(cells[1], score_threshold=0.3)) in give(page, cells[1])


def test_a_film_has_a_progress_bar_and_can_be_stopped(page, tmp_path):
    page.set_input_files("#film input[type=file]", str(write_film(tmp_path / "film.mp4", 150)))
    until(page, "/\\d+\\/150 pictures/.test(document.body.innerText)")
    page.click("#stop")
    said = wait_said(page, "film.mp4", "stopped behind picture")
    number = int(re.search(r"picture (\d+)", said).group(1))
    assert 1 <= number < 150
    assert page.locator("#time input[type=range]").get_attribute("max") == str(max(number, 2))
    images = json.loads(download(page, "json").read_text())["images"]
    assert [image["frame"] for image in images] == list(range(number))


def test_a_recording_has_a_slider_over_time(page):
    choose(page, "network", "events_detector")
    page.locator("#recordings button").first.click()
    wait_said(page, "000001_td.dat", "5 detections")
    assert page.locator("#time input[type=range]").get_attribute("max") == "4"
    assert "one every 0.25 s" in page.inner_text("#time") and not page.locator("#image").is_visible()
    first = page.locator("#drawn-first img").get_attribute("src")
    page.locator("#time input[type=range]").press("ArrowRight")
    wait_said(page, "000001_td.dat, picture 2: 5 detections")
    assert page.locator("#drawn-first img").get_attribute("src") != first


@pytest.mark.attempt("names", 5)
def test_classes_have_bars_and_their_names_are_text(page, cells):
    choose(page, "network", CLASSES)
    page.wait_for_selector("#image", state="visible")
    top = detection.load(CLASSES).predict(cells[0]).top()
    said = give(page, cells[0])
    assert f"{top[0][0]} {top[0][1]:.3f}" in said
    bars = page.inner_text("#bars-first")
    assert all(name in bars and f"{100 * share:.0f}%" in bars for name, share in top)
    assert not page.locator("#score").is_visible() and page.inner_text("#json") == "Classes as JSON"
    choose(page, "network", "classifier")
    wait_said(page, *MARKUP)
    assert all(name in page.inner_text("#bars-first") and name in page.inner_text("#summary") for name in MARKUP)
    assert page.locator("#bars-first b, #summary b, #said b, #bars-first img, #summary img, #said img").count() == 0
    assert page.title() != "run"


def test_two_visitors_at_once_get_their_own_answers(page, new_page, cells):
    page.reload()
    page.wait_for_selector("#said .said")
    pages, expected = [page, new_page()], [detection.load(SPIKING).predict(path) for path in cells]
    assert str(expected[0]) != str(expected[1])
    for each, path in zip(pages, cells, strict=True):
        each.set_input_files("#image input[type=file]", str(path))
    for each, path, prediction in zip(pages, cells, expected, strict=True):
        assert str(prediction) in wait_said(each, path.name, "detections")
    found = [json.loads(download(each, "json").read_text())["annotations"] for each in pages]
    assert [len(rows) for rows in found] == [len(prediction) for prediction in expected]


def test_the_keyboard_reaches_everything_and_small_screens_show_it(page):
    wanted = ["network", "beside", "image", "examples", "film", "stop", "noise", "score", "json", "picture"]
    wanted += ["stage", "back", "next", "tab"]
    seen: list[str] = []
    page.evaluate("document.activeElement.blur()")
    for _ in range(60):
        page.keyboard.press("Tab")
        seen += page.evaluate(
            "(() => { const found = []; for (let e = document.activeElement; e; e = e.parentElement)"
            " { if (e.id) found.push(e.id); if (e.getAttribute('role') == 'tab') found.push('tab'); } return found })()"
        )
    assert [name for name in wanted if name not in seen] == []
    page.locator("#score input[type=range]").press("ArrowRight")
    wait_said(page, "detections")
    until(page, "document.querySelector('#score input[type=number]').value == '0.31'")
    for width in (1400, 800, 390):
        page.set_viewport_size({"width": width, "height": 1000})
        for tab in ("What it costs", "Where it fires"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            cut = "[...document.querySelectorAll('button, label, input, h1, p, img')].filter(each => "
            cut += "each.checkVisibility() && !each.closest('.scroll') && each.getBoundingClientRect().width > 1 && "
            cut += "(each.getBoundingClientRect().right > innerWidth + 1 || each.getBoundingClientRect().left < -1))"
            assert page.evaluate(f"{cut}.map(each => each.outerHTML.slice(0, 200))") == []
    if path := os.environ.get("WRITE_PICTURE"):  # docs/web.png
        page.set_viewport_size({"width": 1200, "height": 1300})
        page.evaluate("scrollTo(0, 0)")
        time.sleep(1)
        Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(192, dither=0).save(path, optimize=True)


# Its server


def ask(server, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, bytes, dict]:
    address = server.address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


@pytest.mark.attempt("foreign requests", 18)
def test_only_the_page_is_served(server, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    status, page, headers = ask(server, "GET", "/")
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert b"fonts.googleapis" not in page and b"cdnjs" not in page
    files = [secret, "/etc/passwd", Path(server.folder.name) / ".." / ".." / "etc" / "passwd", "http://127.0.0.1:1/x"]
    files += [Path(__file__), "detection/cli/web.py", f"{server.folder.name}/%2e%2e/%2e%2e/etc/passwd"]
    for file in files:
        assert ask(server, "GET", f"/gradio_api/file={file}")[0] == 404
    for path in (
        "/gradio_api/proxy=http://x/",
        "/gradio_api/runs",
        "/monitoring",
        "/docs",
        "/gradio_api/file/etc/passwd",
    ):
        assert ask(server, "GET", path)[0] == 404
    for path in (str(secret), "http://127.0.0.1:1/x.png"):
        data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}], "fn_index": 0, "session_hash": "x"}
        body = json.dumps(data)
        for route in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
            assert ask(server, "POST", route, body, content_type="application/json")[0] == 403
    assert ask(server, "GET", "/config", host="example.org")[0] == 421
    assert ask(server, "POST", "/gradio_api/queue/join", "{}", origin="http://example.org")[0] == 403


@pytest.mark.attempt("foreign requests", 2)
def test_uploads_are_limited(server):
    def upload(size: int) -> tuple[int, bytes]:
        begin = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = begin + bytes(size) + b"\r\n--x--\r\n"
        return ask(server, "POST", "/gradio_api/upload", body, content_type="multipart/form-data; boundary=x")[:2]

    assert upload(1000)[0] == 200 and upload(8 * 2**20 + 1000)[0] == 413
    assert upload(20 * 2**20) == (413, b'{"detail":"More than 8 MB are not taken here."}')


# Without either


def test_files_are_counted_while_others_are_removed(tmp_path):
    """As drawings of other visitors are while a file is uploaded."""
    (tmp_path / "kept").write_bytes(bytes(100))
    ended = threading.Event()

    def draw() -> None:
        while not ended.is_set():
            for number in range(20):
                (tmp_path / f"{number}").mkdir()
                (tmp_path / f"{number}" / "picture").touch()
            for number in range(20):
                shutil.rmtree(tmp_path / f"{number}")

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        gate, end = Gate(None, tmp_path, 1), time.monotonic() + 1
        while time.monotonic() < end:
            assert gate._stored() == 100
    finally:
        ended.set()
        thread.join()


def test_what_broken_uploads_leave_is_removed(tmp_path):
    gate, old = Gate(None, tmp_path, 1), time.time() - 4000
    for name, age in (("broken", old), ("under_way", time.time()), ("finished/a.png", old)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (age, age))
    assert [gate._stored(), gate._stored()] == [200, 200] and not (tmp_path / "broken").exists()
    assert gate._is_own(f"{tmp_path}/a") and not gate._is_own(f"{tmp_path}/a\0")
    assert not gate._is_own(f"{tmp_path}/../a") and not gate._is_own(f"{tmp_path}".replace("/", "%2F") + "%2Fc/../a")


def test_noise_on_the_page_is_that_of_robustness():
    network = Network(Run.open(SPIKING), SPIKING)
    model, task = network.predictor.model, network.predictor.task
    picture = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    answer = network.predict(picture, {"membrane": 0.0, "threshold": 0.4, "blur": 1.0, "jpeg": 50.0})
    changed = corrupt(corrupt(picture[None], "blur", 1.0), "jpeg", 50.0)
    with potential_noise(model, "threshold", 0.4, 0):
        expected = network.predictor.predict(changed[0], score_threshold=0.05)
    assert torch.equal(answer.prediction.boxes, expected.boxes)
    assert np.array_equal(answer.prediction.image, expected.image)
    assert torch.equal(answer.clean.scores, network.predictor.predict(picture, score_threshold=0.05).scores)
    network.explain(answer, picture)
    assert answer.activity[0] != answer.activity[1] and 0 < answer.flips[0] < 1
    assert task.time_steps == 1 and answer.left_out == {}
    both = [network.predict(picture, {"membrane": 0.8, "threshold": severity}) for severity in (0.8, 0.79)]
    for each in both:
        network.explain(each, picture)
    assert both[0].flips == pytest.approx(both[1].flips, rel=1e-6)  # one severity counts once


@pytest.fixture(scope="module")
def networks() -> list[Network]:
    return [Network(Run.open(CLASSES), name) for name in ("one", "two")]


def test_a_stopped_film_keeps_a_picture_of_every_network(networks, tmp_path):
    visit = Visit(tmp_path, lambda function: function())
    visit.give(Source(write_film(tmp_path / "film.mp4", 4), "film.mp4", 10**6))
    assert visit.ask(networks, {}, lambda done, of: visit.stopped.set() if done == 2 else None)
    written = json.loads(visit.write_json(networks[0], 0.3).read_text())
    assert len(written["images"]) == 2 and written["info"] == {"description": "predictions of one, last weights"}
    assert [len(visit.answers[network.name]) for network in networks] == [2, 1] and visit.length(networks) == 1


def test_nothing_is_shown_of_a_network_that_has_not_answered(networks, tmp_path):
    page = Page(networks, {network.name: [] for network in networks}, None, 10**6)
    page.build()
    visit = Visit(tmp_path, lambda function: function())
    visit.give(Source(write_film(tmp_path / "film.mp4", 2), "film.mp4", 10**6))
    visit.ask(networks[:1], {}, lambda done, of: None)
    values = {page.network: "one", page.beside: "two", page.time: 2, page.stage: "all stages"}
    for act in (page._move, partial(page._step, 1)):
        assert act(visit, values, None) == {} and visit.index == 0


def test_windows_of_another_length_are_no_picture_beside(networks):
    kinds = {"a": (True, 0.25), "b": (True, 0.1), "c": (True, 0.25), "d": (False, None)}
    page = SimpleNamespace(networks={key: SimpleNamespace(takes_events=e, window=w) for key, (e, w) in kinds.items()})
    assert [Page._others(page, name) for name in kinds] == [["none", "c"], ["none"], ["none", "a"], ["none"]]
    assert networks[0].window is None


def test_a_visit_that_has_ended_writes_no_file(tmp_path):
    visits = Visits(tmp_path, lambda function: function())
    visit = visits.of("one")
    visit._file("first.json").touch()
    visits.end("one")
    with pytest.raises(FileNotFoundError):
        visit._file("second.json")
    assert list(tmp_path.iterdir()) == []


def test_the_visit_that_makes_room_for_another_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("detection.web.visits.MOST_VISITS", 1)
    visits = Visits(tmp_path, lambda function: function())
    first, second = visits.of("first"), visits.of("second")
    assert first.stopped.is_set() and not first.folder.exists()
    assert not second.stopped.is_set() and second.folder.exists() and visits.of("second") is second


def test_a_file_that_is_given_while_another_fails_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("detection.web.page.forget_copies", lambda request: None)
    page, request = object.__new__(Page), SimpleNamespace(session_hash="one")
    page.visits, page.said, page._emptied = Visits(tmp_path, lambda function: function()), "said", dict
    begun, kept = threading.Event(), []

    def fail(visit, values, tell):
        begun.set()
        time.sleep(0.02)
        raise RuntimeError("not a picture")

    def take(visit, values, tell):
        visit.give(Source(tmp_path / "second.png", "second.png", 1))
        time.sleep(0.02)
        kept.append(visit.source is not None)

    for _ in range(5):
        begun.clear()
        first, second = (threading.Thread(target=page._handler(act), args=({}, request)) for act in (fail, take))
        first.start()
        begun.wait()
        second.start()
        first.join()
        second.join()
    assert kept == [True] * 5


def test_examples_of_an_events_classifier_are_of_its_evaluation_data(tmp_path):
    draw_classified(tmp_path / "data", num_train=4, num_val=4, size=32, seed=0)
    values = {"format": "events", "root": str(tmp_path / "data"), "val": "val"}
    config = parse_recipe({**NAMED, "data": values}, "test")
    found = examples_of(SimpleNamespace(run=SimpleNamespace(config=config)), tmp_path / "examples")
    assert len(found) == 4 and all(path.is_relative_to(tmp_path / "data" / "val") for path in found)


def test_the_command_says_what_is_wrong(capsys, monkeypatch):
    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["web", *arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "not a run folder" in call("nowhere")
    assert "--max-mb 0: expected 1 or more" in call(CLASSES, "--max-mb", "0")
    assert "a run is given twice" in call(CLASSES, CLASSES, "--port", "0")
    assert "not free here" in call(CLASSES, "--host", "203.0.113.7")
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert "pip install hoyer-det[web]" in call(CLASSES, "--port", "0")
    error = call(CLASSES, "--port", "0", "--host", "0.0.0.0")
    assert error.startswith("warning: --host 0.0.0.0 lets everybody who can reach this machine use the page")
