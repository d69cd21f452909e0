"""A Lift student's fused passes against its plain layers, and where plain layers are taken."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastkd.models import Taps, create_student


@pytest.fixture
def student(tiny):
    return create_student("vit_tiny_patch16_224", "lift", width=48, **tiny)


@pytest.fixture
def teacher_tokens():
    return torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1))


def plain(student):
    twin = copy.deepcopy(student)
    twin.fused_lift = False
    return twin


def operators(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fastkd" in str(node.target)]


def writes_lifted_tokens(student, images) -> bool:
    """Whether the LayerNorm of torch runs on [B, N, width]."""
    with torch.profiler.profile(record_shapes=True) as profile:
        student(images)
    shapes = [e.input_shapes[0] for e in profile.events() if e.name == "aten::layer_norm"]
    return [2, 17, 48] in shapes


def test_logits_and_gradients_equal_those_of_the_plain_layers(student, images):
    twin = plain(student)
    outputs = [model(images) for model in (student, twin)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(student.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("gradient", [False, True])
def test_logits_are_computed_without_the_lifted_tokens(gradient, student, images):
    with torch.set_grad_enabled(gradient):
        assert not writes_lifted_tokens(student, images)
        assert writes_lifted_tokens(plain(student), images)


@pytest.mark.parametrize("training", [False, True])
def test_forward_is_features_then_head_in_both_modes(training, student, images):
    student.train(training)
    features = student.forward_features(images)
    torch.testing.assert_close(student(images), student.forward_head(features))


def test_train_and_eval_agree_where_nothing_is_dropped(student, images):
    torch.testing.assert_close(student.eval()(images), student.train()(images))


def test_the_heads_dropout_is_of_the_fused_pass_too(tiny, images):
    student = create_student("vit_tiny_patch16_224", "lift", width=48, **tiny, drop_rate=0.5)
    twin, outputs = plain(student), []
    for model in (student, twin):
        torch.manual_seed(4)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(student(images), student(images))


@pytest.mark.parametrize("drop", ["patch_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_other_dropout_is_that_of_the_plain_layers(drop, tiny, images):
    student = create_student("vit_tiny_patch16_224", "lift", width=48, **tiny, **{drop: 0.5})
    twin, outputs = plain(student), []
    for model in (student, twin):
        torch.manual_seed(4)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)


def test_an_attention_mask_reaches_the_blocks(student, images):
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    masked = student(images, attn_mask=mask)
    torch.testing.assert_close(masked, plain(student)(images, attn_mask=mask))
    assert not torch.allclose(masked, student(images))


def test_one_pass_gives_logits_and_distance(student, images, teacher_tokens):
    tokens = Taps(student).last_block(images)
    logits, distance = student.forward_head_kd(
        tokens.data, teacher_tokens, "cosine", grid=tokens.grid
    )
    lifted = student.forward_features(images)[:, 1:]
    torch.testing.assert_close(logits, student(images))
    expected = 1 - F.cosine_similarity(lifted, teacher_tokens, dim=-1).mean()
    torch.testing.assert_close(distance, expected)


def test_one_pass_is_refused_where_the_lift_cannot_be_fused(student, images, teacher_tokens):
    tokens = Taps(student).last_block(images)
    student.reset_classifier(7, "max")
    with pytest.raises(ValueError, match="forward_head_kd: needs global_pool='avg'"):
        student.forward_head_kd(tokens.data, teacher_tokens)


def test_the_last_block_is_tapped_before_the_lift(student, images):
    taps = Taps(student, [0])
    tokens = taps.last_block(images)
    torch.testing.assert_close(tokens.data, Taps(student, [-1])(images).tokens[2].data)
    assert (tokens.grid, tokens.num_prefix) == ((4, 4), 1)
    assert tokens.source.endswith("blocks.2")


def test_the_last_block_of_a_model_tapped_by_name_is_not_known(student, images):
    with pytest.raises(ValueError, match=r"tapped by name \(norm\)"):
        Taps(student, ["norm"]).last_block(images)


@pytest.mark.parametrize("name", ["norm", "norm.proj", "norm.norm", "blocks"])
def test_a_hook_on_what_the_fused_pass_does_not_call_is_heard(name, student, images):
    tokens = Taps(student.eval(), [name], num_prefix=1)(images).tokens[name]
    assert tokens.data.shape[1] == 16


def test_exchanged_layers_are_called(student, images):
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    student.norm.norm = nn.Identity()
    expected = student(images) - student.head.bias
    student.norm.proj.__class__ = Halved
    torch.testing.assert_close(student(images) - student.head.bias, expected / 2)


@pytest.mark.parametrize("strict", [False, True])
def test_export_records_plain_layers(strict, student, images):
    student.eval()
    torch.compile(student, fullgraph=True, backend="eager")(images)  # which export must not reuse
    program = torch.export.export(student, (images,), strict=strict)
    assert operators(program.graph) == []
    torch.testing.assert_close(program.module()(images), student(images))


@pytest.mark.filterwarnings("ignore")  # torch: deprecated, and tracing is no more than it is
def test_tracing_records_plain_layers(student, images):
    student.eval()
    traced = torch.jit.trace(student, images)
    assert "fastkd::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images), student(images))


@pytest.mark.filterwarnings("ignore")
def test_scripting_compiles_plain_layers(student, images):
    student.eval()
    scripted = torch.jit.script(student)
    assert "fastkd::" not in str(scripted.inlined_graph)
    torch.testing.assert_close(scripted(images), student(images))


def test_symbolic_tracing_records_plain_layers(student, images):
    student.eval()
    graph = torch.fx.symbolic_trace(student)
    assert operators(graph.graph) == []
    torch.testing.assert_close(graph(images), student(images))


def test_shapes_are_found_without_storage(student, images):
    assert student.to("meta")(images.to("meta")).shape == (2, 7)


def test_compiled_the_pass_stays_fused(student, images):
    graphs = []

    def record(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    compiled = torch.compile(student, fullgraph=True, backend=record)
    torch.testing.assert_close(compiled(images), plain(student)(images))
    assert operators(graphs[0]) == ["fastkd.lift_kd.default"]


@sdpa_kernel(SDPBackend.MATH)  # the attention that has second derivatives
def test_second_derivatives_are_refused_by_the_fused_pass_and_not_by_the_plain_one(student, images):
    images.requires_grad_()

    def penalise(model):
        (slope,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
        slope.square().sum().backward()

    penalise(plain(student))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        penalise(student)


def test_bfloat16_autocast_gives_the_dtype_of_the_plain_layers(student, images):
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = student(images), plain(student)(images)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    exact = student(images)
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6


def test_a_model_in_bfloat16_runs(student, images):
    student.to(torch.bfloat16)
    assert student(images.bfloat16()).dtype == torch.bfloat16


def test_the_names_of_its_weights_are_those_of_saved_students(student):
    block = [
        *("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"),
        *("attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias"),
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    ]
    saved = [
        *("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
        *(f"blocks.{index}.{name}" for index in range(3) for name in block),
        *("norm.proj.weight", "norm.norm.weight", "norm.norm.bias", "head.weight", "head.bias"),
    ]
    assert list(student.state_dict()) == saved
