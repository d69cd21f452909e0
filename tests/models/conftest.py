import pytest
import torch

# A ViT of three blocks, 24 channels and 16 patches: every path of the real one, in milliseconds.
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_classes": 7}


@pytest.fixture
def tiny():
    return dict(TINY)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
