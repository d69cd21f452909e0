"""Names on the hub: files of any layout, and one quick error where there is no network."""

import errno
import os
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import constants, errors

from fastkd import create_teacher
from fastkd.models import create_student, hub_download, load_released_checkpoint
from fastkd.models.hub_download import DownloadError, fetched, is_hub_name
from fastkd.models.timm_models import build_timm_model

FILE = "hf_hub:owner/name/models/Lift/pytorch_model.pth"


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(hub_download, "_hub_answers", lambda: True)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(hub_download, "_hub_answers", lambda: False)


@pytest.fixture
def student():
    base = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "depth": 1}
    return create_student("deit_tiny_patch16_224", "widelast", width=64, num_classes=5, **base)


@pytest.fixture
def published(student, tmp_path, monkeypatch, online):
    """A released checkpoint on a hub of our own; what was asked of it."""
    torch.save({"model": student.state_dict()}, tmp_path / "cached.pth")
    asked = []

    def download(repo, file, revision=None, **_):
        asked.append((repo, file, revision))
        return str(tmp_path / "cached.pth")

    monkeypatch.setattr(hub_download, "hf_hub_download", download)
    return asked


def failing(error):
    def download(*_, **__):
        raise error

    return download


def answered(kind):
    """An error of the hub's client, which takes a response of its transport's own type."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404")
    return error


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (FILE, ("owner/name", "models/Lift/pytorch_model.pth", None)),
        ("hf-hub:owner/name@v1/model.pth", ("owner/name", "model.pth", "v1")),
    ],
)
def test_a_file_on_the_hub_is_fetched(published, name, expected):
    assert fetched("test", name).name == "cached.pth"
    assert published == [expected]


@pytest.mark.parametrize(
    "name", ["hf_hub:owner/name", "hf-hub:owner/name@v1", "resnet18.a1_in1k", "a/b/c.pth"]
)
def test_other_names_are_left_alone(published, name):
    assert fetched("test", name) == name
    assert is_hub_name(name) == name.startswith("hf") and published == []


def test_a_released_checkpoint_loads_by_its_name_on_the_hub(published, student):
    loaded = load_released_checkpoint(FILE).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in student.state_dict().items())


def test_a_released_checkpoint_can_teach(published, student):
    teacher = create_teacher(FILE)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher(images).logits, student.eval()(images))
    assert create_teacher(FILE, num_classes=0).model.num_classes == 0
    assert create_teacher(FILE, img_size=64).input_size == (64, 64)


def test_a_file_on_the_hub_can_be_a_checkpoint_for_a_name(published, tmp_path):
    model = timm.create_model("test_vit", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "cached.pth")
    teacher = create_teacher("test_vit", checkpoint=FILE)
    assert torch.equal(teacher.model.head.weight, model.head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 7}, "has a head of 5 classes, got num_classes=7"),
        ({"checkpoint": FILE}, "checkpoint has no effect"),
        ({"drop_path_rate": 0.1}, "drop_path_rate has no effect"),
    ],
)
def test_what_a_released_file_says_itself_is_refused(published, options, message):
    with pytest.raises(ValueError, match=message):
        create_teacher(FILE, **options)


def test_a_file_that_was_not_released_is_told_what_to_do(published, tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "cached.pth")
    with pytest.raises(ValueError, match=r"no released checkpoint.*give the model's name, and the"):
        create_teacher(FILE)


@pytest.mark.parametrize("name", [FILE, "hf_hub:owner/name"])
def test_without_network_there_is_one_quick_error(offline, monkeypatch, tmp_path, name):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(DownloadError, match=f"{name} is not cached and could not be downloaded"):
        create_teacher(name)
    assert time.monotonic() - begun < 10  # the hub's client alone waits for 23 seconds


def test_published_weights_without_network_are_one_quick_error(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match=r"test_vit.*not cached and could not be.*or else"):
        build_timm_model("test", "test_vit", pretrained=True, alternative="or else")


@pytest.mark.parametrize("error", [None, OSError("no route")])
def test_the_hub_is_there_if_it_answers_at_all(monkeypatch, error):
    head = failing(error) if error else lambda *_, **__: "even 500 is an answer"
    monkeypatch.setattr(hub_download, "get_session", lambda: SimpleNamespace(head=head))
    assert hub_download._hub_answers() == (error is None)


def test_a_cached_file_needs_no_network(offline, monkeypatch, tmp_path):
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("a" * 40) / "model.pth").write_bytes(b"weights")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert fetched("test", "hf_hub:owner/name/model.pth").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: fetched("test", "hf_hub:o/n/x.pth"), r"test: o/n has no file 'x\.pth'"),
        (
            lambda: build_timm_model("test", "hf_hub:o/n", pretrained=True),
            r"test: o/n is no model in timm's layout",
        ),
    ],
)
def test_a_file_that_the_repository_lacks_is_named(online, monkeypatch, use, message):
    missing = answered(errors.RemoteEntryNotFoundError)
    monkeypatch.setattr(hub_download, "hf_hub_download", failing(missing))
    with pytest.raises(ValueError, match=message):
        use()


def test_a_repository_that_is_not_there_is_a_users_error(online, monkeypatch):
    missing = answered(errors.RepositoryNotFoundError)
    monkeypatch.setattr(hub_download, "hf_hub_download", failing(missing))
    with pytest.raises(ValueError, match="the hub has no repository 'owner/name'"):
        fetched("test", FILE)


def test_a_gated_repository_asks_for_its_terms_to_be_accepted(online, monkeypatch):
    monkeypatch.setattr(hub_download, "hf_hub_download", failing(answered(errors.GatedRepoError)))
    expected = (
        r"owner/name is gated: accept its terms on its page, .*owner/name, then hf auth login"
    )
    with pytest.raises(ValueError, match=expected):
        fetched("test", FILE)


def raised_from(error, cause):
    error.__cause__ = cause
    return error


def told_of(monkeypatch, error, name):
    """What a user reads when a download fails so; of a name on the hub, and of one of timm's."""
    monkeypatch.setattr(hub_download, "hf_hub_download", failing(error))
    with pytest.raises(DownloadError) as told:
        create_teacher(name)
    return str(told.value)


@pytest.mark.parametrize("name", [FILE, "resnet10t.c3_in1k"])
@pytest.mark.parametrize(
    "cause",
    [
        RuntimeError("429 Client Error: Too Many Requests\nfor url https://..."),
        ConnectionError("Name or service not known"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
    ids=["hub", "network", "storage"],
)
def test_what_kept_weights_from_coming_is_told(online, monkeypatch, name, cause):
    error = raised_from(errors.LocalEntryNotFoundError("not found"), cause)
    told = told_of(monkeypatch, error, name)
    assert f"{type(cause).__name__}: {str(cause).splitlines()[0]}" in told
    assert "url" not in told


@pytest.mark.parametrize("name", [FILE, "resnet10t.c3_in1k"])
def test_a_cache_that_cannot_be_written_is_told(online, monkeypatch, name):
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert "PermissionError" in told_of(monkeypatch, error, name)


def test_a_folder_that_is_not_there_is_no_matter_of_the_network(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        build_timm_model("test", f"local-dir:{tmp_path / 'none'}", pretrained=True)
