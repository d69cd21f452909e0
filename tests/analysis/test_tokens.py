"""A model as a source of tokens: its layers, its batches, and what it leaves as it was."""

import json

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastkd.analysis import Options
from fastkd.analysis.images import open_images
from fastkd.analysis.study import parse_layers
from fastkd.analysis.tokens import ModelSource, open_subject, weights_hash
from fastkd.models import create_student
from tests.analysis.test_images import broken_folder, folder_of

SWIN = {"window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
SMALL = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "num_classes": 7}
BASE = {
    "num_classes": 7,
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "num_heads": 1,
    "depth": 3,
}

SERIAL = Options(workers=0)

MODELS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=3, **SMALL),
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=2, **SMALL),
    "cait": lambda: timm.create_model("cait_xxs24_224", depth=3, **SMALL),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **SWIN),
    "resnet": lambda: timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=4),
    "lift": lambda: create_student("deit_tiny_patch16_224", "lift", width=96, **BASE),
    "widelast": lambda: create_student("deit_tiny_patch16_224", "widelast", width=128, **BASE),
}

# (model, layers) -> name, index, [N, D] of each layer, on images of 32 pixels
LAYERS = {
    ("vit", "all"): [(f"blocks.{i}", i, 4, 24) for i in range(3)],
    ("vit", "last"): [("blocks.2", 2, 4, 24)],
    ("vit", "-1,0"): [("blocks.0", 0, 4, 24), ("blocks.2", 2, 4, 24)],
    ("vit", (2, "blocks.1", 2)): [("blocks.1", 1, 4, 24), ("blocks.2", 2, 4, 24)],
    ("vit", "final"): [("final", 3, 4, 24)],
    ("vit", "0,final"): [("blocks.0", 0, 4, 24), ("final", 3, 4, 24)],
    ("distilled", "last"): [("blocks.1", 1, 4, 24)],
    ("cait", "all"): [(f"blocks.{i}", i, 4, 24) for i in range(3)],
    ("swin", "all"): [
        (f"layers.{i}", i, tokens, 16 << i) for i, tokens in enumerate((64, 16, 4, 1))
    ],
    ("resnet", "all"): [
        ("act1", 0, 256, 8),
        ("layer1", 1, 64, 8),
        ("layer2", 2, 16, 16),
        ("layer3", 3, 4, 24),
        ("layer4", 4, 1, 32),
    ],
    ("resnet", "last"): [("layer4", 4, 1, 32)],
    ("lift", "all"): [
        *[(f"blocks.{i}", i, 16, 64) for i in range(3)],
        ("final", 3, 16, 96),
    ],
    ("lift", "last"): [("blocks.2", 2, 16, 64), ("final", 3, 16, 96)],
    ("lift", "-1"): [("blocks.2", 2, 16, 64)],
    ("widelast", "all"): [
        ("blocks.0", 0, 16, 64),
        ("blocks.1", 1, 16, 64),
        ("blocks.2", 2, 16, 128),
    ],
}


@pytest.fixture(scope="module")
def tensors():
    """Images that are fed as they are, so that a model can be run beside the source."""
    generator = torch.Generator().manual_seed(0)
    return open_images(
        TensorDataset(torch.randn(5, 3, 32, 32, generator=generator), torch.zeros(5))
    )


def make(kind):
    torch.manual_seed(0)
    return MODELS[kind]()


def source_of(model, images, **options):
    options = Options(**{"workers": 0, "batch_size": 2} | options)
    return ModelSource(open_subject(model), images, options)


def in_order(images):
    return torch.stack([images.data.val[int(index)][0] for index in images.indices])


@pytest.mark.parametrize(("kind", "layers"), LAYERS)
def test_layers_are_named_counted_and_sized(kind, layers, tensors):
    source = source_of(make(kind), tensors, layers=layers)
    batch = next(source.batches())
    found = [
        (layer.name, layer.index, tokens.shape[1], layer.channels)
        for layer, tokens in zip(source.layers, batch.tokens)
    ]
    assert found == LAYERS[kind, layers]
    assert all(
        tokens.shape[2] == layer.channels for layer, tokens in zip(source.layers, batch.tokens)
    )


@pytest.mark.parametrize("layers", ["all", "last"])
def test_tokens_are_the_blocks_output_without_prefix(layers, tensors):
    model = make("vit")
    source = source_of(model, tensors, layers=layers, batch_size=5)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output[:, 1:]))
    with torch.no_grad():
        model.eval()(in_order(tensors))
    expected = outputs[:] if layers == "all" else outputs[-1:]
    (batch,) = source.batches()
    for tokens, reference in zip(batch.tokens, expected, strict=True):
        torch.testing.assert_close(tokens, reference)


def test_lifted_tokens_are_what_the_head_pools(tensors):
    model = make("lift")
    (batch,) = source_of(model, tensors, batch_size=5).batches()
    with torch.no_grad():
        logits = model.eval()(in_order(tensors))
        torch.testing.assert_close(model.head(batch.tokens[-1].mean(1)), logits)


def test_batches_cover_the_places_in_order(tensors):
    batches = list(source_of(make("vit"), tensors, layers="last").batches())
    assert [batch.places for batch in batches] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("start", "stop", "places"), [(2, None, [2, 3, 4]), (1, 3, [1, 2])])
def test_batches_restart_anywhere(tensors, start, stop, places):
    source = source_of(make("vit"), tensors, layers="last", batch_size=3)
    whole = torch.cat([batch.tokens[0] for batch in source.batches()])
    (batch,) = source.batches(start, stop)
    assert batch.places == places
    torch.testing.assert_close(batch.tokens[0], whole[places])


def test_the_same_places_give_the_same_bits(tensors):
    source = source_of(make("cait"), tensors)
    for first, second in zip(source.batches(2), list(source.batches())[1:]):
        assert first.places == second.places
        assert all(torch.equal(a, b) for a, b in zip(first.tokens, second.tokens))


def test_no_places_give_no_batch(tensors):
    assert list(source_of(make("vit"), tensors).batches(3, 3)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_by_name(tmp_path, workers):
    source = source_of(make("vit"), broken_folder(tmp_path), workers=workers, batch_size=3)
    batches = list(source.batches())
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert {name for _, name, _ in skipped} == {"a/0.png", "a/1.png", "b/2.png", "b/3.png"}
    read = [place for batch in batches for place in batch.places]
    assert sorted(read + [place for place, _, _ in skipped]) == list(range(source.images))
    for batch in batches:
        assert [len(tokens) for tokens in batch.tokens] == [len(batch.places)] * (
            3 if batch.places else 0
        )


def test_a_batch_of_broken_images_has_no_tokens(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    (batch,) = source_of(make("vit"), open_images(tmp_path)).batches()
    assert (batch.places, batch.tokens, len(batch.skipped)) == ([], [], 1)


def test_images_are_prepared_as_timm_evaluates(tmp_path):
    model = make("vit")
    selection = open_images(folder_of(tmp_path, _=2))
    source = source_of(model, selection, layers="last")
    config = timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    transform = timm.data.create_transform(**config, is_training=False)
    images = torch.stack([transform(selection.data.val[int(i)][0]) for i in selection.indices])
    (expected,) = model.eval().forward_intermediates(
        images, 1, output_fmt="NLC", intermediates_only=True
    )
    (batch,) = source.batches()
    torch.testing.assert_close(batch.tokens[0], expected)
    assert source.input_size == (32, 32)


def test_the_model_is_left_as_it_was(tensors):
    model = make("vit").train()
    model.blocks[1].eval()
    before = weights_hash(model), [module.training for module in model.modules()]
    requires_grad = [p.requires_grad for p in model.parameters()]
    list(source_of(model, tensors).batches())
    assert (weights_hash(model), [module.training for module in model.modules()]) == before
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_runs_in_eval_mode_without_gradient(tensors):
    model = make("resnet").train()
    source = source_of(model, tensors, layers="last")
    batches = list(source.batches())
    with torch.no_grad():
        expected = model.eval().forward_features(in_order(tensors)).flatten(2).mT
    tokens = torch.cat([batch.tokens[0] for batch in batches])
    torch.testing.assert_close(tokens, expected)
    assert tokens.grad_fn is None
    assert torch.is_grad_enabled()


def test_the_consumer_is_not_left_in_inference_mode(tensors):
    for _ in source_of(make("vit"), tensors).batches():
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_autocast_decides_the_precision(tensors):
    source = source_of(make("widelast"), tensors, layers="last", amp="bf16")
    plain = next(source_of(make("widelast"), tensors, layers="last").batches()).tokens[0]
    mixed = next(source.batches()).tokens[0]
    assert not torch.equal(mixed.float(), plain)
    torch.testing.assert_close(mixed.float(), plain, atol=0.1, rtol=0.1)


class Plain(nn.Module):
    """A model that is not timm's."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 8, 8)
        self.mix = nn.Linear(6, 10)

    def forward(self, images):
        return self.mix(self.stem(images).flatten(2).mT).mean(1)


def test_any_module_is_read_by_name(tensors):
    source = source_of(Plain(), tensors, layers="mix,stem")
    assert [(layer.name, layer.index, layer.channels) for layer in source.layers] == [
        ("mix", 0, 10),
        ("stem", 1, 6),
    ]
    assert [list(t.shape) for t in next(source.batches()).tokens] == [[2, 16, 10], [2, 16, 6]]


def test_modules_inside_blocks_are_read_without_prefix(tensors):
    source = source_of(make("vit"), tensors, layers=["blocks.1.mlp"], num_prefix=1)
    assert next(source.batches()).tokens[0].shape == (2, 4, 24)


def test_a_model_without_blocks_asks_for_modules(tensors):
    with pytest.raises(ValueError, match="such as stem, mix"):
        source_of(Plain(), tensors)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([9], "index 9 is out of range"),
        (["blocks.9"], "no module 'blocks.9'"),
        ("0,patch_embed", "cannot be read in one pass"),
        ("final,patch_embed", "cannot be read in one pass"),
        ("", "expected all, last, or numbers and names"),
        ([], "expected all, last, or numbers and names"),
        ("0,,1", "expected all, last, or numbers and names"),
    ],
)
def test_layers_that_are_not_there_are_refused(tensors, layers, message):
    with pytest.raises(ValueError, match=message):
        source_of(make("vit"), tensors, layers=layers)


@pytest.mark.parametrize("layers", [3, [True], [0.5], None])
def test_layers_of_another_type_are_refused(layers):
    with pytest.raises(TypeError, match="layers: expected all, last"):
        parse_layers(layers)


def test_images_of_another_size_than_the_models_are_refused():
    images = open_images(TensorDataset(torch.zeros(2, 3, 40, 40), torch.zeros(2)))
    with pytest.raises(ValueError, match="built for 32 x 32"):
        source_of(make("vit"), images)


def test_a_fingerprint_is_plain_and_repeats(tensors):
    first, second = (source_of(make("vit"), tensors).fingerprint for _ in range(2))
    assert first == second == json.loads(json.dumps(first))


def changed_weight():
    model = make("vit")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] += 1e-6
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda images: source_of(changed_weight(), images),
        lambda images: source_of(make("vit"), images, layers="last"),
        lambda images: source_of(make("vit"), images, amp="bf16"),
        lambda images: source_of(make("vit"), open_images(images.data.val, images=3)),
    ],
    ids=["weights", "layers", "amp", "images"],
)
def test_a_fingerprint_tells_apart(tensors, other):
    assert other(tensors).fingerprint != source_of(make("vit"), tensors).fingerprint


def test_a_fingerprint_tells_transforms_apart(tmp_path):
    images = open_images(folder_of(tmp_path, _=1))
    prints = [
        ModelSource(open_subject("test_resnet", untrained=True, img_size=size), images, SERIAL)
        for size in (32, 64)
    ]
    assert prints[0].fingerprint["transform"] != prints[1].fingerprint["transform"]
    assert prints[0].fingerprint["weights"] == prints[1].fingerprint["weights"]


def test_a_source_says_what_it_is(tensors):
    source = ModelSource(open_subject("test_vit", untrained=True, img_size=32), tensors, SERIAL)
    model = timm.create_model("test_vit", img_size=32)
    assert (source.name, source.weights, source.architecture) == (
        "test_vit",
        "untrained",
        "test_vit",
    )
    assert source.parameters == sum(p.numel() for p in model.parameters())
    assert (source.input_size, source.images) == ((32, 32), 5)
