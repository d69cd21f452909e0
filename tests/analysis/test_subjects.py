"""What a MODEL argument means, and how each kind of model sees its images."""

import socket

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fastkd import create_teacher
from fastkd.analysis.tokens import open_subject
from fastkd.data.open_data import open_data
from fastkd.models import (
    LiftVisionTransformer,
    Teacher,
    WideLastVisionTransformer,
    create_student,
    hub_download,
)
from fastkd.training import train
from tests.harness.tiny import FAST, tensor_data, vit

SMALL = {"img_size": 32}
TINY = "test_vit"
PICTURES = [(Image.new("RGB", (40, 40)), 0)]


def same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train(data=tensor_data(), output=folder, student=vit(), **FAST | {"epochs": 1})
    return folder


@pytest.fixture(scope="module")
def named_run(tmp_path_factory):
    """A run whose student can be rebuilt from its recipe, on pictures."""
    folder = tmp_path_factory.mktemp("runs") / "named"
    pictures = [(Image.effect_noise((40, 40), 50 + i).convert("RGB"), i % 2) for i in range(8)]
    options = FAST | {"epochs": 1, "batch_size": 4, "img_size": 32, "num_classes": 2}
    options |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
    train("test_vit", None, (pictures, pictures), folder, **options)
    return folder


def test_untrained_weights_are_the_same_each_time_and_say_so():
    before = torch.get_rng_state()
    first = open_subject(TINY, untrained=True, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)  # another state of the generator for the second
    second = open_subject(TINY, untrained=True, **SMALL)
    assert same_weights(first.model, second.model)
    assert (first.name, first.weights) == (TINY, "untrained")
    assert first.architecture == TINY


def test_a_local_checkpoint_fills_a_timm_model(tmp_path):
    model = timm.create_model(TINY, **SMALL)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    subject = open_subject(TINY, checkpoint=tmp_path / "mine.pth", img_size=32)
    assert same_weights(subject.model, model)
    assert subject.weights == "mine.pth"


def test_without_a_network_the_ways_out_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
    with pytest.raises(RuntimeError, match=r"downloaded.*--checkpoint.*--untrained"):
        open_subject("vit_tiny_patch16_224")


def test_a_model_without_published_weights_names_the_ways_out():
    with pytest.raises(ValueError, match=r"publishes no weights.*--checkpoint.*--untrained"):
        open_subject("deit_tiny_widelast_patch16_224")


def test_a_misspelt_name_is_refused_with_its_neighbors():
    with pytest.raises(ValueError, match="did you mean vit_tiny_patch16_224"):
        open_subject("vit_tiny_patch16_225")


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'runs/lost\.pth'"):
        open_subject("runs/lost.pth")


def test_a_run_is_rebuilt_with_its_own_preprocessing(named_run):
    subject = open_subject(named_run)
    spec = subject.input_spec(open_data(PICTURES, need_train=False))
    assert spec.size == (3, 32, 32)
    assert spec.mean == (0.1, 0.2, 0.3)
    assert subject.preprocessing.recipe.crop_pct == 1.0
    assert (subject.name, subject.architecture) == (str(named_run), "test_vit")


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_the_weights_of_a_run_can_be_chosen(named_run, kind):
    subject = open_subject(named_run / "last.pth", weights=kind)
    state = torch.load(named_run / "last.pth", weights_only=True)
    expected = state["state_dict" if kind == "raw" else "state_dict_ema"]
    assert all(torch.equal(subject.model.state_dict()[n], expected[n]) for n in expected)
    assert subject.weights == f"last.pth ({kind})"


def test_a_run_can_be_looked_at_in_another_size(named_run):
    subject = open_subject(named_run, img_size=48)
    spec = subject.input_spec(open_data(PICTURES, need_train=False))
    assert spec.size == (3, 48, 48)
    assert subject.model(torch.zeros(1, 3, 48, 48)).shape == (1, 2)


def test_a_module_takes_the_weights_of_its_run(run):
    module = vit(seed=9)
    subject = open_subject(module, checkpoint=run / "last.pth", weights="raw")
    expected = torch.load(run / "last.pth", weights_only=True)["state_dict"]
    assert subject.model is module
    assert all(torch.equal(module.state_dict()[name], expected[name]) for name in expected)


def test_a_module_takes_plain_weights_and_stays_trainable(tmp_path):
    module, other = vit(seed=0), vit(seed=1)
    torch.save(other.state_dict(), tmp_path / "plain.pth")
    subject = open_subject(module, checkpoint=tmp_path / "plain.pth")
    assert same_weights(module, other)
    assert subject.weights == "plain.pth"
    assert module.training and all(p.requires_grad for p in module.parameters())


def test_weights_that_do_not_fit_a_module_are_refused(tmp_path):
    torch.save(vit(dim=8).state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"small\.pth' does not fit 'VisionTransformer'"):
        open_subject(vit(), checkpoint=tmp_path / "small.pth")


def test_a_module_is_looked_at_as_it_is():
    module = vit()
    subject = open_subject(module)
    assert subject.model is module
    assert (subject.weights, subject.architecture) == ("as given", "VisionTransformer")


def test_a_teacher_sees_what_it_was_made_for():
    model = timm.create_model("convnext_atto", num_classes=0)
    teacher = Teacher(model, mean=(0.1,) * 3, std=(0.9,) * 3, input_size=(64, 96))
    subject = open_subject(teacher)
    spec = subject.input_spec(open_data(PICTURES, need_train=False))
    assert subject.model is model
    assert (spec.size, spec.mean, spec.std) == ((3, 64, 96), (0.1,) * 3, (0.9,) * 3)


def test_a_teacher_built_for_a_size_keeps_it():
    subject = open_subject(create_teacher(TINY, pretrained=False, img_size=32))
    assert subject.input_spec(open_data(PICTURES, need_train=False)).size == (3, 32, 32)


BASE = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}


def released(variant, folder):
    model = create_student("deit_tiny_patch16_224", variant, width=192, num_classes=4, **BASE)
    state = model.state_dict()
    if variant == "lift":
        renames = {"norm.proj": "projections.1", "norm.norm": "layer_norms.1"}
        renamed = {}
        for name, tensor in state.items():
            old = next((old for old in renames if name.startswith(old)), None)
            is_head = name.startswith("head.")
            new = name.replace(old, renames[old]) if old else name
            renamed[new if old or is_head else f"base_model.{name}"] = tensor
        state = renamed
    save_file(state, folder / f"{variant}.safetensors")
    return model, folder / f"{variant}.safetensors"


@pytest.mark.parametrize(
    ("variant", "kind"), [("lift", LiftVisionTransformer), ("widelast", WideLastVisionTransformer)]
)
def test_a_released_checkpoint_is_recognized(tmp_path, variant, kind):
    model, file = released(variant, tmp_path)
    subject = open_subject(file)
    assert isinstance(subject.model, kind)
    assert same_weights(subject.model, model)
    spec = subject.input_spec(open_data(PICTURES, need_train=False))
    assert (spec.size, subject.weights) == ((3, 32, 32), f"{variant}.safetensors")
    assert spec.mean == (0.485, 0.456, 0.406)


def test_a_released_checkpoint_can_be_looked_at_in_another_size(tmp_path):
    subject = open_subject(released("widelast", tmp_path)[1], img_size=48)
    assert subject.input_spec(open_data(PICTURES, need_train=False)).size == (3, 48, 48)
    assert subject.model(torch.zeros(1, 3, 48, 48)).shape == (1, 4)


def test_weights_of_an_unknown_architecture_ask_for_its_name(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "deit.pth")
    with pytest.raises(
        ValueError,
        match=r"deit\.pth is no released checkpoint.*give the model's name, and the file with",
    ):
        open_subject(tmp_path / "deit.pth")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_is_unpickled(tmp_path):
    torch.save({"model": Touch(tmp_path / "was_here")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="not loaded for safety"):
        open_subject(tmp_path / "bad.pth")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("content", [b"", b"text", "half"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, named_run, content):
    whole = (named_run / "last.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=r"a\.pth is torn or no file of weights"):
        open_subject(tmp_path / "a.pth")


def test_a_folder_that_is_no_run_names_the_checkpoints_in_it(tmp_path, named_run):
    with pytest.raises(ValueError, match=r"no last\.pth$"):
        open_subject(tmp_path)
    (tmp_path / "best.pth").write_bytes((named_run / "last.pth").read_bytes())
    with pytest.raises(ValueError, match=r"there is best\.pth: give the file"):
        open_subject(tmp_path)


def test_a_folder_called_like_a_model_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "test_vit").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_subject("test_vit", untrained=True).weights == "untrained"


@pytest.mark.parametrize(
    ("subject", "options", "named"),
    [
        ("run", {"checkpoint": "x.pth"}, "checkpoint has no effect"),
        ("run", {"untrained": True}, "untrained=True needs a timm name"),
        ("module", {"untrained": True}, "untrained=True needs a timm name.* VisionTransformer"),
        ("module", {"weights": "ema"}, "weights='ema' chooses in a fastkd checkpoint"),
        ("teacher", {"img_size": 64}, "img_size=64"),
        ("test_vit", {"weights": "raw"}, "weights='raw' chooses"),
        ("test_vit", {"weights": "best"}, "weights='best' chooses"),
        ("test_vit", {"untrained": True, "checkpoint": "x.pth"}, "checkpoint=x.pth"),
    ],
)
def test_options_without_effect_are_refused(named_run, subject, options, named):
    given = {"run": named_run, "module": vit(), "teacher": Teacher(vit())}.get(subject, subject)
    with pytest.raises(ValueError, match=named):
        open_subject(given, **options)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="got int"):
        open_subject(3)


def test_a_module_of_a_fixed_size_refuses_another():
    subject = open_subject(vit(img_size=32, in_chans=3), img_size=48)
    with pytest.raises(ValueError, match="built for 32 x 32"):
        subject.input_spec(open_data(PICTURES, need_train=False))


def test_published_weights_are_named_with_their_tag(monkeypatch):
    model = timm.create_model(TINY, **SMALL)
    model.pretrained_cfg = {"architecture": TINY, "tag": "r160_in1k"}
    monkeypatch.setattr("fastkd.inference.open_model.build_timm_model", lambda *_, **__: model)
    subject = open_subject(TINY)
    assert (subject.name, subject.architecture) == (TINY, f"{TINY}.r160_in1k")


def test_a_released_checkpoint_may_be_on_the_hub(tmp_path, monkeypatch):
    base = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "depth": 1}
    student = create_student("deit_tiny_patch16_224", "widelast", width=64, num_classes=5, **base)
    save_file(student.state_dict(), tmp_path / "cached.safetensors")
    name = "hf_hub:owner/name/models/WideLast/model.safetensors"
    monkeypatch.setattr(hub_download, "_hub_answers", lambda: True)
    monkeypatch.setattr(
        hub_download, "hf_hub_download", lambda *_, **__: tmp_path / "cached.safetensors"
    )
    subject = open_subject(name)
    assert subject.name == name and same_weights(subject.model, student)
