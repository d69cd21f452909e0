"""Build timm models with published weights, a checkpoint's, or those of an exported student."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from pydantic import Json
from timm.models import get_pretrained_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from fastkd.models.architectures import LiftVisionTransformer
from fastkd.models.hub_download import (
    DownloadError,
    download,
    explained,
    hub_name,
    is_hub_name,
    offline,
)
from fastkd.models.paper_checkpoints import in_our_names
from fastkd.models.taps import model_name
from fastkd.models.weights import (
    VERSION_KEY,
    ChecksumError,
    Classes,
    Deviations,
    FileForm,
    FileKind,
    Means,
    Size,
    check_sum,
    checked,
    file_kind,
    looks_like_a_path,
    metadata,
    read_file,
    read_weights,
    short_misfit,
)
from fastkd.utils.io import read_json

LOCAL = "local-dir:"  # before a folder that timm builds a model from

_CONFIG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # of a model on the hub


class Exported(FileForm):
    """The metadata of a student that fastkd exported; all but words are JSON."""

    architecture: str  # timm's name, or module:ClassName where only its author can build it
    model_args: Json[dict[str, Any]]
    input_size: Json[Size]
    mean: Json[Means]
    std: Json[Deviations]
    num_classes: Json[Classes] | None = None
    label_names: Json[tuple[str, ...]] | None = None
    crop_pct: Json[float] | None = None
    crop_mode: str | None = None
    interpolation: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What `timm.create_model` needs beside the name."""
        channels = self.input_size[0]
        arguments = {"num_classes": self.num_classes, **self.model_args}
        return arguments if channels == 3 else arguments | {"in_chans": channels}

    @property
    def config(self) -> dict[str, Any]:
        """The ``pretrained_cfg`` of timm: statistics, size, crop and class names."""
        config = {name: value for name in _CONFIG if (value := getattr(self, name)) is not None}
        # timm's values for tests are of the architecture; the student was evaluated as trained.
        return config | {"test_input_size": None, "test_crop_pct": None}


class PretrainedConfig(FileForm):
    """The ``pretrained_cfg`` in a folder in timm's layout."""

    input_size: Size | None = None
    mean: Means | None = None
    std: Deviations | None = None
    num_classes: Classes | None = None
    crop_pct: float | None = None
    hf_hub_filename: str | None = None
    label_names: tuple[str, ...] | None = None
    label_descriptions: dict[str, str] | tuple[str, ...] | None = None


class FolderConfig(PretrainedConfig):
    """A ``config.json`` in timm's layout; older ones hold it all at the top."""

    architecture: str
    model_args: dict[str, Any] | None = None
    pretrained_cfg: PretrainedConfig | None = None


def build_timm_model(
    caller: str, name: str, *, pretrained: bool = False, alternative: str = "", **kwargs: Any
) -> nn.Module:
    """Call `timm.create_model`, with errors that name the cause.

    ``alternative``, what a user can do without pretrained weights, is appended to errors about
    them.
    """
    check_name(caller, name)
    hint = f"; {alternative}" if alternative else ""
    if pretrained and not _has_weights(name, kwargs):
        raise ValueError(f"{caller}: timm publishes no weights for {name!r}{hint}")
    local = name.startswith(LOCAL) or _brings_weights(kwargs)
    downloads = is_hub_name(name) or (pretrained and not local)
    try:
        if is_hub_name(name):
            return _create_from_hub(name, pretrained, kwargs)
        return _create_published(name, kwargs) if downloads else _create(name, pretrained, kwargs)
    except ChecksumError as error:
        raise ChecksumError(f"{caller}: {error}") from error
    except Exception as error:
        told = explained(caller, name, error) if downloads else None
        if told is None:
            raise
        raise type(told)(f"{told}{hint}") from error


def _brings_weights(kwargs: Mapping[str, Any]) -> bool:
    return bool((kwargs.get("pretrained_cfg_overlay") or {}).keys() & {"state_dict", "file"})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    if name.startswith(LOCAL):  # check the files that timm is going to read
        folder = Path(name.removeprefix(LOCAL))
        _read_config(folder / "config.json")
        named = [folder / file for file in _WEIGHT_FILES]
        others = (file for end in ("safetensors", "pth", "bin") for file in folder.glob(f"*.{end}"))
        found = next(filter(Path.is_file, (*named, *others)), None)
        if pretrained and found is not None and not _brings_weights(kwargs):
            check_sum(found)
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        # Most CNNs run at any size. timm lists nowhere which models are built for one.
        if kwargs.get("img_size") is None or "'img_size'" not in str(error):
            raise
    return timm.create_model(name, pretrained=pretrained, **kwargs | {"img_size": None})


def _read_config(file: Path) -> FolderConfig:
    return checked(FolderConfig, read_json(file), file)


def _create_published(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build a model of timm's registry with its published weights."""
    # timm downloads without a time limit, so files are fetched here and handed to it.
    architecture, _, tag = name.partition(".")
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    published = resolve_pretrained_cfg(architecture, kwargs.get("pretrained_cfg") or tag, overlay)
    if not published.hf_hub_id:  # a few old models have a URL alone
        return _create(name, True, kwargs)
    repo, _, revision = published.hf_hub_id.partition("@")
    file = published.hf_hub_filename
    custom = published.custom_load == "hf" and file is not None
    files = [file] if custom else _weight_files(file)
    where = {"revision": revision or None, "cache_dir": kwargs.get("cache_dir")}
    path = download(repo, *files, offline=offline(), **where)
    here = {"file": str(path), "custom_load": True} if custom else _read_by_timm(path)
    model = _create(name, True, kwargs | {"pretrained_cfg_overlay": {**overlay, **here}})
    _forget(model, here, published.to_dict())
    return model


def _create_from_hub(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Build a model that lies on the hub in timm's layout."""
    match = hub_name(name)
    assert match is not None
    repo = match["repo"]
    where: dict[str, Any] = {"offline": offline(), "cache_dir": kwargs.get("cache_dir")}
    where["revision"] = match["revision"]
    config = download(repo, "config.json", **where)
    here: dict[str, Any] = {}
    if pretrained:
        described = _read_config(config)
        files = _weight_files((described.pretrained_cfg or described).hf_hub_filename)
        here = {"source": "", **_read_by_timm(download(repo, *files, **where))}
    overlay = {**(kwargs.get("pretrained_cfg_overlay") or {}), **here}
    model = _create(
        f"{LOCAL}{config.parent}", pretrained, kwargs | {"pretrained_cfg_overlay": overlay}
    )
    _forget(model, here, {})
    model.pretrained_cfg.pop("file", None)
    model.pretrained_cfg |= {"source": "hf-hub", "hf_hub_id": name.partition(":")[2]}
    return model


def _weight_files(named: str | None) -> tuple[str, ...]:
    """List the names that a weights file on the hub may have, in timm's order."""
    if named is None:
        return _WEIGHT_FILES
    safe = named.replace("open_clip_pytorch_model", "open_clip_model")
    return tuple(dict.fromkeys((str(Path(safe).with_suffix(".safetensors")), named)))


def _read_by_timm(path: Path) -> dict[str, Any]:
    """Get the entries of ``pretrained_cfg`` by which timm loads a file of this machine."""
    # A safetensors file is not handed over as tensors, of which timm would make a second copy.
    if path.suffix == ".safetensors":
        check_sum(path)
        return {"file": str(path), "custom_load": False}
    return {"state_dict": read_file(path), "custom_load": False}


def _forget(model: Any, here: Mapping[str, Any], published: Mapping[str, Any]) -> None:
    """Remove the place of the weights on this machine from ``pretrained_cfg``."""
    for key in here:
        model.pretrained_cfg.pop(key, None)
        if key in published:
            model.pretrained_cfg[key] = published[key]


def fixed_input_size(model: nn.Module) -> tuple[int, int] | None:
    """Get the one input size (H, W) that a patch embedding takes; None where it takes any."""
    patch_embed = getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None)
    if size is None or not getattr(patch_embed, "strict_img_size", False):
        return None
    return int(size[0]), int(size[1])


def input_channels(model: nn.Module) -> int:
    """Get the channels of the images that a model takes."""
    # timm's models have them in one of three places.
    own = getattr(model, "in_chans", None)
    if isinstance(own, int):
        return own
    config = getattr(model, "pretrained_cfg", None) or {}
    for stem in (config.get("first_conv"), "patch_embed.proj"):
        if isinstance(stem, str) and stem:
            with contextlib.suppress(AttributeError):
                layer: Any = model.get_submodule(stem)
                return int(layer.in_channels)
    return 3


def check_name(caller: str, name: str) -> None:
    """Refuse a name without a source (``hf-hub:...``) that is not in timm's registry."""
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
    hint = f"did you mean {' or '.join(near)}?" if near else "nor is there a file or folder of it"
    raise ValueError(f"{caller}: timm has no model {name!r}; {hint}")


def _has_weights(name: str, kwargs: Mapping[str, Any]) -> bool:
    if ":" in name or kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay"):
        return True  # the caller says where the weights are; timm checks that
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    return cfg is not None and cfg.has_weights


def build_from_checkpoint(
    caller: str, name: str, file: Path, *, num_classes: int | None = None, **kwargs: Any
) -> nn.Module:
    """Build a timm model with the weights of a file, in any layout that timm converts."""
    check_name(caller, name)
    state = read_weights(caller, file)
    found = _classes_in(state, name)
    check_head(caller, file, found, num_classes)
    overlay = {"state_dict": state, "num_classes": found, "custom_load": False}
    overlay = {**(kwargs.pop("pretrained_cfg_overlay", None) or {}), **overlay}
    options = kwargs | {"num_classes": found, "pretrained_cfg_overlay": overlay}
    try:
        model: Any = build_timm_model(caller, name, pretrained=True, **options)
    except DownloadError:  # of the configuration of a model on the hub
        raise
    except (RuntimeError, KeyError) as error:
        raise _misfit(caller, file, name, error) from error
    model.pretrained_cfg.pop("state_dict", None)  # frees the file's tensors
    if num_classes == 0:
        model.reset_classifier(0)  # after a strict load: timm loads loosely where heads differ
    return model


def fill(caller: str, module: nn.Module, file: Path) -> nn.Module:
    """Load a file's weights into a module, strictly and in place."""
    state: Mapping[str, Tensor] = read_weights(caller, file)
    if isinstance(module, LiftVisionTransformer):
        state = in_our_names(state)
    try:
        module.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise _misfit(caller, file, model_name(module), error) from error
    return module


def _classes_in(state: Mapping[str, Tensor], name: str) -> int:
    """Count the classes of the head in a checkpoint; 0 for a backbone."""
    cfg = None if ":" in name else get_pretrained_cfg(name)
    heads = getattr(cfg, "classifier", None) or ()
    for head in ((heads,) if isinstance(heads, str) else tuple(heads)) + ("head", "fc"):
        if f"{head}.weight" in state:
            return int(state[f"{head}.weight"].shape[0])
    return 0


def check_published_head(
    caller: str, name: str, num_classes: int | None, overlay: Mapping[str, Any] | None = None
) -> None:
    """Refuse a number of classes that the published weights of a timm name do not have."""
    cfg = None if ":" in name else get_pretrained_cfg(name)
    published = (overlay or {}).get("num_classes", getattr(cfg, "num_classes", None))
    check_head(caller, name, published, num_classes)


def check_head(caller: str, source: str | Path, found: int | None, wanted: int | None) -> None:
    """Refuse a number of classes that the weights of a source, if it is known, do not have."""
    if found is not None and wanted not in (None, 0, found):
        raise ValueError(
            f"{caller}: {str(source)!r} has a head of {found} classes, got num_classes={wanted}, "
            "whose head would be random; fine-tune the model first and give it with "
            "checkpoint=PATH, or use num_classes=0 for features alone"
        )


def _misfit(caller: str, checkpoint: Path, name: str, error: Exception) -> ValueError:
    return ValueError(f"{caller}: {str(checkpoint)!r} does not fit {name!r}: {short_misfit(error)}")


def read_description(path: Path) -> Exported | None:
    """Read the metadata of a .safetensors file; None for one that fastkd did not write."""
    found = metadata(path)
    if VERSION_KEY not in found:
        return None
    check_sum(path)
    return checked(Exported, found, path)


def build_exported(caller: str, file: Path, described: Exported | None) -> nn.Module:
    """Build the student in a file that fastkd exported as safetensors."""
    if described is None or not timm.is_model(described.architecture):
        kind = "another fastkd's" if described is None else described.architecture
        raise ValueError(
            f"{caller}: {file} holds a student that timm cannot build, {kind}: give its module, "
            "and the file with checkpoint="
        )
    model = build_timm_model(
        caller,
        described.architecture,
        pretrained_cfg_overlay=described.config,
        **described.arguments,
    )
    return fill(caller, model, file)


def is_export(path: Path) -> bool:
    """Whether a file, or a folder for timm, is a student that fastkd exported."""
    return file_kind(path / "model.safetensors" if path.is_dir() else path) is FileKind.EXPORT
