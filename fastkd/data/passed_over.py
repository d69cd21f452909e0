"""What timm's reader of WebDataset passes over, with a warning only: told instead, or refused.

Knows the stages of that reader's pipeline; neither positions nor batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import UnidentifiedImageError

Tell = Callable[[str, str], None]  # (name, reason)


def tell_what_is_passed_over(reader: Any, tell: Tell) -> None:
    """Let a reader tell of shards that it cannot fetch and samples that it cannot decode.

    Args:
        reader: timm's of WebDataset, about to be iterated.
        tell: called with (``SHARD`` or ``SHARD:KEY``, reason) for each; the reader goes on when it
            returns, and ends with what it raises.

    Raises:
        RuntimeError: timm's pipeline is another than the one known here.
    """
    reader._lazy_init()
    handled = [stage for stage in reader.ds.pipeline if "handler" in getattr(stage, "kw", {})]
    if len(handled) != 2:
        raise RuntimeError("data: this timm reads WebDataset in stages that fastkd does not know")
    fetching, decoding = handled
    fetching.kw["handler"] = _Fetching(tell)
    decoding.kw["handler"] = _reraise
    decoding.args = (_Decoding(decoding.args[0], tell), *decoding.args[1:])


class _Fetching:
    """The handler of whatever goes wrong between an address and its samples."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def __call__(self, error: Exception) -> bool:
        if isinstance(error, TypeError):  # a defect of the code, not of the data
            raise error
        # webdataset puts the address behind what the error says.
        said = [part for part in error.args if isinstance(part, str)]
        address = said.pop() if len(said) > 1 else "a shard"
        self.tell(address, " ".join(said) or type(error).__name__)
        return True


class _Decoding:
    """The decoder of samples; None, which the pipeline leaves out, for those that it cannot."""

    def __init__(self, decode: Callable[[dict[str, Any]], Any], tell: Tell) -> None:
        self.decode = decode
        self.tell = tell

    def __call__(self, sample: dict[str, Any]) -> Any:
        try:
            return self.decode(sample)
        except TypeError:
            raise
        except Exception as error:  # whatever decoders raise
            name = f"{sample.get('__url__')}:{sample.get('__key__')}"
            # Pillow's own words name an address in memory.
            unknown = isinstance(error, UnidentifiedImageError)
            self.tell(name, "no image" if unknown else f"{type(error).__name__}: {error}")
            return None


def _reraise(error: Exception) -> bool:
    raise error
