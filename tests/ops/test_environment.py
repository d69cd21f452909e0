"""The report that goes into bug reports."""

import torch

from fastkd.ops.environment import report


def test_it_names_versions_gpu_and_every_backend():
    text = report()
    for expected in (torch.__version__, "GPU", "CUDA library", "backend cuda", "backend triton"):
        assert expected in text
    assert "backend torch   usable" in text


def test_an_unusable_backend_comes_with_its_reason():
    if not torch.cuda.is_available():
        assert "backend triton  it needs CUDA tensors, got cpu" in report()
