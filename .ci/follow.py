#!/usr/bin/env python3
"""Follow the calls of `fastkd.train` from its epoch loop to the end of the first update.

Prints the files of the package that are entered on the way, with their lines, and exits with 1
where they are over the limits. Models, losses and operators, which any trainer calls, stand apart.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from PIL import Image

import fastkd
from fastkd.training import trainer
from fastkd.training.updates import Engine

PACKAGE = Path(fastkd.__file__).parent
MATHEMATICS = ("models", "losses", "ops", "tokens.py")
FILES, LINES = 12, 2_560
TOGETHER = 800  # lines of trainer.py and updates.py


class UpdateDone(Exception):
    """Ends the run after its first update."""


def main() -> int:
    """Print the files, and say whether they are few enough."""
    before, after = entered()
    way = [path for path in after if path.parts[0] not in MATHEMATICS]
    lines = {path: count(path) for path in way}
    for path in way:
        print(f"{path!s:<28} {lines[path]:>6}")
    total = sum(lines.values())
    print(f"from the loop to an update: {len(way)} files, {total:,} lines", end=" ")
    print(f"(at most {FILES}, {LINES:,})")
    apart, opening = set(after) - set(way), set(before) - set(after)
    print(f"models, losses, operators: {len(apart)} files, {sum(map(count, apart)):,} lines")
    print(f"opening a run before it: {len(opening)} files, {sum(map(count, opening)):,} lines")
    together = count(Path("training/trainer.py")) + count(Path("training/updates.py"))
    print(f"trainer.py and updates.py: {together} lines (at most {TOGETHER})")
    return int(len(way) > FILES or total > LINES or together > TOGETHER)


def count(path: Path) -> int:
    """Lines of a file of the package."""
    return (PACKAGE / path).read_text(encoding="utf-8").count("\n")


def entered() -> tuple[list[Path], list[Path]]:
    """Files in which functions run before the loop, and from there to the first update's end."""
    phases: tuple[dict[Path, None], dict[Path, None]] = ({}, {})
    phase = 0
    update, train_one_epoch = Engine.update, trainer.train_one_epoch

    def trace(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            phases[phase][path.relative_to(PACKAGE)] = None

    def beginning(*arguments: Any) -> Any:
        nonlocal phase
        phase = 1
        return train_one_epoch(*arguments)

    def last(engine: Engine, slices: Any) -> None:
        update(engine, slices)
        sys.setprofile(None)
        raise UpdateDone

    trainer.train_one_epoch = beginning
    Engine.update = last  # type: ignore[method-assign]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            for name in ("a", "b"):
                (Path(folder) / split / name).mkdir(parents=True)
                for number in range(2):
                    image = Image.new("RGB", (40, 40), (number, 9, 9))
                    image.save(Path(folder) / split / name / f"{number}.png")
        options: dict[str, Any] = {
            "model": "test_vit", "width": 64, "num_classes": 2, "img_size": 32, "batch_size": 4,
            "pairs": "-1:-1", "lr_scaling": False, "epochs": 1, "warmup_epochs": 0, "workers": 0,
            "device": "cpu",
        }  # fmt: skip
        model = timm.create_model("test_vit", num_classes=2, img_size=32)
        teacher = fastkd.create_teacher(model)
        sys.setprofile(trace)
        try:
            fastkd.train(
                teacher=teacher, data=folder, output=Path(folder) / "run",
                recipe="lift_softkd_spectral", quiet=True, **options,
            )  # fmt: skip
        except UpdateDone:
            pass
        finally:
            sys.setprofile(None)
    return list(phases[0]), list(phases[1])


if __name__ == "__main__":
    sys.exit(main())
