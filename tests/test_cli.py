"""The command line: what it runs, what it prints, how it fails."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from fastkd.cli import COMMANDS, main, parsers
from fastkd.config import Recipe
from fastkd.losses import registry
from tests.harness.tiny import image_folder, vit

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--model", "test_vit", "--img-size", "32", "--epochs", "1", "--warmup-epochs", "0"),
    *("--batch-size", "6", "--workers", "0", "--amp", "none", "--device", "cpu"),
    *("--lr", "1e-3", "--lr-scaling", "false"),
]

# Without what differs between `train` and `bench-step`.
TINY = [
    *("--model", "test_vit", "--img-size", "8", "--batch-size", "6", "--workers", "0"),
    *("--amp", "none", "--device", "cpu", "--lr-scaling", "false"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(image_folder(tmp_path_factory.mktemp("images"), train=4, val=2))


def run(capsys, *arguments):
    try:
        status = main(arguments)
    except SystemExit as leaving:
        status = leaving.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train_and_evaluate_agree_on_a_folder(capsys, folder, tmp_path):
    output = str(tmp_path / "run")
    status, out, err = run(
        capsys, "train", "--data", folder, "--output", output, *SMALL, "--ema-decay", "none"
    )
    assert status == 0
    assert "epoch 1/1" in err
    top1 = out.split("top-1 after epoch 1: ")[1].split(" ")[0]
    status, out, _ = run(
        capsys, "evaluate", output, "--data", folder, "--device", "cpu", "--workers", "0"
    )
    assert status == 0
    assert out.startswith(f"top-1 {top1} %")
    assert Recipe.load(output).ema_decay is None


def test_a_run_is_evaluated_with_raw_and_averaged_weights_once_each(
    capsys, folder, tmp_path, monkeypatch
):
    output = str(tmp_path / "run")
    run(capsys, "train", "--data", folder, "--output", output, *SMALL)
    evaluate = ("evaluate", output, "--data", folder, "--device", "cpu", "--workers", "0")
    _, out, _ = run(capsys, *evaluate)
    assert [line.rsplit(" ", 1)[1] for line in out.splitlines()] == ["raw)", "ema)"]
    _, out, _ = run(capsys, *evaluate, "--weights", "ema", "--classes-by", "number")
    assert [line.rsplit(" ", 1)[1] for line in out.splitlines()] == ["ema)"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")  # beside a RANK it is no copy of a run
    assert run(capsys, *evaluate) == (0, "", "")


def test_an_unreadable_image_is_one_line_naming_the_file(capsys, tmp_path):
    folder = image_folder(tmp_path / "images", train=4, val=2)
    for image in (folder / "train").glob("*/*.jpg"):  # in whose place others are tried
        image.write_bytes(b"no image")
    output = str(tmp_path / "run")
    small = [*SMALL, "--workers", "1"]
    status, _, err = run(
        capsys, "train", "--data", str(folder), "--output", output, *small, "--quiet"
    )
    assert status == 2
    assert err.splitlines()[-1].startswith("fastkd train: error: ")
    assert "cannot read" in err and ".jpg" in err
    assert "Traceback" not in err


def test_a_mistyped_path_is_said_to_be_missing(capsys, folder):
    status, _, err = run(capsys, "evaluate", "runs/x/best.pth", "--data", folder)
    assert status == 2
    assert "there is no file or folder 'runs/x/best.pth'" in err


def test_dry_run_shows_effective_values_and_trains_nothing(capsys, folder, tmp_path):
    status, out, _ = run(
        capsys,
        *("train", "--recipe", "lift_softkd_spectral", "--data", folder, "--num-classes", "1000"),
        *("--batch-size", "12", "--dry-run", "--output", str(tmp_path / "run")),
    )
    assert status == 0
    assert "variant: lift" in out
    assert "5,983,528" in out
    assert "1e-06 in 5 epochs to 1.17188e-05 = 0.0005 x 12 / 512, then cosine to 1e-05" in out
    assert re.search(r"^optimizer: +adamw$", out, re.MULTILINE)
    assert "1 updates, 12 samples (3 copies of each image)" in out
    assert "teacher: cait_s24_224" in out
    assert not (tmp_path / "run").exists()


def test_dry_run_tells_what_an_optimizer_and_a_schedule_amount_to(capsys):
    status, out, _ = run(
        capsys,
        *("train", "--dry-run", "--model", "test_vit", "--num-classes", "3", "--opt", "lion"),
        *("--opt-kwargs", "betas=[0.9,0.98]", "--sched", "multistep"),
        *("--sched-kwargs", "decay_milestones=[100,200],decay_rate=0.2"),
    )
    assert status == 0
    assert "lion (betas (0.9, 0.98)); the host waits at every update" in out
    assert "then multistep (decay_milestones (100, 200), decay_rate 0.2)\n" in out


def test_one_process_speaks_for_a_dry_run(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")  # beside a RANK it is no copy of a run
    dry = ("train", "--model", "test_vit", "--num-classes", "3", "--lr-scaling", "false")
    assert run(capsys, *dry, "--dry-run") == (0, "", "")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (("train", "--output", "x"), "on the command line --teacher-checkpoint PATH"),
        (("bench-step",), "on the command line --teacher-checkpoint PATH, or --untrained"),
    ],
)
def test_a_teacher_that_cannot_be_downloaded_is_named_with_the_flags_that_help(
    capsys, folder, tmp_path, monkeypatch, command, flags
):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.create_model", fail)
    monkeypatch.setattr(
        "fastkd.inference.preprocessing.create_student", lambda *_, **__: vit(in_chans=3)
    )
    teacher = ("--teacher", "resnet10t.c3_in1k", "--alpha", "0.5")
    status, _, err = run(capsys, *command, "--data", folder, *teacher, *TINY)
    assert status == 2
    assert "could not be downloaded" in err and flags in err


def test_recipes_lists_every_recipe_and_shows_one(capsys):
    _, listing, _ = run(capsys, "recipes")
    assert [line.split()[0] for line in listing.splitlines()] == Recipe.names()
    aims = {line.split()[0]: line[26:36].strip() for line in listing.splitlines()}
    assert aims["lift_softkd_spectral"] == "77.53 %"
    assert aims["uniform219_spectral"] == "-"
    _, shown, _ = run(capsys, "recipes", "deit_tiny")
    assert "Aims at: 72.2 %" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "train --featur-loss mse",
            "unknown argument --featur-loss (did you mean --feature-loss?)",
        ),
        ("train --amp fp8 --output x", "amp: expected one of none, bf16, fp16"),
        ("train --epochs many --output x", "epochs: expected an integer of at least 1, got 'many'"),
        ("train --lr fast --epochs 0 --output x", "got '0'; lr: expected a finite number above 0"),
        (
            "train --lr -1e-3 --output x",
            "lr: expected a finite number above 0 (1e-37 to 1e37), got '-1e-3'",
        ),
        ("train --lr -inf --output x", "written --flag=VALUE"),
        ("train --pairs -1:-1,-1:-1 --output x", "pairs: expected each pair once"),
        ("train --recipe= --output x", "recipe must not be empty, got ''"),
        ("train --output=", "output must not be empty, got ''"),
        ("train --output= --resume never", "output must not be empty, got ''"),
        ("train --resume= --output x", "resume must not be empty, got ''"),
        ("train --data= --output x", "data must not be empty, got ''"),
        ("evaluate x --data=", "data must not be empty, got ''"),
        ("predict test_vit a.jpg --output=", "output must not be empty, got ''"),
        ("analyze test_vit --data y --output=", "output must not be empty, got ''"),
        ("export x --output=", "output must not be empty, got ''"),
        ("bench-step --output=", "output must not be empty, got ''"),
        ("demo --output=", "output must not be empty, got ''"),
        ("shard a b --shard-size inf", "shard_size must be finite and >= 1e-06, got inf"),
        ("shard a b --seed 99999999999999999999", "seed must be finite and below 2^63, got 9999"),
        ("train --workers 1000000 --output x", "workers: expected an integer between 0 and 1,024"),
        ("predict test_vit a.jpg --top 0", "predict: error: top must be at least 1, got 0"),
        ("predict test_vit a.jpg --workers -1", "workers must be 0 to 1024, got -1"),
        ("analyze test_vit --data y --batch-size 0", "batch_size must be at least 1, got 0"),
        ("analyze test_vit --data y --images -3", "images must be at least 1, got -3"),
        ("analyze test_vit --data y --img-size 0", "img_size must be 1 to 16384, got 0"),
        ("analyze test_vit --data y --memory nan", "memory must be finite and >= 0, got nan"),
        ("evaluate x --data y --batch-size 0", "batch_size must be at least 1, got 0"),
        ("export x --img-size 0", "img_size must be 1 to 16384, got 0"),
        ("bench-step --steps 0", "steps must be at least 2, got 0"),
        ("train --learning-rate 1e-3", "--learning-rate (here it is --lr)"),
        ("train --learning_rate=1e-3", "--learning_rate=1e-3 (here it is --lr)"),
        ("train --per_device_train_batch_size 8", "(here it is --batch-size; images of an update"),
        ("train --layer-decay 0.7", "there is no decay of the learning rate by layer"),
        ("train --pretrained", "a student starts from weights if model is"),
        ("train --model-ema", "(here it is --ema-decay; none switches it off)"),
        ("train --num_train_epochs 3", "(here it is --epochs)"),
        ("train --output_dir x", "(here it is --output;"),
        ("train --aa rand", "(here it is --auto-augment)"),
        ("train --smoothing 0.1", "(here it is --label-smoothing)"),
        ("train --drop-path-rate 0.1", "(here it is --drop-path)"),
        ("train --opt-eps 1e-8", "(here it is --adam-eps)"),
        ("train --native-amp", "(here it is --amp; none, bf16 or fp16)"),
        ("train --input-size 3 224 224", "(here it is --img-size)"),
        ("train --no-labels", "(it is switched off by a value: --labels false, none or 0)"),
        ("train --no-lr-scaling", "--lr-scaling false"),
        ("train --batch_size 8", "(did you mean --batch-size?)"),
        ("evaluate x --data y --num-workers 3", "(here it is --workers)"),
        ("predict test_vit a.jpg --topk 3", "(here it is --top)"),
        ("train --alpha 0.9 --output x", "alpha: needs a teacher"),
        ("train --recipe nothing --output x", "widelast_supervised, got 'nothing'"),
        ("train --data nowhere --output x", "no folder 'nowhere'"),
        ("train --data nowhere", "--output is missing"),
        ("evaluate nothing --data nowhere", "no folder 'nowhere'"),
        ("evaluate x", "required: --data"),
        (
            "evaluate x --data y --wieghts raw",
            "unknown argument --wieghts (did you mean --weights?)",
        ),
        ("tarin", "invalid choice: 'tarin' (did you mean 'train'?)"),
        ("nothing", "invalid choice: 'nothing' (choose from train, evaluate,"),
        ("export nowhere", "'nowhere'"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments.split())
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("fastkd")
    assert ": error: " in err
    assert message in err


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (KeyError("x"), 1, "KeyError: 'x' (FASTKD_DEBUG=1 shows where)"),
        (AttributeError("no y"), 1, "AttributeError: no y (FASTKD_DEBUG=1 shows where)"),
        (AssertionError(), 2, "AssertionError (FASTKD_DEBUG=1 shows where)"),
        (MemoryError("much"), 1, "MemoryError: much (FASTKD_DEBUG=1 shows where)"),
        (ValueError("a\nb \x1b]0;title\x07"), 2, r"a b \x1b]0;title\x07"),
        (OSError(2, "missing", "\u202ea\x9b"), 2, r"[Errno 2] missing: '\u202ea\x9b'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_error_is_a_traceback_or_steers_the_terminal(capsys, monkeypatch, error, status, shown):
    def fail(*_):
        raise error

    monkeypatch.setattr("fastkd.config.Recipe.names", fail)
    monkeypatch.delenv("FASTKD_DEBUG", raising=False)
    assert run(capsys, "recipes") == (status, "", f"fastkd recipes: error: {shown}\n")


def test_codes_of_exits_are_kept(capsys, monkeypatch):
    def leave():
        raise SystemExit(143)

    monkeypatch.setattr("fastkd.config.Recipe.names", leave)
    assert run(capsys, "recipes")[0] == 143


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("train --pairs -1:-1", "pairs", "-1:-1"),
        ("train --mean -0.5,0.5,0.5 --std .5", "mean", "-0.5,0.5,0.5"),
        ("train --mean -.5", "mean", "-.5"),
        ("analyze test_vit --layers -2,-1", "layers", "-2,-1"),
        ("bench-step --pairs -2:-2,-1:-1", "pairs", "-2:-2,-1:-1"),
        ("train --labels --pairs -1:-1", "labels", "true"),
    ],
)
def test_a_value_may_begin_with_a_minus(monkeypatch, arguments, name, value):
    words, taken = arguments.split(), []
    parser, commands = parsers(words[:1])
    commands[words[0]].set_defaults(run=taken.append)
    monkeypatch.setattr("fastkd.cli.parsers", lambda _: (parser, commands))
    assert main(words) == 0
    assert getattr(taken[0], name) == value


def test_a_reader_that_leaves_ends_the_command_without_an_error(capsys, monkeypatch, tmp_path):
    with open(tmp_path / "out", "w") as file:

        class Left:
            fileno = file.fileno

            def write(self, _):
                raise BrokenPipeError

            def flush(self):
                raise BrokenPipeError

        monkeypatch.setattr(sys, "stdout", Left())
        assert main(["recipes"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_reader_that_leaves_hides_no_error(capsys, monkeypatch, buffering, fails):
    def work(command, arguments):
        with contextlib.suppress(BrokenPipeError if fails else ()):
            print("a line")
        if fails:
            raise ValueError("the disk is full")
        return 0

    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr("fastkd.cli._run", work)
    with open(writer, "wb", buffering) as raw:
        file = io.TextIOWrapper(raw, write_through=not buffering)
        monkeypatch.setattr(sys, "stdout", file)
        assert main(["recipes"]) == (2 if fails else 0)
        monkeypatch.undo()
    assert capsys.readouterr().err == "fastkd recipes: error: the disk is full\n" * fails


def test_a_command_needs_no_output(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["recipes"]) == 0
    assert capsys.readouterr().err == ""


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("FASTKD_DEBUG", "1")
    with pytest.raises(ValueError, match="recipe: expected"):
        main(["train", "--recipe", "nothing", "--output", "x"])


def test_fastkd_alone_prints_its_help(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert out == run(capsys, "--help")[1]
    assert all(f"\n    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_usage_help_for_every_option_and_examples_that_parse(
    capsys, command, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert out.startswith(f"usage: fastkd {command}")
    assert "$" not in out.split("\nexamples:\n")[0] and "\\" not in out
    assert max(map(len, out.splitlines())) <= 80
    _, commands = parsers([command])
    assert all(action.help for action in commands[command]._actions)
    examples = out.split("\nexamples:\n")[1].splitlines()
    assert len(examples) >= 2
    for example in examples:
        line = re.search(r"\bfastkd ([^)|>#\n]+)", example)[1]
        options, unknown = parsers([command])[0].parse_known_args(shlex.split(line))
        assert (options.command, unknown) == (command, [])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_has_every_command_and_flag(capsys, shell):
    status, script, _ = run(capsys, "completion", shell)
    assert status == 0
    for name, parser in parsers()[1].items():
        lines = [line for line in script.splitlines() if re.search(rf"\b{name}\b", line)]
        words = set(re.findall(r"[\w-]+", " ".join(lines)))
        flags = {flag for action in parser._actions for flag in action.option_strings}
        if shell == "fish":
            flags = {flag[2:] for flag in flags if flag.startswith("--")}
        assert flags <= words, name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ev", ["evaluate"]),
        ("evaluate runs/x --we", ["--weights"]),
        ("evaluate runs/x --amp ", ["none", "bf16", "fp16"]),
        ("train --recipe deit", ["deit_tiny"]),
        ("train --track t", ["tensorboard"]),
        ("completion f", ["fish"]),
        ("predict ", []),  # files
    ],
)
def test_bash_completes(capsys, tmp_path, line, expected):
    _, script, _ = run(capsys, "completion", "bash")
    (tmp_path / "fastkd.sh").write_text(script)
    words = ["fastkd", *line.split(" ")]
    program = (
        f"source {tmp_path}/fastkd.sh; COMP_WORDS=({shlex.join(words)}); "
        f"COMP_CWORD={len(words) - 1}; _fastkd; echo ${{COMPREPLY[*]}}"
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (expected, "")


def read_variables():
    """Names of the environment variables that the project's files read or set."""
    for name in ("fastkd", "setup.py", "csrc", "tests/conftest.py", "tests/models", "bench", ".ci"):
        for path in [ROOT / name, *(ROOT / name).rglob("*")]:
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
                # A string of its own; other names are of C macros and of Python's constants.
                yield from re.findall(r"""["'](FASTKD_[A-Z_]+)["']""", path.read_text())
            elif path.is_file() and path.suffix in ("", ".sh"):
                yield from re.findall(r"\bFASTKD_[A-Z_]+", path.read_text())


def test_env_lists_every_variable(capsys):
    status, out, _ = run(capsys, "env", "--variables")
    assert status == 0
    listed = re.findall(r"^(FASTKD_[A-Z_]+)  +\S", out, re.MULTILINE)
    assert sorted(listed) == sorted(set(read_variables()))


def test_the_accuracy_can_be_written_to_a_file(capsys, folder, tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    file = tmp_path / "accuracy.json"
    arguments = ("evaluate", "test_vit", "--checkpoint", str(tmp_path / "w.pth"), "--data", folder)
    options = ("--device", "cpu", "--workers", "0", "--quiet", "--output", str(file))
    status, out, err = run(capsys, *arguments, *options)
    assert (status, err) == (0, "")
    written = json.loads(file.read_text())
    assert (written["model"], written["data"]) == ("test_vit", folder)
    (measured,) = written["results"]
    assert out.startswith(f"top-1 {measured['top1']:.2f} %")
    assert (measured["count"], measured["weights"]) == (6, "as given")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x.csv", "output must end in .json, got"),
        ("nowhere/x.json", "there is no folder"),
        (".", "output must end in .json"),
        ("folder.json", "output must be a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_opened(
    capsys, tmp_path, monkeypatch, output, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    status, _, err = run(capsys, "evaluate", "nothing", "--data", "nowhere", "--output", output)
    assert status == 2
    assert message in err


def test_every_recipe_field_is_a_flag(capsys):
    _, out, _ = run(capsys, "train", "--help")
    for name in Recipe.model_fields:
        assert "--" + name.replace("_", "-") in out


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import fastkd", ()),
        ("import fastkd.cli as cli; cli.main(['--help'])", ()),
        ("import fastkd.cli as cli; cli.main(['losses', '--help'])", ()),
        ("import fastkd.cli as cli; cli.main(['losses'])", ()),
        ("import fastkd.cli as cli; cli.main(['train', '--help'])", ("pydantic",)),
        ("import fastkd.cli as cli; cli.main(['recipes'])", ("pydantic",)),
        ("import fastkd.cli as cli; cli.main(['recipes', '--schema'])", ("pydantic",)),
    ],
)
def test_what_needs_no_model_imports_no_heavy_package(code, allowed):
    heavy = {"torch", "timm", "numpy", "pydantic"} - set(allowed)
    program = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
        f"print({heavy!r} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "set()"


def test_the_module_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastkd", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("fastkd ")


def test_losses_lists_every_loss_and_projector_in_a_line(capsys):
    status, out, _ = run(capsys, "losses")
    assert status == 0
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    entries = (*registry.LOGIT_LOSSES, *registry.FEATURE_LOSSES, *registry.PROJECTORS)
    assert listed == {entry.name for entry in entries}
    assert "lifted tokens, which are compared (stays at inference)" in out


def test_losses_explains_one_by_its_formula_and_options(capsys):
    status, out, _ = run(capsys, "losses", "rkd")
    assert status == 0
    assert "fastkd.losses.RKD" in out
    assert "distance_weight=25.0" in out
    assert "arXiv 1904.05068" in out
    assert "weight in its source: 1" in out


@pytest.mark.parametrize("loss", [*registry.LOGIT_LOSSES, *registry.FEATURE_LOSSES])
def test_formulas_are_plain_text(capsys, loss):
    _, out, _ = run(capsys, "losses", loss.name)
    assert not re.search(r"[\\$]|:math:|[{}]", out)


def test_losses_explains_a_projector_too(capsys):
    status, out, _ = run(capsys, "losses", "lift")
    assert status == 0
    assert out.startswith("lift")
    assert "stays at inference" in out


def test_an_unknown_loss_is_refused_with_a_hint(capsys):
    status, _, err = run(capsys, "losses", "rdk")
    assert status == 2
    assert "did you mean 'rkd'" in err
