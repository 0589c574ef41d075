"Seats instead of rows, four graphs, and engines that play as PyTorch does."
import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from lwm_course import course, export
from lwm_course.console import Facts
from lwm_course.course import main
from lwm_course.dynamics import WorldModel
from lwm_course.network import DYNAMICS_SIZES, Dynamics
from lwm_course.export import Backend, busy_places, fastest, graphs, key_presses, load_backend, opening, parity, seats
from lwm_course.ssm import Mamba2
from lwm_course.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def wm():
    return WorldModel.from_pretrained("nano", "cpu", "float32")


def small_world(wm, seed=0):
    "One block each, untrained, with a gate that opens, and a memory of six bytes."
    torch.manual_seed(seed)
    kept = [Facts.of([np.random.default_rng(game).integers(5, size=(60, 128), dtype=np.uint8)], facts=6) for game in range(len(wm.games))]
    values, strides = zip(*(facts.sizes for facts in kept))
    net = Dynamics(replace(wm.dynamics.config, depth=1, head_depth=1, facts=6, values=values, strides=strides, shown=(200,) * len(kept)), wm.dynamics.codes)
    net.owned.copy_(wm.dynamics.owned)
    for console, facts in zip(net.consoles, kept):
        console.facts.load_state_dict(facts.state_dict())
        for part in (console.screen.name, console.screen.odd): torch.nn.init.normal_(part.weight, std=8.0)      # it is certain of much, not of all
        torch.nn.init.normal_(console.leave[1].weight)
    torch.nn.init.constant_(net.gate.bias, 0.0)
    return WorldModel(wm.tokenizer, net, wm.folder).ready("cpu", "float32")


@pytest.fixture(scope="module")
def small(wm):
    return small_world(wm)


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    "The small world, exported once."
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"): pytest.importorskip(package)
    out = tmp_path_factory.mktemp("exports")
    return out, export.export(small, list(export.CPU), out, steps=8, games=small.games[:2])


# Seats

def test_every_active_place_has_one_seat():
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.5, 1.0):
        active = torch.rand(5, 65, generator=generator) < share
        active[:, -1] = True
        slots = seats(active)
        assert (slots[:, 0] == 64).all() and slots.shape[1] % 8 == 1
        for row, own in zip(slots.tolist(), active):
            assert sorted(place for place in row if place < 65) == own.nonzero()[:, 0].tolist()


def test_busy_places_repeat_none_and_miss_none():
    active, window = torch.zeros(3, 65, dtype=torch.bool), torch.zeros(3, 65, 3, 4)
    active[0, 5], window[1, 7, 2, 1] = True, -1e-9
    busy = busy_places(active, window)
    assert 5 in busy[0] and 7 in busy[1] and all(len(set(row)) == 8 for row in busy.tolist())


def test_memory_fades_as_a_step_with_nothing():
    torch.manual_seed(0)
    layer, slots = Mamba2(32, 4, 8, bias=False), torch.tensor([[5]])
    state = torch.zeros(1, 5, 3, layer.channels), torch.randn(1, 5, 4, 8, 4)
    with torch.no_grad():
        _, (_, after) = layer.step(torch.zeros(5, 32), tuple(part[0] for part in state))
        histories = export.BusyHistories(export.Seats(slots, 5), torch.tensor([[0]]))
        part = tuple(histories.busy.collect(x) for x in state)
        _, faded = histories.fade(layer, state, (part[0], after[:1]))
    assert torch.allclose(faded[0], after, atol=1e-7) and not torch.allclose(faded, state[1])


# Parity in PyTorch

@pytest.mark.parametrize("game", ["ALE/Pong-v5", "ALE/SpaceInvaders-v5"])
def test_seats_play_as_rows_do_over_a_thousand_steps(wm, game):
    found = parity(wm, Backend(wm, graphs(wm)), game, 1000)
    assert found.passed, found


def test_parity_finds_a_planted_difference(wm):
    backend = Backend(wm, graphs(wm))
    head = backend.run["head"]
    calls = []

    def off(*tensors):
        out, gate = head(*tensors)
        calls.append(1)
        return out, gate - 100 if len(calls) == 4 else gate      # everything changes

    backend.run["head"] = off      # the first call is that of the logits
    found = parity(wm, backend, "ALE/SpaceInvaders-v5", 10)     # no memory draws it
    assert found.same == 2 and not found.passed


def test_a_tie_is_no_difference_but_many_are(wm):
    "Two choices that are as good as one another: the engine takes the other one, with the same numbers."
    class Turns(Backend):
        def next_tokens(self, *how):
            tokens, by, due = super().next_tokens(*how)
            if self.turns:
                tokens[0, 31, 31] = 1 - tokens[0, 31, 31].clamp_max(1)
                self.turns -= 1
            return tokens, by, due
    backend = Turns(wm, graphs(wm))
    for turns, ties, passed in ((0, 0, True), (1, 1, True), (3, 3, False)):
        backend.turns = turns
        found = parity(wm, backend, wm.games[0], 10)
        assert (found.same, found.ties, found.passed) == (10, ties, passed)


def test_what_follows_from_a_tie_is_no_difference(wm):
    "One copy logit on the other side of zero, by less than rounding, and a second token that follows."
    class Follows(Backend):
        frames = 0
        def head(self, *asked):
            out, gate = super().head(*asked)
            if self.frames < 2: gate[0, 31, 31] = self.gate
            return out, gate
        def next_tokens(self, *how):
            self.frames += 1
            tokens, by, due = super().next_tokens(*how)
            if self.frames == 1 and self.follows: tokens[0, 31, 30:] = 1 - tokens[0, 31, 30:].clamp_max(1)
            return tokens, by, due
    for gate, passed in ((-1e-6, True), (1e-6, False)):     # on the other side, or not
        true, backend = Follows(wm, graphs(wm)), Follows(wm, graphs(wm))
        true.gate, backend.gate, true.follows, backend.follows = 1e-6, gate, False, True
        found = parity(true, backend, wm.games[0], 10)
        assert (found.passed, found.ties, found.same) == ((True, 1, 10) if passed else (False, 0, 0))


def test_a_first_step_that_is_a_little_off_does_not_pass():
    good = export.Parity("Pong", 5, 5, 9e-5, 9e-6)
    assert good.passed and not any(replace(good, **off).passed for off in (dict(same=4), dict(ties=2), dict(first_gate=2e-4), dict(first_out=2e-5)))
    half = replace(good, precision="float16", same=4, first_gate=0.04)
    assert half.passed and not any(replace(half, **off).passed for off in (dict(first_gate=0.06), dict(first_out=0.006)))


def test_players_of_different_games_with_many_seats(wm):
    games = ["ALE/Pong-v5", "ALE/SpaceInvaders-v5", "ALE/Boxing-v5"]
    frames, actions = (np.stack([part[:n] for part in parts]) for n, parts in zip((8, 7), zip(*(opening(wm, g) for g in games))))
    backend = Backend(wm, graphs(wm))
    true = own = wm.start(frames, actions, games)
    for key in key_presses(4, 15):
        (a, true), (b, own) = wm.step(true, [key] * 3), backend.step(own, [key] * 3)
        assert torch.equal(a, b) and torch.equal(true.tokens, own.tokens)
    for how in (dict(temperature=1.0), dict(refine=3), dict(guidance=1.5)):
        (a, _), (b, _) = wm.step(true, [1, 1, 1], **how), backend.step(own, [1, 1, 1], **how)
        assert (a != b).float().mean() < 0.01, how


def test_what_the_memory_draws_is_known_to_an_engine_too(small):
    "The console stays in PyTorch; to the graphs it is tokens that are known."
    games = [small.games[0], small.games[6], small.games[0]]
    frames, actions = (np.stack([part[:n] for part in parts]) for n, parts in zip((8, 7), zip(*(opening(small, g) for g in games))))
    backend = Backend(small, graphs(small))
    true = own = small.start(frames, actions, games)
    known = small.dynamics.drawn(true.facts, small.dynamics.carry(true.facts, torch.ones(3, dtype=torch.long), true.game), true.game) != small.dynamics.mask
    assert (true.facts >= 0).any() and known.any() and not known.all()
    for key in key_presses(4, 6):
        (a, true), (b, own) = small.step(true, [key] * 3, guidance=1.5), backend.step(own, [key] * 3, guidance=1.5)
        assert torch.equal(a, b) and torch.equal(true.facts, own.facts) and torch.equal(true.active, own.active)


def test_an_engine_plays_without_a_memory_too(small):
    torch.manual_seed(0)
    net = Dynamics(replace(small.dynamics.config, facts=0), small.dynamics.codes)
    net.owned.copy_(small.dynamics.owned)
    torch.nn.init.constant_(net.gate.bias, 0.0)
    world = WorldModel(small.tokenizer, net, small.folder).ready("cpu", "float32")
    assert parity(world, Backend(world, graphs(world)), world.games[0], 30).passed


def test_the_old_state_stays_valid(wm):
    backend = Backend(wm, graphs(wm))
    clip, actions = opening(wm, wm.games[0])
    state = backend.start(clip[None], actions[None], wm.games[0])
    first, _ = backend.step(state, [2])
    assert torch.equal(backend.step(state, [2])[0], first)


def test_graphs_of_the_larger_sizes_shape(small, tmp_path):
    "Every position, always, and no memory in some blocks: as in `tiny`, `base` and `large`, with few channels."
    torch.manual_seed(0)
    own = {name: value for name, value in DYNAMICS_SIZES["tiny"].items() if name not in ("depth", "head_depth", "width", "token_width", "attention_heads")}
    net = Dynamics(replace(small.dynamics.config, depth=3, head_depth=1, width=64, token_width=8, attention_heads=4, facts=0, **own, grid=8), small.dynamics.codes)
    torch.nn.init.constant_(net.gate.bias, 0.0)
    world = WorldModel(Tokenizer(replace(small.tokenizer.config, frame_size=64)), net).ready("cpu", "float32")
    world.tokenizer.quantizer.load_state_dict(small.tokenizer.quantizer.state_dict())
    [manifest] = export.export(world, ["onnx"], tmp_path, steps=20, games=world.games[:1]).values()
    assert [block is None for block in world.start(*play_of(world)).memory.blocks] == [False, True, False]
    assert export.Parity(**manifest["parity"][0]).passed and len(manifest["shapes"]["trunk"]) == 10 + 2 * 2


def test_a_size_with_random_weights_is_the_same_each_time():
    args = argparse.Namespace(size="nano", frame_size=64)
    assert export.source_hash(export.exported_model(args)) == export.source_hash(export.exported_model(args))


def play_of(world):
    "Random pictures, a key, a game."
    return np.random.default_rng(0).integers(0, 256, (1, 4, *world.frame_size, 3), np.uint8), np.zeros((1, 3), int), world.games[0]


def test_graphs_refuse_another_precision(small):
    low = small_world(small)
    low.dynamics.bfloat16()
    with pytest.raises(ValueError, match="float32"): graphs(low)


# Engines

def check_play(small, backend):
    "An engine plays as the model does, in another game and with another number of players than the example's."
    assert parity(small, backend, small.games[5], 30, seed=1).passed
    clip, actions = opening(small, small.games[3])
    frames, actions = np.stack([clip] * 3), np.stack([actions] * 3)
    true = own = small.start(frames, actions, small.games[3])
    for keys in ([0, 1, 2], [3, 3, 0]):
        (a, true), (b, own) = small.step(true, keys), backend.step(own, keys)
        assert a.shape == b.shape and (backend.precision == "int8" or torch.equal(a, b))


@pytest.mark.parametrize("target", export.CPU)
def test_engine_plays_alike(small, folders, target):
    out, manifests = folders
    assert len(manifests[target]["parity"]) == 2 and all(export.Parity(**p).passed for p in manifests[target]["parity"])
    backend = load_backend(small, out/target)
    assert backend.precision == manifests[target]["precision"] == ("int8" if target == "onnx-int8" else "float32")
    check_play(small, backend)


@pytest.mark.skipif(not shutil.which("npm"), reason="ONNX Runtime Web comes from npm, which is not installed")
def test_the_same_files_run_in_a_browser(folders, browser, tmp_path):
    "The page beside them, in Chromium, with the runtime next to it as somebody without a network would put it."
    page_source = (folders[0]/"onnx"/"index.html").read_text()
    version = re.search(r'VERSION = "([\d.]+)"', page_source)[1]
    subprocess.run(["npm", "pack", f"onnxruntime-web@{version}"], cwd=tmp_path, check=True, capture_output=True)
    shutil.unpack_archive(next(tmp_path.glob("*.tgz")), tmp_path)
    for target, most in {"onnx": 1e-4, "onnx-int8": 2.0}.items():
        folder = shutil.copytree(folders[0]/target, tmp_path/target)
        (folder/"ort").symlink_to(tmp_path/"package"/"dist")
        with served(folder) as address:
            page = browser.new_page()
            page.goto(address)
            page.wait_for_function("window.found", timeout=120_000)
            found = page.evaluate("window.found")
            assert set(found) == set(export.GRAPHS), found
            assert all(part["ms"] > 0 and part["difference"] <= most for part in found.values()) and (target == "onnx" or found["head"]["difference"] > 0)
            assert page.locator("tbody tr").count() == 4 and "ms for all four" in page.inner_text("#said")
            (folder/"closer.onnx").write_bytes(b"no")
            page.goto(address)
            page.wait_for_function("window.found")
            assert "It did not run" in page.inner_text("#said")
            page.close()


@contextmanager
def served(folder):
    "A folder at an address of this machine."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_graphs_are_traced_with_inputs_as_engines_get_them(small):
    "A compiled graph takes the layout of its example for granted; `checked` makes every input contiguous."
    given = export.example(small, Backend(small, graphs(small)))
    assert all(tensor.is_contiguous() for inputs, _ in given.values() for tensor in inputs)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_compiled_engine_plays_alike_and_is_for_this_machine(small, tmp_path, monkeypatch):
    manifest = export.export(small, ["inductor"], tmp_path, steps=8, games=small.games[:1])["inductor"]
    assert export.Parity(**manifest["parity"][0]).passed and manifest["machine"] == export.Inductor.machine()
    check_play(small, load_backend(small, tmp_path/"inductor"))
    monkeypatch.setattr(export.Inductor, "machine", lambda: "a toaster")
    with pytest.raises(ValueError, match="was compiled for .*, and this is a toaster: export the model again"): load_backend(small, tmp_path/"inductor")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler.*install g\\+\\+"): export.Inductor.write(tmp_path/"program", tmp_path/"file")


def test_eight_bits_are_smaller_and_round(folders):
    out, manifests = folders
    sizes = [sum(file.stat().st_size for file in (out/target).glob("*.onnx")) for target in ("onnx", "onnx-int8")]
    assert sizes[1] < 0.9 * sizes[0]
    assert all(1e-4 < p["first_gate"] for p in manifests["onnx-int8"]["parity"]) and all(p["first_gate"] < 1e-4 for p in manifests["onnx"]["parity"])


def test_eight_bit_weights_keep_a_bit_free(folders):
    "Two products of 8 bits do not fit the 16 in which a processor without VNNI adds them."
    onnx = importlib.import_module("onnx")
    weights = [onnx.numpy_helper.to_array(x) for file in (folders[0]/"onnx-int8").glob("*.onnx") for x in onnx.load(file).graph.initializer
               if x.data_type == onnx.TensorProto.INT8 and len(x.dims) == 2]
    assert len(weights) > 10 and all(np.abs(w.astype(int)).max() <= 64 for w in weights)


def test_manifest_says_what_it_is(small, folders):
    out, _ = folders
    manifest = json.loads((out/"onnx"/"manifest.json").read_text())
    assert manifest["source"] == export.source_hash(small) and manifest["precision"] == "float32"
    assert manifest["shapes"]["trunk"][-1] == ["players", 65, 4, 32, 16]
    assert set(manifest["files"]) == {f"{name}.onnx" for name in export.GRAPHS} and manifest["tools"]["onnxruntime"]


def copy(folder, to):
    "A folder to spoil."
    to.mkdir()
    for file in folder.iterdir(): (to/file.name).write_bytes(file.read_bytes())
    return to


def test_bad_folders_are_refused_by_name(small, folders, tmp_path):
    out, _ = folders
    with pytest.raises(ValueError, match="no manifest"): load_backend(small, tmp_path/"nowhere")
    with pytest.raises(ValueError, match="stale"): load_backend(small_world(small, 1), out/"onnx")
    spoilt = copy(out/"onnx", tmp_path/"spoilt")
    data = bytearray((spoilt/"trunk.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (spoilt/"trunk.onnx").write_bytes(data)
    with pytest.raises(ValueError, match="trunk.onnx is damaged"): load_backend(small, spoilt)
    (spoilt/"trunk.onnx").unlink()
    with pytest.raises(ValueError, match="lacks trunk.onnx"): load_backend(small, spoilt)
    (spoilt/"manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"): load_backend(small, spoilt)
    (spoilt/"manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks"): load_backend(small, spoilt)


def test_a_state_of_another_shape_is_refused(small, folders):
    backend = load_backend(small, folders[0]/"onnx")
    clip, actions = opening(small, small.games[0])
    state = small.start(clip[None], actions[None], small.games[0])
    window, scan = state.memory.blocks[0]
    state.memory.blocks[0] = window, scan[..., :-1]
    with pytest.raises(ValueError, match="state_1 must be .players, 65, 4, 32, 16."): backend.step(state, [0])


def test_a_missing_extra_is_named(small, monkeypatch, tmp_path):
    def missing(module, extra): raise course.MissingExtra(f"{module}: pip install 'lwm-course[{extra}]'")
    monkeypatch.setattr(course, "require", missing)
    with pytest.raises(course.MissingExtra, match=r"lwm-course\[export\]"): export.export(small, ["onnx"], tmp_path)


def test_the_fastest_that_plays_alike_is_taken(small, folders, tmp_path, monkeypatch):
    out, _ = folders
    player, trials = fastest(small, [out/"onnx", tmp_path/"nowhere"], seconds=0.1, steps=3)
    assert trials[0].ms == min(t.ms for t in trials if t.ms) and "no manifest" in trials[-1].why
    assert player is small or player.name == trials[0].backend
    real = export.load_backend

    def wrong(wm, folder):
        backend = real(wm, folder)
        head = backend.run["head"]
        backend.run["head"] = lambda *x: (head(*x)[0], head(*x)[1] - 1)
        return backend

    monkeypatch.setattr(export, "load_backend", wrong)
    player, trials = fastest(small, [out/"onnx"], seconds=0.1, steps=3)
    assert player is small and trials[-1].ms is None and "not alike" in trials[-1].why


def test_the_lines_of_the_readme_play(monkeypatch):
    "As they stand there; only the engine is not written."
    [lines] = re.findall(r"```python\n(.*?)```", (course.root()/"README.md").read_text(encoding="utf-8"), re.DOTALL)
    chosen, given = [], {}
    monkeypatch.setattr(export, "play_by", lambda wm, name: chosen.append(name))
    exec(lines, given)
    assert given["frame"].shape == (1, 256, 256, 3) and given["frame"].dtype == torch.uint8 and set(chosen) <= {*export.BACKENDS, "auto"} and chosen


def test_one_line_changes_the_engine(small, folders, tmp_path, monkeypatch, capsys):
    out, _ = folders
    home = tmp_path/"lwm_course"/f"{export.source_hash(small)[:16]}-{torch.__version__}"
    written = []

    def write(wm, targets, where, steps, games):
        written.extend(targets)
        for target in targets: shutil.copytree(out/target, where/target, dirs_exist_ok=True)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(export, "export", write)
    clip, keys = opening(small, small.games[0])
    state = small.start(clip[None], keys[None], small.games[0])
    frame, after = small.step(state, [0])
    try:
        small.backend = "onnxruntime"
        assert small.backend == small.name == "onnxruntime" and isinstance(small, Backend) and written == ["onnx"] and str(home) in capsys.readouterr().out
        shown, onward = small.step(state, [0])
        assert torch.equal(shown, frame) and torch.equal(onward.tokens, after.tokens)
        small.backend = "torch"
        assert small.backend == "torch" and type(small) is WorldModel and torch.equal(small.step(onward, [0])[0], small.step(after, [0])[0])
        small.backend = "onnx"
        assert small.backend == "onnxruntime" and written == ["onnx"]               # it was there
        (home/"onnx"/"head.onnx").write_bytes(b"cut short")
        small.backend = "onnxruntime"
        assert written == ["onnx", "onnx"]                                          # and is written again where it is damaged
        with pytest.raises(ValueError, match="onnxruntime"): small.backend = "onnxruntme"
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="tensorrt-rtx needs an NVIDIA GPU"): small.backend = "tensorrt"
        monkeypatch.setattr(export, "within", lambda *_: False)
        small.backend = "torch"
        with pytest.raises(ValueError, match="does not play as PyTorch"): small.backend = "onnxruntime"
        assert small.backend == "torch" and type(small) is WorldModel               # as before
        small.backend = "auto"
        assert small.backend == "torch"                                             # the only one that passed
    finally: small.__class__ = WorldModel


@pytest.mark.parametrize("command, chapter, run", [(export.eval_command, export.evaluation, "run_eval"), (export.bench_command, export.speed, "run_bench")])
def test_yardstick_and_benchmark_take_an_engine(small, folders, tmp_path, monkeypatch, command, chapter, run):
    given = []
    monkeypatch.setattr(chapter, run, lambda args, load=None: given.append(load and load(args)))
    small.save_pretrained(tmp_path/"small")
    def call(*options):
        parser = argparse.ArgumentParser()
        command(parser)
        args = parser.parse_args(["--model", str(tmp_path/"small"), *options], argparse.Namespace(seed=0))
        args.run(args)
    call()
    call("--engine", str(folders[0]/"onnx"))
    assert given[0] is None and isinstance(given[1], Backend) and given[1].name == "onnx"
    with pytest.raises(ValueError, match="no manifest"): call("--engine", str(tmp_path))


def test_a_player_is_the_fastest_and_it_is_said(small, folders, tmp_path, capsys):
    small.save_pretrained(tmp_path/"small")
    assert type(export.load_player(str(tmp_path/"small"), [])) is WorldModel and not capsys.readouterr().out
    player = export.load_player(str(tmp_path/"small"), [str(folders[0]/"onnx"), str(tmp_path)])
    said = capsys.readouterr().out
    assert "the fastest that passed" in said and "no manifest" in said and isinstance(player, WorldModel)


def test_a_frame_costs_what_is_counted(small):
    "Twice the players, twice the operations, about; the weights are read once, of tables only a few rows."
    one, two = (export.frame_cost(small, small.games[0], 4, players=n) for n in (1, 2))
    assert 1.8 < two.flops / one.flops < 2.2
    weights = sum(p.nbytes for p in small.dynamics.parameters())
    weights -= sum(table.weight.nbytes for table in small.dynamics.modules() if isinstance(table, torch.nn.Embedding))
    assert one.bytes > weights and two.bytes - weights == pytest.approx(2 * (one.bytes - weights))
    assert export.Cost(1e9, 1e6).seconds(1e12, 1e10) == 1e-3 and export.Cost(1e9, 1e8).seconds(1e12, 1e10) == 1e-2


def test_two_results_side_by_side(tmp_path):
    for name, value in (("one", 20.0), ("two", 30.0)):
        course.save_results(tmp_path/f"{name}.json", "made up", [course.Figure("fps", value, "FPS", 1), course.Figure(name, 1.0)])
    table = str(export.compare(tmp_path/"one.json", tmp_path/"two.json"))
    assert "1.5" in table and "one" in table and len(table.splitlines()) == 3
    course.save_results(tmp_path/"other.json", "made up", [course.Figure("ms", 1.0)])
    with pytest.raises(ValueError, match="no figure in common"): export.compare(tmp_path/"one.json", tmp_path/"other.json")


def test_a_picture_between_two_frames_is_nearer_to_the_games(tmp_path):
    assert main(["bench", "--smooth", "--game", "ALE/Pong-v5", "--frames", "60", "--json", str(tmp_path/"smooth.json")]) == 0
    moved, mixed = json.loads((tmp_path/"smooth.json").read_text())["figures"]
    assert (moved["name"], mixed["name"]) == ("between_psnr", "between_average_psnr") and moved["baseline"] == mixed["baseline"]
    assert moved["value"] > moved["baseline"] + 3 and moved["value"] > mixed["value"]       # where what moves flies straight


def test_benchmarks_side_by_side_on_a_page(tmp_path):
    def write(name, ms, players=(1, 4)):
        figures = [course.Figure(key, value, unit, 9, source="int8, 1 player") for key, value, unit in
                   [("load_s", 0.5, "s"), ("fps", 1000 / ms, "FPS"), ("peak_memory_gb", 1.0, "GB"), ("parameters", 7.0, "")]
                   + [(f"latency_p{q}_ms", ms + q / 100, "ms") for q in (50, 95, 99)] + [(f"fps_players_{n}", 900 * n / ms, "FPS") for n in players]]
        course.save_results(tmp_path/f"{name}.json", f"lwm bench --json {name}.json", figures, 0)
        return tmp_path/f"{name}.json"
    one, two = write("one", 10.0), write("two", 5.0, (1,))
    table = str(export.bench_page([one, two], tmp_path/"page"))
    assert all(word in table for word in ("one", "two", "int8", "10.5", "200", "lwm bench --json two.json"))
    page = (tmp_path/"page"/"bench.md").read_text()
    assert "several machines" not in page and "(bench.png)" in page and "| two" in page and (tmp_path/"page"/"bench.png").read_bytes()[:4] == b"\x89PNG"
    lines = export.bench_plot(export.bench_rows([one, two])).axes[1].lines
    assert [list(line.get_xdata()) for line in lines] == [[1, 4], [1]] and list(lines[0].get_ydata()) == [90.0, 360.0]
    other = json.loads(two.read_text())
    other["machine"]["cpu"] = "another"
    two.write_text(json.dumps(other))
    export.bench_page([one, two], tmp_path/"page")
    assert "several machines" in (tmp_path/"page"/"bench.md").read_text()
    course.save_results(tmp_path/"else.json", "by hand", [course.Figure("skill", 0.5, "", 1)], 0)
    with pytest.raises(ValueError, match="else.json is not a benchmark"): export.bench_page([one, tmp_path/"else.json"], tmp_path/"page")


# TensorRT

@pytest.fixture(scope="module")
def rtx(small, tmp_path_factory):
    "Engines of the small world, built without a GPU, and their manifest."
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("rtx")
    return out/"tensorrt-rtx", export.export(small, ["tensorrt-rtx"], out, steps=3, games=small.games[:1])["tensorrt-rtx"]


def test_engines_are_built_for_every_card(rtx):
    folder, manifest = rtx
    assert manifest["cards"] == ("SM75", "SM86", "SM89", "SM120") == tuple(export.CARDS) and manifest["precision"] == "float16"
    assert set(manifest["files"]) == {f"{name}.engine" for name in export.GRAPHS} and manifest["tools"]["tensorrt_rtx"]
    assert all((folder/name).stat().st_size > 100_000 for name in manifest["files"])
    assert all(export.Parity(**p).passed for p in manifest["parity"]) and manifest["parity"][0]["first_gate"] > 1e-6, "it is half precision"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the test below plays on it")
def test_without_a_gpu_an_engine_is_refused_before_anything_runs(small, rtx):
    folder, manifest = rtx
    assert manifest["played_by"] == "onnx"
    with pytest.raises(ValueError, match="head.engine runs on an NVIDIA GPU"): load_backend(small, folder)
    player, trials = fastest(small, [folder], seconds=0.1, steps=2)
    assert player is small and "NVIDIA GPU" in trials[-1].why


@pytest.mark.skipif(not torch.cuda.is_available(), reason="engines run on an NVIDIA GPU only")
def test_an_engine_plays_on_a_gpu(small, rtx):
    folder, manifest = rtx
    assert manifest["played_by"] == "tensorrt-rtx" and parity(small, load_backend(small, folder), small.games[0], 20).passed


def test_what_cannot_be_built_is_said(small, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    import onnx
    from onnx import TensorProto, helper
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    file = tmp_path/"strange.onnx"
    onnx.save(helper.make_model(helper.make_graph([helper.make_node("Strange", ["x"], ["y"], domain="nobody")], "strange", [x], [y])), file)
    with pytest.raises(ValueError, match="tensorrt_rtx cannot read strange.onnx"): export.TARGETS["tensorrt-rtx"].write(file, tmp_path/"no.engine")
    assert not (tmp_path/"no.engine").exists()


def test_an_interrupt_after_an_engine_was_freed(tmp_path):
    "OpenVINO's plugin lends the thread that loads it a stack for signals, and takes it away from the thread that frees it last."
    script = """
import gc, signal, sys, threading
import numpy as np, openvino as ov, torch
from openvino import opset13 as ops
from pathlib import Path
from lwm_course.export import OpenVino
x, file = ops.parameter([2, 2], np.float32), Path(sys.argv[1]) / "graph.xml"
ov.save_model(ov.Model([ops.matmul(x, ops.constant(np.eye(2, dtype=np.float32)), False, False)], [x]), file)
runs = [OpenVino.load(file)]
print(runs[0]([torch.ones(2, 2)]))
other = threading.Thread(target=lambda: (runs.clear(), gc.collect()))
other.start()
other.join()
try: signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt: print("interrupted")
"""
    found = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0 and "interrupted" in found.stdout, (found.returncode, found.stderr)
