"""Several processes on one run: the same update, exact evaluation, one writer."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd.training import CheckpointError, Result, load_checkpoint, train
from fastkd.utils.distributed import TASK_COUNTS, process_count, world
from tests.harness.tiny import FAST, tensor_data, vit
from tests.harness.torchrun import run_ranks

OPTIONS = FAST | {"alpha": 0.5, "projector": "linear", "accumulation": 2, "log_interval": 1}
MEASURED = (
    *("loss", "ce", "soft_kd", "feature", "grad_norm"),
    *("top1", "eval_loss", "ema_top1", "ema_loss"),
)


def train_on_rank(rank: int, output: str) -> None:
    # 31 evaluation images: the ranks' shares differ by one. The main process' weights count.
    student = vit(seed=rank)
    result = train(student, vit(24, seed=1), tensor_data(70, 31), output, **OPTIONS)
    result.save(f"{output}/rank{rank}.json")
    normed = with_batch_norm()
    train(normed, None, tensor_data(70, 31), f"{output}/normed", **FAST | {"epochs": 1})
    torch.save(normed.state_dict(), f"{output}/normed{rank}.pth")
    features_alone = FAST | {"labels": False, "alpha": 0.0, "pairs": [(0, 0)]}
    taught = train(vit(), vit(seed=1), tensor_data(70, 31), **features_alone)
    taught.save(f"{output}/features{rank}.json")
    resume_from_folders_of_their_own(rank, Path(output))


def resume_from_folders_of_their_own(rank: int, output: Path) -> None:
    """Only the main process finds a checkpoint, as on nodes that share no file system."""
    folder = output / f"node{rank}"
    if rank == 0:
        shutil.copytree(output / "normed", folder)
    options = FAST | {"epochs": 1}
    with pytest.raises(CheckpointError, match=r"updates \(\[4, 0\]\).*file system"):
        train(with_batch_norm(), None, tensor_data(70, 31), folder, **options)


def with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 6),
    )


def test_two_processes_run_the_same_training_as_one(tmp_path):
    train(vit(), vit(24, seed=1), tensor_data(70, 31), tmp_path / "one", **OPTIONS)
    (tmp_path / "two").mkdir()
    run_ranks(train_on_rank, str(tmp_path / "two"))
    one, two = (load_checkpoint(tmp_path / name) for name in ("one", "two"))
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        for name in MEASURED:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, atol=1e-4, rtol=1e-3)
    for name, value in one["state_dict_ema"].items():
        torch.testing.assert_close(two["state_dict_ema"][name], value, atol=1e-4, rtol=1e-3)
    normed = [torch.load(tmp_path / "two" / f"normed{rank}.pth") for rank in range(2)]
    assert torch.equal(normed[0]["1.running_mean"], normed[1]["1.running_mean"])
    assert torch.equal(normed[0]["1.running_var"], normed[1]["1.running_var"])
    ranks = [Result.load(tmp_path / "two" / f"rank{rank}.json") for rank in range(2)]
    assert ranks[0].top1 == ranks[1].top1
    assert ranks[0].images == 31
    first, second = (Result.load(tmp_path / "two" / f"features{rank}.json") for rank in range(2))
    assert first.eval_loss == second.eval_loss
    assert first.history[-1]["feature"] < first.history[0]["feature"]


def test_one_process_needs_no_process_group():
    with world("cpu") as alone:
        assert (alone.rank, alone.size, alone.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_an_error():
    with pytest.raises(ValueError, match="device: torch cannot use cuda"), world("cuda"):
        pass


@pytest.fixture
def launched(monkeypatch):
    """Set the variables of a launcher, and those of no other."""
    for name in ("WORLD_SIZE", "RANK", "SLURM_NTASKS", "SLURM_PROCID", *TASK_COUNTS):
        monkeypatch.delenv(name, raising=False)

    def launch(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # srun -n 4
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"},  # as a container may hand them on
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"MV2_COMM_WORLD_SIZE": "8"},
        {"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "1"},
        {"JSM_NAMESPACE_SIZE": "4"},
        {"RANK": "1"},  # which would also print nothing
    ],
)
def test_several_tasks_without_a_process_group_are_refused(variables, launched):
    launched(**variables)
    name, value = next(iter(variables.items()))
    if name == "SLURM_NTASKS":
        name, value = "SLURM_PROCID", "3"
    with pytest.raises(ValueError, match=f"{name}={value}.*torchrun.*WORLD_SIZE=1"), world("cpu"):
        pass


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, 1),
        # An interactive shell of salloc, and the same as a step of its own; sbatch without srun.
        ({"SLURM_NTASKS": "4"}, 1),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 1),
        ({"SLURM_PROCID": "", "OMPI_COMM_WORLD_SIZE": "", "WORLD_SIZE": "", "RANK": ""}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, 1),
        # torchrun in each of two tasks; a task that says that it is alone.
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "WORLD_SIZE": "8", "RANK": "5"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "WORLD_SIZE": "1"}, 1),
    ],
)
def test_what_runs_once_or_under_torchrun_goes_on(variables, size, launched):
    launched(**variables)
    assert process_count() == size


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "-1", "1.0"])
def test_a_launchers_variable_that_is_no_number_is_named(name, value, launched):
    launched(**{name: value})
    with pytest.raises(ValueError, match=f"{name} must be a number from .*'{value}'"), world("cpu"):
        pass
