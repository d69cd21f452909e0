"""A model with its weights: of a timm name, of a file, or of a module that takes a file's.

What `create_teacher`, `evaluate` and `predict` call a model that is no run's. Knows files, names
and heads; nothing of what the model is for. What does not fit is an error, never a random layer.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from fastkd.models.hub import (
    DownloadError,
    explained,
    fetched,
    is_download_failure,
    is_hub_name,
    no_waiting_offline,
    not_downloaded,
)
from fastkd.models.released import in_our_names, load_released_checkpoint
from fastkd.models.students import LiftVisionTransformer
from fastkd.models.taps import model_name
from fastkd.models.weights import (
    FASTKD_FORMAT,
    VERSION_KEY,
    FileKind,
    UnreadableError,
    file_kind,
    held_weights,
    looks_like_a_path,
    metadata,
    read_file,
    short_misfit,
)

# Metadata is text: these are JSON in it.
_JSON = ("model_args", "num_classes", "label_names", "input_size", "mean", "std", "crop_pct")

_CONFIG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")

Size = int | tuple[int, int]

LOCAL = "local-dir:"  # before a folder that timm builds a model from


def build_timm_model(
    caller: str, name: str, *, pretrained: bool = False, alternative: str = "", **kwargs: Any
) -> nn.Module:
    """`timm.create_model`, with errors that say what is missing and what can be done.

    Args:
        caller: the public function that asks, named in errors.
        name: a timm model name, with or without a pretrained tag.
        pretrained: load timm's weights; the only thing here that touches the network.
        alternative: what a user can do without these weights, appended to errors about them.
        **kwargs: passed on to `timm.create_model`; ``img_size`` only to models that have one (most
            CNNs run at any size and do not).

    Returns:
        The model.

    Raises:
        ValueError: timm does not know ``name``, or publishes no weights for it; or the hub has no
            such model.
        FileNotFoundError: ``name`` is a path, or a ``local-dir:`` with one, that is not there.
        DownloadError: the weights could not be downloaded.
    """
    check_name(caller, name)
    if pretrained and not _has_weights(name, kwargs):
        raise ValueError(f"{caller}: timm publishes no weights for {name!r}{_or_else(alternative)}")
    downloads = _downloads(name, pretrained, kwargs)
    try:
        with no_waiting_offline() if downloads else contextlib.nullcontext():
            return _create(name, pretrained, kwargs)
    except Exception as error:
        told = explained(caller, name, error)
        if told is not None:
            raise type(told)(f"{told}{_or_else(alternative)}") from error
        if downloads and is_download_failure(error):
            what = f"the pretrained weights of {name!r} are"
            told = not_downloaded(caller, what, error)
            raise DownloadError(f"{told}{_or_else(alternative)}") from error
        raise


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        # timm says nowhere which models are built for a size, but by refusing the argument.
        if kwargs.get("img_size") is None or "'img_size'" not in str(error):
            raise
    return timm.create_model(name, pretrained=pretrained, **kwargs | {"img_size": None})


def fixed_input_size(model: nn.Module) -> tuple[int, int] | None:
    """The one input size that a model's patch embedding takes.

    Args:
        model: any.

    Returns:
        (H, W); None where it takes any size, or there is no such patch embedding.
    """
    patch_embed = getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None)
    if size is None or not getattr(patch_embed, "strict_img_size", False):
        return None
    return int(size[0]), int(size[1])


def check_name(caller: str, name: str) -> None:
    """Refuse a name that is not in timm's registry, suggesting the nearest ones.

    Names with a source (``hf-hub:...``, ``local-dir:...``) are left to timm.

    Raises:
        ValueError: timm does not know ``name``, or it is the path of a file.
        FileNotFoundError: it is the path of a file that is not there.
    """
    if looks_like_a_path(name):
        if Path(name).exists():
            raise ValueError(
                f"{caller}: {name} is no timm name: give the name of a model, and its weights with "
                "checkpoint="
            )
        raise FileNotFoundError(f"{caller}: there is no file or folder {name!r}")
    architecture = name.split(".", 1)[0]
    if name.startswith(LOCAL) and not (folder := Path(name.removeprefix(LOCAL))).is_dir():
        raise FileNotFoundError(f"{caller}: there is no folder {str(folder)!r}")
    if ":" in name or timm.is_model(architecture):
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    raise ValueError(
        f"{caller}: timm has no model {name!r}"
        + (f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models()")
    )


def _has_weights(name: str, kwargs: dict[str, Any]) -> bool:
    if ":" in name or kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay"):
        return True  # the caller says where the weights are; timm checks that
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    return cfg is not None and cfg.has_weights


def _downloads(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> bool:
    """Whether building a model may touch the network."""
    given = kwargs.get("pretrained_cfg_overlay") or {}
    if name.startswith(LOCAL) or "state_dict" in given or "file" in given:
        return False
    return pretrained or is_hub_name(name)


def _or_else(alternative: str) -> str:
    return f"; {alternative}" if alternative else ""


def build_pretrained(
    caller: str,
    source: str | Path,
    checkpoint: str | Path | None = None,
    *,
    pretrained: bool = True,
    num_classes: int | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """Build a model with weights that somebody trained.

    Args:
        caller: the public function that asks, named in errors.
        source: a timm name; or, as a path or ``hf_hub:OWNER/NAME/FILE``, a checkpoint that the
            authors of arXiv 2511.15572 released, or a student that fastkd exported as safetensors.
        checkpoint: weights for a timm name, likewise. What they were fed with, fastkd's own files
            say: it goes into the model's ``pretrained_cfg``.
        pretrained: without ``checkpoint``, load timm's published weights; False leaves them random.
        num_classes: of the head; None takes that of the weights; 0 leaves it out.
        **timm_kwargs: of the timm model; ``img_size`` alone for a released or exported file.

    Returns:
        The model.

    Raises:
        ValueError: an unknown name, weights that do not exist or do not fit, or a head that the
            weights do not have.
        FileNotFoundError: there is no such file.
        DownloadError: the weights cannot be downloaded.
    """
    file = None if checkpoint is None else _existing(caller, checkpoint)
    named = fetched(caller, source)
    kind = file_kind(named)
    if kind in (FileKind.WEIGHTS, FileKind.EXPORT):
        if file is not None:
            raise ValueError(f"{caller}: checkpoint has no effect: {source} has weights itself")
        build = _build_released if kind is FileKind.WEIGHTS else _build_exported
        return build(caller, named, num_classes, **timm_kwargs)
    if kind is FileKind.UNREADABLE and looks_like_a_path(str(named)):
        _read(caller, named)  # which says why
    options = timm_kwargs | {"num_classes": num_classes}
    if file is not None:
        return _build_from_file(caller, str(source), file, options)
    if pretrained:
        _check_published_head(caller, str(source), num_classes)
    return build_timm_model(
        caller,
        str(source),
        pretrained=pretrained,
        alternative="give local weights with checkpoint=PATH",
        **options,
    )


def fill(caller: str, module: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Load a file's weights into a module, strictly.

    Args:
        caller: the public function that asks, named in errors.
        module: changed in place.
        checkpoint: a path or ``hf_hub:OWNER/NAME/FILE``.

    Returns:
        The module.

    Raises:
        ValueError: the weights do not fit, or cannot be read.
        FileNotFoundError: there is no such file.
        DownloadError: it cannot be downloaded.
    """
    file = _existing(caller, checkpoint)
    state: Mapping[str, Tensor] = _held(caller, _read(caller, file), file)
    if isinstance(module, LiftVisionTransformer):
        state = in_our_names(state)
    try:
        module.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise _misfit(caller, file, model_name(module), error) from error
    return module


def _existing(caller: str, checkpoint: str | Path) -> str | Path:
    file = fetched(caller, checkpoint)
    if not Path(file).is_file():
        raise FileNotFoundError(f"{caller}: there is no checkpoint {str(checkpoint)!r}")
    return file


def _build_released(
    caller: str,
    file: str | Path,
    num_classes: int | None,
    img_size: Size | None = None,
    **others: Any,
) -> nn.Module:
    _refuse_others(caller, file, others)
    try:
        model: Any = load_released_checkpoint(file)
    except UnreadableError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{caller}: {file} is no released checkpoint ({error}); for weights of a timm model "
            "give the model's name, and the file with checkpoint="
        ) from error
    return _adapted(caller, file, model, num_classes, img_size)


def _build_exported(
    caller: str,
    file: str | Path,
    num_classes: int | None,
    img_size: Size | None = None,
    **others: Any,
) -> nn.Module:
    _refuse_others(caller, file, others)
    described = read_description(file)
    if described is None or not timm.is_model(described.architecture):
        kind = "another fastkd's" if described is None else described.architecture
        raise ValueError(
            f"{caller}: {file} holds a student that timm cannot build, {kind}: hand its module "
            "over, and the file with checkpoint="
        )
    model: Any = build_timm_model(
        caller,
        described.architecture,
        pretrained_cfg_overlay=described.config,
        **described.arguments,
    )
    return _adapted(caller, file, fill(caller, model, file), num_classes, img_size)


def _refuse_others(caller: str, file: str | Path, options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{caller}: {given[0]} has no effect: {file} says all itself")


def _adapted(
    caller: str, file: str | Path, model: Any, num_classes: int | None, img_size: Size | None
) -> nn.Module:
    """A file's whole model, without its head or in another size, if that is asked for."""
    if num_classes not in (None, 0, model.num_classes):
        raise _random_head(caller, file, model.num_classes, num_classes)
    if num_classes == 0:
        model.reset_classifier(0)
    if img_size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=img_size)
    return model


def _build_from_file(
    caller: str, name: str, checkpoint: str | Path, kwargs: dict[str, Any]
) -> nn.Module:
    """Through timm's own loader, which converts the layouts that it knows, and strictly."""
    check_name(caller, name)
    if file_kind(checkpoint) is FileKind.EXPORT:
        _check_architecture(caller, name, checkpoint)
        return _build_exported(caller, checkpoint, **kwargs)
    content = _read(caller, checkpoint)
    state = _held(caller, content, checkpoint)
    found = _classes_in(state, name)
    wanted = kwargs["num_classes"]
    if wanted not in (None, 0, found):
        raise _random_head(caller, checkpoint, found, wanted)
    overlay = {"state_dict": state, "num_classes": found, "custom_load": False}
    overlay |= run_statistics(content)
    options = kwargs | {"num_classes": found, "pretrained_cfg_overlay": overlay}
    try:
        model: Any = build_timm_model(caller, name, pretrained=True, **options)
    except DownloadError:  # of what a model on the hub is, whose weights are here
        raise
    except (RuntimeError, KeyError) as error:
        raise _misfit(caller, checkpoint, name, error) from error
    model.pretrained_cfg.pop("state_dict", None)  # the file's tensors, which nobody needs again
    if wanted == 0:
        model.reset_classifier(0)  # after a strict load: timm loads loosely where heads differ
    return model


def _check_architecture(caller: str, name: str, file: str | Path) -> None:
    described = read_description(file)
    if described is not None and name.partition(".")[0] != described.architecture:
        raise ValueError(
            f"{caller}: {file} holds a student of {described.architecture}, not of {name}: give it "
            "alone"
        )


def _read(caller: str, file: str | Path) -> Any:
    try:
        return read_file(file)
    except UnreadableError as error:
        raise UnreadableError(f"{caller}: {error}") from error


def _held(caller: str, content: Any, file: str | Path) -> dict[str, Tensor]:
    try:
        return held_weights(content, file)
    except UnreadableError as error:
        raise UnreadableError(f"{caller}: {error}") from error


def _classes_in(state: Mapping[str, Tensor], name: str) -> int:
    """Classes of the head in a checkpoint; 0 for a backbone."""
    heads = _cfg_of(name).get("classifier") or ()
    for head in ((heads,) if isinstance(heads, str) else tuple(heads)) + ("head", "fc"):
        if f"{head}.weight" in state:
            return int(state[f"{head}.weight"].shape[0])
    return 0


def _check_published_head(caller: str, name: str, num_classes: int | None) -> None:
    published = _cfg_of(name).get("num_classes")
    if published is not None and num_classes not in (None, 0, published):
        raise ValueError(
            f"{caller}: the published weights of {name!r} have {published} classes, got "
            f"num_classes={num_classes}, whose head would be random; fine-tune the model and give "
            "it with checkpoint=PATH, or use num_classes=0 for features alone"
        )


def _random_head(caller: str, file: str | Path, found: int, wanted: int | None) -> ValueError:
    return ValueError(
        f"{caller}: {str(file)!r} has a head of {found} classes, got num_classes={wanted}, whose "
        "head would be random; use 0 for features alone"
    )


def _cfg_of(name: str) -> Mapping[str, Any]:
    cfg = None if ":" in name else get_pretrained_cfg(name)
    return {} if cfg is None else cfg.to_dict()


def _misfit(caller: str, checkpoint: str | Path, name: str, error: Exception) -> ValueError:
    return ValueError(f"{caller}: {str(checkpoint)!r} does not fit {name!r}: {short_misfit(error)}")


@dataclass(frozen=True)
class Description:
    """How timm builds an exported student, and what it takes in.

    Attributes:
        architecture: timm's name, or ``module:ClassName`` where only its author can build it.
        arguments: that `timm.create_model` needs beside the name.
        config: for timm's ``pretrained_cfg``: statistics, size, crop and names of classes.
    """

    architecture: str
    arguments: dict[str, Any]
    config: dict[str, Any]


def read_description(path: str | Path) -> Description | None:
    """Read an exported file's metadata.

    Args:
        path: of a .safetensors file.

    Returns:
        The description; None of a file that `fastkd export` did not write.
    """
    said = metadata(path)
    if VERSION_KEY not in said:
        return None
    values: dict[str, Any] = {
        name: json.loads(text) if name in _JSON else text for name, text in said.items()
    }
    arguments = {"num_classes": values.get("num_classes"), **values["model_args"]}
    channels = values["input_size"][0]
    if channels != 3:
        arguments["in_chans"] = channels
    config = {name: _as_tuple(values[name]) for name in _CONFIG if name in values}
    # Of the architecture in general; this student was evaluated as it was trained.
    config |= {"test_input_size": None, "test_crop_pct": None}
    return Description(values["architecture"], arguments, config)


def run_statistics(content: Any) -> dict[str, Any]:
    """What the images of a fastkd run were normalised with, for timm's ``pretrained_cfg``.

    Args:
        content: of a file of weights.

    Returns:
        ``mean`` and ``std``; empty for what is no checkpoint of a run. Images that were fed as they
        came were normalised with 0 and 1.
    """
    if not isinstance(content, Mapping) or content.get("format") != FASTKD_FORMAT:
        return {}
    fed = content.get("input")
    if fed is None:
        return {}
    channels = fed["size"][0]
    mean, std = fed["mean"] or (0.0,) * channels, fed["std"] or (1.0,) * channels
    return {"mean": tuple(mean), "std": tuple(std)}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
