"""Checkpoints with the released code's names load, and compute what the released models compute."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from fastkd import create_teacher
from fastkd.models import (
    LiftVisionTransformer,
    WideLastVisionTransformer,
    create_student,
    load_released_checkpoint,
)

# Heads of 64 channels, as in every DeiT: the released names say nothing of heads.
BASE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 1, "depth": 3}
CLASSES, WIDTH = 7, 128


@pytest.fixture
def deit():
    return timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES, **BASE).eval()


@pytest.fixture
def lift_state(deit):
    """As the released Lift saves itself, the dead norm and head of its DeiT included."""
    return {
        **{f"base_model.{name}": tensor for name, tensor in deit.state_dict().items()},
        "projections.2.weight": torch.randn(WIDTH, 64),
        "layer_norms.2.weight": torch.randn(WIDTH),
        "layer_norms.2.bias": torch.randn(WIDTH),
        "head.weight": torch.randn(CLASSES, WIDTH),
        "head.bias": torch.randn(CLASSES),
    }


@pytest.fixture
def widelast():
    model = create_student(
        "deit_tiny_patch16_224", "widelast", width=WIDTH, num_classes=CLASSES, **BASE
    )
    return model.eval()


def released_lift_forward(deit, state, images):
    """The released model's forward pass, from its description rather than from our modules."""
    _, (tokens,) = deit.forward_intermediates(images, [-1], output_fmt="NLC")
    lifted = F.linear(tokens, state["projections.2.weight"])
    normed = F.layer_norm(
        lifted, (WIDTH,), state["layer_norms.2.weight"], state["layer_norms.2.bias"], 1e-5
    )
    return F.linear(normed.mean(1), state["head.weight"], state["head.bias"])


def test_lift_computes_what_the_released_model_computes(deit, lift_state, images):
    model = load_released_checkpoint(lift_state).eval()
    assert isinstance(model, LiftVisionTransformer)
    torch.testing.assert_close(model(images), released_lift_forward(deit, lift_state, images))


def normed(tokens, state, name):
    return F.layer_norm(
        tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6
    )


def linear(tokens, state, name):
    return F.linear(tokens, state[f"{name}.weight"], state.get(f"{name}.bias"))


def released_block_forward(tokens, state, block, heads):
    """A pre-norm transformer block, by its parameters' names."""
    count, length, _ = tokens.shape
    qkv = linear(normed(tokens, state, f"{block}.norm1"), state, f"{block}.attn.qkv")
    query, key, value = qkv.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    tokens = tokens + linear(mixed, state, f"{block}.attn.proj")
    hidden = F.gelu(linear(normed(tokens, state, f"{block}.norm2"), state, f"{block}.mlp.fc1"))
    return tokens + linear(hidden, state, f"{block}.mlp.fc2")


def released_widelast_forward(state, images):
    """The released model's forward pass, from its description rather than from our modules."""
    patches = F.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8
    )
    patches = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches], 1)
    tokens = tokens + state["pos_embed"]
    for block in ("blocks.0", "blocks.1"):
        tokens = released_block_forward(tokens, state, block, heads=1)
    tokens = normed(linear(tokens, state, "blocks.2.proj_in"), state, "blocks.2.proj_norm")
    tokens = released_block_forward(tokens, state, "blocks.2", heads=2)  # 64 channels each
    return linear(normed(tokens, state, "norm")[:, 0], state, "head")


def test_widelast_computes_what_the_released_model_computes(widelast, images):
    # Nothing at its initial value, where a norm or a bias that is left out would not be seen.
    state = {name: torch.randn_like(tensor) / 4 for name, tensor in widelast.state_dict().items()}
    model = load_released_checkpoint(state).eval()
    assert isinstance(model, WideLastVisionTransformer)
    torch.testing.assert_close(model(images), released_widelast_forward(state, images))


def test_the_architecture_is_read_off_the_shapes(lift_state):
    model = load_released_checkpoint(lift_state)
    assert (len(model.blocks), model.embed_dim, model.num_features) == (3, 64, WIDTH)
    assert model.patch_embed.img_size == (32, 32) and model.patch_embed.patch_size == (8, 8)
    assert (model.num_classes, model.in_chans) == (CLASSES, 3)


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_usual_wrapping_is_read(wrap, prefix, lift_state, images, tmp_path):
    state = {prefix + name: tensor for name, tensor in lift_state.items()}
    wrapped = state if wrap == "bare" else {wrap: state, "epoch": 300}
    torch.save(wrapped, tmp_path / "lift.pth")
    expected = load_released_checkpoint(lift_state).eval()(images)
    for source in (tmp_path / "lift.pth", str(tmp_path / "lift.pth"), wrapped):
        torch.testing.assert_close(load_released_checkpoint(source).eval()(images), expected)


def test_a_released_lift_fills_a_module_of_ours(lift_state, images, tmp_path):
    torch.save(lift_state, tmp_path / "lift.pth")
    module = load_released_checkpoint(lift_state)
    torch.nn.init.zeros_(module.head.weight)
    expected = load_released_checkpoint(lift_state).eval()(images)
    filled = create_teacher(module, checkpoint=tmp_path / "lift.pth")
    torch.testing.assert_close(filled(images).logits, expected)


def test_safetensors_are_read(widelast, images, tmp_path):
    save_file(widelast.state_dict(), tmp_path / "widelast.safetensors")
    model = load_released_checkpoint(tmp_path / "widelast.safetensors").eval()
    torch.testing.assert_close(model(images), widelast(images))


def test_raw_weights_are_read_where_averaged_ones_lie_beside(lift_state, tmp_path):
    averaged = {name: torch.zeros_like(tensor) for name, tensor in lift_state.items()}
    torch.save({"model": lift_state, "model_ema": averaged}, tmp_path / "both.pth")
    model = load_released_checkpoint(tmp_path / "both.pth")
    assert torch.equal(model.head.weight, lift_state["head.weight"])


def test_no_code_is_unpickled(tmp_path):
    torch.save(
        {"model": {"head.weight": torch.zeros(1)}, "args": pytest.raises}, tmp_path / "a.pth"
    )
    with pytest.raises(ValueError, match=r"more than plain state.*not loaded for safety"):
        load_released_checkpoint(tmp_path / "a.pth")


def test_another_number_of_classes_gets_a_new_head(lift_state, images):
    model = load_released_checkpoint(lift_state, num_classes=3)
    assert model(images).shape == (2, 3)
    assert torch.equal(model.lift.proj.weight, lift_state["projections.2.weight"])


def test_differences_are_listed(lift_state):
    del lift_state["layer_norms.2.bias"]
    lift_state["base_model.blocks.1.extra"] = torch.zeros(1)
    lift_state["base_model.cls_token"] = torch.zeros(1, 1, 63)
    with pytest.raises(ValueError) as error:
        load_released_checkpoint(lift_state)
    for part in (
        'Missing key(s) in state_dict: "norm.norm.bias"',
        'Unexpected key(s) in state_dict: "blocks.1.extra"',
        "size mismatch for cls_token",
    ):
        assert part in str(error.value)


def test_of_many_differences_the_first_are_listed(lift_state):
    state = {name: tensor for name, tensor in lift_state.items() if ".attn." not in name}
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.weight.? and 4 more"):
        load_released_checkpoint(state)


def test_a_projection_of_an_earlier_block_is_not_taken_for_the_lift(lift_state):
    lift_state["projections.0.weight"] = torch.zeros(WIDTH, 64)
    with pytest.raises(ValueError, match=r"Unexpected .*projections\.0\.weight"):
        load_released_checkpoint(lift_state)


@pytest.mark.parametrize("name", ["base_model.patch_embed.proj.weight", "base_model.pos_embed"])
def test_a_name_that_sizes_the_model_is_asked_for(name, lift_state):
    del lift_state[name]
    with pytest.raises(ValueError, match=rf"has no '{name.removeprefix('base_model.')}'"):
        load_released_checkpoint(lift_state)


def test_widths_that_do_not_divide_into_heads_ask_for_head_dim(lift_state, images):
    with pytest.raises(ValueError, match="64 channels are no heads of 48; set head_dim"):
        load_released_checkpoint(lift_state, head_dim=48)
    assert load_released_checkpoint(lift_state, head_dim=16).blocks[0].attn.num_heads == 4


def test_positions_that_are_no_square_grid_are_refused(lift_state):
    lift_state["base_model.pos_embed"] = torch.zeros(1, 19, 64)
    with pytest.raises(ValueError, match=r"pos_embed .*19 positions"):
        load_released_checkpoint(lift_state)


def test_other_checkpoints_are_refused(deit):
    with pytest.raises(ValueError, match="neither a released Lift"):
        load_released_checkpoint(deit.state_dict())


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"there is no file 'nowhere\.pth'"):
        load_released_checkpoint("nowhere.pth")
