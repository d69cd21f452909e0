"""``fastkd shard``: write an image folder as WebDataset shards."""

from __future__ import annotations

import argparse

from fastkd.cli import flags, print_once


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd shard``."""
    parser.usage = "fastkd shard SOURCE DESTINATION [options]"
    parser.description = (
        "Write an image folder as WebDataset shards, which fastkd, timm and webdataset read. "
        "After an interruption the same command continues."
    )
    parser.epilog = """examples:
  fastkd shard imagenet imagenet-shards
  fastkd shard imagenet imagenet-full --short-side none --shard-size 256"""
    flags.text(
        parser, "source", "SOURCE", "folder with train/ and val/, or folder of class folders"
    )
    flags.text(parser, "destination", "DESTINATION", "new folder for the shards")
    side = "resize larger images to this short side; none: copy all as they are (default: 256)"
    flags.text(parser, "--short-side", "PIXELS", side, type=_pixels, default=256)
    flags.number(parser, "--quality", 90, "JPEG quality")
    length = parser.add_mutually_exclusive_group()
    flags.number(length, "--shard-size", 64.0, "size of a shard", "MB")
    flags.number(length, "--samples-per-shard", None, "images in a shard, instead of its size")
    most = "stop after this many unreadable images (default: 1 %% of all, at least 20)"
    flags.number(parser, "--max-unreadable", None, most)
    flags.number(parser, "--workers", None, "processes (default: one per core)")
    flags.number(parser, "--seed", 0, "seed of the order of the images")
    flags.shared(parser, "--quiet")
    parser.set_defaults(run=_run)


def _pixels(text: str) -> int | None:
    return None if text == "none" else int(text)


_pixels.__name__ = "number of pixels, or none"  # shown in argparse's error


def _run(options: argparse.Namespace) -> int:
    from fastkd.data.shard_writer import shard

    given = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    print_once(shard(**given).summary())
    return 0
