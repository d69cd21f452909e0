"""Reads what .ci/run needs: a marked command of the README, or an extra's packages.

python .ci/readme.py demo          # the command below <!-- ci: demo -->
python .ci/readme.py --extra dev   # the packages of the extra, without fastkd itself
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def marked_command(name: str) -> str:
    """The bash block that follows a marker, as one line."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- ci: {name} -->\s*```bash\n(.*?)```", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no command marked <!-- ci: {name} -->")
    lines = [line for line in found[1].splitlines() if line and not line.startswith("#")]
    return " && ".join(lines)


def extra(name: str) -> list[str]:
    """The packages of an extra of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1]
    found = re.search(rf"^{name} = \[(.*?)^\]|^{name} = \[(.*?)\]$", section, re.DOTALL | re.M)
    packages = re.findall(r'"(.+?)"', found[0])
    return [package for package in packages if not package.startswith("fastkd")]


if __name__ == "__main__":
    if sys.argv[1] == "--extra":
        print("\n".join(extra(sys.argv[2])))
    else:
        print(marked_command(sys.argv[1]))
