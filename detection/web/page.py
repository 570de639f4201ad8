"""The page: what stands on it, and what happens when a visitor does something."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from detection.cli.common import explain
from detection.files import EVENT_SUFFIXES, is_recording
from detection.robustness import SEVERITIES, UNITS
from detection.sources import VIDEO_EXTENSIONS
from detection.web.answers import LOWEST, NOISES, Network
from detection.web.sources import Source
from detection.web.tables import costs, sentence, summary
from detection.web.visits import ALL_STAGES, Tell, Visit, Visits

TITLE = "hoyer-det: networks at work"
SCORE = 0.3
NOBODY = "none"
GREETING = "Give the network a picture: choose a file, paste one, use the camera, or take an example."
COPIES = 100  # of components, per visitor
BUSY = "The network looks at it."
Values = Mapping[Any, Any]
Updates = dict[Any, Any]

# What a visitor gives as the file that it is, for `read_image`, which refuses in a sentence what Gradio would stumble
# over. Not by a subclass: Gradio writes a .pyi file beside the source of one.
gr.Image.preprocess = lambda self, payload: None if payload is None else payload.path
Act = Callable[[Visit, Values, Tell], Updates]


CSS = (Path(__file__).parents[1] / "templates" / "web.css").read_text(encoding="utf-8")


def theme() -> gr.Theme:
    """Return the colours and letters of the page, of which none comes from elsewhere."""
    letters = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    digits = ["ui-monospace", "Menlo", "Consolas", "Liberation Mono", "monospace"]
    found = gr.themes.Default(primary_hue="teal", font=letters, font_mono=digits)
    readable = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "block_title_text_color")
    return found.set(**dict.fromkeys(readable, "*neutral_600"), **{f"{key}_dark": "*neutral_300" for key in readable})


class Page:
    """The page over some networks.

    Args:
        networks: at least one.
        examples: files for each network, by its name.
        visits: who is there.
        most_pixels: of a picture.
    """

    def __init__(
        self, networks: Sequence[Network], examples: Mapping[str, Sequence[Path]], visits: Visits, most_pixels: int
    ) -> None:
        self.networks = {network.name: network for network in networks}
        self.examples, self.visits, self.most_pixels = examples, visits, most_pixels

    def build(self) -> gr.Blocks:
        """Return the page, ready to be served."""
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as blocks:
            gr.HTML('<h1>hoyer-det</h1><p class="lead">Trained networks at work on a picture of yours.</p>')
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=300):
                    self._lay_out_inputs()
                with gr.Column(scale=5, min_width=300):
                    self._lay_out_answers()
            self._connect()
            blocks.load(self._begin, None, [self.beside], show_progress="hidden")
            blocks.unload(self._leave)
        blocks.queue(max_size=32, default_concurrency_limit=4)
        return blocks

    # What stands on it

    def _lay_out_inputs(self) -> None:
        first = next(iter(self.networks.values()))
        names, files = list(self.networks), self.examples[first.name]
        # Not a dropdown: that of Gradio stays open over the page when the keyboard leaves it.
        self.network = gr.Radio(names, value=first.name, label="network", elem_id="network")
        self.beside = gr.Radio([NOBODY], value=NOBODY, label="beside it", elem_id="beside", visible=len(names) > 1)
        with gr.Column(visible=not first.takes_events) as self.image_part:
            sources = ["upload", "clipboard", "webcam"]
            self.image = gr.Image(
                type="filepath", sources=sources, label="picture", elem_id="image", buttons=[], height=260
            )
            samples = [] if first.takes_events else [[str(path)] for path in files]
            still = gr.Image(render=False)
            self.pictures = gr.Dataset(
                components=[still], samples=samples, type="index", label="examples", elem_id="examples"
            )
        suffixes = [*VIDEO_EXTENSIONS, *EVENT_SUFFIXES]
        self.pictures.keep_in_cache |= {str(path) for paths in self.examples.values() for path in paths}
        self.film = gr.File(file_types=suffixes, label="film, or recording of events", elem_id="film", height=160)
        samples = [[path.name] for path in files] if first.takes_events else []
        self.recordings = gr.Dataset(
            components=[gr.Textbox(render=False)],
            samples=samples,
            type="index",
            label="examples of recordings",
            elem_id="recordings",
            visible=first.takes_events,
        )
        self.stop = gr.Button("Stop the film", elem_id="stop", size="sm")
        with gr.Accordion("Noise, as hoyer-det robustness makes it", open=False, elem_id="noise"):
            self.noises = {
                kind: gr.Slider(0, SEVERITIES[kind][-1], 0, label=name, info=UNITS[kind], elem_id=kind)
                for kind, name in NOISES.items()
            }

    def _lay_out_answers(self) -> None:
        self.said = gr.HTML(sentence(GREETING), elem_id="said", padding=False)
        self.drawn, self.bars, self.maps = [], [], []
        picture = {"buttons": ["fullscreen"], "interactive": False}
        with gr.Row():
            for side in ("first", "second"):
                with gr.Column(min_width=280, visible=side == "first", elem_classes="side") as column:
                    shown = gr.Image(label="found", elem_id=f"drawn-{side}", elem_classes="drawn", **picture)
                    bars = gr.Label(num_top_classes=5, label="classes", elem_id=f"bars-{side}", visible=False)
                self.drawn.append(shown)
                self.bars.append(bars)
            self.second = column
        self.score = gr.Slider(LOWEST, 0.95, SCORE, step=0.01, label="boxes with a score above", elem_id="score")
        self.time = gr.Slider(1, 2, 1, step=1, label="picture of the film", elem_id="time", visible=False)
        self.table = gr.HTML(
            summary(dict.fromkeys([next(iter(self.networks))]), SCORE), elem_id="summary", padding=False
        )
        with gr.Row():
            self.json = gr.DownloadButton("Boxes as COCO JSON", elem_id="json", size="md", interactive=False)
            self.file = gr.DownloadButton("Picture", elem_id="picture", size="md", interactive=False)
        with gr.Tabs():
            with gr.Tab("Where it fires"):
                self.stage = gr.Radio([ALL_STAGES], value=ALL_STAGES, label="stage", elem_id="stage")
                with gr.Row():
                    self.back = gr.Button("Stage before", size="sm", elem_id="back")
                    self.on = gr.Button("Next stage", size="sm", elem_id="next")
                for side in ("first", "second"):
                    place = {"elem_id": f"maps-{side}", "elem_classes": ["drawn", "maps"]}
                    self.maps.append(gr.Image(label="spikes", visible=side == "first", **place, **picture))
            with gr.Tab("What it costs"):
                self.costs = gr.HTML(elem_id="costs", padding=False)

    def _connect(self) -> None:
        settings = [self.network, self.beside, self.score, self.stage, self.time, *self.noises.values()]
        self.all_settings = set(settings)
        self.everything = [
            *settings, self.image, self.image_part, self.pictures, self.film, self.recordings, self.said, self.second,
            *self.drawn, *self.bars, *self.maps, self.table, self.json, self.file, self.costs,
        ]  # fmt: skip

        ask = {"concurrency_id": "ask", "concurrency_limit": 4}
        always_last = {"trigger_mode": "always_last"}

        def on(event: Callable[..., Any], act: Act, *more: Any, explain: bool = True, **options: Any) -> None:
            inputs = {*self.all_settings, *more}
            options = {"show_progress_on": self.drawn, **options} if explain else {"show_progress": "hidden", **options}
            if more:  # something new: what was said of the last thing is over
                event = event(lambda: sentence(BUSY), None, self.said, queue=False, show_progress="hidden").then
            done = event(self._handler(act), inputs, self.everything, **options)
            if explain:
                more_of_it = self._handler(self._explain)
                done.then(more_of_it, self.all_settings, self.everything, show_progress="hidden", **always_last, **ask)

        on(self.image.input, self._give_image, self.image, **ask)
        on(self.film.upload, self._give_film, self.film, **ask)
        for part in (self.image, self.film):
            on(part.clear, self._clear, explain=False)
        for part in (self.pictures, self.recordings):
            on(part.click, partial(self._give_example, part), part, **ask)
        for part in (self.network, self.beside):
            on(part.input, self._choose, **ask)
        on(partial(gr.on, [slider.change for slider in self.noises.values()]), self._ask, **always_last, **ask)
        on(self.time.input, self._move, **always_last, **ask)
        on(self.score.input, self._show, explain=False, **always_last)
        on(self.stage.input, self._show_maps, explain=False, **always_last)
        for button, by in ((self.back, -1), (self.on, 1)):
            on(button.click, partial(self._step, by), explain=False)
        self.stop.click(self._stop, queue=False)

    # What happens. Changes are `gr.update`: a component that is made here would stay with the visitor.

    def _handler(self, act: Act) -> Callable[..., Updates]:
        """Return what Gradio calls: an error becomes a sentence on the page."""

        def call(values: dict, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Updates:  # noqa: B008
            visit = self.visits.of(request.session_hash)
            forget_copies(request)
            tell = lambda done, of: progress((done, of or None), unit="pictures")  # noqa: E731
            with visit.lock:  # until the end: the next file that is given waits for it
                try:
                    return act(visit, values, tell) or {self.said: gr.skip()}
                except Exception as error:
                    words = _in_words(error, visit.source)
                    visit.give(None)
                    return self._emptied() | {self.said: sentence(words, wrong=True)}

        return call

    def _chosen(self, values: Values) -> list[Network]:
        names = dict.fromkeys((values[self.network], values[self.beside]))
        return [self.networks[name] for name in names if name in self.networks]

    def _begin(self) -> Updates:
        first = next(iter(self.networks))
        return {self.beside: gr.update(choices=self._others(first), value=NOBODY)}

    def _others(self, name: str) -> list[str]:
        """Return the networks that take what a network takes."""
        takes = {key: (each.takes_events, each.window) for key, each in self.networks.items()}
        return [NOBODY, *(key for key in takes if key != name and takes[key] == takes[name])]

    def _give_image(self, visit: Visit, values: Values, tell: Tell) -> Updates:
        if values[self.image] is None:
            return self._clear(visit, values, tell)
        return {self.film: None, **self._give(visit, values, tell, Path(values[self.image]))}

    def _give_film(self, visit: Visit, values: Values, tell: Tell) -> Updates:
        return {self.image: None, **self._give(visit, values, tell, Path(values[self.film]))}

    def _give_example(self, part: gr.Dataset, visit: Visit, values: Values, tell: Tell) -> Updates:
        path = self.examples[values[self.network]][int(values[part])]
        shown = {self.image: str(path), self.film: None} if part is self.pictures else {self.image: None}
        return {**shown, **self._give(visit, values, tell, path)}

    def _give(self, visit: Visit, values: Values, tell: Tell, path: Path) -> Updates:
        visit.give(Source(path, path.name, self.most_pixels))
        return self._ask(visit, values, tell)

    def _clear(self, visit: Visit, values: Values, tell: Tell) -> Updates:
        visit.give(None)
        return self._emptied() | {self.said: sentence(GREETING)}

    def _choose(self, visit: Visit, values: Values, tell: Tell) -> Updates:
        """Show what belongs to the chosen networks, and ask them."""
        name, updates = values[self.network], {}
        network, others = self.networks[name], self._others(name)
        beside = values[self.beside] if values[self.beside] in others else NOBODY
        samples = [[str(path)] for path in self.examples[name]]
        updates[self.beside] = gr.update(choices=others, value=beside)
        updates[self.image_part] = gr.update(visible=not network.takes_events)
        updates[self.pictures] = gr.update(samples=[] if network.takes_events else samples)
        names = [[path.name] for path in self.examples[name]]
        updates[self.recordings] = gr.update(samples=names, visible=network.takes_events)
        updates[self.second] = gr.update(visible=beside != NOBODY)
        if visit.source is not None and is_recording(visit.source.path) != network.takes_events:
            visit.give(None)  # of the other kind
            updates |= self._emptied()
        return {**updates, **self._ask(visit, {**values, self.beside: beside}, tell)}

    def _ask(self, visit: Visit, values: Values, tell: Tell) -> Updates:
        """Ask the chosen networks about what was given, and show the answers."""
        if visit.source is None:
            return {self.said: sentence(GREETING)}
        networks = self._chosen(values)
        stopped = visit.ask(networks, {kind: values[slider] for kind, slider in self.noises.items()}, tell)
        number = visit.length(networks)
        long = visit.source.is_long(networks[0].predictor.task)
        name = f"picture, one every {visit.source.seconds(networks[0].predictor.task):.3g} s" if long else ""
        shown = self._show(visit, values, tell)
        words = visit.source.name + (f", stopped behind picture {number}" if stopped else "")
        return shown | {
            self.time: gr.update(minimum=1, maximum=max(2, number), value=visit.index + 1, label=name, visible=long),
            self.said: sentence(f"{words}; {self._found(visit, networks, values[self.score])}."),
        }

    def _move(self, visit: Visit, values: Values, tell: Tell) -> Updates:
        networks = self._chosen(values)
        if not visit.has_answers(networks):
            return {}
        visit.index = min(int(values[self.time]), visit.length(networks)) - 1
        return self._show(visit, values, tell)

    def _found(self, visit: Visit, networks: Sequence[Network], score: float) -> str:
        found = [visit.answer(network).prediction.above(score) for network in networks]
        return " beside ".join(str(each) for each in found)

    def _show(self, visit: Visit, values: Values, tell: Tell) -> Updates:
        """Show the answers that are there already, at the score of the slider."""
        networks, score = self._chosen(values), values[self.score]
        if not visit.has_answers(networks):
            return {}
        paths = [visit.work(partial(visit.draw, network, score)) for network in networks]
        answers = {network.name: visit.answer(network) for network in networks}
        updates: Updates = {self.score: gr.update(visible=any(network.has_boxes for network in networks))}
        for index, network in enumerate(networks):
            top = answers[network.name].prediction.top()
            updates[self.drawn[index]] = gr.update(value=str(paths[index]), label=network.name)
            updates[self.bars[index]] = gr.update(
                value=dict(top) or None, visible=bool(top), label=f"classes, {network.name}"
            )
        updates[self.table] = summary(answers, score)
        words = "Boxes as COCO JSON" if networks[0].has_boxes else "Classes as JSON"
        file = str(visit.write_json(networks[0], score))
        updates[self.json] = gr.update(label=words, value=file, interactive=True)
        updates[self.file] = gr.update(value=str(paths[0]), interactive=True)
        words = f"{visit.source.name}, picture {visit.index + 1}: {self._found(visit, networks, score)}."
        return updates | {self.second: gr.update(visible=len(networks) > 1), self.said: sentence(words)}

    def _explain(self, visit: Visit, values: Values, tell: Tell) -> Updates:
        """Show what takes longer: where the networks fire, and what the picture costs."""
        networks = self._chosen(values)
        if not visit.has_answers(networks):
            return {}
        answers = {network.name: visit.work(partial(visit.explain, network)) for network in networks}
        updates: Updates = {self.table: summary(answers, values[self.score]), self.costs: costs(answers)}
        stages = self._stages(visit, values)
        stage = values[self.stage] if values[self.stage] in stages else ALL_STAGES
        updates[self.stage] = gr.update(choices=stages, value=stage)
        return updates | self._show_maps(visit, {**values, self.stage: stage}, tell)

    def _stages(self, visit: Visit, values: Values) -> list[str]:
        answers = [visit.answer(network) for network in self._chosen(values)]
        return [ALL_STAGES, *dict.fromkeys(each.name for answer in answers for each in answer.maps)]

    def _show_maps(self, visit: Visit, values: Values, tell: Tell) -> Updates:
        networks = self._chosen(values)
        if not visit.has_answers(networks):
            return {}
        updates: Updates = {}
        for index, network in enumerate(networks):
            path = visit.work(partial(visit.draw_maps, network, values[self.stage]))
            label = f"{values[self.stage]}, {network.name}"
            updates[self.maps[index]] = gr.update(
                value=None if path is None else str(path), label=label, visible=path is not None
            )
        return updates | ({} if len(networks) > 1 else {self.maps[1]: gr.update(visible=False)})

    def _step(self, by: int, visit: Visit, values: Values, tell: Tell) -> Updates:
        """Go to another stage, behind the last one to the first."""
        if not visit.has_answers(self._chosen(values)):
            return {}
        stages = self._stages(visit, values)
        now = stages.index(values[self.stage]) if values[self.stage] in stages else 0
        stage = stages[(now + by) % len(stages)]
        return {self.stage: stage, **self._show_maps(visit, {**values, self.stage: stage}, tell)}

    def _stop(self, request: gr.Request) -> None:
        self.visits.of(request.session_hash).stopped.set()

    def _leave(self, request: gr.Request) -> None:
        self.visits.end(request.session_hash)

    def _emptied(self) -> Updates:
        """Return the page without a picture."""
        nothing = [*self.drawn, *self.bars, *self.maps, self.image, self.film, self.costs]
        table = {self.table: summary(dict.fromkeys([next(iter(self.networks))]), SCORE)}
        buttons = {part: gr.update(value=None, interactive=False) for part in (self.json, self.file)}
        return dict.fromkeys(nothing) | table | buttons | {self.time: gr.update(visible=False)}


def forget_copies(request: gr.Request) -> None:
    """Drop old copies of components: Gradio keeps one for each input that has changed, event by event, for an hour.

    The newest stay, since other events of the visitor may be about to use them.
    """
    state = request.request.app.state_holder[request.session_hash]
    own = request.request.app.get_blocks().blocks
    for table in (state.blocks_config.blocks, state.config_values):
        copies = sorted(table.keys() - own.keys())
        if len(copies) > 2 * COPIES:
            for key in copies[:-COPIES]:
                table.pop(key, None)


def _to_the_owner(error: Exception) -> str:
    traceback.print_exception(error)
    return "the server's terminal"


def _in_words(error: Exception, source: Source | None) -> str:
    """Return an error as a sentence that names a file as its owner does, and no folder of the server."""
    text = explain(error, _to_the_owner)[1].removeprefix("error: ")
    if source is None:
        return text
    text = text.replace(str(source.path), source.name)
    return text if source.name in text else f"{source.name}: {text}"
