"""A hub that cannot be reached, or never answers: the cached weights, or an error, at once."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
import timm
from safetensors.torch import save_file

COMMIT = "a" * 40

OPEN = """
import json, sys, time
from huggingface_hub import constants
from fastkd.inference.open_model import open_model
found = {}
for name in sys.argv[1:]:
    begun = time.monotonic()
    try:
        found[name] = open_model(name).network.num_classes
    except RuntimeError as error:
        found[name] = type(error).__name__
    assert time.monotonic() - begun < 5, name
assert not constants.HF_HUB_OFFLINE
print(json.dumps(found))
"""


@contextlib.contextmanager
def silent_server():
    """Accepts connections, and lets them wait."""
    kept = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


@contextlib.contextmanager
def nobody():
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


def cached(cache, repo, files):
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, write in files.items():
        write(snapshot / name)


@pytest.mark.slow
@pytest.mark.parametrize("server", [silent_server, nobody])
def test_a_hub_that_does_not_answer_holds_nobody_up(server, tmp_path):
    weights = timm.create_model("test_vit").state_dict()
    config = {"architecture": "test_vit", "pretrained_cfg": {"num_classes": 1000}}
    files = {
        "config.json": lambda path: path.write_text(json.dumps(config)),
        "model.safetensors": lambda path: save_file(weights, path),
    }
    cached(tmp_path, "owner/whole", files)
    cached(tmp_path, "timm/test_vit.r160_in1k", files)
    expected = {
        "hf_hub:owner/whole": 1000,
        "test_vit.r160_in1k": 1000,
        "hf_hub:owner/unknown/model.pth": "DownloadError",
    }
    with server() as port:
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_CACHE": str(tmp_path)}
        environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-c", OPEN, *expected],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
