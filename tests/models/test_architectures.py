"""The students are timm models in everything, and exactly the ones of the paper."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from timm.optim import param_groups_layer_decay

from fastkd.models import (
    Lift,
    LiftVisionTransformer,
    WideLastBlock,
    WideLastVisionTransformer,
    create_student,
)
from fastkd.models.factory import default_cfgs, rebuilt_by

PARAMETERS = {
    ("plain", None): 5_717_416,
    ("lift", 384): 5_983_528,
    ("widelast", 384): 7_313_896,
    ("uniform", 219): 7_372_759,
}
REGISTERED = {
    "deit_tiny_lift_patch16_224": 5_983_528,
    "deit_tiny_widelast_patch16_224": 7_313_896,
    "deit_tiny_uniform219_patch16_224": 7_372_759,
}
VARIANTS = ["plain", "lift", "widelast", "uniform"]
OURS = ["lift", "widelast"]  # the two that are not timm's own classes


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def student(variant, tiny, width=48, **kwargs):
    width = None if variant == "plain" else width
    return create_student("vit_tiny_patch16_224", variant, width=width, **tiny | kwargs)


@pytest.mark.parametrize("variant,width", PARAMETERS)
def test_parameter_counts_are_the_papers(variant, width):
    with torch.device("meta"):
        model = create_student("deit_tiny_patch16_224", variant, width=width)
    assert count(model) == PARAMETERS[variant, width]


@pytest.mark.parametrize("name", REGISTERED)
def test_timm_creates_the_registered_students(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count(model) == REGISTERED[name]
    assert timm.list_models(name) == [name]


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_students_carry_the_statistics_of_deit(name):
    ours, deit = (timm.get_pretrained_cfg(n) for n in (name, "deit_tiny_patch16_224"))
    for field in ("input_size", "mean", "std", "interpolation", "fixed_input_size"):
        assert getattr(ours, field) == getattr(deit, field)
    assert ours.crop_pct == 0.875  # the published numbers'; timm evaluates DeiT at 0.9
    assert (ours.first_conv, ours.classifier) == (deit.first_conv, deit.classifier)
    assert not ours.has_weights


# Every name that fastkd adds to timm's registry, and the student that it stands for.
CREATED = {
    "deit_tiny_lift_patch16_224": ("lift", None),
    "deit_tiny_widelast_patch16_224": ("widelast", None),
    "deit_tiny_uniform219_patch16_224": ("uniform", 219),
    "fastkd_student": ("plain", None),
}
SOURCES_OF_WEIGHTS = ("url", "hf_hub_id", "tag")


def test_all_registered_names_are_compared_with_what_is_created():
    assert set(default_cfgs) == set(CREATED)


@pytest.mark.parametrize("name", CREATED)
def test_a_registered_student_is_the_created_one(name):
    variant, width = CREATED[name]
    with torch.device("meta"):
        registered = timm.create_model(name)
        created = create_student("deit_tiny_patch16_224", variant, width=width)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (registered, created)]
    assert shapes[0] == shapes[1] and type(registered) is type(created)
    expected = {k: v for k, v in created.pretrained_cfg.items() if k not in SOURCES_OF_WEIGHTS}
    assert registered.pretrained_cfg == expected | {"architecture": name}


@pytest.mark.parametrize(
    ("base", "variant"), [("test_vit", "lift"), ("vit_tiny_patch16_224", "plain")]
)
def test_a_student_by_name_is_fed_as_its_base(base, variant):
    fields = ("mean", "std", "input_size", "crop_pct", "interpolation", "first_conv", "classifier")
    with torch.device("meta"):
        model = timm.create_model("fastkd_student", base=base, variant=variant)
    published = timm.get_pretrained_cfg(base)
    assert {f: model.pretrained_cfg[f] for f in fields} == {
        f: getattr(published, f) for f in fields
    }
    assert not any(model.pretrained_cfg.get(source) for source in SOURCES_OF_WEIGHTS)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: timm.create_model("test_vit", num_classes=3), ("test_vit", "plain", None)),
        (lambda: timm.create_model("test_resnet", in_chans=1), ("test_resnet", "plain", None)),
        (
            lambda: create_student("test_vit", "lift", width=96, img_size=32),
            ("test_vit", "lift", 96),
        ),
        (
            lambda: timm.create_model("deit_tiny_widelast_patch16_224", width=192),
            ("deit_tiny_patch16_224", "widelast", 192),
        ),
        (lambda: create_student("test_vit", "uniform", width=66), ("test_vit", "uniform", 66)),
        # The same weights, but another function.
        (lambda: timm.create_model("test_resnet", global_pool="max"), None),
        (lambda: timm.create_model("test_vit", depth=2), None),
        (lambda: VisionTransformer(embed_dim=24, depth=1, num_heads=2), None),
    ],
)
def test_a_module_of_timm_is_known_by_the_name_that_rebuilds_it(made, expected):
    model = made()
    found = rebuilt_by(model)
    assert (found and (found["model"], found["variant"], found["width"])) == expected
    assert model.training


def test_stochastic_depth_is_a_part_of_what_rebuilds_a_module():
    model = timm.create_model("test_vit", drop_path_rate=0.1)
    assert rebuilt_by(model)["drop_path"] == 0.1


def test_a_module_with_hooks_is_not_rebuilt_without_them():
    model = timm.create_model("test_vit")
    model.blocks[0].register_forward_hook(lambda *_: None)
    assert rebuilt_by(model) is None


def test_lift_classifies_the_mean_of_its_lifted_patch_tokens(tiny, images):
    model = student("lift", tiny).eval()
    x = model.patch_embed(images)
    x = model.blocks(model.norm_pre(model._pos_embed(x)))[:, 1:]
    lifted = torch.nn.functional.layer_norm(
        x @ model.lift.proj.weight.T, (48,), model.lift.norm.weight, model.lift.norm.bias, 1e-5
    )
    torch.testing.assert_close(model(images), model.head(lifted.mean(1)))


def test_widelast_enters_its_wide_block_through_projection_and_norm(tiny, images):
    model = student("widelast", tiny).eval()
    block = model.blocks[-1]
    x = torch.randn(2, 17, 24)
    expected = Block.forward(block, block.proj_norm(x @ block.proj_in.weight.T))
    torch.testing.assert_close(block(x), expected)
    assert block.attn.num_heads == 6 and block.attn.head_dim == 8  # base: 3 heads of 8
    assert model(images).shape == (2, 7)


def test_widelast_has_the_key_names_of_the_released_code():
    with torch.device("meta"):
        ours = create_student(variant="widelast").state_dict().keys()
        base = create_student(variant="plain").state_dict().keys()
    entry = {
        f"blocks.11.{name}" for name in ("proj_in.weight", "proj_norm.weight", "proj_norm.bias")
    }
    assert ours - base == entry and base <= ours


def test_widelast_keeps_drop_path_layer_scale_and_biases_of_the_last_block(tiny):
    model = student("widelast", tiny, drop_path_rate=0.3, qkv_bias=False, init_values=1e-5)
    block = model.blocks[-1]
    assert block.drop_path1.drop_prob == pytest.approx(0.3)
    assert block.attn.qkv.bias is None
    assert block.ls1.gamma.shape == (48,) and torch.all(block.ls1.gamma == 1e-5)
    assert block.mlp.fc1.out_features == 4 * 48


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_parts_are_initialized_as_timm_does(variant, tiny):
    model = student(variant, tiny, num_classes=1000, init_weights="timm")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert torch.all(parameter == 0), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_is_dead(variant, tiny, images):
    model = student(variant, tiny)
    model(images).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_features_then_head(variant, tiny, images):
    model = student(variant, tiny).eval()
    features = model.forward_features(images)
    assert features.shape == (2, 17, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model(images), model.get_classifier()(pooled))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_intermediates_have_the_channels_that_feature_info_says(variant, output_fmt, tiny, images):
    model = student(variant, tiny).eval()
    final, maps = model.forward_intermediates(images, output_fmt=output_fmt)
    axis = 1 if output_fmt == "NCHW" else 2
    assert [m.shape[axis] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [info["reduction"] for info in model.feature_info] == [8, 8, 8]
    torch.testing.assert_close(final, model.forward_features(images))


def test_feature_info_of_widelast_is_wide_in_the_last_block_alone(tiny):
    assert [i["num_chs"] for i in student("widelast", tiny).feature_info] == [24, 24, 48]


def test_normed_intermediates_of_lift_are_lifted_tokens(tiny, images):
    model = student("lift", tiny).eval()
    final, maps = model.forward_intermediates(images, [0, 2], norm=True, output_fmt="NLC")
    assert (
        [m.shape[-1] for m in maps]
        == [48, 48]
        == [model.feature_info[i]["num_chs_norm"] for i in (0, 2)]
    )
    torch.testing.assert_close(maps[1], final[:, 1:])


def test_normed_intermediates_of_widelast_are_for_the_wide_block(tiny, images):
    model = student("widelast", tiny).eval()
    final, maps = model.forward_intermediates(images, [-1], norm=True, output_fmt="NLC")
    torch.testing.assert_close(maps[0], final[:, 1:])
    with pytest.raises(RuntimeError, match=r"normalized_shape=\[48\].*24\]"):
        model.forward_intermediates(images, [0, 2], norm=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_classifier_makes_a_head_as_wide_as_the_features(variant, tiny, images):
    model = student(variant, tiny)
    model.reset_classifier(5)
    assert model.num_classes == 5 and model(images).shape == (2, 5)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_student_can_be_created_without_classes(variant, tiny, images):
    assert student(variant, tiny, num_classes=0)(images).shape[1] in (24, 48)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_lift_pools_patch_tokens_in_every_way_that_reads_no_class_token(pool, tiny, images):
    model = student("lift", tiny, global_pool=pool)
    assert model.global_pool == pool and model(images).shape == (2, 7)


@pytest.mark.parametrize("pool", ["token", "map"])
def test_lift_refuses_pools_that_read_other_than_patch_tokens(pool, tiny):
    with pytest.raises(ValueError, match="global_pool must be one of"):
        student("lift", tiny, global_pool=pool)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        student("lift", tiny).reset_classifier(7, pool)


@pytest.mark.parametrize("variant", OURS)
def test_pooled_norm_models_convert(variant, tiny, images):
    # vit_*_gap_*: no final norm, a norm after the pool
    model = student(variant, tiny, global_pool="avg", fc_norm=True)
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_register_tokens_are_neither_pooled_nor_in_the_way(variant, tiny, images):
    model = student(variant, tiny, reg_tokens=4)
    assert model.num_prefix_tokens == 5
    assert model.forward_intermediates(images, [2])[1][0].shape[2:] == (4, 4)
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", OURS)
def test_no_weight_decay_and_layer_decay_see_every_parameter(variant, tiny):
    model = student(variant, tiny)
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}
    groups = param_groups_layer_decay(
        model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    by_name = {name: scale[id(p)] for name, p in model.named_parameters()}
    last_block = by_name["blocks.2.mlp.fc1.weight"]
    new = "norm.proj.weight" if variant == "lift" else "blocks.2.proj_in.weight"
    assert by_name[new] == last_block > by_name["blocks.1.mlp.fc1.weight"]
    assert by_name["head.weight"] == 1.0 > last_block


@pytest.mark.parametrize("variant", OURS)
def test_gradient_checkpointing_changes_no_gradient(variant, tiny, images):
    model = student(variant, tiny)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for m in (model, twin):
        m(images).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("variant", OURS)
def test_input_size_can_be_changed(variant, tiny):
    model = student(variant, tiny)
    model.set_input_size((48, 32))
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 7)


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize("prune_norm", [True, False])
@pytest.mark.parametrize("keep", [0, 2])
def test_pruned_students_still_run(variant, prune_norm, keep, tiny, images):
    model = student(variant, tiny).eval()
    expected = model.forward_intermediates(images, [keep], intermediates_only=True)[0]
    model.prune_intermediate_layers([keep], prune_norm=prune_norm)
    torch.testing.assert_close(
        model.forward_intermediates(images, [keep], intermediates_only=True)[0], expected
    )
    assert model.forward_features(images).shape[-1] == model.num_features


@pytest.mark.parametrize("variant", OURS)
def test_features_only_gives_maps(variant, tiny, images):
    name = f"deit_tiny_{variant}_patch16_224"
    options = {**tiny, "width": 48, "num_heads": 3, "out_indices": (0, 2), "features_only": True}
    model = timm.create_model(name, **options)
    assert [m.shape[1] for m in model(images)] == model.feature_info.channels()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_timm_checkpoint_round_trips(variant, tiny, images, tmp_path):
    model, other = (student(variant, tiny).eval() for _ in range(2))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    timm.models.load_checkpoint(other, str(tmp_path / "model.pth"))
    torch.testing.assert_close(other(images), model(images))


def test_a_registered_student_loads_a_local_file_through_timm(tiny, images, tmp_path):
    options = {**tiny, "width": 48}
    model = timm.create_model("deit_tiny_lift_patch16_224", **options).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    overlay = {"file": str(tmp_path / "model.pth"), "num_classes": 7}
    loaded = timm.create_model(
        "deit_tiny_lift_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **options
    )
    torch.testing.assert_close(loaded.eval()(images), model(images))


@pytest.mark.parametrize(
    "variant,new", [("lift", ("norm", "head")), ("widelast", ("norm", "head", "blocks.2"))]
)
def test_pretrained_students_start_from_the_base_where_it_fits(variant, new, tiny, tmp_path):
    base = timm.create_model("vit_tiny_patch16_224", **tiny)
    torch.save(base.state_dict(), tmp_path / "base.pth")
    overlay = {"file": str(tmp_path / "base.pth"), "num_classes": 7, "custom_load": False}
    model = student(variant, tiny, pretrained=True, pretrained_cfg_overlay=overlay)
    loaded = model.state_dict()
    for name, tensor in base.state_dict().items():
        if not name.startswith(new):
            assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_as_one_graph(variant, tiny, images):
    model = student(variant, tiny).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_options_of_timm_reach_every_variant(tiny):
    options = {**tiny, "img_size": (48, 32)}
    for variant in VARIANTS:
        model = student(variant, options, in_chans=1, drop_path_rate=0.1)
        assert model(torch.randn(1, 1, 48, 32)).shape == (1, 7)
        assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.05)


@pytest.mark.parametrize("variant", OURS)
def test_new_parts_are_made_on_the_device_and_in_the_dtype_of_the_rest(variant, tiny):
    model = student(variant, tiny, device="meta", dtype=torch.bfloat16)
    model.reset_classifier(3)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_types_are_subclasses_of_timms(tiny):
    assert isinstance(student("lift", tiny), LiftVisionTransformer)
    assert isinstance(student("lift", tiny).lift, Lift)
    assert isinstance(student("widelast", tiny), WideLastVisionTransformer)
    assert isinstance(student("widelast", tiny).blocks[-1], WideLastBlock)
    assert type(student("uniform", tiny)) is VisionTransformer
    assert student("lift", tiny).embed_dim == student("widelast", tiny).embed_dim == 24


def test_plain_takes_any_timm_model():
    assert create_student("resnet10t", num_classes=3).num_classes == 3


@pytest.mark.parametrize(
    "name", ["resnet10t", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"]
)
@pytest.mark.parametrize("variant", OURS)
def test_models_without_such_a_variant_are_refused_by_name(name, variant):
    with pytest.raises(ValueError, match=f"create_student: variant '{variant}'.*got '{name}', a "):
        create_student(name, variant)


def test_uniform_takes_a_distilled_deit():
    with torch.device("meta"):
        model = create_student("deit_tiny_distilled_patch16_224", "uniform", width=219)
    assert model.embed_dim == 219 and model.dist_token.shape[-1] == 219


@pytest.mark.parametrize(
    "name,variant,width,message",
    [
        ("deit_tiny_patch16_225", "plain", None, "did you mean deit_tiny_patch16_224"),
        ("deit_tiny_patch16_224", "lifted", 384, "variant must be one of"),
        ("deit_tiny_patch16_224", "plain", 384, "'plain' has no width, got 384"),
        ("deit_tiny_patch16_224", "widelast", 219, "multiple of the head dimension 64"),
        ("deit_tiny_patch16_224", "uniform", 220, "multiple of the 3 heads"),
        ("vit_small_patch16_18x2_224", "widelast", 384, "must be timm's Block"),
        ("vit_base_patch16_siglip_224", "widelast", 768, "pools by attention"),
    ],
)
def test_wrong_requests_say_what_is_wrong(name, variant, width, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_student(name, variant, width=width)


def test_uniform_has_no_pretrained_weights():
    with pytest.raises(ValueError, match="do not fit variant 'uniform'"):
        create_student(variant="uniform", width=219, pretrained=True)


def test_registered_students_say_that_no_weights_are_published():
    with pytest.raises(
        ValueError, match=r"publishes no weights for 'deit_tiny_lift.*pretrained=False"
    ):
        create_student("deit_tiny_lift_patch16_224", pretrained=True)


@pytest.mark.parametrize("variant", OURS)
def test_a_width_that_is_not_given_is_that_of_the_papers_teacher(variant):
    with torch.device("meta"):
        assert create_student(variant=variant).num_features == 384


def test_uniform_needs_a_width():
    with pytest.raises(ValueError, match=r"'uniform' needs width=.*219 makes deit_tiny"):
        create_student(variant="uniform")


def test_uniform_reads_the_heads_of_blocks_that_do_not_say_how_many():
    with torch.device("meta"):
        model = create_student("vit_small_patch16_18x2_224", "uniform", width=396)
        with pytest.raises(ValueError, match="multiple of the 6 heads"):
            create_student("vit_small_patch16_18x2_224", "uniform", width=400)
    assert model.embed_dim == 396


@pytest.mark.parametrize("variant,width", [("lift", 384), ("widelast", 384), ("uniform", 219)])
def test_a_derived_student_names_no_weights_of_its_base(variant, width):
    with torch.device("meta"):
        cfg = create_student("deit_tiny_patch16_224", variant, width=width).pretrained_cfg
    assert not any(cfg.get(name) for name in ("url", "hf_hub_id", "file", "tag"))
    name = "uniform219" if variant == "uniform" else variant
    assert cfg["architecture"] == f"deit_tiny_{name}_patch16_224"


def test_an_image_size_is_for_models_that_are_built_for_one():
    assert create_student("resnet10t", img_size=64, num_classes=3).num_classes == 3


@pytest.mark.parametrize("name", ["runs/x/best.pth", "best.pth", "weights.safetensors", "./vit"])
def test_a_path_that_is_not_there_is_no_unknown_model(name):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        create_student(name)
