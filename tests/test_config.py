from pathlib import Path

import pytest
import yaml

from detection.config import Config, Data, load_config, override, save_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
MINIMAL = {"data": {"format": "synthetic"}}


def write(path: Path, values) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_loads_and_names_its_own_command(path):
    assert isinstance(load_config(path), Config)
    assert f"configs/{path.name}" in path.read_text()


def test_there_are_recipes():
    assert len(CONFIGS) >= 2


def test_saved_config_reads_back_equal(tmp_path):
    config = load_config(write(tmp_path / "a.yaml", MINIMAL), ["--train.epochs", "3", "--data.classes", "a b", "c"])
    save_config(config, tmp_path / "b.yaml")
    assert config.data.classes == ["a b", "c"]
    assert load_config(tmp_path / "b.yaml") == config


def test_overrides_are_typed_and_both_spellings_work(tmp_path):
    path = write(tmp_path / "a.yaml", MINIMAL)
    config = load_config(
        path,
        [
            "--model.backbone.activation",
            "relu",
            "model.backbone.width=0.25",
            "--model.min_size",
            "64",
            "96",
            "--train.compile",
            "True",
            "--data.root",
            "elsewhere",
        ],
    )
    assert config.model.backbone.activation == "relu"
    assert config.model.backbone.width == 0.25
    assert config.model.min_size == [64, 96]
    assert config.train.compile is True
    assert config.data.root == Path("elsewhere")


def test_an_override_leaves_the_rest_of_its_section_alone(tmp_path):
    path = write(tmp_path / "a.yaml", MINIMAL | {"model": {"backbone": {"name": "vgg11", "width": 0.5}}})
    backbone = load_config(path, ["--model.backbone.activation", "fixed"]).model.backbone
    assert (backbone.name, backbone.width, backbone.activation) == ("vgg11", 0.5, "fixed")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"modle": {}}, ["'modle'", "did you mean 'model'"]),
        ({"model": {"backbone": {"nmae": "vgg11"}}}, ["'model.backbone.nmae'", "did you mean 'name'"]),
        ({"train": {"epochs": "many"}}, ["train.epochs", "integer", "'many'"]),
        ({"train": {"epochs": 0}}, ["train.epochs", "greater than 0", "got 0"]),
        ({"model": {"backbone": {"activation": "relu6"}}}, ["model.backbone.activation", "'hoyer', 'relu' or 'fixed'"]),
        ({"model": {"backbone": {"name": "resnet17"}}}, ["model.backbone", "'resnet17'", "did you mean 'resnet1"]),
        ({"data": {"format": "voc"}}, ["data", "train: empty", "voc"]),
        ({"data": {"format": "coco", "train": ["a", "b"], "val": ["a"]}}, ["train", "one annotation file"]),
        ({"hoyer": {"reduction": "median"}}, ["hoyer.reduction", "'sum' or 'mean'", "'median'"]),
        ({"model": 3}, ["model", "got 3"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(tmp_path, values, parts):
    path = write(tmp_path / "bad.yaml", MINIMAL | values)
    with pytest.raises(ValueError) as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message
    for part in [str(path), *parts]:
        assert part in message


def test_data_section_is_required(tmp_path):
    with pytest.raises(ValueError, match="data is missing"):
        load_config(write(tmp_path / "a.yaml", {"train": {"epochs": 3}}))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml: no such config file"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", ""])
def test_a_file_without_sections(tmp_path, text):
    with pytest.raises(ValueError, match="expected sections model, data"):
        load_config(write(tmp_path / "a.yaml", text))


def test_a_file_that_is_not_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"a\.yaml: not a YAML file"):
        load_config(write(tmp_path / "a.yaml", "a: [1, 2"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.bakbone.width", "1"], ["--model.bakbone.width", "--model.backbone.width"]),
        (["--train.epochs", "many"], ["--train.epochs", "many"]),
        (["--train.epochs", "-1"], ["greater than 0"]),
        (["--model.backbone.activation", "gelu"], ["gelu", "hoyer", "relu", "fixed"]),
    ],
)
def test_a_wrong_override_ends_the_command_with_an_explanation(tmp_path, capsys, arguments, parts):
    path = write(tmp_path / "a.yaml", MINIMAL)
    with pytest.raises(SystemExit) as stop:
        load_config(path, arguments)
    assert stop.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    for part in parts:
        assert part in text


def test_help_documents_every_field(capsys):
    def fields(model, prefix=""):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation, f"{prefix}{name}.")
            else:
                yield f"--{prefix}{name}", field.description

    with pytest.raises(SystemExit) as stop:
        override(Config(data=Data(format="synthetic")), ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.replace("│", " ").split())
    seen = 0
    for flag, description in fields(Config):
        assert flag in text
        assert description, flag
        assert " ".join(description.split())[:25] in flat, flag
        seen += 1
    assert seen > 40
