"""The report page: what is on it, that it stands alone, that it can be read and reached, and what bad input gives."""

import html
import json
import os
import re
import shutil
import subprocess
from itertools import pairwise

import pytest
import yaml
from helpers import run_tool
from report_pages import BOXES, C1, C1_TWIN, CIFAR, SECTIONS, Page, copy_run, last_line
from test_training import tiny_recipe

from backbones import zoo
from detection.analysis import analyze_run
from detection.report import write_report
from detection.runs import Run

NASTY = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run folder of a tiny training."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, "train_det", tiny_recipe(folder), "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def pages(finished, tmp_path_factory):
    """One page of each kind, by name."""
    folder = tmp_path_factory.mktemp("pages")
    nasty = copy_run(C1, folder / "nasty", classes=[NASTY, "WBC", "Platelets"])
    runs = {
        "tiny": [finished],
        "log": [C1],
        "comparison": [C1, C1_TWIN],
        "classifier": [CIFAR / "hoyer_seed0"],
        "nasty": [nasty],
    }
    for name, folders in runs.items():
        write_report(folders, folder / f"{name}.html", num_images=2, command=["python", "tools/report.py", NASTY])
    return {name: folder / f"{name}.html" for name in runs}


# What stands on a page


@pytest.mark.parametrize(("name", "folder"), [("log", C1), ("classifier", CIFAR / "hoyer_seed0")])
def test_headline_has_the_numbers_of_the_log(pages, name, folder):
    page, line = Page(pages[name]), last_line(folder)
    log = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(row["seconds"] + row.get("eval_seconds", 0.0) for row in log)
    metric = "AP50" if name == "log" else "top1"
    expected = {metric: line[metric], "activity": line["activity"], "seconds": pytest.approx(seconds)}
    analysis = folder / "analysis" / "analysis.json"
    if analysis.is_file():
        expected["energy"] = json.loads(analysis.read_text())["ratios"]["spiking/twin"]["operations"]
    assert page.values() == expected
    shown = {attributes["data-key"]: text for attributes, text in page.data}
    assert shown[metric] == f"{line[metric]:.3f}"
    assert shown["activity"] == f"{100 * line['activity']:.1f} %"


def test_comparison_has_the_numbers_of_each_log_and_the_gaps(pages):
    page = Page(pages["comparison"])
    first, second = last_line(C1), last_line(C1_TWIN)
    for key, line in (("run1", first), ("run2", second)):
        values = page.values(run=key)
        assert {name: values[name] for name in ("AP50", "AP", "AP75")} == {
            name: line[name] for name in ("AP50", "AP", "AP75")
        }
    assert f"{second['AP50'] - first['AP50']:+.3f}" in page.words_of
    assert "model.backbone.activation" in page.words_of.split("Differences of the recipes")[1].split("Recipe")[0]
    assert {f"run{run}-{section}" for run in (1, 2) for section in SECTIONS | BOXES} < set(page.ids)


@pytest.mark.parametrize("name", ["tiny", "log", "classifier"])
def test_every_section_is_there_and_in_the_contents(pages, name):
    page = Page(pages[name])
    expected = {f"run1-{section}" for section in SECTIONS | (set() if name == "classifier" else BOXES)}
    assert expected == {each for each in page.ids if each.startswith("run1-")}
    assert {f"#{each}" for each in expected} < {link["href"] for link in page.find("a")}


def test_page_of_a_whole_run_leaves_nothing_out(pages, finished):
    page, line = Page(pages["tiny"]), last_line(finished)
    assert "Left out" not in page.words_of and "is left out" not in page.words_of
    assert {key: page.values()[key] for key in ("AP50", "activity")} == {
        "AP50": line["AP50"],
        "activity": line["activity"],
    }
    assert 0 < page.values()["energy"] < 1
    assert "equal to the log in every digit" in page.words_of
    assert "in the folder, equal" in page.words_of
    for digest in Run.open(finished).checksums().values():
        assert digest in page.words_of
    pictures = [image["href"] for image in page.find("image")]
    titles = re.findall(r"<title>(detection, (?:right|wrong)|true box, (?:found|missed)): ([^<]+)</title>", page.text)
    assert len(titles) >= 4 and any(
        name in title for _, title in titles for name in Run.open(finished).config.data.classes
    )
    assert len(pictures) == 4 and all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    scores = [float(score) for score in re.findall(r": F1 ([\d.]+),", page.words_of)]
    assert scores[0] >= scores[1] >= scores[3] >= scores[2]  # the best first, then the worst first
    assert len(page.find("img")) == 4 * 5  # the spike maps of each: c2 to c4, and what enters the neck
    assert len(page.text) < 3e6


def test_energy_and_certificate_are_those_of_the_analysis(pages, finished):
    analysis = analyze_run(finished).to_dict()
    page = Page(pages["tiny"])
    assert page.values()["energy"] == analysis["ratios"]["spiking/twin"]["operations"]
    for exception in analysis["certificate"]["exceptions"]:
        assert exception["layer"] in page.words_of
    assert f"{analysis['certificate']['num_binary']} layers saw 0 and 1 only" in page.words_of


def test_stored_analysis_is_taken_if_it_is_newer_than_the_weights_and_of_the_same(finished, tmp_path):
    run = copy_run(finished, tmp_path / "run")
    analyze_run(finished).save(run / "analysis")
    path = run / "analysis" / "analysis.json"
    stored = json.loads(path.read_text())
    stored["ratios"]["spiking/twin"]["operations"] = 0.123456
    path.write_text(json.dumps(stored))
    page = Page(write_report([run]))  # no weights: all that can be said stands in the analysis
    assert page.values()["energy"] == 0.123456
    assert page.words_of.count("The weights, last.safetensors, are not in the run folder.") == 2  # curves, images
    assert "energy" not in Page(write_report([run], weights="best")).values()
    shutil.copy(finished / "last.safetensors", run)
    os.utime(run / "last.safetensors", (path.stat().st_mtime + 10,) * 2)
    assert Page(write_report([run])).values()["energy"] != 0.123456
    stored.pop("ratios")  # as of another version
    path.write_text(json.dumps(stored))
    os.utime(path, (path.stat().st_mtime + 20,) * 2)
    assert Page(write_report([run])).values()["energy"] != 0.123456
    path.write_text("{")
    os.utime(run / "last.safetensors", (path.stat().st_mtime - 10,) * 2)
    with pytest.raises(ValueError, match=r"analysis\.json: damaged .*; remove it"):
        write_report([run])


def test_classifier_with_weights_and_data_shows_what_it_takes_for_what(tmp_path, monkeypatch):
    recipe = {
        "task": "classification",
        "model": {"backbone": {"name": "vgg11", "width": 0.125, "stem": "cifar"}},
        "data": {"format": "synthetic", "size": 32, "num_train": 32, "num_val": 24},
        "train": {"epochs": 1, "batch_size": 16},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_tool(monkeypatch, "train_cls", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    run_tool(monkeypatch, "report", tmp_path / "run")
    page, line = Page(tmp_path / "run" / "report.html"), last_line(tmp_path / "run")
    assert page.values()["top1"] == line["top1"]
    assert "top1, top5 equal to the log in every digit" in page.words_of
    wrong = round(24 * (1 - line["top1"]))
    mistake = r'<th scope="row">(\w+)</th>\s*<td>(\w+)</td>\s*<td class="n" data-value="(\d+)">\3</td>'
    rows = re.findall(mistake, page.text)
    assert sum(int(number) for *_, number in rows) == wrong > 0
    assert all(truth != answer for truth, answer, _ in rows)
    assert "Left out" not in page.words_of


def test_unfinished_runs_say_how_far_they_are(tmp_path):
    page = Page(write_report([copy_run(C1, tmp_path / "three", num_lines=3)]))
    assert "The training has not gone to its end: 3 of 40 epochs are logged." in page.words_of
    assert "epoch 2 of 40" not in page.words_of or page.values()["AP50"]
    page = Page(write_report([copy_run(C1, tmp_path / "one", num_lines=1)]))  # not evaluated yet
    assert "No epoch has been evaluated yet." in page.words_of
    assert page.values().keys() == {"seconds"}


def test_runs_of_other_precision_stand_side_by_side(finished, tmp_path):
    other = tmp_path / "bf16"
    shutil.copytree(finished, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["train"]["precision"] = "bf16"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report([finished, other], tmp_path / "page.html", num_images=0))
    assert page.words_of.count("Evaluated again for this page") == 2
    assert page.values(run="run1")["energy"] > 0 and page.values(run="run2")["energy"] > 0
    assert "could not be computed" not in page.words_of
    assert page.words_of.count("No images were asked for") == 2


# A page that stands alone and can be read


@pytest.mark.parametrize("name", ["tiny", "log", "comparison", "classifier", "nasty"])
def test_page_is_valid_and_needs_nothing_else(pages, name):
    page = Page(pages[name])
    assert page.wrong == []
    assert len(set(page.ids)) == len(page.ids)
    for _, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(key) or ""
            assert value.startswith(("data:", "#")) or not value, (key, value[:80])
        assert not any(key.startswith("on") for key in attributes)
    targets = [link["href"].removeprefix("#") for link in page.find("a")]
    assert set(targets) <= set(page.ids)
    assert not re.search(r"url\(|@import|https?://", page.text.split("</style>")[0])
    policy = next(meta["content"] for meta in page.find("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    assert page.text.lstrip().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("name", ["tiny", "log", "comparison", "classifier", "nasty"])
def test_page_can_be_read_by_everybody(pages, name):
    page = Page(pages[name])
    assert page.find("html") == [{"lang": "en"}]
    assert len(page.find("h1")) == len(page.find("main")) == page.text.split("</head>")[0].count("<title>") == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    first_link = page.find("a")[0]
    assert first_link["class"] == "skip" and first_link["href"].removeprefix("#") in page.ids
    assert all(image["alt"] for image in page.find("img"))
    pictures = [svg for svg in page.find("svg") if svg.get("aria-hidden") != "true"]
    assert pictures and all(svg["role"] == "img" and svg["aria-label"] for svg in pictures)
    regions = [attributes for _, attributes in page.elements if "scroll" in (attributes.get("class") or "").split()]
    assert regions and all(each["role"] == "region" and each["tabindex"] == "0" for each in regions)
    labels = [each["aria-label"] for each in regions]
    assert all(labels) and len(set(labels)) == len(labels)
    assert (
        "@media print" in page.text
        and ":focus-visible" in page.text
        and "outline: none" not in page.text.replace("section:focus, main:focus { outline: none; }", "")
    )
    names = [tag for tag, _ in page.elements]
    assert all(names[index + 1] == "summary" for index, tag in enumerate(names) if tag == "details")
    assert all(cell.get("scope") in ("row", "col") for cell in page.find("th"))


def test_names_paths_and_commands_are_text_and_nothing_else(pages, attempt):
    with attempt("names", 2):
        page = Page(pages["nasty"])
        assert len(page.find("script")) == 1  # the page's own
        assert html.escape(NASTY, quote=False).split("(")[0] in page.text.replace("&#39;", "'")
        assert page.words_of.count(NASTY) >= 4  # class table, data root in headline and recipe, command


def colours(text: str) -> list[tuple[str, dict[str, str], list[tuple[str, dict[str, str]]]]]:
    """(scheme, custom properties, rules) of a page's style, for light and for dark."""
    css = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    dark = re.search(r"@media screen and \(prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", css, re.S).group(1)
    light = re.search(r":root \{(.*?)\}", css, re.S).group(1)
    rules = [
        (selector.strip(), dict(re.findall(r"([\w-]+):\s*([^;]+)", body)))
        for selector, body in re.findall(r"([^{}@]+)\{([^{}]*)\}", css)
        if ":root" not in selector
    ]
    properties = dict(re.findall(r"(--[\w-]+):\s*(#\w+)", light))
    changed = dict(re.findall(r"(--[\w-]+):\s*(#\w+)", dark))
    assert changed.keys() == properties.keys()
    return [("light", properties, rules), ("dark", changed, rules)]


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_text_and_bars(pages):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    num_texts = num_bars = 0
    for scheme, properties, rules in colours(pages["tiny"].read_text()):

        def resolve(value: str, properties=properties) -> str | None:
            name = re.search(r"var\((--[\w-]+)\)", value)
            found = properties.get(name.group(1)) if name else value.strip()
            return found if found and re.fullmatch("#[0-9a-f]{6}", found) else None

        surfaces = [properties[f"--{name}"] for name in ("page", "card", "sunken")]
        for selector, style in rules:
            own = resolve(style.get("background", ""))
            text = resolve(style.get("color", ""))
            if text and ".fill" in selector:
                assert contrast(text, properties["--card"]) >= 3, (scheme, selector, text)
                num_bars += 1
            elif text:
                for surface in [own] if own else surfaces:
                    assert contrast(text, surface) >= 4.5, (scheme, selector, text, surface)
                num_texts += 1
    assert num_texts >= 20 and num_bars == 6


# In a browser

PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll("details").forEach((each) => (each.open = true));
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [];
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest("script, title, .tag-text")) continue;
    let ground = element;
    while (ground && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
    const style = getComputedStyle(element);
    const pair = [element.closest("svg") ? style.fill : style.color, getComputedStyle(ground).backgroundColor];
    const [low, high] = pair.map(luminance).sort((a, b) => a - b);
    texts += 1;
    if ((high + 0.05) / (low + 0.05) < 4.5) faint.push([node.textContent.trim().slice(0, 30), ...pair]);
  }
  const focusable = [...document.querySelectorAll("a, button, summary, .scroll")];
  const lost = focusable.filter((each) => (each.focus(), document.activeElement !== each || each.tabIndex < 0));
  const scrolling = [...document.querySelectorAll("main *")].filter((each) => {
    const style = getComputedStyle(each);
    return /auto|scroll/.test(style.overflowX + style.overflowY) &&
      (each.scrollWidth > each.clientWidth || each.scrollHeight > each.clientHeight);
  });
  const head = document.querySelector("table.sortable th:nth-child(2) button");
  const rows = () => [...head.closest("table").tBodies[0].rows];
  const column = () => rows().map((row) => row.cells[1].dataset.value ?? "");
  const orders = [];
  if (head) { head.click(); orders.push(column()); head.click(); orders.push(column()); }
  parent.postMessage({
    name: document.currentName, scrollWidth: document.documentElement.scrollWidth, innerWidth, errors, faint, texts,
    focusable: focusable.length, lost: lost.map((each) => each.outerHTML.slice(0, 80)), scrolling: scrolling.length,
    unreachable: scrolling.filter((each) => each.tabIndex < 0).map((each) => each.outerHTML.slice(0, 80)), orders,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    smallest: Math.min(...[...document.querySelectorAll("figure svg text")]
      .map((text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)),
  }, "*");
}, 50));
</script>"""


@pytest.fixture(scope="module")
def chromium():
    """The browser's command; skips without one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on the PATH")
    return found


def test_in_a_browser_at_two_widths_and_in_both_schemes(pages, chromium, tmp_path):
    frames = ""
    for name, page in pages.items():
        probed = page.read_text().replace(
            "</body>", PROBE.replace("document.currentName", json.dumps(name)) + "</body>"
        )
        (tmp_path / f"{name}.html").write_text(probed)
        frames += "".join(
            f'<iframe src="{name}.html" style="width:{width}px;height:800px;border:0"></iframe>'
            for width in (1280, 390)
        )
    (tmp_path / "frames.html").write_text(
        "<!DOCTYPE html><title>frames</title><pre id='out'></pre><script>"
        "addEventListener('message', (event) => {"
        "document.getElementById('out').textContent += JSON.stringify(event.data) + '\\n'; });"
        f"</script>{frames}"
    )
    for scheme in ("0", "1"):  # dark, light
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / scheme}", f"--blink-settings=preferredColorScheme={scheme}"),
            *("--virtual-time-budget=4000", "--dump-dom", (tmp_path / "frames.html").as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        lines = html.unescape(re.search(r"<pre id=.out.>(.*?)</pre>", done.stdout, re.S).group(1)).splitlines()
        found = [json.loads(line) for line in lines]
        assert sorted((each["name"], each["innerWidth"]) for each in found) == sorted(
            (name, width) for name in pages for width in (1280, 390)
        )
        for each in found:
            where = (each["name"], each["innerWidth"], scheme)
            assert each["scrollWidth"] <= each["innerWidth"], where
            assert each["dark"] == (scheme == "0")
            assert each["errors"] == each["faint"] == each["lost"] == each["unreachable"] == [], where
            assert each["texts"] > 100 and each["focusable"] > 20, where
            assert each["smallest"] >= 9, where  # pixels of the letters in charts
            if each["innerWidth"] == 390:
                assert each["scrolling"] > 3, where  # wide tables, each in its own container
            if each["name"] == "tiny":
                down, up = ([float(value) for value in order] for order in each["orders"])
                assert down == sorted(down, reverse=True) and up == sorted(up)


# Bad input


def refused(monkeypatch, capsys, *arguments) -> str:
    """What the tool says on standard error when it refuses."""
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "report", *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_bad_runs_are_refused_by_name(monkeypatch, capsys, tmp_path):
    with pytest.raises(FileNotFoundError, match="none is not a run folder"):
        write_report([tmp_path / "none"])
    assert f"{tmp_path / 'none'} is not a run folder" in refused(monkeypatch, capsys, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} is not a run folder" in refused(monkeypatch, capsys, tmp_path / "empty")
    run = copy_run(C1, tmp_path / "run", num_lines=0)
    assert "has not finished its first epoch" in refused(monkeypatch, capsys, run)
    (run / "metrics.jsonl").unlink()
    assert "has not finished its first epoch" in refused(monkeypatch, capsys, run)
    line = json.dumps({"epoch": 1, "loss": 1.0, "seconds": 1.0})
    (run / "metrics.jsonl").write_text(f"{line}\n{line[:20]}\n")
    assert f"{run / 'metrics.jsonl'}, line 2: damaged" in refused(monkeypatch, capsys, run)
    (run / "metrics.jsonl").write_text(f'{line}\n{{"loss": 1}}\n')
    assert f"{run / 'metrics.jsonl'}, line 2: damaged" in refused(monkeypatch, capsys, run)
    (run / "metrics.jsonl").write_text(f"{line}\n")
    (run / "run.json").unlink()
    assert f"{run / 'run.json'}: no such file" in refused(monkeypatch, capsys, run)
    assert f"{C1}: given twice" in refused(monkeypatch, capsys, C1, C1)
    entry = zoo.find("scenes_retinanet_resnet18")  # by its place and by its name
    assert f"{entry}: given twice" in refused(monkeypatch, capsys, f"zoo:{entry.name}", entry)
    assert "detection and of classification" in refused(
        monkeypatch, capsys, C1, CIFAR / "hoyer_seed0", "--out", tmp_path / "page.html"
    )
    assert "no such weights as ema" in refused(monkeypatch, capsys, C1, "--weights", "ema")
    assert "--images -1: expected 0 or more" in refused(monkeypatch, capsys, C1, "--images", "-1")
    assert not list(tmp_path.rglob("*.html"))


def test_out_is_checked_and_only_a_report_is_replaced(monkeypatch, capsys, tmp_path):
    missing = tmp_path / "no" / "page.html"
    assert f"there is no folder {missing.parent}" in refused(monkeypatch, capsys, C1, "--out", missing)
    assert "a folder; name an HTML file" in refused(monkeypatch, capsys, C1, "--out", tmp_path)
    mine = tmp_path / "mine.html"
    mine.write_text("my own page")
    assert "is no report page" in refused(monkeypatch, capsys, C1, "--out", mine)
    assert mine.read_text() == "my own page"
    page = tmp_path / "page.html"
    run_tool(monkeypatch, "report", C1, "--out", page)
    run_tool(monkeypatch, "report", C1_TWIN, "--out", page)
    assert C1_TWIN.name in Page(page).words_of
    assert f"{page}: 0." in capsys.readouterr().out


def test_data_that_are_not_there_are_said_on_the_page_or_refused_if_asked_for(finished, monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"format": "voc", "root": str(tmp_path / "gone"), "train": ["A/train"], "val": ["A/val"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    run_tool(monkeypatch, "report", run)
    page = Page(run / "report.html")
    assert page.words_of.count("Left out. It could not be computed:") >= 3
    assert str(tmp_path / "gone") in page.words_of
    assert page.values()["AP50"] == last_line(run)["AP50"]
    where = tmp_path / "elsewhere"
    assert str(where) in refused(monkeypatch, capsys, run, "--data.root", where)
    run_tool(monkeypatch, "report", run, "--log-only")
    assert "This page was made from the log alone." in Page(run / "report.html").words_of
