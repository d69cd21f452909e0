"""Exported students: what the files hold, and that other tools compute what the student does."""

import copy
import importlib.util
import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastkd import create_teacher, exporting
from fastkd.checkpoint import load_checkpoint, save_checkpoint
from fastkd.cli import main
from fastkd.exporting import OPSET, export
from fastkd.inference.open_model import open_model
from fastkd.models import create_student, load_released_checkpoint
from fastkd.training import load_student, train
from tests.harness.tiny import FAST, image_folder, made_run, tensor_data, vit

VARIANTS = [("plain", None), ("lift", 96), ("widelast", 128), ("uniform", 66)]
MISSING = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
OUTPUTS = {"timm": "student", "safetensors": "student.safetensors", "onnx": "student.onnx"}
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def logits(model, size=32):
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(images)


def from_timm(path, **options):
    return timm.create_model(f"local-dir:{path}", pretrained=True, **options).eval()


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A real run, whose checkpoint holds a projector and an optimizer, too."""
    root = tmp_path_factory.mktemp("distilled")
    options = FAST | {"epochs": 1, "batch_size": 6, "img_size": 32, "lr": 1e-3}
    train(
        "test_vit",
        create_student("test_vit", "uniform", width=96, num_classes=3, img_size=32),
        image_folder(root / "images", train=4, val=2),
        root / "run",
        projector="linear",
        **options,
    )
    return root / "run"


def test_the_papers_own_students_keep_their_names_in_timm(tmp_path):
    name = "deit_tiny_patch16_224"
    exported = export(made_run(tmp_path / "run", "uniform", 219, name=name))
    assert exported.architecture == "deit_tiny_uniform219_patch16_224"
    assert exported.model_args == {"img_size": [32, 32]}


def test_timm_prepares_images_as_the_run_did(tmp_path):
    model = from_timm(export(made_run(tmp_path / "run", interpolation="bilinear")).path)
    config = timm.data.resolve_data_config({}, model=model)
    assert json.loads(json.dumps(config)) == {  # tuples or lists
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "crop_pct": 0.9,
        "crop_mode": "center",
    }


def test_timm_learns_the_names_of_the_classes(tmp_path):
    model = from_timm(export(made_run(tmp_path / "run", classes=["blue", "green", "red"])).path)
    assert list(model.pretrained_cfg["label_names"]) == ["blue", "green", "red"]


def test_an_exported_student_can_be_fine_tuned_on_other_classes(tmp_path):
    path = export(made_run(tmp_path / "run", "lift", 96)).path
    model, student = from_timm(path, num_classes=7), from_timm(path)
    assert logits(model).shape == (3, 7)
    torch.testing.assert_close(model.norm.proj.weight, student.norm.proj.weight)


def test_another_input_size_is_built_in(tmp_path):
    run = made_run(tmp_path / "run", name="deit_tiny_patch16_224")
    model = from_timm(export(run, img_size=64).path)
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 64, 64)
    assert logits(model, 64).shape == (3, 3)


def test_a_model_that_takes_any_size_is_built_in_another_one(tmp_path):
    run = made_run(tmp_path / "run")
    exported = export(run, img_size=64)
    config = json.loads((exported.path / "config.json").read_text())
    assert exported.model_args == {"img_size": [64, 64]}
    assert config["pretrained_cfg"]["fixed_input_size"] is False
    assert (
        load_file(exported.path / "model.safetensors")["pos_embed"].shape[1] == 1 + (64 // 16) ** 2
    )
    expected = logits(load_student(run).network, 64)
    torch.testing.assert_close(logits(from_timm(exported.path), 64), expected)


def test_a_model_of_one_size_says_so(tmp_path):
    exported = export(made_run(tmp_path / "run", name="deit_tiny_patch16_224"))
    config = json.loads((exported.path / "config.json").read_text())
    assert config["pretrained_cfg"]["fixed_input_size"] is True


def loaded_by(line):
    """What a line of Python that `export` prints gives."""
    imports, call = line.split("; ")
    names = {}
    exec(imports, names)
    return eval(call, names).eval()


@pytest.mark.parametrize("format", ["timm", "safetensors"])
@pytest.mark.parametrize(("variant", "width"), VARIANTS)
def test_the_line_that_is_printed_loads_the_student(tmp_path, variant, width, format):
    run = made_run(tmp_path / "run", variant, width)
    exported = export(run, format)
    assert f"load: {exported.load}" in exported.summary().splitlines()
    packages = "timm" if variant == "plain" else "fastkd.models, timm"
    assert exported.load.startswith(f"import {packages}; ")
    assert torch.equal(logits(loaded_by(exported.load)), logits(load_student(run).network))
    assert exported.difference == 0


def test_timm_loads_a_file_of_the_papers_own_student_by_its_name(tmp_path):
    run = made_run(tmp_path / "run", "widelast", 128, name="deit_tiny_patch16_224")
    exported = export(run, "safetensors")
    assert "create_model('deit_tiny_widelast_patch16_224', checkpoint_path=" in exported.load
    assert exported.difference == 0


def saved_with_its_head_zeroed(state, path, metadata):
    save_file(state | {"head.weight": torch.zeros_like(state["head.weight"])}, path, metadata)


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_a_file_that_computes_something_else_never_takes_its_place(tmp_path, monkeypatch, format):
    run, output = made_run(tmp_path / "run"), tmp_path / OUTPUTS[format]
    file = export(run, format, output, weights="raw").path
    file = file / "model.safetensors" if file.is_dir() else file
    before = file.read_bytes()
    monkeypatch.setattr(exporting, "save_file", saved_with_its_head_zeroed)
    with pytest.raises(RuntimeError, match="what was written computes something else"):
        export(run, format, output, overwrite=True)
    assert file.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", output.name}


def test_a_module_that_timm_does_not_build_keeps_its_own_name(tmp_path):
    run = made_run(tmp_path / "run")
    module = load_student(run).network
    module.norm.eps = 1.0  # the same weights, but another function
    exported = export(module, "safetensors", checkpoint=run)
    assert (exported.architecture, exported.load) == ("module:VisionTransformer", None)
    assert exported.difference == 0


def test_a_size_that_is_exported_does_not_change_the_callers_module(tmp_path):
    run = made_run(tmp_path / "run", name="deit_tiny_patch16_224")
    module = create_student("deit_tiny_patch16_224", num_classes=3, img_size=32)
    before = copy.deepcopy(module.state_dict())
    exported = export(module, "safetensors", checkpoint=run, img_size=64)
    assert exported.model_args == {"img_size": [64, 64]}
    assert module.patch_embed.img_size == (32, 32)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_the_line_that_is_printed_is_python_for_a_path_with_quotes(tmp_path, format):
    output = tmp_path / "it's" / f'"my" {OUTPUTS[format]}'
    output.parent.mkdir()
    run = made_run(tmp_path / "run")
    exported = export(run, format, output)
    assert torch.equal(logits(loaded_by(exported.load)), logits(load_student(run).network))


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_an_exported_student_is_exported_again_as_it_is(tmp_path, format):
    first = export(made_run(tmp_path / "run", "lift", 96), format)
    again = export(first.path, "safetensors", tmp_path / "again.safetensors")
    assert (again.architecture, again.model_args) == (first.architecture, first.model_args)
    assert torch.equal(logits(loaded_by(again.load)), logits(loaded_by(first.load)))
    with safe_open(again.path, "pt") as file:
        assert json.loads(file.metadata()["mean"]) == [0.4, 0.5, 0.6]


def test_safetensors_describe_themselves(tmp_path):
    path = export(made_run(tmp_path / "run", "lift", 96), "safetensors").path
    with safe_open(path, "pt") as file:
        described = file.metadata()
    assert json.loads(described["model_args"]) == {
        "base": "test_vit", "variant": "lift", "width": 96, "img_size": [32, 32]
    }  # fmt: skip
    assert json.loads(described["mean"]) == [0.4, 0.5, 0.6]
    assert (described["weights"], described["num_classes"]) == ("ema", "3")


def test_what_a_student_started_from_is_not_exported(tmp_path):
    exported = export(made_run(tmp_path / "run", "lift", 96, init_weights="timm"), "timm")
    assert "init_weights" not in (exported.path / "config.json").read_text()


@pytest.mark.parametrize(
    ("weights", "held"),
    [("auto", "state_dict_ema"), ("raw", "state_dict"), ("ema", "state_dict_ema")],
)
def test_the_weights_that_were_asked_for_are_written(tmp_path, weights, held):
    run = made_run(tmp_path / "run", "lift", 96)
    written = load_file(export(run, "safetensors", weights=weights).path)
    state = load_checkpoint(run)[held]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_channels_last_weights_are_written(tmp_path):
    run = made_run(tmp_path / "run", name="test_resnet")
    state = load_checkpoint(run)
    model = create_student("test_resnet", num_classes=3).to(memory_format=torch.channels_last)
    save_checkpoint(state | {"state_dict": model.state_dict()}, run / "last.pth")
    written = from_timm(export(run, weights="raw").path)
    torch.testing.assert_close(logits(written), logits(model.eval()))


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_nothing_but_the_student_is_written(distilled, tmp_path, format):
    output = tmp_path / OUTPUTS[format]
    path = export(distilled, format, output).path
    assert any("projector" in name for name in load_checkpoint(distilled)["terms"])
    file = path / "model.safetensors" if path.is_dir() else path
    assert load_file(file).keys() == load_student(distilled).network.state_dict().keys()
    if path.is_dir():
        assert {entry.name for entry in path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_bare_checkpoint_is_exported_beside_itself(distilled, tmp_path):
    checkpoint = tmp_path / "mine.pth"
    checkpoint.write_bytes((distilled / "last.pth").read_bytes())
    assert export(checkpoint, "safetensors").path == tmp_path / "student.safetensors"


@needs_onnx
@pytest.mark.parametrize(("variant", "width"), VARIANTS[:2])
def test_onnxruntime_computes_what_the_student_does(tmp_path, variant, width):
    import onnxruntime

    run = made_run(tmp_path / "run", variant, width)
    exported = export(run, "onnx")
    assert exported.difference < 1e-5
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 32, 32)
    (computed,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = load_student(run).network(images)
    torch.testing.assert_close(torch.from_numpy(computed), expected, rtol=1e-4, atol=1e-5)


@needs_onnx
def test_an_onnx_file_says_what_it_takes_in_and_not_where_it_was_made(tmp_path):
    import onnx

    exported = export(made_run(tmp_path / "run", name="test_resnet"), "onnx")
    graph = onnx.load(exported.path)
    described = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(described["input_size"]) == [3, 32, 32]
    assert json.loads(described["std"]) == [0.2, 0.3, 0.4]
    assert graph.opset_import[0].version == OPSET
    assert b".py" not in exported.path.read_bytes()


def test_missing_onnx_packages_are_named(tmp_path, monkeypatch):
    for name in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install (onnx )?onnxscript onnxruntime$"):
        export(made_run(tmp_path / "run"), "onnx")


class Untimely(nn.Module):
    """A student that timm does not know."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 6)

    def forward(self, x):
        return self.head(x.flatten(1))


@pytest.fixture(scope="module")
def modules_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("module") / "run"
    student = Untimely()
    train(student, None, tensor_data(), output, **FAST | {"epochs": 1})
    return output, student


def test_a_modules_weights_are_checked_with_a_copy_of_it(modules_run, tmp_path):
    run, student = modules_run
    module = Untimely()
    before = copy.deepcopy(module.state_dict())
    output = tmp_path / "student.safetensors"
    exported = export(module, "safetensors", output, weights="raw", checkpoint=run)
    assert (exported.load, exported.difference) == (None, 0)
    written = load_file(exported.path)
    assert all(torch.equal(written[name], value) for name, value in student.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_a_module_that_is_not_here_is_asked_for(modules_run, tmp_path, format):
    with pytest.raises(ValueError, match=r"module:Untimely: hand the module over"):
        export(modules_run[0], format, tmp_path / OUTPUTS[format])


def test_a_module_that_timm_does_not_know_is_refused_for_timm(modules_run, tmp_path):
    with pytest.raises(ValueError, match=r"module:Untimely.*timm knows no such model; safetensors"):
        export(Untimely(), "timm", tmp_path / "student", checkpoint=modules_run[0])
    assert not (tmp_path / "student").exists()


def test_a_module_that_timm_would_build_otherwise_is_refused(tmp_path):
    model = vit(in_chans=3, num_classes=6)
    model.pretrained_cfg = {"architecture": "test_vit"}
    images, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 6
    data = torch.utils.data.TensorDataset(images, labels)
    train(model, None, (data, data), tmp_path / "run", **FAST | {"epochs": 1})
    with pytest.raises(ValueError, match="module:VisionTransformer cannot be exported to timm"):
        export(model, checkpoint=tmp_path / "run")
    assert {entry.suffix for entry in (tmp_path / "run").iterdir() if entry.is_dir()} == set()


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_an_output_is_replaced_only_where_that_is_asked_for(tmp_path, format):
    run = made_run(tmp_path / "run")
    output = tmp_path / OUTPUTS[format]
    export(run, format, output, weights="raw")
    with pytest.raises(FileExistsError, match="overwrite"):
        export(run, format, output)
    assert export(run, format, output, overwrite=True).weights == "ema"
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", output.name}


@pytest.mark.slow
@needs_onnx
def test_an_onnx_file_is_replaced_where_that_is_asked_for(tmp_path):
    run = made_run(tmp_path / "run", name="test_resnet")
    export(run, "onnx", weights="raw")
    assert export(run, "onnx", overwrite=True).weights == "ema"


@pytest.mark.parametrize("format", ["timm", "safetensors", pytest.param("onnx", marks=needs_onnx)])
def test_a_run_and_its_checkpoints_are_never_replaced(tmp_path, format):
    run = made_run(tmp_path / "run")
    target = run
    if format != "timm":  # a checkpoint under a name that the format could have
        target = (run / "last.pth").rename(run / f"last.{format}")
        shutil.copy(target, run / "last.pth")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(FileExistsError, match="is not replaced"):
        export(run, format, target, overwrite=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("format", ["timm", "safetensors", pytest.param("onnx", marks=needs_onnx)])
def test_a_model_that_others_wrote_is_never_replaced(tmp_path, format):
    run, output = made_run(tmp_path / "run"), tmp_path / OUTPUTS[format]
    weights = output
    if format == "timm":
        output.mkdir()
        (output / "config.json").write_text("{}")
        weights = output / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, weights)
    before = weights.read_bytes()
    with pytest.raises(FileExistsError, match="that fastkd exported"):
        export(run, format, output, overwrite=True)
    assert weights.read_bytes() == before


@pytest.mark.parametrize("format", ["safetensors", pytest.param("onnx", marks=needs_onnx)])
def test_a_file_is_called_what_it_is(tmp_path, format):
    with pytest.raises(ValueError, match=rf"must end in \.{format}, got '.*best\.pth'"):
        export(made_run(tmp_path / "run"), format, tmp_path / "best.pth")


@pytest.fixture
def exported_twice(tmp_path, monkeypatch):
    """An older export in place, and the names of folders whenever one is renamed."""
    run = made_run(tmp_path / "run")
    output = export(run, "timm", tmp_path / "student", weights="raw").path
    replace = Path.replace

    def run_again(on_rename):
        def replaced(path, target):
            on_rename(path, target)
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", replaced)
        export(run, "timm", output, overwrite=True)

    return output, run_again


def held_weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()["weights"]


def test_at_every_moment_a_whole_timm_folder_is_there(exported_twice):
    output, run_again = exported_twice
    seen = []

    def look(path, target):
        held = [held_weights(p) for p in output.parent.iterdir() if (p / "config.json").exists()]
        seen.append((sorted(held), output.exists()))

    run_again(look)
    # before the older one is set aside, and before the new one takes its name
    assert seen == [(["ema", "raw"], True), (["ema", "raw"], False)]
    assert held_weights(output) == "ema"
    assert {entry.name for entry in output.parent.iterdir()} == {"run", "student"}


def test_an_older_timm_folder_gets_its_name_back_where_the_new_one_cannot_have_it(exported_twice):
    output, run_again = exported_twice

    def fail(path, target):
        if path.suffix == ".tmp":
            raise OSError("no")

    with pytest.raises(OSError, match="no"):
        run_again(fail)
    assert held_weights(output) == "raw"
    assert {entry.name for entry in output.parent.iterdir()} == {"run", "student"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be one of"),
        ({"weights": "best"}, "weights.* auto, raw or ema, got 'best'"),
        ({"weights": "ema"}, "no EMA weights"),
    ],
)
def test_options_that_cannot_be_met_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(made_run(tmp_path / "run", ema=False), **options)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"x\.pth is torn"):
        export(tmp_path / "x.pth", "safetensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match=r"not written by fastkd.*neither a released Lift"):
        export(tmp_path / "y.pth", "safetensors")
    (tmp_path / "z.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"z\.safetensors is torn"):
        export(tmp_path / "z.safetensors", "safetensors")


@pytest.fixture(params=[".safetensors", ".pth"])
def released(tmp_path, request):
    """A checkpoint as the paper's authors wrote it, the .pth with the arguments of its run."""
    base = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 1, "depth": 2}
    student = create_student("deit_tiny_patch16_224", "widelast", width=128, num_classes=7, **base)
    path = tmp_path / f"released{request.param}"
    if request.param == ".pth":
        torch.save({"model": student.state_dict(), "args": Namespace(epochs=300)}, path)
    else:
        save_file(student.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "raw"}, "weights='raw'.*without EMA weights to choose from"),
        ({"weights": "ema"}, "weights='ema'.*without EMA weights to choose from"),
        ({"checkpoint": "x.pth"}, "checkpoint has no effect"),
    ],
)
def test_options_of_a_run_are_refused_for_a_released_checkpoint(released, options, message):
    with pytest.raises(ValueError, match=message):
        export(released, **options)


def test_a_released_checkpoint_is_exported_under_our_names(released):
    exported = export(released)
    assert (exported.architecture, exported.weights) == (
        "deit_tiny_widelast_patch16_224", "as given"
    )  # fmt: skip
    expected = load_released_checkpoint(released).eval()
    torch.testing.assert_close(logits(from_timm(exported.path)), logits(expected))


def test_the_command_says_what_it_wrote_and_how_to_load_it(capsys, tmp_path):
    run = made_run(tmp_path / "run", "lift", 96)
    assert main(["export", str(run), "--weights", "raw"]) == 0
    out = capsys.readouterr().out
    assert "raw weights" in out and "differ by at most 0.0e+00" in out
    assert "import fastkd.models, timm; timm.create_model(" in out
    assert f"'local-dir:{run / 'student-timm'}'" in out


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_models_of_other_channels_are_built_for_them(tmp_path, format):
    gray = timm.create_model("test_vit", in_chans=1, num_classes=3, img_size=32).eval()
    gray.pretrained_cfg |= {"mean": (0.5,), "std": (0.2,)}
    loaded = loaded_by(export(gray, format, tmp_path / OUTPUTS[format]).load)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), gray(images))


def test_of_a_link_the_target_is_replaced(tmp_path):
    run = made_run(tmp_path / "run")
    export(run, output=tmp_path / "real", weights="raw")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        export(run, output=tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "real", "link"}
    config = json.loads((tmp_path / "real" / "config.json").read_text())
    assert config["weights"] == "ema"


def test_a_folder_that_appears_while_an_export_is_written_is_kept(tmp_path, monkeypatch):
    run, output = made_run(tmp_path / "run"), tmp_path / "student"
    write = exporting._write

    def writing(*arguments):
        difference = write(*arguments)
        output.mkdir()
        (output / "thesis.tex").write_text("precious")
        return difference

    monkeypatch.setattr(exporting, "_write", writing)
    with pytest.raises(FileExistsError, match="is not replaced"):
        export(run, output=output)
    assert (output / "thesis.tex").read_text() == "precious"


def test_a_damaged_export_is_loaded_only_where_asked(tmp_path, capsys):
    run = made_run(tmp_path / "run")
    file = export(run, "safetensors", tmp_path / "x.safetensors").path
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    again = ["export", str(file), "--format", "safetensors", "--output", str(tmp_path / "y")]
    again[-1] += ".safetensors"
    assert main(again) == 2
    assert "x.safetensors is damaged" in capsys.readouterr().err
    assert main([*again, "--no-verify"]) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_whose_files_changed_is_refused(tmp_path, name):
    folder = export(made_run(tmp_path / "run"), "timm", tmp_path / "student").path
    content = (folder / name).read_bytes()
    assert content.count(b"0.4") >= 1  # of the mean
    (folder / name).write_bytes(content.replace(b"0.4", b"0.5", 1))
    with pytest.raises(ValueError, match=name):
        open_model(str(folder))
    teacher = create_teacher(folder, verify=False)
    assert teacher.mean[0] == (0.5 if name == "config.json" else 0.4)
