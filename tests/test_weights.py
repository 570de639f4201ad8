"""Weights of backbones: bit-equal from every source, and what does not fit is named and changes nothing."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from safetensors.torch import save_file
from test_backbones import (
    WIDTH,
    assert_equal_state,
    classifier,
    images,
    one_of_each_family,
    snapshot,
    with_statistics,
)
from torch import Tensor

from backbones import Classifier, create, load_weights, zoo


def trained(name: str) -> Classifier:
    """A classifier whose running averages differ from a new one's."""
    return with_statistics(classifier(name, "cifar", seed=3))


@one_of_each_family
def test_weights_load_bit_equal_from_every_source(name, tmp_path):
    model = trained(name)
    expected = snapshot(model.backbone)
    assert any(key.endswith(".extremum") and value.item() < 1 for key, value in expected.items())
    detector = {f"backbone.body.{key}": value for key, value in expected.items()}
    detector |= {"backbone.fpn.weight": torch.ones(3), "head.weight": torch.ones(2)}
    save_file(expected, tmp_path / "backbone.safetensors")
    save_file(model.state_dict(), tmp_path / "classifier.safetensors")
    sources = {
        "backbone": expected,
        "classifier": model.state_dict(),
        "detector": detector,
        "file": tmp_path / "backbone.safetensors",
        "name of a file": str(tmp_path / "classifier.safetensors"),
        "within other modules": torch.nn.Sequential(torch.nn.DataParallel(model)).state_dict(),
        "compiled": torch.compile(model.backbone).state_dict(),
    }
    for source in sources.values():
        torch.manual_seed(5)
        backbone = create(name, stem="cifar", width=WIDTH, weights=source)
        assert_equal_state(backbone.state_dict(), expected)
    x = images("cifar")
    model.eval()
    with torch.no_grad():
        assert torch.equal(backbone.eval()(x)["c5"], model.backbone(x)["c5"])


def test_loaded_weights_are_copies():
    state = trained("vgg11").backbone.state_dict()
    backbone = create("vgg11", stem="cifar", width=WIDTH, weights=state)
    before = {key: value.clone() for key, value in state.items()}
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert_equal_state(state, before)


# The second convolution of a VGG11, 8 -> 16 channels at WIDTH
KEY = "stages.1.1.weight"


def without_key(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != KEY}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_key, rf"'{KEY}' is missing"),
        (lambda state: state | {"stages.1.1.bias": torch.ones(16)}, r"'stages\.1\.1\.bias' is unknown"),
        (lambda state: state | {KEY: torch.ones(2, 3)}, rf"'{KEY}' has the shape \(2, 3\), .* \(16, 8, 3, 3\)"),
        (lambda state: without_key(state) | {"extra": torch.ones(1)}, rf"'{KEY}' is missing \(and 1 more\)"),
        (lambda state: {}, r"'stages\.0\.0\.weight' is missing"),
    ],
    ids=["missing", "unknown", "shape", "two", "empty"],
)
@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.body."])
def test_weights_that_do_not_fit_are_named_and_change_nothing(damage, message, prefix, tmp_path):
    state = damage(snapshot(trained("vgg11").backbone))
    state = {prefix + key: value for key, value in state.items()}
    save_file(state, tmp_path / "damaged.safetensors")
    backbone = classifier("vgg11", "cifar").backbone
    before = snapshot(backbone)
    with pytest.raises(ValueError, match="state dict.*" + message):
        load_weights(backbone, state)
    with pytest.raises(ValueError, match=r"damaged\.safetensors.*" + message):
        load_weights(backbone, tmp_path / "damaged.safetensors")
    assert_equal_state(backbone.state_dict(), before)


def test_weights_of_another_stem_width_extremum_or_activation_do_not_fit():
    spiking = create("resnet18", stem="cifar", width=WIDTH).state_dict()
    for options, key in (
        ({"stem": "imagenet"}, r"stem\.2\.weight"),
        ({"width": 0.25}, r"stem\.0\.weight"),
        ({"extremum": "channel"}, "extremum"),
        ({"activation": "relu"}, "v_th"),
    ):
        with pytest.raises(ValueError, match=rf"{key}'"):
            create("resnet18", **({"stem": "cifar", "width": WIDTH} | options), weights=spiking)


@pytest.mark.parametrize(
    ("trained", "open_key"),
    [({"activation": "graded", "levels": 8}, "levels"), ({"time_steps": 4, "reset": "zero"}, "reset")],
)
def test_what_no_shape_tells_has_to_be_said(tmp_path, trained, open_key):
    options = {"name": "vgg9", "width": 0.0625, "stem": "cifar"} | trained
    expected = create(**options).state_dict()
    save_file(expected, tmp_path / "last.safetensors")
    (tmp_path / "run.json").write_text(json.dumps({"backbone": options}))
    assert_equal_state(create(**options, weights=tmp_path).state_dict(), expected)
    left = {key: value for key, value in options.items() if key != open_key}
    with pytest.raises(ValueError, match=f"trained with {open_key} {trained[open_key]!r}, wanted is "):
        create(**left, weights=tmp_path)


def test_weights_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        create("vgg11", stem="cifar", width=WIDTH, weights=tmp_path / "nothing.safetensors")


def test_files_of_a_zoo_entry():
    name, options = "zoo:voc_retinanet_resnet18_spiking", zoo.settings("voc_retinanet_resnet18_spiking")
    expected = create(**options, weights=name).state_dict()
    assert_equal_state(create(**options, weights=f"{name}/last.safetensors").state_dict(), expected)
    for load in (create, lambda weights, **options: load_weights(create(**options), weights)):
        with pytest.raises(
            ValueError, match=r"model\.events: a file of the event-driven engine; its run has the weights"
        ):
            load(**options, weights=f"{name}/model.events")
        with pytest.raises(ValueError, match=r"other: no such file of the entry"):
            load(**options, weights=f"{name}/other")


@pytest.mark.parametrize("content", [b"", b"no weights at all, but more than eight bytes"], ids=["empty", "text"])
def test_weights_file_that_is_not_safetensors(content, tmp_path):
    path = tmp_path / "text.safetensors"
    path.write_bytes(content)
    backbone = classifier("vgg11", "cifar").backbone
    before = snapshot(backbone)
    with pytest.raises(ValueError, match=r"text\.safetensors: damaged weights file"):
        load_weights(backbone, path)
    assert_equal_state(backbone.state_dict(), before)


def test_files_of_torch_save_are_refused_with_the_way_to_convert_them(tmp_path, attempt):
    expected = snapshot(trained("vgg11").backbone)
    for name, options in (("new.pth", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        with attempt("damaged files"):
            torch.save(expected, tmp_path / name, **options)
            backbone = classifier("vgg11", "cifar").backbone
            with pytest.raises(ValueError, match=r"written by torch\.save.*only \.safetensors files are read") as error:
                load_weights(backbone, tmp_path / name)
            assert "damaged" not in str(error.value)
            command = shlex.split(str(error.value).splitlines()[-1])
            assert command[:2] == ["python", "-c"]
            exec(command[2], {})
            load_weights(backbone, (tmp_path / name).with_suffix(".safetensors"))
            assert_equal_state(backbone.state_dict(), expected)


def test_a_state_with_two_backbones_is_refused():
    state = create("vgg9", width=0.125).state_dict()
    both = {f"{name}.backbone.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    with pytest.raises(ValueError, match=r"state dict has several backbones: student\., teacher\.; give the state"):
        load_weights(create("vgg9", width=0.125), both)
