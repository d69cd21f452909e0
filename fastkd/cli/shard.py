"""``fastkd shard``: from a folder of images to WebDataset shards."""

from __future__ import annotations

import argparse

from fastkd.cli import print_once


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd shard``."""
    parser.description = (
        "Write a folder of images as WebDataset shards, which fastkd, timm and "
        "webdataset read. Stopped at any moment, the same command goes on."
    )
    parser.add_argument("source", help="folder with train/ and val/, or of classes' folders")
    parser.add_argument("destination", help="new folder for the shards")
    parser.add_argument(
        "--short-side",
        type=_pixels,
        default=256,
        metavar="PIXELS",
        help="of larger images; smaller ones are copied; none copies all (default: 256)",
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default: 90)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--shard-size", type=float, default=64, metavar="MB", help="size of a shard (default: 64)"
    )
    length.add_argument(
        "--samples-per-shard", type=int, metavar="N", help="images in a shard, instead of its size"
    )
    parser.add_argument(
        "--max-unreadable",
        type=int,
        metavar="N",
        help="broken images that are left out before the work stops (default: 1 %% of all, at "
        "least 20)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--seed", type=int, default=0, help="of the images' order (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=_run)


def _pixels(text: str) -> int | None:
    return None if text == "none" else int(text)


_pixels.__name__ = "number of pixels, or none"  # argparse names it in its error


def _run(options: argparse.Namespace) -> int:
    from fastkd.data.shard_writer import shard

    report = shard(
        options.source,
        options.destination,
        short_side=options.short_side,
        quality=options.quality,
        shard_size=options.shard_size,
        samples_per_shard=options.samples_per_shard,
        max_unreadable=options.max_unreadable,
        workers=options.workers,
        seed=options.seed,
        quiet=options.quiet,
    )
    print_once(report.summary())
    return 0
