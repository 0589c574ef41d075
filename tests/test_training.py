"Chapter 02 at its edges: exact resume after every stop, damaged files, full disks, divergence, several processes, ledgers."
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lwm_course import training
from lwm_course.course import Budget, MissingExtra
from lwm_course.training import (EMA, Diverged, Run, Summary, TrainConfig, advance, batches, find_pretrained, fit, interval,
                                 load_checkpoint, load_model, make_optimizer, orthogonal, plot_history, psnr, push_folder, restore,
                                 save, save_model, schedule, shard, ssim, to_device)

# One small net with everything that could break exactness: dropout, a buffer that moves, noise in the loss.

class Net(nn.Sequential):
    def hidden_matrices(self): return [self[4].weight]


def net(seed=0):
    torch.manual_seed(seed)
    return Net(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))


def batch_at(step):
    return {"x": np.random.default_rng([1, step]).standard_normal((12, 8)).astype(np.float32)}


def loss(model, batch, step):
    x = batch["x"]
    error = (model(x + 0.1 * torch.randn_like(x)) - x.roll(1, 1)).float().square().mean()
    return error, {"noise": torch.rand(())}


def config(**changes):
    return TrainConfig(**{"steps": 40, "lr": 1e-2, "device": "cpu", "valid_every": 16, "log_every": 1, **changes})


def valid(model): return {"loss": sum(p.square().sum() for p in model.parameters())}


def weights(model): return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_time(history): return [{k: v for k, v in row.items() if k != "elapsed"} for row in history]


def environment():
    "Of a process that imports this file."
    paths = Path(training.__file__).parent.parent, Path(__file__).parent, Path(__file__).parent.parent / "tools"
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def run_script(folder, body, *arguments, wait=True):
    "Start a process that has the definitions above."
    (folder / "script.py").write_text("import sys\nfrom test_training import *\n" + textwrap.dedent(body))
    command = [sys.executable, "script.py", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=folder, text=True, stderr=subprocess.PIPE, env=environment())
    if wait: process.communicate(timeout=300)
    return process


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[False, True], ids=["adamw", "muon"])
def undisturbed(request):
    "Weights and history of a run that nobody interrupts, and its optimizer."
    model = net()
    run = fit(model, batch_at, loss, config(muon=request.param), valid=valid, quiet=True)
    return weights(model), without_time(run.history), {"muon": request.param}


# Exact resume

@pytest.mark.parametrize("stop", [1, 17, 39])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_interrupted_equals_uninterrupted(undisturbed, tmp_path, stop, prefetch):
    def stopping(model, batch, step):
        if step == stop: raise KeyboardInterrupt
        return loss(model, batch, step)

    settings = config(prefetch=prefetch, **undisturbed[2])
    with pytest.raises(KeyboardInterrupt): fit(net(), batch_at, stopping, settings, tmp_path, valid, quiet=True)
    assert load_checkpoint(tmp_path)[1]["step"] == stop
    assert json.loads((tmp_path / "ledger.json").read_text())["status"] == "interrupted"
    model = net(seed=99)  # where it starts does not matter: the checkpoint decides
    run = fit(model, batch_at, loss, config(**undisturbed[2]), tmp_path, valid, quiet=True)
    assert same(weights(model), undisturbed[0])
    assert without_time(run.history) == undisturbed[1]


FOREVER = """
    def slow(model, batch, step):
        time.sleep(0.01)
        return loss(model, batch, step)
    model = net()
    fit(model, batch_at, slow, config(save_every_s=float(sys.argv[2]), steps=int(sys.argv[3])), sys.argv[1], quiet=True)
    save_model(sys.argv[1], model, {})
"""


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate(timeout=300)[1]
        time.sleep(0.01)


def test_sigkill(tmp_path):
    victim = run_script(tmp_path, FOREVER, "run", 0, 100, wait=False)
    wait_for(tmp_path / "run/checkpoint/state.json", victim)
    time.sleep(0.2)
    victim.kill()
    assert victim.wait(300) == -signal.SIGKILL
    reached = load_checkpoint(tmp_path / "run")[1]["step"]
    assert 0 < reached < 100
    assert run_script(tmp_path, FOREVER, "run", 60, 100).returncode == 0
    assert run_script(tmp_path, FOREVER, "whole", 60, 100).returncode == 0
    assert same(load_model(tmp_path / "run")[0], load_model(tmp_path / "whole")[0])
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    assert [(s["first_step"], s["last_step"]) for s in ledger["sessions"]] == [(0, reached), (reached, 100)]
    assert len(list((tmp_path / "run/checkpoint").iterdir())) == 2, "what the killed process left half-written must be gone"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_at_a_whole_step(tmp_path, number):
    victim = run_script(tmp_path, FOREVER, "run", 0.05, 100_000, wait=False)
    wait_for(tmp_path / "run/ledger.json", victim)
    victim.send_signal(number)
    _, errors = victim.communicate(timeout=300)
    assert victim.returncode == -number, errors
    assert json.loads((tmp_path / "run/ledger.json").read_text())["status"] == "interrupted"
    state = load_checkpoint(tmp_path / "run")[1]
    assert len(state["history"]) == state["step"], "the step that was running has been finished and saved"


def test_a_second_interrupt_does_not_save_half_a_step(tmp_path):
    def impatient(model, batch, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return loss(model, batch, step)

    with pytest.raises(KeyboardInterrupt): fit(net(), batch_at, impatient, config(), tmp_path, quiet=True)
    assert load_checkpoint(tmp_path) is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_is_not_repeated_and_can_be_extended(tmp_path):
    first = net()
    done = fit(first, batch_at, loss, config(), tmp_path, quiet=True)
    ledger = (tmp_path / "ledger.json").read_bytes()
    again = net(seed=5)
    assert fit(again, batch_at, loss, config(), tmp_path, quiet=True).elapsed == done.elapsed
    assert same(weights(again), weights(first)) and (tmp_path / "ledger.json").read_bytes() == ledger
    assert not same({k[6:]: v for k, v in load_checkpoint(tmp_path)[0].items() if k.startswith("model.")}, weights(first)), \
        "the checkpoint keeps the weights themselves, the model has their mean"
    assert fit(again, batch_at, loss, config(steps=50), tmp_path, quiet=True).step == 50


def test_a_budget_in_minutes_goes_on_where_it_was(tmp_path, monkeypatch):
    clock = iter(range(10**6))  # every look at the clock takes a second
    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock))))
    settings = config(steps=None, minutes=2, save_every_s=1e9)

    def stopping(model, batch, step):
        if step == 20: raise KeyboardInterrupt
        return loss(model, batch, step)

    with pytest.raises(KeyboardInterrupt): fit(net(), batch_at, stopping, settings, tmp_path, quiet=True)
    used = load_checkpoint(tmp_path)[1]["elapsed"]
    assert 0 < used < 120
    for _ in range(500): next(clock)  # time between two sessions does not count
    run = fit(net(), batch_at, loss, settings, tmp_path, quiet=True)
    assert 120 <= run.elapsed < 125 and run.history[-1]["lr"] < 0.1 * settings.lr, "the rate falls to 0 at the end of the budget"
    assert sum(s["seconds"] for s in run.sessions) == pytest.approx(run.elapsed)


# Files

LIMITED = """
    import resource
    model = net()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    fit(model, batch_at, loss, config(steps=60), sys.argv[1], quiet=True)
"""


def test_a_real_failing_write_keeps_the_last_good_checkpoint(tmp_path):
    fit(net(), batch_at, loss, config(), tmp_path / "run", quiet=True)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run/checkpoint").iterdir()}
    process = run_script(tmp_path, LIMITED, "run", 2000, wait=False)  # the system refuses to write more than 2000 bytes to a file
    message = process.communicate(timeout=300)[1].splitlines()[-1]
    assert process.returncode == 1 and "step 60" in message and "step 40 is intact" in message and "Make room" in message
    assert {p.name: p.read_bytes() for p in (tmp_path / "run/checkpoint").iterdir()} == before
    assert fit(net(), batch_at, loss, config(steps=60), tmp_path / "run", quiet=True).step == 60


def test_full_disk(tmp_path, monkeypatch):
    fit(net(), batch_at, loss, config(), tmp_path, quiet=True)

    def full(tensors, path):
        path.write_bytes(b"half of")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(OSError, match="No space left on device.*step 40 is intact"):
        fit(net(), batch_at, loss, config(steps=60), tmp_path, quiet=True)
    with pytest.raises(OSError, match="there is none yet"): fit(net(), batch_at, loss, config(), tmp_path / "new", quiet=True)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)[1]["step"] == 40 and len(list((tmp_path / "checkpoint").iterdir())) == 2


@pytest.mark.parametrize("pattern", ["step-*", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_checkpoint_is_named(tmp_path, pattern, damage):
    fit(net(), batch_at, loss, config(steps=2), tmp_path, quiet=True)
    file, = (tmp_path / "checkpoint").glob(pattern)
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-10], "empty": b"", "other": b"[1, 2]"}[damage])
    with pytest.raises(ValueError, match=f"{file.name}.*delete .*checkpoint to start"):
        fit(net(), batch_at, loss, config(steps=2), tmp_path, quiet=True)


def test_a_lost_file_is_named(tmp_path):
    fit(net(), batch_at, loss, config(steps=2), tmp_path, quiet=True)
    file, = (tmp_path / "checkpoint").glob("step-*")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=file.name): fit(net(), batch_at, loss, config(steps=2), tmp_path, quiet=True)
    with pytest.raises(FileNotFoundError, match="config.json"): load_model(tmp_path)


def test_another_run_in_the_folder_is_refused(tmp_path):
    fit(net(), batch_at, loss, config(steps=2), tmp_path, data_hash="abc", quiet=True)
    with pytest.raises(ValueError, match="lr was 0.01 and is now 0.5.*another folder"):
        fit(net(), batch_at, loss, config(lr=0.5), tmp_path, data_hash="abc", quiet=True)
    with pytest.raises(ValueError, match="data_hash was abc and is now None"):
        fit(net(), batch_at, loss, config(), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="another model"):
        fit(nn.Linear(8, 8), batch_at, loss, config(), tmp_path, data_hash="abc", quiet=True)
    assert fit(net(), batch_at, loss, config(lr=0.5), tmp_path, data_hash="xyz", resume=False, quiet=True).step == 40


def test_a_checkpoint_older_than_a_setting_goes_on(tmp_path):
    fit(net(), batch_at, loss, config(steps=2), tmp_path, quiet=True)
    file = tmp_path / "checkpoint" / "state.json"
    state = json.loads(file.read_text())
    del state["config"]["muon"]
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="muon was False and is now True"):
        fit(net(), batch_at, loss, config(muon=True), tmp_path, quiet=True)
    assert fit(net(), batch_at, loss, config(), tmp_path, quiet=True).step == 40


def test_save_model(tmp_path):
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100, bias=False))
    model[1].weight = model[0].weight  # tied, as in language models
    save_model(tmp_path / "full", model, {"width": 64}, card="# Card")
    save_model(tmp_path / "half", model, {"width": 64}, dtype=torch.bfloat16)
    state, settings = load_model(tmp_path / "full")
    assert same(state, weights(model)) and settings == {"width": 64} and (tmp_path / "full/README.md").read_text() == "# Card"
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.52 * sizes[0] and not (tmp_path / "half/README.md").exists()
    model.load_state_dict(load_model(tmp_path / "half")[0])
    assert model[0].weight.dtype == torch.float32


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A folder of shipped models with one, `nano`, and one that is not complete."
    for name in ("nano", "half"): (tmp_path / "models" / name).mkdir(parents=True)
    save_model(tmp_path / "models" / "nano", net(), {})
    monkeypatch.setattr(training, "MODELS", tmp_path / "models")
    return tmp_path


@pytest.mark.parametrize("name", ["nan", "nanno", "Nano", "half"])
def test_unknown_model_gets_the_nearest(shelf, name):
    assert find_pretrained("nano") == shelf / "models" / "nano"
    with pytest.raises(ValueError, match=f"Unknown model '{name}'. (Did you mean|Known:) nano"): find_pretrained(name)


def test_folder_is_a_model_and_goes_before_the_hub(shelf, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: pytest.fail("it asks the Hub"))
    monkeypatch.chdir(shelf / "models")
    assert find_pretrained(shelf / "models" / "half") == shelf / "models" / "half"
    assert find_pretrained("../models") == Path("../models")


def test_model_of_the_hub_is_downloaded(shelf, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(shelf / "cache" / name))
    assert find_pretrained("someone/something") == shelf / "cache" / "someone" / "something"


def test_missing_folder_is_named_without_a_network(shelf, monkeypatch):
    import huggingface_hub

    def offline(name): raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="no folder runs/mine here.*Shipped models: nano"): find_pretrained("runs/mine")


def test_upload_sends_what_is_saved(monkeypatch):
    import huggingface_hub
    sent = []

    class Api:
        def create_repo(self, repo, private, exist_ok): sent.append((repo, private, exist_ok))
        def upload_folder(self, repo_id, folder_path):
            sent.append(weights(net(9)).keys() == load_model(folder_path)[0].keys())
            return f"https://hub/{repo_id}"

    model = types.SimpleNamespace(save_pretrained=lambda folder: save_model(folder, net(), {}))
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_folder(model, "someone/something", True) == "https://hub/someone/something"
    assert sent == [("someone/something", True, True), True]


# Divergence

def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    def exploding(model, batch, step): return loss(model, batch, step)[0] * (math.inf if step == 7 else 1), {}

    with pytest.raises(Diverged, match="became inf at step 7. There is no checkpoint. Lower lr"):
        fit(net(), batch_at, exploding, config(save_every_s=1e9), tmp_path / "a", quiet=True)
    assert json.loads((tmp_path / "a/ledger.json").read_text())["status"] == "diverged"
    with pytest.raises(Diverged, match="The last checkpoint, in .*b, is that of step 7"):
        fit(net(), batch_at, exploding, config(save_every_s=0), tmp_path / "b", quiet=True)
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path / "b")[0].values())


@pytest.mark.parametrize("broken, steps", [({3, 8}, 40), (set(range(3, 40)), 12)])
def test_single_bad_gradients_are_skipped_and_counted(tmp_path, broken, steps):
    def bad(model, batch, step):
        value, metrics = loss(model, batch, step)
        return value + ((0 * model[0].weight.sum()).sqrt() if step in broken else 0), metrics  # the root's slope at 0 is infinite

    if steps < 40:
        with pytest.raises(Diverged, match="10 steps, up to step 12"): fit(net(), batch_at, bad, config(), tmp_path, quiet=True)
        return
    model = net()
    run = fit(model, batch_at, bad, config(), tmp_path, quiet=True)
    assert run.skipped == 2 and json.loads((tmp_path / "ledger.json").read_text())["skipped_steps"] == 2
    assert run.history[3]["norm"] is None and all(p.isfinite().all() for p in model.parameters())


# Settings

@pytest.mark.parametrize("wrong", [{}, {"steps": 0}, {"steps": 1, "lr": -1.0}, {"steps": 1, "warmup": 0.9}, {"minutes": -1},
                                   {"steps": 1, "ema": 2}, {"steps": 1, "lr": math.nan}])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match="TrainConfig"): TrainConfig(**wrong)


def test_wrong_names():
    for make in (lambda: training.device("gpu"), lambda: training.dtype("int3")):
        with pytest.raises(ValueError, match="choose auto"): make()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA GPU. Use device='cpu'"): training.device("cuda")
    with pytest.raises(ValueError, match="float16 would need loss scaling"): fit(net(), batch_at, loss, config(dtype="float16"))


def test_no_bfloat16_on_an_imitated_older_cpu(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert training.dtype("auto", "cpu") == torch.float32 and training.dtype("bfloat16", "cpu") == torch.bfloat16


def test_weights_stay_float32_and_products_do_not():
    seen = []

    def spying(model, batch, step):
        seen.append(model[0](batch["x"]).dtype)
        return loss(model, batch, step)

    model = net()
    fit(model, batch_at, spying, config(steps=1, dtype="bfloat16"), quiet=True)
    assert seen == [torch.bfloat16] and all(p.dtype == torch.float32 for p in model.parameters())


def test_layout_of_convolutions():
    model = nn.Conv2d(3, 8, 3)
    run = Run(model, loss, config(channels_last=True))
    assert model.weight.is_contiguous(memory_format=torch.channels_last) and run.model is model


def test_curve_that_grows_is_of_ones_own_drawing(monkeypatch):
    pytest.importorskip("IPython"), pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr(training, "_in_notebook", lambda: True)

    def draw(history):
        seen.append([row for row in history if "valid_loss" in row])
        return plot_history(history, ["valid_loss"])

    history = fit(net(), batch_at, loss, config(), valid=valid, draw=draw).history
    measured = [row for row in history if "valid_loss" in row]
    assert seen[-1] == measured and [row["step"] for row in measured] == [16, 32, 40]
    times = [row["elapsed"] for row in history]
    assert times == sorted(times) and times[0] > 0, "every row says when"


def test_schedule_is_never_negative_and_ends_at_zero():
    points = [schedule(p) for p in np.linspace(0, 1, 1001)]
    assert min(points) == 0 and max(points) == 1 and points[-1] == 0
    rows = fit(net(), batch_at, loss, config(), quiet=True).history
    assert max(row["lr"] for row in rows) == 1e-2 and rows[-1]["lr"] == pytest.approx(1e-2 / 40 / 0.2)


def test_averaging():
    model = net()
    run = fit(model, batch_at, loss, config(ema=0.0), quiet=True)
    assert same(weights(model), {**weights(model), **run.ema.mean}), "without memory the mean is the weights"
    ema = EMA(model, 0.9)
    model[1].running_mean = torch.full((16,), 5.0)  # a module may replace its buffers
    ema.update(10**6)
    assert ema.mean["1.running_mean"].max() > 0.4


# Muon

class Matrices(nn.Module):
    "Matrices of three shapes, two of one shape; a table and a vector."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = {"tall": (24, 8), "wide": (8, 24), "square": (12, 12), "twin": (24, 8), "table": (5, 8), "gain": (8,)}
        for name, shape in shapes.items(): setattr(self, name, nn.Parameter(torch.randn(shape)))

    def hidden_matrices(self): return [self.tall, self.wide, self.square, self.twin]


def after_steps(optimizer_of, without=(), steps=5):
    "The matrices after steps with random gradients, and a falling rate; some get no gradient."
    model, rng = Matrices(), torch.Generator().manual_seed(1)
    optimizer = optimizer_of(model)
    for step in range(steps):
        for group in optimizer.param_groups: group["lr"] = 0.1 / (1 + step)
        for name, p in model.named_parameters():
            gradient = torch.randn(p.shape, generator=rng)
            p.grad = None if name in without else gradient
        optimizer.step()
    return weights(model)


def ours(muon=True): return lambda model: make_optimizer(model, config(weight_decay=0.5, muon=muon))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim has Muon since 2.9")
@pytest.mark.parametrize("wrong", [None, {"weight_decay": 0.4}, {"momentum": 0.9}, {"nesterov": False}, {"adjust_lr_fn": "original"}])
def test_muon_is_that_of_pytorch(monkeypatch, wrong):
    # PyTorch's works in bfloat16 there, and the notebook allows for it: here both use one way to make matrices orthogonal.
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda g, *_: orthogonal(g[None])[0])
    settings = {"weight_decay": 0.5, "adjust_lr_fn": "match_rms_adamw", **(wrong or {})}
    theirs = after_steps(lambda model: torch.optim.Muon(model.hidden_matrices(), lr=0.1, **settings))
    found = after_steps(ours())
    off = max((found[name] - theirs[name]).norm() / theirs[name].norm() for name in ("tall", "square", "twin", "wide"))
    assert off < 1e-5 if wrong is None else off > 1e-3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim has Muon since 2.9")
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (32, 32), (1, 7), (7, 1)])
def test_orthogonal_is_that_of_pytorch(shape):
    from torch.optim._muon import _zeropower_via_newtonschulz
    g = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    theirs = _zeropower_via_newtonschulz(g, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    assert (orthogonal(g[None])[0] - theirs).norm() < 15 * 2**-8 * theirs.norm()     # 15 products, each rounded to 8 bits


def test_muon_leaves_the_rest_to_adamw():
    plain, turned = after_steps(ours(muon=False)), after_steps(ours())
    assert all(torch.equal(plain[name], turned[name]) for name in ("table", "gain"))
    assert not any(torch.equal(plain[name], turned[name]) for name in ("tall", "wide", "square", "twin"))


def test_what_has_no_gradient_does_not_move():
    every, some = after_steps(ours()), after_steps(ours(), without=("tall", "gain"))
    assert torch.equal(some["tall"], weights(Matrices())["tall"]) and torch.equal(some["gain"], weights(Matrices())["gain"])
    assert all(torch.allclose(every[name], some[name], atol=1e-5) for name in ("twin", "wide", "square", "table"))
    assert same(after_steps(ours(), without=weights(Matrices())), weights(Matrices()))


def test_zero_gradients_only_decay():
    model = Matrices()
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    make_optimizer(model, config(lr=0.1, weight_decay=0.5, muon=True)).step()
    for name, value in weights(Matrices()).items():
        assert torch.allclose(getattr(model, name), value * (1 if name == "gain" else 1 - 0.1 * 0.5)), name


def test_muon_of_matrices_alone_and_of_frozen_ones():
    model = nn.Linear(4, 4, bias=False)
    model.hidden_matrices = lambda: [model.weight]
    model.weight.grad = torch.randn(4, 4)
    optimizer = make_optimizer(model, config(muon=True))
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and model.weight.isfinite().all()
    model = Matrices()
    model.tall.requires_grad_(False)
    assert not any(p is model.tall for group in make_optimizer(model, config(muon=True)).param_groups for p in group["params"])


def test_muon_asks_for_matrices():
    with pytest.raises(ValueError, match=r"give Linear a method hidden_matrices\(\).*muon=False"):
        fit(nn.Linear(8, 8), batch_at, loss, config(muon=True), quiet=True)
    model = nn.Conv2d(3, 4, 3)
    model.hidden_matrices = lambda: [model.weight]
    with pytest.raises(ValueError, match=r"of Conv2d lists shapes \[\(4, 3, 3, 3\)\]"): make_optimizer(model, config(muon=True))


# Batches and processes

def test_an_error_in_a_batch_surfaces():
    def broken(step):
        if step == 3: raise OSError("episode 17 is damaged")
        return batch_at(step)

    with pytest.raises(OSError, match="episode 17"): fit(net(), broken, loss, config(), quiet=True)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")], "no thread is left behind"


def test_fit_works_in_a_thread():
    result = []
    thread = threading.Thread(target=lambda: result.append(fit(net(), batch_at, loss, config(steps=3), quiet=True).step))
    thread.start()
    thread.join()
    assert result == [3]


def test_shards_must_be_equal():
    with pytest.raises(ValueError, match="batch of 5 cannot be cut into 2"): shard(torch.zeros(5, 2), 0, 2)


def test_batches_that_know_their_parts_are_not_cut():
    asked = []

    class Batches:
        def part(self, step, rank, world):
            asked.append((step, rank, world))
            return batch_at(step)

    fit(net(), Batches(), loss, config(steps=2, prefetch=0), quiet=True)
    assert asked[:2] == [(0, 0, 1), (1, 0, 1)]


def test_batches_are_made_ahead_but_not_endlessly():
    made = []
    source = batches(lambda step: made.append(step) or step, 0, prefetch=2)
    assert next(source) == 0
    source.close()
    assert len(made) <= 3


SEVERAL = """
    import os, json
    model = net(seed=int(os.environ.get("RANK", 0)))  # starts differ; the first process's counts
    model[1], model[3] = nn.Identity(), nn.Identity()  # batch statistics and dropout do depend on the share
    plain = lambda model, batch, step: ((model(batch["x"]) - batch["x"].roll(1, 1)).square().mean(), {})
    run = Run(model, plain, config(clip=0.0, dtype="float32"))
    advance(run, to_device(shard(batch_at(0), run.workers.rank, run.workers.world), run.workers.device), 0.5)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.save(gradients, f"gradients-{run.workers.world}-{run.workers.rank}.pt")
    model.register_parameter("seldom", nn.Parameter(torch.ones(())))      # in some steps only
    sometimes = lambda model, batch, step: (plain(model, batch, step)[0] + (model.seldom.square() if step % 2 else 0), {})
    fit(model, batch_at, sometimes, config(steps=5, dtype="float32"), f"run-{run.workers.world}", quiet=True)
    torch.save(model.state_dict(), f"weights-{run.workers.world}-{run.workers.rank}.pt")
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs the train extra")
def test_two_processes_compute_the_gradient_of_the_whole_batch(tmp_path):
    process = run_script(tmp_path, SEVERAL, wait=False)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py"]
    together = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment())
    assert together.returncode == 0, together.stderr
    load = lambda name: torch.load(tmp_path / f"{name}.pt")
    alone, halves = load("gradients-1-0"), [load(f"gradients-2-{rank}") for rank in (0, 1)]
    assert torch.equal(*halves) and torch.allclose(halves[0], alone, rtol=1e-5, atol=1e-7)
    assert same(load("weights-2-0"), load("weights-2-1"))
    assert load("weights-2-0")["seldom"] < 1
    ledger = json.loads((tmp_path / "run-2/ledger.json").read_text())
    assert ledger["devices"] == 2 and ledger["device_hours"] == pytest.approx(ledger["seconds"] / 3600 * 2, abs=1e-5)


# Metrics and ledger

def test_psnr_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.functional.image")
    a, b = torch.rand(2, 2, 16, 16, 3)
    assert psnr(a, b) == pytest.approx(image.peak_signal_noise_ratio(a, b, data_range=1.0).item(), abs=1e-4)


def test_images_of_either_kind():
    a, b = (np.random.default_rng(s).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8) for s in (0, 1))
    assert psnr(a, b) == pytest.approx(psnr(a / 255, torch.from_numpy(b)), abs=1e-4)
    assert psnr(a, a) == math.inf
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="these floats reach"): metric(a.astype(np.float32), b)
        with pytest.raises(ValueError, match="different shapes"): metric(a, b[:1])


def test_ssim():
    pytest.importorskip("torchmetrics")
    a = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert ssim(a, a) == pytest.approx(1, abs=1e-5) and ssim(a, 255 - a) < 0 and ssim(a[0], a[0]) == pytest.approx(1, abs=1e-5)


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith(("torchmetrics.", "matplotlib."))]: monkeypatch.delitem(sys.modules, name)
    image = np.zeros((16, 16, 3))
    with pytest.raises(MissingExtra, match=r"torchmetrics.*lwm-course\[train\]"): ssim(image, image)
    with pytest.raises(MissingExtra, match=r"matplotlib.*lwm-course\[train\]"): plot_history([{"step": 0, "loss": 1.0}])


def test_importing_needs_no_extra():
    extras = "matplotlib", "accelerate", "torchmetrics", "IPython", "gradio", "gymnasium"
    code = f"import sys, lwm_course.training; print([name for name in {extras} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_intervals_cover_what_they_should():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = interval(rng.exponential(1.0, size=40))  # its mean is 1
        hits += low <= 1 <= high
    # 95 % nominal; 40 values of a skewed distribution cost the percentile bootstrap a few points; 3 standard errors are 5 points
    assert 170 <= hits <= 199
    summary = Summary.of([1.0, 2.0, 3.0])
    assert (summary.mean, summary.n) == (2.0, 3) and 1 <= summary.low <= 2 <= summary.high <= 3 and "n = 3" in str(summary)
    with pytest.raises(ValueError, match="at least one value"): interval([])


def test_ledger(tmp_path):
    fit(net(), batch_at, loss, config(cost_per_hour=3.0, seed=4), tmp_path, valid, data_hash="sha256:abc", quiet=True)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert [ledger[key] for key in ("status", "steps", "seed", "data_hash", "device")] == ["finished", 40, 4, "sha256:abc", "cpu"]
    assert ledger["cost_usd"] == pytest.approx(3 * ledger["device_hours"]) and ledger["machine"]["cores"]
    assert {"loss", "noise", "valid_loss"} <= ledger["metrics"].keys() and ledger["config"]["lr"] == 1e-2
    spent = Budget.spent(ledger)
    assert spent.gpu_hours == 0 and spent.money == ledger["cost_usd"]
    assert spent.hours == pytest.approx(ledger["device_hours"], abs=1e-5)


def test_one_line_in_a_terminal(tmp_path, capfd):
    fit(net(), batch_at, loss, config(steps=5), tmp_path)
    shown = capfd.readouterr().err.rstrip("\n")
    assert "100%" in shown and "loss=" in shown and "\n" not in shown
    fit(net(), batch_at, loss, config(steps=5), tmp_path / "quiet", quiet=True)
    assert capfd.readouterr().err == ""


def test_save_without_a_folder_does_nothing():
    run = Run(net(), loss, config())
    advance(run, {"x": torch.rand(4, 8)}, 0.5)
    save(run)
    assert not restore(run) and run.saved_step is None
