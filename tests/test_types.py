"""What a type checker says of a user's script, against the installed package."""

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.conftest import skip_or_fail

GOOD = """
import torch

import fastkd
from fastkd import Recipe, feature_kd
from fastkd.analysis import Options
from fastkd.losses import DistillationLoss, FeatureKD, SoftKD, VkD

x = torch.zeros(2, 4, 8)
loss = feature_kd(x, x, "spectral", grid=(2, 2), backend="torch")
result = fastkd.train("vit_tiny_patch16_224", None, "data", "out", epochs=4, pairs=((11, 23),))
terms = DistillationLoss(SoftKD(2.0), FeatureKD(VkD("whiten"), resample="area"))
recipe = Recipe(lr=1e-3, clip_grad=1, mean=(0.5,), pairs=((11, "a"),)).override(epochs=3, data="x")
options = Options(layers=[0, "final"], sep="none", images=None, amp="bf16")
report = fastkd.analyze("resnet18", "data", layers="0,5", levels=(0.9,), shared="all")
print(options, report.models[0].last.ranks.at(0.9))
print(result.top1, recipe.scaled_lr, fastkd.__version__, loss)
"""
BAD = """
import torch

import fastkd

x = torch.zeros(2, 4, 8)
fastkd.feature_kd(x, x, "msee")
fastkd.feature_kd(x, x, backend="tritom")
fastkd.lift_kd(x, x, x, loss="l2")
fastkd.train(None, None, "data", 3)
fastkd.evaluate("resnet18", "data", crop_pc=1.0)
fastkd.predict("resnet18", "a.jpg", weights="best")
fastkd.analyze("resnet18", "data", layrs="last")
fastkd.analysis.Options(sep="half")
fastkd.Recipe(epocs=4)
fastkd.Recipe(epochs="4")
fastkd.Recipe(amp="fp8")
fastkd.nothing
fastkd.losses.nothing
fastkd.losses.VkD(normalize="whitn")
fastkd.losses.FeatureKD("mse", backend="tritom", resample="linear")
fastkd.losses.LiftKD(192, 384, "msee")
fastkd.training.nothing
"""
FAULTY = [number for number, line in enumerate(BAD.splitlines(), 1) if line.startswith("fastkd.")]
CHECKERS = {
    "mypy": ["-m", "mypy", "--cache-dir", "cache"],
    "basedpyright": ["-m", "basedpyright", "--project", "."],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_type_checker_finds_a_users_mistakes_and_nothing_else(checker, tmp_path):
    if importlib.util.find_spec(checker) is None:
        skip_or_fail("types", f"{checker} is not installed")
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    done = subprocess.run(
        [sys.executable, *CHECKERS[checker], "good.py", "bad.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = re.findall(r"(\w+\.py):(\d+):.* error", done.stdout)
    assert found, done.stdout + done.stderr
    assert sorted({(file, int(line)) for file, line in found}) == [("bad.py", n) for n in FAULTY]
