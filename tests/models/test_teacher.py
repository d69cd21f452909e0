"""A teacher is frozen, loads from anywhere, and is fed what it was trained on."""

import copy

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from fastkd import create_teacher
from fastkd.models import Teacher, create_student
from fastkd.models.weights import read_weights

NAME = "vit_tiny_patch16_224"  # timm's mean and std for it are 0.5
HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def vit(tiny):
    return timm.create_model(NAME, **tiny).eval()


@pytest.fixture
def checkpoint(vit, tmp_path):
    torch.save({"state_dict": vit.state_dict(), "epoch": 3}, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


@pytest.fixture
def shape(tiny):
    """Arguments of the tiny ViT without its number of classes."""
    return {k: v for k, v in tiny.items() if k != "num_classes"}


def test_a_teacher_has_no_gradient_and_stays_in_eval_mode(tiny, images):
    teacher = create_teacher(NAME, pretrained=False, drop_rate=0.5, **tiny)
    teacher.tap([-1])
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    output = teacher(images)
    assert not output.logits.requires_grad and not output.tokens[2].data.requires_grad
    torch.testing.assert_close(teacher(images).logits, output.logits)


def test_taps_are_chosen_by_tap(vit, images):
    teacher = create_teacher(vit)
    assert teacher(images).tokens == {}
    taps = teacher.tap([-1, 0])
    assert taps.indices == [2, 0] and taps.dims == {2: 24, 0: 24}
    assert set(teacher(images).tokens) == {0, 2}


def test_any_module_is_a_teacher(images):
    module = nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = create_teacher(module)
    teacher.tap(["0"])
    output = teacher(images)
    assert output.logits.shape == (2, 5) and output.tokens["0"].grid == (4, 4)
    assert teacher.prepare(images) is images


def test_images_are_renormalized_from_the_students_statistics_to_the_teachers(vit):
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (
        torch.tensor(s).view(3, 1, 1) for s in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    teacher = create_teacher(vit)
    teacher.set_input_stats(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    torch.testing.assert_close(teacher.prepare((pixels - mean) / std), (pixels - 0.5) / 0.5)
    torch.testing.assert_close(teacher((pixels - mean) / std).logits, vit((pixels - 0.5) / 0.5))


@pytest.mark.parametrize("stats", [(HALF, HALF), (list(HALF), list(HALF)), (None, None)])
def test_images_with_the_teachers_statistics_are_left_alone(vit, images, stats):
    teacher = create_teacher(vit)
    teacher.set_input_stats(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    teacher.set_input_stats(*stats)  # the last call counts
    assert teacher.prepare(images) is images


def test_own_statistics_can_be_given(vit, images):
    teacher = create_teacher(vit, mean=(0, 0, 0), std=(1, 1, 1))
    teacher.set_input_stats(HALF, HALF)
    torch.testing.assert_close(teacher.prepare(images), images * 0.5 + 0.5)


def test_statistics_of_another_channel_count_are_not_taken_for_the_models(tiny):
    teacher = create_teacher(NAME, pretrained=False, in_chans=1, **tiny)
    assert teacher.mean is None
    teacher.set_input_stats([0.3], [0.2])
    images = torch.randn(1, 1, 32, 32)
    assert teacher.prepare(images) is images


def test_renormalized_images_keep_their_dtype(vit, images):
    teacher = create_teacher(vit)
    teacher.set_input_stats(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert teacher.prepare(images.bfloat16()).dtype == torch.bfloat16


def test_statistics_do_not_enter_the_state_dict(vit):
    teacher = create_teacher(vit)
    teacher.set_input_stats(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert teacher.state_dict().keys() == {f"model.{name}" for name in vit.state_dict()}


@pytest.mark.parametrize("mean,std", [(HALF, None), (None, HALF), (HALF, (0.5,))])
def test_half_given_statistics_are_refused(vit, mean, std):
    with pytest.raises(ValueError, match="mean and std must both"):
        create_teacher(vit, mean=mean, std=std)
    with pytest.raises(ValueError, match="mean and std must both"):
        create_teacher(vit).set_input_stats(mean, std)


def test_statistics_of_another_channel_count_are_refused(vit):
    with pytest.raises(ValueError, match="takes 3 channels, got statistics of 1"):
        create_teacher(vit).set_input_stats([0.5], [0.5])


def test_a_fixed_size_model_gets_its_own_size(vit):
    teacher = create_teacher(vit)
    teacher.tap([-1])
    assert teacher.input_size == (32, 32)
    assert teacher(torch.randn(2, 3, 24, 40)).tokens[2].grid == (4, 4)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_a_cnn_takes_images_as_they_come(name, images):
    teacher = create_teacher(name, pretrained=False)
    assert teacher.input_size is None and teacher.prepare(images) is images


def test_a_model_of_dynamic_size_takes_images_as_they_come():
    with torch.device("meta"):
        teacher = create_teacher(
            "vit_small_patch14_reg4_dinov2", pretrained=False, dynamic_img_size=True
        )
    assert teacher.input_size is None


def test_an_input_size_of_ones_own_is_kept(images):
    teacher = create_teacher("resnet10t", pretrained=False, input_size=64)
    teacher.tap([4])
    assert teacher(images).tokens[4].grid == (2, 2)


def test_an_input_size_against_a_fixed_model_points_to_img_size(vit):
    with pytest.raises(ValueError, match=r"fixed to images of \(32, 32\).*img_size=64"):
        create_teacher(vit, input_size=64)


def test_a_checkpoint_brings_its_weights_and_number_of_classes(vit, checkpoint, shape, images):
    teacher = create_teacher(NAME, checkpoint=checkpoint, **shape)
    torch.testing.assert_close(teacher(images).logits, vit(images))


def test_a_checkpoint_fills_a_module(vit, checkpoint, tiny, images):
    teacher = create_teacher(timm.create_model(NAME, **tiny), checkpoint=str(checkpoint))
    torch.testing.assert_close(teacher(images).logits, vit(images))


def test_a_checkpoint_of_another_image_size_is_resampled(checkpoint, shape):
    teacher = create_teacher(NAME, checkpoint=checkpoint, **shape | {"img_size": 48})
    teacher.tap([0])
    assert teacher.input_size == (48, 48)
    assert teacher(torch.randn(1, 3, 32, 32)).tokens[0].grid == (6, 6)


def test_a_checkpoint_can_give_features_alone(vit, checkpoint, shape, images):
    teacher = create_teacher(NAME, checkpoint=checkpoint, num_classes=0, **shape)
    torch.testing.assert_close(
        teacher(images).logits, vit.forward_head(vit.forward_features(images), pre_logits=True)
    )


def test_a_backbone_checkpoint_has_no_head(vit, shape, images, tmp_path):
    state = {k: v for k, v in vit.state_dict().items() if not k.startswith("head")}
    torch.save(state, tmp_path / "backbone.pth")
    teacher = create_teacher(NAME, checkpoint=tmp_path / "backbone.pth", **shape)
    assert teacher(images).logits.shape == (2, 24)


def test_a_student_of_ours_can_teach(tiny, images, tmp_path):
    lift = create_student("deit_tiny_patch16_224", "lift", width=48, **tiny).eval()
    torch.save(lift.state_dict(), tmp_path / "lift.pth")
    name, options = "deit_tiny_lift_patch16_224", {**tiny, "width": 48}
    teacher = create_teacher(name, checkpoint=tmp_path / "lift.pth", **options)
    torch.testing.assert_close(teacher(images).logits, lift(images))


def test_a_head_that_the_checkpoint_does_not_have_is_refused(checkpoint, shape):
    with pytest.raises(ValueError, match="has a head of 7 classes, got num_classes=10"):
        create_teacher(NAME, checkpoint=checkpoint, num_classes=10, **shape)


@pytest.mark.parametrize("classes", [None, 0])
def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, shape, classes):
    options = shape | {"depth": 4, "num_classes": classes}
    with pytest.raises(ValueError, match=r"teacher\.pth' does not fit 'vit_tiny.*blocks\.3"):
        create_teacher(NAME, checkpoint=checkpoint, **options)


def test_a_missing_checkpoint_is_named(vit):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint 'nowhere\.pth'"):
        create_teacher(vit, checkpoint="nowhere.pth")


def test_without_network_the_error_names_the_model_and_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "weights of 'resnet10t.c3_in1k'.*could not be downloaded.*checkpoint=PATH"
    with pytest.raises(RuntimeError, match=message):
        create_teacher("resnet10t.c3_in1k", cache_dir=tmp_path)


def test_weights_that_were_never_published_are_not_looked_for():
    message = "publishes no weights for 'deit_tiny_lift_patch16_224'; give local weights"
    with pytest.raises(ValueError, match=message):
        create_teacher("deit_tiny_lift_patch16_224")


def test_a_random_head_on_published_weights_is_refused():
    with pytest.raises(ValueError, match="head of 1000 classes, got num_classes=10"):
        create_teacher("resnet10t", num_classes=10)


def test_an_unknown_name_is_refused_with_its_neighbors(checkpoint):
    for options in ({}, {"checkpoint": checkpoint}):
        with pytest.raises(
            ValueError, match=r"create_teacher: .*timm has no model 'resnet10tt'.*resnet10t"
        ):
            create_teacher("resnet10tt", **options)


def test_options_of_timm_for_a_module_are_refused(vit):
    with pytest.raises(TypeError, match="num_classes, img_size apply where a model is built"):
        create_teacher(vit, num_classes=3, img_size=64)


def test_neither_a_name_nor_a_module_is_refused():
    with pytest.raises(TypeError, match=r"must be a timm name, a file or an nn\.Module, got int"):
        create_teacher(3)


def test_a_copied_teacher_reads_its_own_model(vit, images):
    teacher = create_teacher(vit)
    teacher.tap([0])
    twin = copy.deepcopy(teacher)
    expected = twin(images).logits
    for parameter in vit.parameters():
        parameter.zero_()
    torch.testing.assert_close(twin(images).logits, expected)


def test_compiles_as_one_graph(vit, images):
    teacher = Teacher(vit, mean=HALF, std=HALF)
    teacher.set_input_stats(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    teacher.tap([-1])

    def step(x):
        output = teacher(x)
        return output.logits, output.tokens[2].data

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(images), step(images), strict=True):
        torch.testing.assert_close(ours, expected)


def fastkd_checkpoint(vit, **measured):
    averaged = {name: tensor + 1 for name, tensor in vit.state_dict().items()}
    return {
        "format": "fastkd-checkpoint",
        "state_dict": vit.state_dict(),
        "state_dict_ema": averaged,
        "measured": measured,
        "optimizer": {},
    }


@pytest.mark.parametrize(
    ("measured", "averaged"),
    [
        ({"top1": 70.0, "ema_top1": 10.0}, False),
        ({"top1": 70.0, "ema_top1": 71.0}, True),
        ({"top1": 70.0}, False),
        ({}, False),
    ],
)
def test_a_checkpoint_of_a_run_gives_its_better_weights(vit, tmp_path, measured, averaged):
    torch.save(fastkd_checkpoint(vit, **measured), tmp_path / "last.pth")
    weights = read_weights("test", tmp_path / "last.pth")
    torch.testing.assert_close(weights["head.bias"], vit.head.bias.detach() + averaged)


def test_a_checkpoints_tensors_are_not_kept_a_second_time(checkpoint, shape):
    teacher = create_teacher(NAME, checkpoint=checkpoint, **shape)
    assert "state_dict" not in teacher.model.pretrained_cfg


def test_of_a_checkpoint_that_does_not_fit_the_first_names_are_listed(checkpoint):
    with pytest.raises(ValueError, match=r"does not fit 'resnet10t'.* more\. ") as error:
        create_teacher("resnet10t", checkpoint=checkpoint)
    assert len(str(error.value)) < 1000


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match=r"x\.pth is torn or no file of weights"):
        create_teacher(NAME, checkpoint=tmp_path / "x.pth")


def test_a_model_without_a_size_of_its_own_gets_images_of_img_size(images):
    teacher = create_teacher("resnet10t", pretrained=False, img_size=64)
    assert teacher.prepare(images).shape == (2, 3, 64, 64)
