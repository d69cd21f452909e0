"""timm's own tests of its models, run on the students that fastkd registers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from fastkd.models.factory import default_cfgs
from tests.conftest import skip_or_fail

PLACE = os.environ.get("FASTKD_TIMM_TESTS")
HOW = (
    "timm's tests are not in its wheel: pip download --no-deps --no-binary timm "
    f"timm=={timm.__version__}, unpack it, and set FASTKD_TIMM_TESTS=.../tests/test_models.py"
)

# What timm's suite says of its own Vision Transformers, by the names that it gives them: they have
# tokens in place of a last feature map, and forward_intermediates.
LIKE_A_VIT = {
    "NON_STD_FILTERS = [": "'fastkd_student', ",
    "FEAT_INTER_FILTERS = [": "'factory', ",
}


@pytest.mark.slow
def test_registered_students_pass_timms_tests(tmp_path):
    if PLACE is None:
        skip_or_fail("timm", HOW)
    text = Path(PLACE).read_text(encoding="utf-8")
    for beginning, name in LIKE_A_VIT.items():
        assert text.count(f"\n{beginning}") == 1
        text = text.replace(f"\n{beginning}", f"\n{beginning}{name}")
    (tmp_path / "test_models.py").write_text(text, encoding="utf-8")
    chosen = " or ".join(default_cfgs)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fastkd.models", "-k", chosen]
    command += ["-p", "no:cacheprovider", "-W", "ignore", "test_models.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found and int(found[1]) >= 8 * len(default_cfgs), done.stdout[-2000:]
