"""The files for Kubernetes and for clouds: their makers know every field, and their commands start jobs."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import parse_args

from launch.cli import parse
from launch.settings import Settings
from tests.launch.stand_ins import LAUNCH, output_of, stand_ins


def _read(name: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="reading the file needs PyYAML")
    return yaml.safe_load((LAUNCH / name).read_text())


def _torchrun(arguments: list[str]) -> tuple[Any, Settings]:
    """Return what torchrun and launch.train make of these arguments."""
    taken = parse_args(arguments)
    assert taken.module
    assert taken.training_script == "launch.train"
    return taken, parse(taken.training_script_args)


@pytest.fixture
def train_job() -> Any:
    """Return Kubeflow's file."""
    return _read("kubeflow.yaml")


def test_kubeflow_knows_every_field(train_job: Any) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the package kubeflow_trainer_api")
    assert models.TrainerV1alpha1TrainJob.from_dict(train_job).to_dict() == train_job


def test_kubeflow_starts_a_job_that_goes_on(train_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables that the runtime sets in every pod, which Kubernetes puts into the arguments."""
    trainer = train_job["spec"]["trainer"]
    pod = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1"}
    pod |= {"PET_MASTER_ADDR": "gaf-ddp-node-0-0.gaf-ddp", "PET_MASTER_PORT": "29500"}
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    command = trainer["command"] + trainer["args"]
    program, *arguments = (re.sub(r"\$\((\w+)\)", lambda found: pod[found[1]], part) for part in command)
    assert program == "torchrun"
    taken, settings = _torchrun(arguments)
    assert (taken.nnodes, taken.nproc_per_node, taken.max_restarts) == ("2", "4", 3)
    assert (taken.rdzv_backend, taken.rdzv_endpoint) == ("c10d", "gaf-ddp-node-0-0.gaf-ddp:29500")
    assert settings.resume
    (volume,) = _pod(train_job)["containers"][0]["volumeMounts"]
    for folder in (settings.out, settings.data_dir):
        assert str(folder).startswith(volume["mountPath"])
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in trainer["env"]


def _pod(train_job: Any) -> Any:
    (patch,) = train_job["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


@pytest.fixture
def task() -> Any:
    """Return SkyPilot's file, for some bucket."""
    return {**_read("skypilot.yaml"), "envs": {"BUCKET": "somebody-s-bucket"}}


def test_skypilot_knows_every_field(task: Any) -> None:
    sky = pytest.importorskip("sky", reason="needs the package skypilot")
    assert sky.Task.from_yaml_config(task).num_nodes == 2


def test_skypilot_starts_a_job_that_goes_on(task: Any, tmp_path: Path) -> None:
    """In a folder without the clone's own environment, whose torchrun would come before the stand-in."""
    tools = stand_ins(tmp_path)
    tools.add("torchrun", 'echo "$*"')
    (tmp_path / LAUNCH.name).symlink_to(LAUNCH)
    machine = {"NUM_NODES": "2", "NUM_GPUS_PER_NODE": "4", "TASK_ID": "sky-1_gaf-ddp"}
    machine["NODE_IPS"] = "127.0.0.1\n127.0.0.2"
    environment = tools.environment(**{f"SKYPILOT_{name}": value for name, value in machine.items()})
    printed = output_of(["bash", "-c", f"cd {tmp_path}\n{task['run']}"], environment)
    taken, settings = _torchrun(printed.split())
    assert (taken.nnodes, taken.nproc_per_node, taken.max_restarts) == ("2", "4", 3)
    assert taken.rdzv_endpoint == "127.0.0.1:29400"
    assert settings.resume
    assert settings.out == Path(*task["file_mounts"], "sky-1_gaf-ddp")
    assert subprocess.run(["bash", "-n", "-c", task["setup"]], timeout=30).returncode == 0
