"""Taps give the same typed tokens whatever the model's own layout is."""

import copy
import functools
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from fastkd.models import Taps, create_student
from fastkd.tokens import match_grids

SWIN = {"window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
DYNAMIC = {"depth": 2, "dynamic_img_size": True}

# (timm name, arguments, image side, index, expected [N, D], grid, prefix tokens dropped there)
CASES = {
    "vit": ("vit_tiny_patch16_224", {"depth": 3}, 32, 2, (4, 192), (2, 2), 1),
    "deit": ("deit_tiny_patch16_224", {"depth": 3}, 32, 0, (4, 192), (2, 2), 1),
    "distilled": ("deit_tiny_distilled_patch16_224", {"depth": 2}, 32, 1, (4, 192), (2, 2), 2),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", DYNAMIC, 42, 1, (9, 384), (3, 3), 5),
    "cait": ("cait_xxs24_224", {"depth": 3}, 32, 2, (4, 192), (2, 2), 0),
    "swin_first": (
        "swin_tiny_patch4_window7_224",
        SWIN,
        64,
        0,
        (256, 16),
        (16, 16),
        0,
    ),
    "swin_last": ("swin_tiny_patch4_window7_224", SWIN, 64, 3, (4, 128), (2, 2), 0),
    "convnext": ("convnext_atto", {}, 64, 3, (4, 320), (2, 2), 0),
    "resnet_stem": ("resnet10t", {}, 64, 0, (1024, 64), (32, 32), 0),
    "resnet": ("resnet10t", {}, 64, 4, (4, 512), (2, 2), 0),
}
FIXED_SIZE = ("vit", "deit", "distilled", "cait", "swin_first", "swin_last")

WIDTHS = {"plain": None, "lift": 48, "widelast": 48, "uniform": 48}


@functools.cache
def make(case):
    """A small model of the kind and images for it; shared, so that no test may change it."""
    name, options, side, *_ = CASES[case]
    size = {"img_size": side} if case in FIXED_SIZE else {}
    return timm.create_model(name, num_classes=7, **options, **size).eval(), torch.randn(
        2, 3, side, side
    )


@pytest.fixture
def vit(tiny):
    return timm.create_model("vit_tiny_patch16_224", **tiny).eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_tokens_are_typed_for(case):
    (model, images), (*_, index, shape, grid, prefix) = make(case), CASES[case]
    taps = Taps(model, [index])
    tokens = taps(images).tokens[index]
    assert tokens.data.shape == (2, *shape)
    assert (tokens.grid, tokens.num_prefix) == (grid, prefix)
    assert taps.dims == {index: shape[1]}
    assert CASES[case][0] in tokens.source


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_tokens_are_the_blocks_own_output_before_the_final_norm(case):
    (model, images), index = make(case), CASES[case][3]
    tokens = Taps(model, [index])(images).tokens[index]
    maps = model.forward_intermediates(images, [index], intermediates_only=True)[0]
    torch.testing.assert_close(tokens.data.transpose(1, 2).reshape(maps.shape), maps)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_the_models(case):
    model, images = make(case)
    for indices in ([], [0, 1]):
        torch.testing.assert_close(Taps(model, indices)(images).logits, model(images))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_final_is_what_the_head_sees_without_prefix(case):
    model, images = make(case)
    final = Taps(model, [0])(images).final
    features = model.forward_features(images)
    if features.ndim == 3:
        expected = features[:, getattr(model, "num_prefix_tokens", 1) :]  # CaiT has one
    else:
        expected = features.flatten(1, 2) if "swin" in case else features.flatten(2).mT
    torch.testing.assert_close(final.data, expected)
    torch.testing.assert_close(Taps(model)(images).final.data, expected)


def test_cait_has_its_24_patch_blocks_to_tap():
    with torch.device("meta"):
        model = timm.create_model("cait_s24_224")
    assert Taps(model, [-1, 0]).indices == [23, 0]
    with pytest.raises(ValueError, match=r"index 24 is out of range: cait_s24_224 has 24 blocks"):
        Taps(model, [24])


@torch.no_grad()
def test_final_of_a_lift_student_is_its_lifted_tokens(tiny, images):
    model = create_student("vit_tiny_patch16_224", "lift", width=48, **tiny).eval()
    output = Taps(model, [-1])(images)
    torch.testing.assert_close(output.final.data, model.lift(output.tokens[2].data))
    torch.testing.assert_close(output.logits, model.head(output.final.data.mean(1)))
    assert output.final.dim == 48 and output.tokens[2].dim == 24


def test_widelast_is_tapped_at_its_widths(tiny, images):
    model = create_student("vit_tiny_patch16_224", "widelast", width=48, **tiny)
    taps = Taps(model, [1, 2])
    assert taps.dims == {1: 24, 2: 48}
    assert {k: t.dim for k, t in taps(images).tokens.items()} == taps.dims


@torch.no_grad()
def test_indices_keep_their_order_count_from_the_end_and_are_read_once(vit, images):
    taps = Taps(vit, [-1, 0, 2, -3])
    assert taps.indices == [2, 0] == list(taps(images).tokens)
    alone = {i: Taps(vit, [i])(images).tokens[i].data for i in (0, 2)}
    for index, tokens in taps(images).tokens.items():
        torch.testing.assert_close(tokens.data, alone[index])


@pytest.mark.parametrize("index", [3, -4, 11])
def test_an_index_out_of_range_names_the_model_and_its_blocks(vit, index):
    message = rf"index {index} is out of range: vit_tiny_patch16_224 has 3 .*blocks\.0 .. blocks\.2"
    with pytest.raises(ValueError, match=message):
        Taps(vit, [index])


def test_stages_of_a_cnn_are_counted_too():
    with pytest.raises(ValueError, match="has 4 blocks or stages"):
        Taps(timm.create_model("convnext_atto"), [4])


@pytest.mark.parametrize("indices", [3, "blocks.1", [0, "blocks.1"], [1.5], [None]])
def test_indices_of_a_wrong_type_are_refused(vit, indices):
    with pytest.raises(TypeError, match="Taps: indices must be"):
        Taps(vit, indices)


def test_nothing_is_copied(vit, images):
    blocks = []
    vit.blocks[1].register_forward_hook(lambda module, inputs, output: blocks.append(output))
    tokens = Taps(vit, [1])(images).tokens[1]
    assert tokens.data.untyped_storage().data_ptr() == blocks[0].untyped_storage().data_ptr()


@torch.no_grad()
def test_maps_become_tokens_without_a_copy():
    model, images = make("resnet")
    maps = []
    with model.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output)):
        tokens = Taps(model, [4])(images).tokens[4]
    assert tokens.data.data_ptr() == maps[0].data_ptr()


def test_the_model_runs_once(vit, images):
    runs = []
    vit.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    Taps(vit, [0, 1, 2])(images)
    assert len(runs) == 1


def test_gradient_reaches_the_model_through_tokens_logits_and_final(vit, images):
    output = Taps(vit, [0])(images)
    (
        output.tokens[0].data.square().sum() + output.final.data.sum() + output.logits.sum()
    ).backward()
    assert all(p.grad is not None for p in vit.parameters())


def test_grid_follows_images_that_are_not_square():
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **DYNAMIC).eval()
    assert Taps(model, [0])(torch.randn(1, 3, 28, 56)).tokens[0].grid == (2, 4)


def test_different_grids_meet_in_one_clear_error(vit, images):
    resnet = timm.create_model("resnet10t").eval()
    student = Taps(vit, [2])(images).tokens[2]
    teacher = Taps(resnet, [4])(images).tokens[4]
    with pytest.raises(
        ValueError, match=r"vit_tiny.*blocks\.2 has a \(4, 4\) grid, resnet10t layer4"
    ):
        match_grids(student, teacher)
    assert match_grids(student, teacher, "bilinear")[1].grid == (4, 4)


@pytest.mark.parametrize("variant", ["plain", "lift", "widelast"])
def test_compiles_as_one_graph(variant, tiny, images):
    model = create_student("vit_tiny_patch16_224", variant, width=WIDTHS[variant], **tiny).eval()
    taps = Taps(model, [0, -1])

    def step(x):
        output = taps(x)
        return output.logits, output.tokens[0].data, output.final.data

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(images), step(images), strict=True):
        torch.testing.assert_close(ours, expected)


def test_autocast_decides_the_dtype_of_the_logits(vit, images):
    with torch.autocast("cpu", torch.bfloat16):
        output = Taps(vit, [1])(images)
    assert output.logits.dtype == torch.bfloat16
    assert output.tokens[1].data.shape == (2, 16, 24)


class Holder(nn.Module):
    """What a training task is: it owns the model, and calls its taps."""

    def __init__(self, model, indices):
        super().__init__()
        self.model = model
        self.taps = Taps(model, indices)

    def forward(self, images):
        return self.taps(images).tokens


class LogitsHolder(Holder):
    def forward(self, images):
        return self.taps(images).logits


def test_a_module_with_taps_registers_its_model_once(vit):
    names = Holder(vit, [0]).state_dict().keys()
    assert names == {f"model.{name}" for name in vit.state_dict()}


@pytest.fixture
def process_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", ["plain", "lift", "widelast"])
def test_ddp_needs_no_search_for_unused_parameters(variant, tiny, images, process_group):
    model = create_student("vit_tiny_patch16_224", variant, width=WIDTHS[variant], **tiny)
    ddp = nn.parallel.DistributedDataParallel(LogitsHolder(model, [-1]))
    for _ in range(2):  # DDP notices a parameter without gradient in the step after
        ddp(images).square().sum().backward()
    assert all(p.grad is not None for p in ddp.parameters())


@pytest.mark.parametrize("indices", [[1], ["patch_embed.proj"]])
def test_a_copy_of_such_a_module_taps_the_copied_model(vit, images, indices):
    holder = Holder(vit, indices)
    expected = holder(images)[indices[0]].data
    for twin in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert twin.taps.model is twin.model is not vit
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.mul_(1.5)
        torch.testing.assert_close(twin(images)[indices[0]].data, expected)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.div_(1.5)


class Plain(nn.Module):
    """A model of nobody's library: a convolution, then tokens with one class token."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.BatchNorm2d(6))
        self.block = nn.Linear(6, 6)
        self.unused = nn.Linear(1, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, images):
        patches = self.conv(images).flatten(2).mT
        tokens = self.block(torch.cat([patches[:, :1], patches], 1))
        return self.head(tokens[:, 0])


def test_any_module_is_tapped_by_name(images):
    model = Plain().eval()
    output = Taps(model, ["conv", "block"], num_prefix=1)(images)
    torch.testing.assert_close(output.tokens["conv"].data, model.conv(images).flatten(2).mT)
    assert output.tokens["block"].data.shape == (2, 16, 6)
    assert (output.tokens["block"].grid, output.tokens["block"].num_prefix) == ((4, 4), 1)
    torch.testing.assert_close(output.logits, model(images))
    assert output.final is None


def test_no_hook_is_left_behind(images):
    model = Plain()
    Taps(model, ["conv"])(images)
    with pytest.raises(ValueError):
        Taps(model, ["block"])(images)
    assert not model.conv._forward_hooks and not model.block._forward_hooks


def test_a_class_token_left_in_is_named_as_the_cause(images):
    with pytest.raises(ValueError, match=r"block gives 17 tokens.*num_prefix \(now 0\)"):
        Taps(Plain(), ["block"])(images)
    with pytest.raises(ValueError, match=r"block gives 17 tokens.*num_prefix \(now 18\)"):
        Taps(Plain(), ["block"], num_prefix=18)(images)


def test_a_grid_that_is_no_square_can_be_given(images):
    taps = Taps(Plain(), ["block"], num_prefix=1, grid=(2, 8))
    assert taps(images).tokens["block"].grid == (2, 8)


def test_channels_of_named_modules_are_known_after_a_probe(images):
    model = Plain().train()
    before = copy.deepcopy(model.state_dict())
    taps = Taps(model, ["conv"])
    with pytest.raises(RuntimeError, match=r"Taps\.probe\(images\)"):
        _ = taps.dims
    assert taps.probe(images) == {"conv": 6} == taps.dims
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_module_that_does_not_exist_is_refused_with_its_neighbors():
    with pytest.raises(ValueError, match=r"Plain has no module 'convs'; there are conv"):
        Taps(Plain(), ["convs"])


def test_a_module_that_does_not_run_is_named(images):
    with pytest.raises(RuntimeError, match="Plain unused did not run"):
        Taps(Plain(), ["unused"])(images)


def test_an_output_that_is_no_feature_map_is_named(images):
    with pytest.raises(
        ValueError, match=r"head must give \[B, C, H, W\] or \[B, N, D\], got \[2, 5\]"
    ):
        Taps(Plain(), ["head"])(images)


def test_numbers_need_timms_interface():
    with pytest.raises(TypeError, match="Plain has no forward_intermediates"):
        Taps(Plain(), [0])


def test_outputs_with_logits_and_tuples_of_tensors_are_understood(images):
    class Answer:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(Plain):
        def forward(self, images):
            return Answer(super().forward(images))

    class Pair(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), None

    model = Wrapped()
    assert Taps(model)(images).logits.shape == (2, 5)
    sequence = nn.Sequential(Pair(1, 4, 4, stride=4))
    sequence.forward = lambda x: sequence[0](x)[0]
    assert Taps(sequence, ["0"])(images[:, :1]).tokens["0"].data.shape == (2, 64, 4)


def test_an_output_without_logits_is_refused(images):
    class Dictionary(Plain):
        def forward(self, images):
            return {"out": super().forward(images)}

    with pytest.raises(
        TypeError, match=r"must return its logits, or an object with \.logits, got dict"
    ):
        Taps(Dictionary())(images)


def test_dropped_patches_are_named_as_what_leaves_no_grid(tiny, images):
    model = timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5, **tiny)
    taps = Taps(model, [-1])
    with pytest.raises(ValueError, match=r"drops patches in training \(patch_drop\)"):
        taps(images)
    assert Taps(model)(images).final is None
    model.eval()
    assert taps(images).tokens[2].grid == (4, 4)


def test_the_stem_of_a_resnet_is_stage_0(images):
    model = timm.create_model("resnet10t").eval()
    taps = Taps(model, [0, 4])
    assert taps.dims == {0: 64, 4: 512}
    assert taps(images).tokens[4].source.endswith("layer4")


# Small models of timm's families, by how their modules lay out what they give:
# (timm name, arguments, image side, a module that feature_info lists).
ONE_HEAD = {"embed_dim": 32, "num_heads": 1}
VIT_64 = {"img_size": 64, "depth": 2, **ONE_HEAD}
VIT_28 = VIT_64 | {"img_size": 28}
LEVIT = {"embed_dim": (16, 32, 32), "num_heads": (1, 2, 2), "depth": (1, 1, 1), "key_dim": 16}
CONVIT = VIT_64 | {"num_heads": 2, "local_up_to_layer": 1}
FAMILIES = [
    # [B, H, W, C]
    ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 64}, 64, "layers.1"),
    ("swinv2_tiny_window8_256", SWIN | {"img_size": 64}, 64, "layers.2"),
    ("test_mambaout", {}, 64, "stages.1"),
    # [B, C, H, W]
    ("swinv2_cr_tiny_224", SWIN | {"img_size": 64}, 64, "stages.1"),
    ("test_convnext", {}, 64, "stages.2"),
    ("test_resnet", {}, 64, "layer2"),
    ("test_efficientnet", {}, 64, "blocks.1"),
    # [B, N, D]
    ("levit_128s", LEVIT | {"img_size": 64}, 64, "stages.1"),
    ("xcit_nano_12_p16_224", VIT_64, 64, "blocks.1"),
    ("cait_xxs24_224", VIT_64, 64, "blocks.1"),
    ("convit_tiny", CONVIT, 64, "blocks.0"),
    # [B, prefix + N, D]
    ("convit_tiny", CONVIT, 64, "blocks.1"),
    ("vit_tiny_patch16_224", VIT_64, 64, "blocks.1"),
    ("deit_tiny_distilled_patch16_224", VIT_64, 64, "blocks.0"),
    ("vit_small_patch14_reg4_dinov2", VIT_28, 28, "blocks.1"),  # 5 + 4 tokens: not 3 x 3
    ("vit_medium_patch16_reg4_gap_256", VIT_64, 64, "blocks.1"),
    ("beit_base_patch16_224", VIT_64, 64, "blocks.1"),
    ("eva02_tiny_patch14_224", VIT_28, 28, "blocks.1"),
    *(
        pytest.param(name, {}, side, module, marks=pytest.mark.slow)
        for name, side, module in (
            ("davit_tiny", 64, "stages.1"),
            ("pvt_v2_b0", 64, "stages.1"),
            ("maxvit_pico_rw_256", 256, "stages.1"),
            ("pit_ti_224", 224, "transformers.1"),
            ("sequencer2d_s", 64, "stages.1"),  # [B, H, W, C], as the next
            ("volo_d1_224", 224, "network.2"),
            ("focalnet_tiny_srf", 64, "layers.1"),
            ("poolformer_s12", 64, "stages.1"),
            ("caformer_s18", 64, "stages.1"),
            ("nest_tiny", 224, "levels.1"),
            ("gcvit_xxtiny", 224, "stages.1"),
            ("coatnet_pico_rw_224", 224, "stages.2"),
            ("edgenext_xx_small", 64, "stages.1"),
            ("tiny_vit_5m_224", 224, "stages.1"),
            ("mobilevit_xxs", 64, "stages.2"),
            ("regnetx_002", 64, "s2"),
            ("efficientformer_l1", 224, "stages.3"),  # [B, N, D], the stages before it are maps
            ("mixer_s32_224", 224, "blocks.1"),
        )
    ),
]


@pytest.mark.parametrize(("name", "options", "side", "module"), FAMILIES)
@torch.no_grad()
def test_a_module_by_name_gives_what_it_gives_by_number(name, options, side, module):
    model = timm.create_model(name, **options).eval()
    images = torch.randn(1, 3, side, side)
    modules = [str(info["module"]) for info in Taps(model, [0]).model.feature_info]
    index = modules.index(module)
    expected = Taps(model, [index])(images).tokens[index]
    tokens = Taps(model, [module])(images).tokens[module]
    assert tokens.grid == expected.grid
    torch.testing.assert_close(tokens.data, expected.data)


class Given(nn.Module):
    """A model whose only module gives a map of a shape."""

    def __init__(self, *shape):
        super().__init__()
        self.part = nn.Identity()
        self.map = torch.arange(float(torch.Size(shape).numel())).reshape(shape)

    def forward(self, images):
        return self.part(self.map).flatten(1)


@pytest.mark.parametrize(
    ("shape", "size", "grid", "dim"),
    [
        ((2, 5, 4, 4), (32, 32), (4, 4), 5),
        ((2, 4, 4, 5), (32, 32), (4, 4), 5),
        ((2, 96, 1, 1), (32, 32), (1, 1), 96),
        ((2, 7, 7, 49), (224, 224), (7, 7), 49),
        ((2, 16, 4, 2), (64, 32), (4, 2), 16),
        ((2, 4, 2, 8), (64, 32), (4, 2), 8),
        ((2, 12, 5, 8), (33, 50), (5, 8), 12),  # a stride of 7, rounded up
        ((2, 8, 5), (64, 32), (4, 2), 5),
        ((2, 16, 5), (16, 256), (1, 16), 5),  # a square number, but no square image
    ],
)
def test_the_images_aspect_tells_where_channels_are(shape, size, grid, dim):
    tokens = Taps(Given(*shape), ["part"])(torch.zeros(2, 3, *size)).tokens["part"]
    assert (tokens.grid, tokens.dim) == (grid, dim)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 4, 4, 4), (32, 32)),
        ((2, 3, 5, 6), (32, 32)),  # neither way a square
        ((2, 2, 4, 8), (32, 64)),  # either way twice as wide as high
    ],
)
def test_a_layout_that_nobody_knows_is_refused_until_the_model_says_it(shape, size):
    model, images = Given(*shape), torch.zeros(2, 3, *size)
    with pytest.raises(ValueError, match=rf"Given part gives \[{str(shape)[1:-1]}\].*output_fmt"):
        Taps(model, ["part"])(images)
    model.output_fmt = "NHWC"
    tokens = Taps(model, ["part"])(images).tokens["part"]
    torch.testing.assert_close(tokens.data, model.map.flatten(1, 2))
    model.output_fmt = "NCHW"
    assert Taps(model, ["part"])(images).tokens["part"].grid == shape[2:]


def test_a_convolution_gives_its_channels_first_even_as_a_cube():
    model = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.Flatten()).eval()
    images = torch.randn(2, 3, 32, 32)
    for name, part in (("0", model[:1]), ("1", model[:2])):
        tokens = Taps(model, [name])(images).tokens[name]
        torch.testing.assert_close(tokens.data, part(images).flatten(2).mT)


@pytest.mark.parametrize("shape", [(8, 4, 4, 5), (8, 16, 5), (1, 16, 5)])
def test_windows_are_not_taken_for_images(shape):
    with pytest.raises(ValueError, match=r"Given part gives \[.*\] for 2 images"):
        Taps(Given(*shape), ["part"])(torch.zeros(2, 3, 32, 32))


HIERA = {"img_size": (64, 64), "stages": (1, 1, 1, 1), "embed_dim": 16}
CROSSVIT = {"img_scale": (1.0, 224 / 240), "embed_dim": (8, 16), "num_heads": (1, 1)}


@pytest.mark.parametrize(
    ("name", "options", "side", "module", "reason"),
    [
        # Hiera's blocks order tokens by windows; CrossViT's have two branches.
        ("hiera_tiny_224", HIERA, 64, "blocks.0", "orders tokens by windows"),
        ("crossvit_tiny_240", CROSSVIT, 240, "blocks.1", "several maps"),
        ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 64}, 64, "layers.0.blocks.0.attn",
         "windows or patches"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_maps_that_only_a_number_can_name_are_refused_by_name(name, options, side, module, reason):
    model = timm.create_model(name, **options).eval()
    with pytest.raises(ValueError, match=rf"Taps: {name} {module}.*{reason}"):
        Taps(model, [module])(torch.randn(1, 3, side, side))
