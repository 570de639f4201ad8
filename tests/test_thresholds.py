"""Several thresholds: neurons of each potential that fire at potentials of their own, and bits alone behind them."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from test_energy import SPIKING_HEAD, SPIKING_NECK, make_config, make_detector, make_images
from test_finetuning import save
from test_fold import classifier, detector, run_and_record
from torch import nn

import backbones
from backbones import HoyerSpike, certify, energy, fold, hoyer_penalty, measure_activity, to_integers
from backbones.activations import SeveralThresholds
from backbones.deploy.events import Engine, Program, available, to_program, using
from backbones.deploy.events.library import MAX_OUTPUTS
from backbones.deploy.fold import NORMS, ChannelThreshold, copies_of, module_of
from backbones.deploy.highest import MOST, Highest, fire_once
from detection.cli import main
from detection.models import build_detector
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.start import start_from

NETWORKS = [
    ("vgg11", {"head": "pooled"}),
    ("resnet18", {}),
    ("resnet18", {"shortcut": "real", "norm_first": True}),
    ("resnet50", {"stem": "imagenet"}),
]
networks = pytest.mark.parametrize(("name", "options"), NETWORKS, ids=str)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def test_at_first_the_neurons_of_a_potential_fire_at_equal_distances():
    layer = SeveralThresholds(1, 3, lambda channels: HoyerSpike(channels, fixed=True)).eval()
    u = torch.tensor([0.4, 0.6, 0.9, 1.1, 1.4, 1.6]).view(6, 1, 1, 1)
    count = torch.tensor([0, 1, 1, 2, 2, 3.0])
    spikes = layer(u)
    assert spikes.shape == (6, 3, 1, 1)
    assert torch.equal(spikes.sum((1, 2, 3)), count)
    # Of the copies the first is the easiest: where a later one fires, those before it fire, too.
    assert torch.equal(spikes, spikes.cummin(1).values)


@networks
def test_every_layer_but_the_first_sees_bits_of_its_own_width(name, options):
    torch.manual_seed(0)
    one, three = (
        backbones.Classifier(backbones.create(name, width=0.125, thresholds=k, **{"stem": "cifar"} | options), 10)
        for k in (1, 3)
    )
    ours, theirs = ([m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))] for model in (three, one))
    for index, (wide, narrow) in enumerate(zip(ours, theirs, strict=True)):
        assert wide.weight.shape[1] == narrow.weight.shape[1] * (3 if index else 1)
        assert wide.weight.shape[0] == narrow.weight.shape[0]
    images = torch.rand(4, 3, 64, 64)
    (three(images).square().sum() + hoyer_penalty(three, "network")).backward()
    assert all(parameter.grad.isfinite().all() for parameter in three.parameters())
    certificate = certify(measure_activity(three.eval(), [images]), strict=True)
    assert certificate.is_binary and certificate.num_binary == len(ours) - 1


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "ssd", "fasterrcnn"])
def test_detectors_are_binary_to_their_last_layer(kind):
    spiking = {} if kind in ("ssd", "fasterrcnn") else {"neck": SPIKING_NECK, "head": SPIKING_HEAD}
    config = make_config(kind, backbone={"name": "resnet18", "thresholds": 2}, **spiking)
    model = make_detector(config)
    certificate = certify(measure_activity(model, [make_images()]), task_of(config).analogue_parts(model))
    assert certificate.is_binary, certificate.violations
    if kind != "fasterrcnn":
        assert [each.layer for each in certificate.exceptions] == ["backbone.body.stem.0"]
    targets = [{"boxes": torch.tensor([[5.0, 5, 30, 30]]), "labels": torch.tensor([1])}] * 2
    loss = sum(model.train()(make_images(), targets).values()) + hoyer_penalty(model, "network")
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@networks
def test_one_threshold_and_the_twin_are_what_they_were(name, options):
    options = {"width": 0.125, "stem": "cifar"} | options
    assert shapes(backbones.create(name, **options)) == shapes(backbones.create(name, thresholds=1, **options))
    twin = {"activation": "relu"} | options
    assert shapes(backbones.create(name, **twin)) == shapes(backbones.create(name, thresholds=3, **twin))
    config = make_config(backbone={"thresholds": 3, "activation": "relu"}, neck=SPIKING_NECK, head=SPIKING_HEAD)
    plain = make_config(backbone={"activation": "relu"}, neck=SPIKING_NECK, head=SPIKING_HEAD)
    assert shapes(build_detector(config)) == shapes(build_detector(plain))


@networks
def test_a_folded_network_fires_alike(name, options):
    model = classifier(name, thresholds=2, **options).double()
    images = torch.randn(2, 3, 65, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    folded = fold(model)
    for node in folded.graph.nodes:  # no BatchNorm that comparisons alone see
        if isinstance(module_of(folded, node), NORMS):
            assert not all(copies_of(u) or isinstance(module_of(folded, u), ChannelThreshold) for u in node.users)
    expected, spikes = run_and_record(model, images, HoyerSpike)
    result, ours = run_and_record(folded, images, ChannelThreshold)
    assert 0.02 < torch.cat([each.flatten() for each in spikes]).mean() < 0.9
    assert all(torch.equal(a, b) for a, b in zip(spikes, ours, strict=True))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_a_folded_detector_finds_the_same():
    head = {"num_convs": 2, "spiking": True, "score_threshold": 0.001}
    model = detector(backbone={"name": "resnet18", "width": 0.125, "thresholds": 2}, head=head).double()
    images = [torch.rand(3, 64, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        (ours,), (expected,) = fold(model)(images), model(images)
    assert len(expected["boxes"]) and torch.equal(ours["labels"], expected["labels"])
    torch.testing.assert_close(ours["boxes"], expected["boxes"])


@pytest.mark.parametrize("thresholds", [2, 3])
@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {"shortcut": "real", "norm_first": True}), ("resnet50", {}), ("resnet18", {})]
)
def test_a_potential_that_fires_once_gives_the_same(name, options, thresholds):
    """Whatever the order and the sign of the thresholds; where neurons of a potential differ in sign, all stay."""
    torch.manual_seed(0)
    model = classifier(name, stem="cifar", thresholds=thresholds, **options).double()
    norms = [module[1] for module in model.modules() if isinstance(module, SeveralThresholds)]
    for norm in norms:
        norm.bias.data = norm.bias.data[torch.randperm(len(norm.bias))]
        turned = torch.randint(0, 2, (len(norm.weight) // thresholds,)).mul(2).sub(1).repeat(thresholds)
        norm.weight.data = norm.weight.data.abs() * turned
    norms[-1].weight.data[0] *= -1
    folded = fold(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, spikes = run_and_record(folded, images, ChannelThreshold)
    result, once = run_and_record(fire_once(folded), images, Highest)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert 0 < len(once) < len(spikes)
    sets = [each.unflatten(1, (thresholds, -1)).sum(1) for each in once]
    assert all(each.max() == 1 for each in sets)
    assert sum(each.sum() for each in once) < 0.8 * sum(each.sum() for each in spikes)


@pytest.mark.parametrize("thresholds", [3, 5, 9])
def test_the_engine_fires_once_bit_for_bit(thresholds):
    """By every set of instructions; also where a layer has more comparisons, or a potential more thresholds, than 8."""
    torch.manual_seed(0)
    model = classifier("resnet18", stem="cifar", thresholds=thresholds)
    for norm in [module[1] for module in model.modules() if isinstance(module, SeveralThresholds)]:
        norm.weight.data.abs_()
    folded = fold(model)
    images = torch.randn(4, 3, 32, 32)
    network = to_integers(folded, images, exact=True)
    program = to_program(network)
    numbers = Counter(each["op"] for each in program.operations)
    assert ("highest" in numbers) == (thresholds <= MOST == MAX_OUTPUTS == 8)
    assert max(len(each["outputs"]) for each in program.operations if each["op"] == "layer") <= 9
    with torch.no_grad():
        expected = network(images.contiguous(memory_format=torch.channels_last))
    for name in available():
        with using(name):
            (found,) = Engine(program)(images)
            assert torch.equal(found, expected), name


def test_maps_of_a_potential_that_do_not_fit_are_refused():
    pool = {"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1], "ceil_mode": False}
    steps = [("threshold", ["images"], "a", {}), ("pool_bits", ["a"], "b", pool), ("highest", ["a", "b"], "c", {})]
    operations = [
        {"op": op, "inputs": inputs, "outputs": [out], "attributes": attributes, "tensors": {}}
        for op, inputs, out, attributes in steps
    ]
    operations[0]["tensors"] = {"level_0": "level"}
    for inputs, sentence in (
        (["a", "b"], "2 maps of a potential"),
        (["a"] * 9, r"9 maps .*up to 8, of one"),
    ):
        operations[2]["inputs"] = inputs
        with pytest.raises(ValueError, match=sentence):
            Engine(Program(operations, ["c"], {"level": torch.zeros(3)}))(torch.rand(1, 3, 8, 8))


def test_operations_are_those_of_a_potential_that_fires_once():
    """Where one neuron of a potential rises and another falls, all of them are added up."""
    torch.manual_seed(0)
    model = classifier("resnet18", stem="cifar", thresholds=3, shortcut="real", norm_first=True).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    norms = [module[1] for module in model.modules() if isinstance(module, SeveralThresholds)]
    total = []
    for norm in norms:
        norm.weight.data.abs_()
    for turned in (0, 1):
        norms[0].weight.data[1 : 1 + turned] *= -1
        folded = fold(model)
        measured, every, once = (measure_activity(each, [images]) for each in (model, folded, fire_once(folded)))
        total.append([sum(layer.num_synops for layer in each.layers.values()) for each in (measured, every, once)])
        assert [layer.num_active for layer in measured.layers.values()] == [
            layer.num_active for layer in every.layers.values()
        ]
    assert total[0][0] == total[0][2] < 0.8 * total[0][1]
    assert total[1][0] == total[1][2] > total[0][0]


def test_twins_are_priced_layer_by_layer():
    """A layer behind one threshold has as many inputs in the twin, whatever others of the network have."""
    spike = backbones.SpikeFactory("hoyer", thresholds=3)
    first = [nn.Conv2d(3, 8, 3, padding=1), spike(8), nn.MaxPool2d(2), nn.Conv2d(24, 8, 3, padding=1)]
    model = nn.Sequential(*first, nn.BatchNorm2d(8), HoyerSpike(8), nn.Conv2d(8, 8, 3, padding=1))
    measured = measure_activity(model.eval(), [torch.rand(2, 3, 16, 16)])
    assert (measured.layers["3"].thresholds, measured.layers["6"].thresholds, measured.thresholds) == (3, 1, 3)
    layers = energy(measured).layers
    for network in ("twin", "binary"):
        for each in ("3", "6"):
            assert layers[each][network].macs + layers[each][network].acs == 64 * (8 * 3 - 2) ** 2


def test_twins_are_priced_with_one_neuron_for_each_potential():
    """A network that fires everywhere has, but for its own operations, the energy of one with one threshold."""
    images, found = torch.rand(2, 3, 32, 32), {}
    for thresholds in (1, 2):
        torch.manual_seed(0)
        model = backbones.Classifier(backbones.create("resnet18", width=0.125, stem="cifar", thresholds=thresholds), 10)
        measured = measure_activity(model.eval(), [images])
        found[thresholds] = energy(measured).networks
        assert measured.thresholds == thresholds
    for network in ("twin", "twin_int8", "binary"):
        one, two = (found[thresholds][network] for thresholds in (1, 2))
        assert (two.macs, two.acs, two.comparisons, two.weight_bits) == (
            one.macs,
            one.acs,
            one.comparisons,
            one.weight_bits,
        )
        assert two.read_bits == one.read_bits
    assert found[2]["spiking"].comparisons == 2 * found[1]["spiking"].comparisons


def test_outputs_leave_as_the_bits_of_their_neurons():
    """3 neurons of a potential are 3 bits in place of a real value; of 4 levels the one is 2, and is read as such."""
    images, found = torch.rand(2, 3, 32, 32), {}
    for key, options in {
        "one": {},
        "three": {"thresholds": 3},
        "graded": {"activation": "graded", "levels": 4},
    }.items():
        torch.manual_seed(0)
        backbone = backbones.create("vgg11", width=0.125, stem="cifar", head="pooled", **options)
        measured = measure_activity(backbones.Classifier(backbone, 10).eval(), [images])
        name, layer = list(measured.layers.items())[1]
        found[key] = layer.output_bits, energy(measured).layers[name]["spiking"]
    (one, of_one), (three, of_three), (graded, of_graded) = found.values()
    assert (one, three, graded) == (1, 3, 2)
    assert of_three.write_bits == 3 * of_one.write_bits and of_three.read_bits == 3 * of_one.read_bits
    assert of_graded.write_bits == 2 * of_one.write_bits and of_graded.read_bits == 2 * of_one.read_bits


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("resnet18", {"thresholds": 0}, "thresholds must be a whole number from 1 on, got 0"),
        ("resnet18", {"thresholds": True}, "thresholds must be a whole number from 1 on, got True"),
        ("resnet18", {"thresholds": 2, "activation": "graded"}, "has one threshold alone \\(allowed: hoyer, fixed\\)"),
        ("mobilenetv1", {"thresholds": 2}, "thresholds must be 1 for mobilenetv1, whose convolutions are depthwise"),
    ],
)
def test_what_is_refused(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        backbones.create(name, width=0.125, **options)


def test_a_head_of_hidden_layers_is_refused():
    backbone = backbones.create("vgg11", width=0.125, stem="cifar", thresholds=2)
    with pytest.raises(ValueError, match="several thresholds need head 'pooled'"):
        backbones.Classifier(backbone, 10)


def shake(model: nn.Module) -> None:
    """Give norms and neurons the values of no fresh network."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith(("weight", "v_th", "running_var")) and value.dim() < 2:
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            value.uniform_(-0.3, 0.3, generator=generator)


WIDENED = [
    ("vgg16", {"head": "pooled"}),
    ("resnet18", {"shortcut": "real", "norm_first": True}),
    ("resnet50", {"stem": "imagenet", "shortcut": "real", "threshold": "channel"}),
    ("resnet50", {"time_steps": 2}),
]


@pytest.mark.parametrize("thresholds", [2, 3])
@pytest.mark.parametrize(("name", "options"), WIDENED, ids=str)
def test_weights_of_one_threshold_start_the_same_function(name, options, thresholds):
    """To the last bit but for the extremum, which is over more neurons: left out, nothing else differs."""
    options = {"width": 0.125, "stem": "cifar", "activation": "fixed"} | options
    one = backbones.create(name, **options).double().eval()
    shake(one)
    several = backbones.create(name, thresholds=thresholds, weights=one.state_dict(), **options).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = list(zip(one(images).values(), several(images).values(), strict=True))
    assert all(torch.allclose(found, wanted, atol=1e-3) for wanted, found in pairs)
    assert any(wanted.std() > 0.1 for wanted, _ in pairs)
    places = [m for m in several.modules() if isinstance(m, SeveralThresholds)]
    shifts = torch.stack(
        [(m[1].bias.view(thresholds, -1).diff(dim=0) / m[1].weight.view(thresholds, -1)[0]).mean() for m in places]
    )
    torch.testing.assert_close(shifts, torch.full_like(shifts, -1 / (thresholds - 1)))
    with pytest.raises(ValueError, match="does not fit the backbone"):
        backbones.create(name, weights=several.state_dict(), **options)


def test_a_detector_of_one_threshold_starts_one_of_several(tmp_path):
    network = {"backbone": {"name": "resnet18", "width": 0.125, "shortcut": "real", "norm_first": True}}
    network |= {"neck": SPIKING_NECK, "head": SPIKING_HEAD}
    one = make_config(**network)
    model = save(tmp_path / "run", one)
    network["backbone"] |= {"thresholds": 3}
    three = make_config(**network, weights=str(tmp_path / "run"))
    wide = widened = build_detector(three)
    start = start_from(task_of(three), wide)
    assert not (start.new or start.left_out or start.partly)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        narrow, wide = (m.eval().head(list(m.backbone(images).values())) for m in (model, wide))
    for key, value in narrow.items():  # but for the extremum
        assert torch.corrcoef(torch.stack([value.flatten(), wide[key].flatten()]))[0, 1] > 0.8
    three.model.weights, one.model.weights = None, str(tmp_path / "wide")
    three.model.backbone.weights, one.model.backbone.weights = str(tmp_path / "run"), str(tmp_path / "wide")
    backbone = build_detector(three).backbone.body.state_dict()
    assert all(torch.equal(value, widened.backbone.body.state_dict()[key]) for key, value in backbone.items())
    save(tmp_path / "wide", three)
    with pytest.raises(ValueError, match=r"trained with model\.backbone\.thresholds 3, this recipe's is 1"):
        start_from(task_of(one), model)
    with pytest.raises(ValueError, match=r"trained with thresholds 3, this recipe's model\.backbone\.thresholds is 1"):
        build_detector(one)


def test_a_recipe_trains_and_its_files_say_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenes = "--data.scenes.num_train 4 --data.scenes.num_val 4 --data.scenes.size 64 --train.epochs 1"
    network = "--model.backbone.width 0.125 --model.backbone.thresholds 2 --model.neck.out_channels 16"
    spiking = "--model.neck.spiking True --model.head.spiking True --model.min_size 64 --model.max_size 64"
    main(f"train scenes_retinanet_resnet18 --out run {scenes} {network} {spiking}".split())
    main(["export", "run", "--format", "events", "--evaluate"])
    described = json.loads((tmp_path / "run" / "model.events.json").read_text())
    assert described["evaluation"]["file"].keys() == described["evaluation"]["run"].keys()
    assert task_of(Run.open(tmp_path / "run").config).describe().endswith("spiking, 2 thresholds, neck and head too")
