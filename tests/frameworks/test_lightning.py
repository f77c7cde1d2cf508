"""The Lightning callback, and attach under Fabric: to the bit what a loop on DDP does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from gaf_ddp import attach, gaf_hook
from tests.frameworks.by_hand import QUIET, RULES, STEPS, as_torchrun, assert_same_state, by_hand, loss_of, sgd
from tests.nets import assert_replicas_equal, batches, flat_parameters, mlp

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
fabric = pytest.importorskip("lightning.fabric", reason="lightning is not installed")

from gaf_ddp.lightning import AgreementCallback  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

Ranks = Callable[..., list[Any]]


def net(package: Any) -> Any:
    """Return a module of that package: `lightning.pytorch` and `pytorch_lightning` have classes of their own."""

    class Net(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def training_step(self, batch: Any, index: int) -> Any:
            return loss_of(self.inner(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self.inner)

    return Net()


def notes(package: Any) -> Any:
    """Return a logger that keeps what it is told."""

    class Notes(package.loggers.logger.Logger):  # type: ignore[misc]
        name = version = "notes"

        def __init__(self) -> None:
            super().__init__()
            self.told: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.told.append((step, dict(metrics)))

        def log_hyperparams(self, *args: Any) -> None:
            pass

    return Notes()


def trainer_of(package: Any, folder: Path | str, *callbacks: Any, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    plain = {"accelerator": "cpu", "use_distributed_sampler": False, "default_root_dir": str(folder), **quiet}
    return package.Trainer(**{**plain, "logger": False, "callbacks": list(callbacks), **options})


def fit(package: Any, folder: str, callback: Any, epochs: int, path: str | None = None, **options: Any) -> Any:
    """Return the Trainer after so many epochs of half the steps each."""
    halves = batches(dist.get_rank(), STEPS // 2)
    trainer = trainer_of(package, folder, callback, strategy="ddp", devices=2, max_epochs=epochs, **options)
    trainer.fit(net(package), DataLoader(halves, batch_size=None), ckpt_path=path)  # type: ignore[arg-type]
    return trainer


def equals_the_loop(device: torch.device, folder: str, packages: list[str]) -> None:
    """Trainer and Fabric end with the loop's parameters, for each rule; the Trainer's loggers get the summary."""
    as_torchrun()
    data: DataLoader[Any] = DataLoader(batches(dist.get_rank(), STEPS), batch_size=None)  # type: ignore[arg-type]
    for settings in RULES:
        expected = by_hand(device, settings)
        for name in packages:
            package = pytest.importorskip(name)
            callback, logger = AgreementCallback(**settings), notes(package)
            options = {"max_epochs": 1, "log_every_n_steps": 3, "logger": logger}
            trainer = trainer_of(package, folder, callback, strategy="ddp", devices=2, **options)
            module = net(package)
            trainer.fit(module, data)
            assert torch.equal(flat_parameters(module.inner), expected)
            assert callback.state.step == STEPS
            assert not callback.state._records.followers  # undone with the fit
            assert [step for step, metrics in logger.told if "gaf/kept_rank_01" in metrics] == [2, 5]
        assert torch.equal(with_fabric(settings), expected)


def with_fabric(settings: dict[str, Any]) -> Any:
    """Return what README's lines for Fabric end with."""
    launched = fabric.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    launched.launch()
    module = mlp()
    model, optimizer = launched.setup(module, sgd(module))
    state = attach(model, optimizer, **settings)
    for inputs, targets in batches(dist.get_rank(), STEPS):
        optimizer.zero_grad()
        launched.backward(loss_of(model(inputs), targets))
        optimizer.step()
    assert state.step == STEPS
    return flat_parameters(module)


def resumes(device: torch.device, folder: str) -> None:
    """A fit that goes on from a checkpoint equals one that was not disturbed; so does its state."""
    for number, settings in enumerate(RULES):
        whole, first, second = (AgreementCallback(**settings) for _ in range(3))
        expected = fit(lightning, folder, whole, 2)
        path = str(Path(folder, f"{number}.ckpt"))
        fit(lightning, folder, first, 1).save_checkpoint(path)
        resumed = fit(lightning, folder, second, 2, path)
        wanted, found = (flat_parameters(trainer.lightning_module.inner) for trainer in (expected, resumed))
        assert torch.equal(wanted, found)
        assert first.state.step == STEPS // 2
        assert_same_state(second.state, whole.state)
        assert_replicas_equal(resumed.lightning_module)


def refuses(device: torch.device, folder: str) -> None:
    strategy = lightning.strategies.DDPStrategy(ddp_comm_hook=gaf_hook)
    trainer = trainer_of(lightning, folder, AgreementCallback(), strategy=strategy, devices=2, max_steps=1)
    data: DataLoader[Any] = DataLoader(batches(0, 1), batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ddp_comm_hook must be None beside this callback, found <function gaf_hook"):
        trainer.fit(net(lightning), data)


def on_two_ranks(device: torch.device, folder: str, packages: list[str]) -> None:
    equals_the_loop(device, folder, packages)
    resumes(device, folder)
    refuses(device, folder)


def test_fits_resumes_and_refuses(gloo_ranks: Ranks, tmp_path: Path) -> None:
    packages = ["lightning.pytorch"]
    try:
        pytest.importorskip("pytorch_lightning")
        packages.append("pytorch_lightning")
    except pytest.skip.Exception:  # `lightning` alone is fine
        assert len(packages) == 1
    gloo_ranks(2, on_two_ranks, str(tmp_path), packages)


def test_one_device_trains_without_a_filter(tmp_path: Path) -> None:
    data: DataLoader[Any] = DataLoader(batches(0, 2), batch_size=None)  # type: ignore[arg-type]
    callback = AgreementCallback()
    with pytest.warns(UserWarning, match="gaf_ddp: one device, no other gradients to filter against"):
        trainer_of(lightning, tmp_path, callback, devices=1, max_epochs=1).fit(net(lightning), data)
    assert callback.state.step == 0


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(lightning, tmp_path, AgreementCallback(), devices=1, max_epochs=1)
    trainer.callbacks.append(AgreementCallback())
    with pytest.raises(ValueError, match="callbacks must hold one AgreementCallback, found 2"):
        trainer.fit(net(lightning), DataLoader(batches(0, 1), batch_size=None))  # type: ignore[arg-type]


def test_state_and_settings_exclude_each_other() -> None:
    with pytest.raises(TypeError, match="state and settings exclude each other, found both: tau"):
        AgreementCallback(state=AgreementCallback().state, tau=1.0)
