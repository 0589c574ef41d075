"The demo as a visitor meets it: `lwm demo` in a process of its own, a real browser, and players who break the rules."
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from lwm_course.course import main
from lwm_course.demo import BETWEEN, BINARY, FRAME, IN_FLIGHT, PING, TEXT, Client, Room, Server, make_app, make_space, take_port, ws_frame
from lwm_course.dynamics import WorldModel
from lwm_course.export import between

PROGRAM = [sys.executable, "-c", "import sys; from lwm_course.course import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def demo():
    "Address of a running `lwm demo` that three may play."
    command = [*PROGRAM, "demo", "--port", "0", "--max-sessions", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if "http" not in line:
        process.kill()
        pytest.fail(f"lwm demo printed {line!r} and {process.stderr.read()}")
    drain = threading.Thread(target=process.stderr.read, daemon=True)
    drain.start()
    yield line.split()[-1]
    assert process.poll() is None, "the server has died"
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="module")
def model():
    return WorldModel.from_pretrained("nano")


class Visitor:
    "A browser tab on the demo's page."
    def __init__(self, browser, url, **context):
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, "accept_downloads": True, **context})
        self.tab, self.requests, self.errors = self.context.new_page(), [], []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(url)
        self.at_frame(0)

    def at_frame(self, number):
        "Wait until the canvas shows a frame of this number."
        self.tab.wait_for_selector(f".lwm[data-frame='{number}']", state="attached", timeout=60_000)

    def frame(self): return int(self.tab.get_attribute(".lwm", "data-frame"))

    def after(self, number):
        reached = "n => Number(document.querySelector('.lwm').dataset.frame) >= n"
        self.tab.wait_for_function(reached, arg=number, timeout=60_000)

    def pixels(self, canvas=".lwm-model"):
        size, data = self.tab.evaluate("""selector => { const c = document.querySelector(selector);
            return [[c.height, c.width], Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]; }""", canvas)
        return np.array(data, np.uint8).reshape(*size, 4)[..., :3]

    def button(self, name): return self.tab.get_by_role("button", name=name, exact=True)

    def steps(self, n, key=None):
        "Start again, hold a key and step n frames by hand."
        self.reset()
        if key: self.tab.keyboard.down(key)
        try:
            # A held key would start the clock of a fresh start: stand still before the first step.
            for i in range(n): self.step()
        finally:
            if key: self.tab.keyboard.up(key)
        return self.pixels()

    def step(self):
        before = self.frame()
        self.button("Step").click()
        self.at_frame(before + 1)

    def reset(self):
        self.pause()
        self.button("Reset").click()
        self.at_frame(0)
        self.step()                                    # no longer fresh: keys alone do not start the clock

    def pause(self):
        if self.tab.get_attribute(".lwm", "data-playing") == "true": self.button("Pause").click()

    def set(self, label, value):
        box = self.tab.get_by_label(label, exact=True)
        box.fill(str(value))
        box.dispatch_event("change")

    def choose(self, game):
        self.tab.get_by_label("Game", exact=True).select_option(game)
        self.tab.wait_for_function("game => window.lwm.game === game", arg=game)
        self.at_frame(0)

    def close(self):
        self.context.close()
        outside = [u for u in self.requests if not re.match(r"(http|ws)://127\.0\.0\.1[:/]|(blob|data):", u)]
        assert outside == [], "the page asked other machines"
        assert self.errors == []


@pytest.fixture
def visitor(browser, demo):
    visitor = Visitor(browser, demo)
    yield visitor
    visitor.close()


def test_first_frame_is_the_clips_last_one(visitor, model):
    frames, _ = model.clip(model.games[0], 0)
    assert np.abs(visitor.pixels().astype(int) - frames[-1]).mean() < 6    # JPEG


def test_keys_change_the_picture(visitor):
    still, left, right = visitor.steps(8), visitor.steps(8, "ArrowLeft"), visitor.steps(8, "d")
    assert (np.abs(left.astype(int) - right) > 40).any(), "left and right look the same"
    assert (np.abs(left.astype(int) - still) > 40).any() or (np.abs(right.astype(int) - still) > 40).any()


def test_a_key_starts_the_clock_and_p_stops_it(visitor):
    visitor.tab.keyboard.press("ArrowRight")
    visitor.after(5)
    visitor.tab.keyboard.press("p")
    visitor.tab.wait_for_selector(".lwm[data-playing=false]")
    visitor.tab.wait_for_timeout(300)
    here = visitor.frame()
    visitor.tab.wait_for_timeout(300)
    assert visitor.frame() == here
    visitor.tab.keyboard.press("n")
    visitor.at_frame(here + 1)
    stats = visitor.tab.evaluate("window.lwm.stats()")
    assert stats["keys"] >= 1 and stats["key_p50"] > 0 and stats["model_p50"] > 0


def test_same_seed_same_frames(visitor):
    visitor.choose("ALE/SpaceInvaders-v5")      # what a memory draws (06a) is no matter of chance
    visitor.set("Temperature", 1)
    visitor.set("Seed", 7)
    first = visitor.steps(24, "ArrowRight")
    assert np.array_equal(visitor.steps(24, "ArrowRight"), first)
    visitor.set("Seed", 8)
    visitor.set("Temperature", 1.5)
    assert not np.array_equal(visitor.steps(24, "ArrowRight"), first)


def test_pictures_in_between_come_halfway(visitor):
    visitor.tab.evaluate("""() => { const lwm = window.lwm, paint = lwm.paint.bind(lwm); window.drawn = [];
        lwm.paint = (bitmap, frame) => { window.drawn.push([frame.kind, performance.now()]); paint(bitmap, frame); }; }""")
    visitor.tab.get_by_label("Pictures in between").check()
    visitor.tab.keyboard.press("ArrowRight")
    visitor.after(12)
    visitor.tab.keyboard.press("p")
    drawn = visitor.tab.evaluate("window.drawn")
    first = [kind for kind, _ in drawn].index(BETWEEN)
    pairs = [*zip(drawn[first::2], drawn[first + 1::2])]
    assert len(pairs) >= 8 and all((a[0], b[0]) == (BETWEEN, FRAME) for a, b in pairs)
    waits = np.array([b[1] - a[1] for a, b in pairs])
    assert np.median(waits) >= 30, "a frame came at once after the picture that should be seen before it"      # 1/30 s


def test_another_game(visitor, model):
    before = visitor.pixels()
    visitor.choose(model.games[1])
    frames, _ = model.clip(model.games[1], 0)
    assert not np.array_equal(visitor.pixels(), before)
    assert np.abs(visitor.pixels().astype(int) - frames[-1]).mean() < 6


def test_own_picture(visitor, tmp_path):
    path = tmp_path/"sky.png"
    Image.new("RGB", (90, 60), (30, 90, 200)).save(path)
    visitor.tab.get_by_label("Own picture", exact=True).set_input_files(str(path))
    visitor.tab.wait_for_function("window.lwm.clip === null")
    visitor.at_frame(0)
    assert np.abs(visitor.pixels().astype(int) - (30, 90, 200)).max() < 12
    visitor.step()
    (tmp_path/"bad.png").write_bytes(b"not a picture <script>alert(1)</script>")
    visitor.tab.get_by_label("Own picture", exact=True).set_input_files(str(tmp_path/"bad.png"))
    visitor.tab.get_by_text("not a picture the browser can read").wait_for()


def test_emulator_beside_the_model(visitor, model):
    pytest.importorskip("ale_py")
    visitor.tab.get_by_label("Real emulator beside it").check()
    visitor.tab.locator(".lwm-real").wait_for()
    visitor.tab.wait_for_function("window.lwm.compare")
    visitor.at_frame(0)
    real = visitor.pixels(".lwm-real")
    if not visitor.tab.locator(".lwm-note").inner_text():  # empty: it begins at the clip's own moment
        assert np.abs(real.astype(int) - visitor.pixels()).max() < 60
    left, right = [(visitor.steps(8, key), visitor.pixels(".lwm-real"))[1] for key in ("ArrowLeft", "ArrowRight")]
    assert not np.array_equal(left, right), "the emulator ignores the keys"


def test_recording_is_a_gif(visitor, tmp_path):
    visitor.button("Record").click()
    visitor.button("Stop").wait_for()
    for _ in range(5): visitor.step()
    with visitor.tab.expect_download() as caught: visitor.button("Stop").click()
    caught.value.save_as(tmp_path/"film.gif")
    assert caught.value.suggested_filename.endswith("-seed0.gif")
    with Image.open(tmp_path/"film.gif") as film:
        film.seek(film.n_frames - 1)                  # every frame can be decoded
        assert film.format == "GIF" and min(film.size) >= 256


def test_keys_scroll_and_type_as_always_outside_the_game(visitor):
    seed = visitor.tab.get_by_label("Seed", exact=True)
    seed.click()
    visitor.tab.keyboard.press("ArrowUp")
    assert seed.input_value() == "1" and visitor.frame() == 0


def test_buttons_on_a_phone(browser, demo):
    phone = Visitor(browser, demo, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    width = phone.tab.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "the page is wider than the phone"
    inside = phone.tab.evaluate("""[...document.querySelectorAll('.lwm-cross button, .lwm-fire, .lwm-bar button')].every(b => {
        const r = b.getBoundingClientRect();
        return r.width >= 40 && r.height >= 40 && r.left >= 0 && r.right <= innerWidth; })""")
    assert inside, "a button is too small for a thumb or lies off the screen"
    def centre(selector):
        box = phone.tab.locator(selector).bounding_box()
        return box["x"] + box["width"]/2, box["y"] + box["height"]/2
    fingers = phone.context.new_cdp_session(phone.tab)
    def touch(*points):
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        fingers.send("Input.dispatchTouchEvent", {"type": "touchStart" if points else "touchEnd", "touchPoints": points})
    touch(centre("[data-button=RIGHT]"), centre(".lwm-fire"))          # two thumbs
    phone.tab.wait_for_function("window.lwm.buttons.held.sort().join() === 'FIRE,RIGHT'")
    phone.after(3)
    touch()
    phone.tab.wait_for_function("window.lwm.buttons.held.length === 0")
    phone.close()


def test_two_tabs_do_not_disturb_each_other(browser, demo):
    one, two = Visitor(browser, demo), Visitor(browser, demo)
    there = two.pixels()
    one.steps(4, "ArrowRight")
    assert two.frame() == 0 and np.array_equal(two.pixels(), there)
    one.close()
    two.close()


def test_names_of_the_server_are_never_markup(browser, demo):
    visitor = Visitor(browser, demo + "?game=<img src=x onerror=alert(1)>")
    visitor.tab.evaluate("window.lwm.told({type: 'error', message: '<img src=x onerror=\"window.broken = 1\">'})")
    assert visitor.tab.locator(".lwm-note img").count() == 0 and visitor.tab.evaluate("window.broken === undefined")
    visitor.close()


# ---- players without a browser ----

def reply(player):
    "The next text message."
    while not isinstance(message := player.receive(), dict): pass
    return message


def test_bad_messages_are_answered_and_harm_nobody(demo):
    deep = b'{"type":' + b"["*2000
    texts = [b"{", b"[]", b"null", b'{"type": 3}', b'{"type": "fly"}', b'{"type": "start", "game": "ALE/Pnog-v5"}',
             b'{"type": "start", "clip": 99999}', b'{"type": "start", "clip": null}', b'{"type": "start", "seed": -1}',
             b'{"type": "start", "seed": 1e400}', b'{"type": "start", "compare": "yes"}', b'{"type": "keys", "held": {}}',
             b'{"type": "keys", "held": ["UP"], "at": "now"}', b'{"type": "set", "temperature": NaN}',
             b'{"type": "set", "refine": 1.5}', b'{"type": "record", "format": "exe"}', b"x"*5000, deep]
    with Client(demo) as player:
        assert player.until("hello")["games"]
        for text in texts:
            player.write(TEXT, text)
            answer = reply(player)
            assert answer["type"] == "error" and len(answer["message"]) < 400, text
        for picture in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(50)):
            player.write(BINARY, picture)
            assert "picture" in reply(player)["message"]
        player.send("start", paused=True)              # still alive, in the same session
        assert player.until(FRAME).number == 0


def test_a_picture_bomb_is_refused(demo):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    with Client(demo) as player:
        player.until("hello")
        player.write(BINARY, bomb.getvalue())
        assert "megapixels" in reply(player)["message"]


@pytest.mark.parametrize("raw", [
    ws_frame(TEXT, b"unmasked"), b"\xff\xff\xff\xff", ws_frame(BINARY, bytes(9*2**20), b"mask"), ws_frame(TEXT, b"\xff", b"mask"),
    b"\x80\x80mask", ws_frame(PING, bytes(126), b"mask")],
    ids=["unmasked", "odd", "too large", "not UTF-8", "continues nothing", "long ping"])
def test_a_broken_protocol_closes_only_that_player(demo, raw):
    with Client(demo) as good, Client(demo) as bad:
        good.until("hello")
        bad.until("hello")
        with pytest.raises((ConnectionError, OSError)):
            bad.socket.sendall(raw)
            while True: bad.receive()
        good.send("start", paused=True)
        assert good.until(FRAME).number == 0


def test_a_request_that_is_no_handshake_is_refused(demo):
    host, port = demo.split("//")[1].split(":")
    with socket.create_connection((host, int(port)), 10) as s:
        s.sendall(b"GET /play HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 4")
    with pytest.raises(ConnectionError, match="403"): Client(demo + "/elsewhere")


def entered(demo):
    "A player with a place. The server hears of a closed socket when it hears of it, so those of earlier players may still be taken."
    for _ in range(100):
        player = Client(demo)
        if reply(player)["type"] == "hello": return player
        player.close()
        time.sleep(0.05)
    pytest.fail("no place came free")


def test_the_room_has_an_end_and_places_come_free(demo):
    players = [entered(demo) for _ in range(3)]
    with Client(demo) as late: assert "full" in late.until("full")["message"]
    players.pop().close()
    for p in (*players, entered(demo)): p.close()


def test_no_credits_no_frames(demo):
    with Client(demo) as player:
        player.until("hello")
        player.send("start", speed=4.0, paused=False)
        for _ in range(IN_FLIGHT): player.until(FRAME)
        player.socket.settimeout(0.5)
        with pytest.raises(TimeoutError): player.until(FRAME)
        player.socket.settimeout(30)
        player.send("credit")
        assert player.until(FRAME).number == IN_FLIGHT


def test_pictures_in_between(demo, model):
    "Each is what chapter 14 draws between the two frames beside it; it costs no credit."
    with Client(demo) as player:
        player.until("hello")
        player.send("start", game="ALE/Breakout-v5", smooth=True, paused=True)
        player.until(FRAME)
        player.send("credit")
        player.send("step")
        added, after = player.until(BETWEEN), player.until(FRAME)
        assert added.number == after.number == 1 and added.frame.shape == after.frame.shape
        frames, keys = model.clip("ALE/Breakout-v5")
        state = model.start(frames[None], keys[None], "ALE/Breakout-v5")
        frame, _ = model.step(state, [0])
        wanted = between(model, state.pixels, frame)[0].numpy()
        assert np.abs(added.frame.astype(int) - wanted).mean() < 2 and np.abs(after.frame.astype(int) - frame[0].numpy()).mean() < 2     # JPEG
        player.send("set", smooth=False)
        player.send("credit")
        player.send("step")
        kinds = []
        while FRAME not in kinds: kinds.append(getattr(player.receive(), "kind", None))
        assert BETWEEN not in kinds
        player.send("set", smooth="yes")
        assert "smooth must be true or false" in player.until("error")["message"]


def test_pongs_knob_follows_up_and_down(demo, model):
    actions = model.actions("ALE/Pong-v5")
    with Client(demo) as player:
        player.until("hello")
        player.send("start", game="ALE/Pong-v5", paused=True)
        assert set(player.until("started")["buttons"]) == {"UP", "DOWN", "LEFT", "RIGHT", "FIRE"}
        player.until(FRAME)
        for button, name in (("UP", "RIGHT"), ("DOWN", "LEFT"), ("LEFT", "LEFT")):
            player.send("keys", held=[button])
            player.send("credit")
            player.send("step")
            assert actions[player.until(FRAME).action] == name


def test_an_absent_player_gives_up_the_place(model):
    with Server(make_app(model, max_sessions=1, idle=0.3)) as server, Client(server.url) as sleeper:
        sleeper.until("hello")
        with pytest.raises(ConnectionError, match="nobody played"):
            while True: sleeper.receive()
        with Client(server.url) as next_one: assert next_one.until("hello")


def test_a_failing_model_is_told_and_survived(model, monkeypatch):
    with Server(make_app(model)) as server, Client(server.url) as player:
        player.until("hello")
        player.send("start", paused=True)
        player.until(FRAME)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "frame", lambda *args, **options: 1/0)
            player.send("step")
            assert "ZeroDivisionError" in player.until("paused")["message"]
        player.send("start", paused=True)
        player.send("credit")
        assert player.until(FRAME).number == 0
        player.send("credit")
        player.send("step")
        assert player.until(FRAME).number == 1


def test_mp4_or_the_reason_why_not(demo):
    with Client(demo) as player:
        player.until("hello")
        player.send("start", paused=True)
        player.until(FRAME)
        player.send("record", on=True, format="mp4")
        if shutil.which("ffmpeg") is None and not pytest.importorskip("imageio_ffmpeg"): return
        for i in range(4):
            player.send("credit")
            player.send("step")
            player.until(FRAME)
        player.send("record", on=False)
        told = player.until("file")
        assert told["mime"] == "video/mp4" and told["frames"] == 4
        data = player.until(2).data
        assert data[4:8] == b"ftyp" and len(data) == told["bytes"]


# ---- without extras ----

def test_without_extras_the_page_gives_reasons(model, monkeypatch):
    for name in ("gymnasium", "ale_py", "imageio_ffmpeg", "anywidget"): monkeypatch.setitem(sys.modules, name, None)
    hello = Room(model).hello()
    assert not hello["emulator"]["ok"] and "lwm-course[games]" in hello["emulator"]["why"]
    assert not hello["mp4"]["ok"] and "lwm-course[video]" in hello["mp4"]["why"]


# ---- commands ----

def test_a_port_in_use_is_said_with_the_way_out(capfd):
    with take_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    error = capfd.readouterr().err
    assert f"--port {port + 1}" in error and "Traceback" not in error


@pytest.mark.parametrize("words", [["--port", "70000"], ["--model", "nanno"], ["--max-sessions", "0"], ["--temperature", "-1"]])
def test_wrong_arguments_get_a_sentence(words, capfd):
    assert main(["demo", "--port", "0", *words]) == 1
    error = capfd.readouterr().err
    assert error.startswith("lwm demo: ") and error.count("\n") == 1


def test_play_records_without_a_browser(tmp_path, model, capfd):
    game = model.games[0]
    for name in ("film.gif", "strip.png"):
        assert main(["play", game, "--record", str(tmp_path/name), "--keys", "RIGHT*4 NOOP*2 FIRE"]) == 0, capfd.readouterr().err
    with Image.open(tmp_path/"film.gif") as film: assert film.format == "GIF"
    with Image.open(tmp_path/"strip.png") as strip: assert strip.size[0] == 8*strip.size[1]
    assert main(["play", game, "--record", str(tmp_path/"smooth.gif"), "--keys", "RIGHT*4 NOOP*2 FIRE", "--smooth", "--compare"]) == 0
    with Image.open(tmp_path/"smooth.gif") as film: assert film.size[0] == 2*film.size[1]     # a picture that stands still is kept once
    assert main(["play", game, "--record", str(tmp_path/"film.gif"), "--keys", "RIGTH*4"]) == 1
    assert "RIGHT" in capfd.readouterr().err
    assert main(["play", game, "--record", str(tmp_path/"film.exe"), "--keys", "NOOP"]) == 1


def test_measure_writes_what_a_browser_saw(tmp_path):
    path = tmp_path/"demo.json"
    done = subprocess.run([*PROGRAM, "demo", "--measure", "--seconds", "2", "--json", str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = {f["name"]: f for f in json.loads(path.read_text())["figures"]}
    assert {"start_s", "page_fps", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms"} <= figures.keys()
    assert figures["start_s"]["value"] > figures["listening_s"]["value"] > 0 and figures["page_fps"]["value"] > 0


def test_play_opens_the_browser_at_a_game(model):
    game = model.games[-1]
    command = [*PROGRAM, "play", game.split("/")[-1].rsplit("-v", 1)[0].lower()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "BROWSER": "echo opened %s"})
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        address = lines[0].split()[-1]
        assert address.endswith(f"/?game={game}")
        assert f"opened {address}\n" in lines
        with Client(address.split("/?")[0]) as player: assert player.until("hello")["game"] == game
    finally:
        process.terminate()
        process.wait(10)


def test_the_space_folder_is_complete(tmp_path):
    folder = make_space(tmp_path/"space")
    readme = (folder/"README.md").read_text()
    front = dict(line.split(": ", 1) for line in readme.split("---")[1].strip().splitlines())
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["license"] == "mit"
    assert len(front["short_description"]) <= 60      # the Hub refuses longer ones
    assert (folder/"requirements.txt").read_text().splitlines()[-1].startswith("lwm-course[games,video]==")
    source = (folder/"app.py").read_text()
    code = source.split("if __name__")[0] + "\nassert app.state.room.limit == 4\nprint('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("fine"), done.stderr
