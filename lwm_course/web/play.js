// The player's side of a world model: keys and fingers in, pixels out.
// `mount` serves the page (over a WebSocket) and `render` serves Jupyter (over the kernel's messages): one console, two wires.

const HEADER = 24;            // bytes before the picture; written by `pack` in demo.py
const FRAME = 1, FILE = 2, BETWEEN = 3;   // kinds of binary messages
const KEYS = {
  ArrowUp: "UP", ArrowRight: "RIGHT", ArrowLeft: "LEFT", ArrowDown: "DOWN",
  KeyW: "UP", KeyD: "RIGHT", KeyA: "LEFT", KeyS: "DOWN", Space: "FIRE",
};
const SHORTCUTS = { KeyP: "pause", KeyN: "step", KeyR: "reset" };
const BUTTONS = ["UP", "LEFT", "RIGHT", "DOWN", "FIRE"];
const LARGEST_PICTURE = 512;  // pixels; the server makes it smaller still

// ---- what is held -------------------------------------------------------------------------------------------------------------

// Buttons are state, not events: a key and a finger may hold the same one, and any number may be down at once.
export class Buttons {
  constructor(changed) { this.holders = new Map(); this.changed = changed; this.last = ""; }

  hold(holder, names, at = performance.now()) {
    const before = this.holders.get(holder);
    if (before && before.join() === names.join()) return;
    this.holders.delete(holder);                       // a holder that changes is the newest again
    if (names.length) this.holders.set(holder, names);
    this.tell(at);
  }

  release(at = performance.now()) { this.holders.clear(); this.tell(at); }

  get held() { return [...new Set([...this.holders.values()].flat())]; }   // oldest first

  tell(at) {
    const held = this.held;
    if (held.join() === this.last) return;
    this.last = held.join();
    this.changed(held, at);
  }
}

const nothingFocused = () => document.activeElement === document.body;
const typing = (e) => !!e?.closest?.("input, select, textarea, [contenteditable]:not([contenteditable=false])");

// Keys are taken from the page only while `active()`: elsewhere they scroll, type and tab as always.
export function keyboard(buttons, { active, shortcut }) {
  const down = (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || typing(e.target) || !active()) return;
    const name = KEYS[e.code], command = SHORTCUTS[e.code];
    if (!name && !command) return;
    if (e.code === "Space" && e.target.closest?.("button, summary, a, label")) return;   // space presses a focused button
    e.preventDefault();
    e.stopPropagation();
    if (e.repeat) return;
    if (name) buttons.hold("key " + e.code, [name], e.timeStamp);
    else shortcut(command);
  };
  const up = (e) => { if (KEYS[e.code]) buttons.hold("key " + e.code, [], e.timeStamp); };
  const leave = () => buttons.release();
  window.addEventListener("keydown", down, true);
  window.addEventListener("keyup", up, true);
  window.addEventListener("blur", leave);
  return () => {
    window.removeEventListener("keydown", down, true);
    window.removeEventListener("keyup", up, true);
    window.removeEventListener("blur", leave);
  };
}

// A thumb slides over the cross; each finger holds what is under it. A press without a pointer (screen reader) is a short tap.
export function pad(root, buttons) {
  const cross = root.querySelector(".lwm-cross");
  const under = (e) => {
    const box = cross.getBoundingClientRect();
    const x = (e.clientX - box.left) / box.width * 2 - 1, y = (e.clientY - box.top) / box.height * 2 - 1;
    if (Math.hypot(x, y) < 0.18) return [];
    const names = [];                                  // eight sectors of 45 degrees
    if (Math.abs(y) > Math.abs(x) * 0.414) names.push(y < 0 ? "UP" : "DOWN");
    if (Math.abs(x) > Math.abs(y) * 0.414) names.push(x < 0 ? "LEFT" : "RIGHT");
    return names;
  };
  const follow = (element, names) => {
    const set = (e, held) => { e.preventDefault(); buttons.hold("finger " + e.pointerId, held, e.timeStamp); };
    element.addEventListener("pointerdown", (e) => {
      element.setPointerCapture?.(e.pointerId);
      set(e, names(e));
    });
    element.addEventListener("pointermove", (e) => { if (element.hasPointerCapture?.(e.pointerId)) set(e, names(e)); });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) element.addEventListener(end, (e) => set(e, []));
    element.addEventListener("contextmenu", (e) => e.preventDefault());
  };
  follow(cross, under);
  for (const b of root.querySelectorAll("[data-button]")) {
    const name = b.dataset.button;
    if (!cross.contains(b)) follow(b, () => [name]);
    b.addEventListener("click", (e) => {
      if (e.detail) return;                            // a real pointer was followed above
      buttons.hold("tap " + name, [name]);
      setTimeout(() => buttons.hold("tap " + name, []), 150);
    });
  }
}

// ---- what is measured ---------------------------------------------------------------------------------------------------------

export function quantile(values, q) {
  if (!values.length) return NaN;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(q * sorted.length) - 1)];   // nearest rank: a latency that really happened
}

const rate = (times) => (times.length < 2 ? NaN : (times.length - 1) / (times.at(-1) - times[0]) * 1000);

class Meter {
  constructor(keep = 1000) { this.keep = keep; this.clear(); }
  clear() { this.times = []; this.latencies = []; this.model = []; this.bytes = []; }
  add(list, value) { list.push(value); if (list.length > this.keep) list.shift(); }
  frame(now, modelMs, bytes) { this.add(this.times, now); this.add(this.model, modelMs); this.add(this.bytes, bytes); }
  key(ms) { this.add(this.latencies, ms); }
  get fps() {
    return rate(this.times.slice(-31));
  }
}

// ---- the console --------------------------------------------------------------------------------------------------------------

const icon = (d) => `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${d}"/></svg>`;
const ICONS = {
  play: icon("M4 2.5v11l9-5.5z"), pause: icon("M3.5 2.5h3v11h-3zm6 0h3v11h-3z"), step: icon("M3 2.5v11l7-5.5zm8 0h2.5v11H11z"),
  reset: icon("M8 2a6 6 0 1 1-5.7 4.1l1.9.6A4 4 0 1 0 8 4v2.6L4 3.3 8 0z"), record: icon("M8 3a5 5 0 1 1 0 10A5 5 0 0 1 8 3z"),
  up: icon("M8 3l6 9H2z"), down: icon("M8 13L2 4h12z"), left: icon("M3 8l9-6v12z"), right: icon("M13 8L4 14V2z"),
};
const command = (name, label, key) =>
  `<button type="button" data-do="${name}"${key ? ` aria-keyshortcuts="${key}" title="${label} (${key})"` : ""}>
    ${ICONS[name]}<span>${label}</span></button>`;
const arrow = (name) =>
  `<button type="button" tabindex="-1" data-button="${name.toUpperCase()}" aria-label="${name}">${ICONS[name]}</button>`;
const slider = (name, label, min, max, step, value) =>
  `<label>${label}<span class="lwm-value" data-of="${name}"></span><input type="range" aria-label="${label}" data-set="${name}"
    min="${min}" max="${max}" step="${step}" value="${value}"></label>`;

const MARKUP = `
<div class="lwm-play">
  <div class="lwm-stage" tabindex="0" role="application"
       aria-label="Game screen. Arrow keys or W A S D move, space fires, P pauses, N steps one frame, R starts again.">
    <figure><canvas class="lwm-model" width="128" height="128" role="img" aria-label="Frames of the world model"></canvas>
      <figcaption>World model</figcaption></figure>
    <figure class="lwm-twin" hidden>
      <canvas class="lwm-real" width="128" height="128" role="img" aria-label="Frames of the real emulator"></canvas>
      <figcaption>Real emulator, same keys</figcaption></figure>
    <p class="lwm-hint" aria-hidden="true">Connecting</p>
  </div>
  <dl class="lwm-stats" aria-label="Measurements">
    <div><dt>frames/s</dt><dd data-stat="fps">&ndash;</dd></div>
    <div class="lwm-wide" title="From pressing a key to the first frame that shows it: median and 95th percentile">
      <dt>key to pixels p50 / p95</dt><dd data-stat="key">&ndash;</dd></div>
    <div><dt>model</dt><dd data-stat="model">&ndash;</dd></div>
    <div><dt>frame</dt><dd data-stat="frame">&ndash;</dd></div>
  </dl>
  <div class="lwm-pad" role="group" aria-label="Game buttons">
    <div class="lwm-cross">${arrow("up")}${arrow("left")}${arrow("right")}${arrow("down")}</div>
    <div class="lwm-extra"></div>
    <button type="button" class="lwm-fire" data-button="FIRE" tabindex="-1">Fire</button>
  </div>
  <div class="lwm-bar" role="group" aria-label="Play">
    ${command("play", "Play", "P")}${command("step", "Step", "N")}${command("reset", "Reset", "R")}${command("record", "Record")}
  </div>
  <p class="lwm-note" role="status" aria-live="polite"></p>
</div>
<form class="lwm-settings" aria-label="Settings">
  <label>Game<select aria-label="Game" data-set="game"></select></label>
  <label>Start from<select aria-label="Start from" data-set="clip"></select></label>
  <label class="lwm-file">Own picture<input aria-label="Own picture" type="file" data-set="picture" accept="image/*"></label>
  <label>Seed<input aria-label="Seed" type="number" data-set="seed" min="0" max="2147483647" step="1" value="0"
    inputmode="numeric"></label>
  ${slider("temperature", "Temperature", 0, 1.5, 0.05, 0)}
  ${slider("refine", "Refinement steps", 1, 4, 1, 1)}
  ${slider("speed", "Speed", 0.25, 2, 0.25, 1)}
  <label>Record as<select aria-label="Record as" data-set="format">
    <option value="gif">GIF</option><option value="mp4">MP4</option></select></label>
  <label class="lwm-check"><input type="checkbox" data-set="compare"><span>Real emulator beside it</span></label>
  <label class="lwm-check" title="A picture between every two frames, drawn without the model: twice as smooth, half a frame late">
    <input type="checkbox" data-set="smooth"><span>Pictures in between</span></label>
  <p class="lwm-why"></p>
</form>`;

// `wire` is anything with send(data), close() and the callbacks open, message(data) and closed(reason).
export class Console {
  constructor(element, wire, options = {}) {
    this.root = document.createElement("div");
    this.root.className = "lwm";
    this.root.innerHTML = MARKUP;
    element.classList.add("lwm-box");
    element.replaceChildren(this.root);
    this.wire = wire;
    this.options = options;
    this.playing = false;
    this.fresh = true;           // no key yet since this start: the first one starts the clock
    this.recording = false;
    this.meter = new Meter();
    this.drawing = Promise.resolve();
    this.buttons = new Buttons((held, at) => this.pressed(held, at));
    this.stage = this.find(".lwm-stage");
    this.screens = [this.find(".lwm-model"), this.find(".lwm-real")].map((c) => c.getContext("2d"));
    this.controls = Object.fromEntries([...this.root.querySelectorAll("[data-set]")].map((c) => [c.dataset.set, c]));
    this.listen();
    wire.open = () => this.note("");
    wire.message = (data) => (typeof data === "string" ? this.told(JSON.parse(data)) : this.binary(data));
    wire.closed = (reason) => this.closed(reason);
    this.timer = setInterval(() => this.showStats(), 500);
  }

  find(selector) { return this.root.querySelector(selector); }
  send(type, fields = {}) { this.wire.send(JSON.stringify({ type, ...fields })); }
  note(text, kind = "") { const n = this.find(".lwm-note"); n.textContent = text; n.dataset.kind = kind; }
  hint(text) { const h = this.find(".lwm-hint"); h.textContent = text; h.hidden = !text; }

  focus() { this.stage.focus({ preventScroll: true }); }

  listen() {
    const anywhere = this.options.anywhere ?? true;    // in Jupyter only the focused canvas takes keys
    this.stop = keyboard(this.buttons, {
      active: () => this.stage.contains(document.activeElement) || (anywhere && (this.playing || nothingFocused())),
      shortcut: (name) => this.run(name === "pause" ? "play" : name),
    });
    pad(this.find(".lwm-pad"), this.buttons);
    this.stage.addEventListener("pointerdown", () => { this.focus(); if (this.fresh) this.play(true); });
    for (const b of this.root.querySelectorAll("[data-do]")) {
      b.addEventListener("click", (e) => { this.run(b.dataset.do); if (e.detail) this.focus(); });
    }
    for (const [name, c] of Object.entries(this.controls)) {
      c.addEventListener(c.type === "range" ? "input" : "change", () => this.changed(name));
    }
    const form = this.find(".lwm-settings");
    form.addEventListener("submit", (e) => e.preventDefault());
    let pointed = false;   // a setting changed by mouse or finger gives the keys back to the game; one changed by keys keeps them
    form.addEventListener("pointerdown", () => { pointed = true; });
    form.addEventListener("keydown", () => { pointed = false; });
    form.addEventListener("change", (e) => { if (pointed && e.target.type !== "number") this.focus(); });
    document.addEventListener("visibilitychange", this.hidden = () => { if (document.hidden && this.playing) this.play(false); });
  }

  dispose() {
    this.stop();
    clearInterval(this.timer);
    document.removeEventListener("visibilitychange", this.hidden);
    this.wire.close();
  }

  // -- what the player does
  pressed(held, at) {
    this.send("keys", { held, at });
    for (const b of this.root.querySelectorAll("[data-button]")) b.classList.toggle("held", held.includes(b.dataset.button));
    if (held.length && this.fresh && this.options_received) this.play(true);
  }

  play(on) {
    this.playing = on;
    if (on) { this.fresh = false; this.hint(""); }
    this.send("pause", { on: !on });
    this.meter.times = [];                             // a pause is not a slow frame
    const b = this.find("[data-do=play]");
    b.innerHTML = (on ? ICONS.pause : ICONS.play) + `<span>${on ? "Pause" : "Play"}</span>`;
    this.root.dataset.playing = on;
  }

  run(name) {
    if (name === "play") this.play(!this.playing);
    if (name === "step") { if (this.playing) this.play(false); this.fresh = false; this.hint(""); this.send("step"); }
    if (name === "reset") this.start(this.playing);
    if (name === "record") this.send("record", { on: !this.recording, format: this.controls.format.value });
  }

  start(playing = false) {
    const value = (name) => Number(this.controls[name].value);
    const clip = this.controls.clip.value;
    this.meter.clear();
    this.playing = playing;
    this.send("start", {
      game: this.controls.game.value, clip: clip === "picture" ? null : Number(clip), seed: Math.trunc(value("seed")) || 0,
      temperature: value("temperature"), refine: value("refine"), speed: value("speed"),
      compare: this.controls.compare.checked, smooth: this.controls.smooth.checked, paused: !playing,
    });
    this.play(playing);
    if (playing) return;
    this.fresh = true;
    this.hint(matchMedia("(pointer: coarse)").matches ? "Tap to play" : "Press a key to play");
  }

  changed(name) {
    this.labels();
    if (name === "game") { this.fillClips(); this.start(); }
    if (name === "clip" && this.controls.clip.value === "picture" && !this.picture) this.controls.picture.click();
    else if (name === "clip") this.start();
    if (name === "seed" || name === "compare") this.start(this.playing);
    if (["temperature", "refine", "speed"].includes(name)) this.send("set", { [name]: Number(this.controls[name].value) });
    if (name === "smooth") this.send("set", { smooth: this.controls.smooth.checked });
    if (name === "picture" && this.controls.picture.files.length) this.upload(this.controls.picture.files[0]);
  }

  async upload(file) {
    let bitmap;
    try { bitmap = await createImageBitmap(file); }
    catch { this.note("This file is not a picture the browser can read. Choose a PNG, JPEG or WebP file.", "error"); return; }
    const scale = Math.min(1, LARGEST_PICTURE / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    this.wire.send(await blob.arrayBuffer());
    this.picture = true;
    this.fillClips();
    this.controls.clip.value = "picture";
    this.start();
  }

  // -- what the server says
  told(m) {
    if (m.type === "hello") this.hello(m);
    else if (m.type === "started") this.started(m);
    else if (m.type === "recording") this.setRecording(m);
    else if (m.type === "file") { this.file = m; this.note(`Recorded ${m.frames} frames: ${m.name}`); }
    else if (m.type === "paused") { if (this.playing) this.play(false); this.note(m.message, "error"); }
    else if (m.type === "full") this.refused(m);
    else if (m.type === "error") this.note(m.message, "error");
    else if (m.type === "note") this.note(m.message);
  }

  refused(m) {
    this.full = true;
    this.hint("The machine is full");
    this.note(m.message, "error");
    this.retry();
  }

  hello(m) {
    this.options_received = true;
    this.games = m.games;
    this.fps = m.fps;
    const wanted = this.options.game && m.games.some((g) => g.name === this.options.game) ? this.options.game : m.game;
    this.controls.game.replaceChildren(...m.games.map((g) => new Option(g.title, g.name, false, g.name === wanted)));
    for (const name of ["seed", "temperature", "refine", "speed"]) this.controls[name].value = m.defaults[name];
    this.controls.compare.disabled = !m.emulator.ok;
    this.find(".lwm-why").textContent = [m.emulator.why, m.mp4.why].filter(Boolean).join(" ");
    const mp4 = this.controls.format.querySelector("[value=mp4]");
    mp4.disabled = !m.mp4.ok;
    mp4.title = m.mp4.why;
    if (!m.mp4.ok) mp4.textContent = "MP4 (not installed)";
    this.fillClips();
    this.labels();
    this.start();
  }

  started(m) {
    Object.assign(this, { game: m.game, clip: m.clip, compare: m.compare });
    for (const b of this.root.querySelectorAll(".lwm-cross [data-button], .lwm-fire")) {
      b.classList.toggle("unused", !m.buttons.includes(b.dataset.button));
    }
    const others = m.actions.filter((a) => a !== "NOOP" && BUTTONS.reduce((rest, b) => rest.replace(b, ""), a) !== "");
    this.find(".lwm-extra").replaceChildren(...others.map((name) => {
      const b = Object.assign(document.createElement("button"), { type: "button", textContent: name.toLowerCase() });
      b.dataset.button = name;
      const hold = (names) => (e) => this.buttons.hold("finger " + e.pointerId, names, e.timeStamp);
      b.addEventListener("pointerdown", hold([name]));
      for (const end of ["pointerup", "pointercancel", "pointerleave"]) b.addEventListener(end, hold([]));
      return b;
    }));
    this.find(".lwm-twin").hidden = !m.compare;
    this.root.classList.toggle("two", m.compare);
    this.note(m.note);
  }

  setRecording(m) {
    this.recording = m.on;
    const b = this.find("[data-do=record]");
    b.classList.toggle("on", m.on);
    b.querySelector("span").textContent = m.on ? "Stop" : "Record";
    if (m.message) this.note(m.message);
  }

  binary(buffer) {
    const view = new DataView(buffer);
    if (view.getUint8(0) === FILE) return this.save(buffer.slice(HEADER));
    if (![FRAME, BETWEEN].includes(view.getUint8(0))) return;
    const frame = {
      kind: view.getUint8(0), panels: view.getUint8(1), number: view.getUint32(4, true), key: view.getFloat64(8, true),
      model: view.getFloat32(16, true), bytes: buffer.byteLength - HEADER,
    };
    const picture = createImageBitmap(new Blob([buffer.slice(HEADER)], { type: "image/jpeg" }));
    // decoded at once, drawn in order
    this.drawing = this.drawing.then(() => picture).then((bitmap) => this.show(bitmap, frame))
      .catch((error) => this.note(`A frame could not be drawn: ${error.message}`, "error"));
  }

  // A picture in between is drawn at once, and its frame half a frame's time after it.
  async show(bitmap, frame) {
    if (frame.kind === BETWEEN) {
      this.paint(bitmap, frame);
      this.half = performance.now() + 500 / (this.fps * Number(this.controls.speed.value));
      return;
    }
    if (this.half && this.playing) await new Promise((done) => setTimeout(done, this.half - performance.now()));
    this.half = 0;
    this.draw(bitmap, frame);
  }

  paint(bitmap, frame) {
    const side = bitmap.width / frame.panels;
    for (let p = 0; p < frame.panels; p++) {
      const screen = this.screens[p];
      if (screen.canvas.width !== side) { screen.canvas.width = side; screen.canvas.height = bitmap.height; }
      screen.drawImage(bitmap, p * side, 0, side, bitmap.height, 0, 0, side, bitmap.height);
    }
    bitmap.close();
  }

  draw(bitmap, frame) {
    this.paint(bitmap, frame);
    this.send("credit");                               // drawn: the server may send one more
    const now = performance.now();
    this.frame = frame.number;
    if (frame.number) this.meter.frame(now, frame.model, frame.bytes);
    if (frame.key >= 0) this.meter.key(now - frame.key);
    this.root.dataset.frame = frame.number;            // what tests and scripts wait for
    if (!this.playing) this.showStats();
  }

  save(bytes) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes], { type: this.file.mime }));
    link.download = this.file.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  closed(reason) {
    this.playing = false;
    this.root.dataset.playing = false;
    if (this.full) return;
    this.hint("Disconnected");
    this.note(reason || "The connection to the server closed.", "error");
    this.retry();
  }

  retry() {
    if (!this.options.reconnect || this.find(".lwm-again")) return;
    const again = document.createElement("button");
    Object.assign(again, { type: "button", className: "lwm-again", textContent: "Connect again" });
    again.addEventListener("click", () => { this.dispose(); this.options.reconnect(); });
    this.find(".lwm-note").after(again);
  }

  // -- what the page shows
  fillClips() {
    const game = this.games.find((g) => g.name === this.controls.game.value);
    const list = game.starts.map((name, i) => new Option(name, String(i)));
    list.push(new Option(this.picture ? "Own picture" : "Own picture ...", "picture"));
    this.controls.clip.replaceChildren(...list);
  }

  labels() {
    const text = { temperature: (v) => Number(v).toFixed(2), refine: (v) => v, speed: (v) => `${Number(v)}x` };
    for (const [name, show] of Object.entries(text)) this.find(`[data-of=${name}]`).textContent = show(this.controls[name].value);
  }

  stats() {
    const m = this.meter, key = (q) => quantile(m.latencies, q), model = quantile(m.model, 0.5);
    return { fps: m.fps, fps_mean: rate(m.times), keys: m.latencies.length, key_p50: key(0.5), key_p95: key(0.95),
      key_p99: key(0.99), model_p50: model, bytes: quantile(m.bytes, 0.5), frame: this.frame ?? null };
  }

  showStats() {
    const s = this.stats(), put = (name, text) => { this.find(`[data-stat=${name}]`).textContent = text; };
    const none = "\u2013", ms = (x) => (Number.isFinite(x) ? `${Math.round(x)}` : none);
    put("fps", this.playing && Number.isFinite(s.fps) ? s.fps.toFixed(1) : none);
    put("key", s.keys ? `${ms(s.key_p50)} / ${ms(s.key_p95)} ms` : none);
    put("model", Number.isFinite(s.model_p50) ? `${ms(s.model_p50)} ms` : none);
    put("frame", s.frame ?? none);
  }
}

// ---- two wires ----------------------------------------------------------------------------------------------------------------

function socketWire(url) {
  const wire = {
    open() {}, message() {}, closed() {}, close() { socket.close(); },
    send(data) { if (socket.readyState === WebSocket.OPEN) socket.send(data); },
  };
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => wire.open();
  socket.onmessage = (e) => wire.message(e.data);
  socket.onclose = (e) => wire.closed(e.reason);
  return wire;
}

// The page: one console on one WebSocket of the server that sent this page.
export function mount(element) {
  const url = new URL("play", document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const game = new URLSearchParams(location.search).get("game");
  window.lwm = new Console(element, socketWire(url), { game, reconnect: () => mount(element) });
  return window.lwm;
}

// Jupyter: the same console; the kernel's messages are the wire (the convention of anywidget).
function render({ model, el }) {
  const wire = {
    open() {}, message() {}, closed() {}, close() {},
    send(data) { typeof data === "string" ? model.send({ text: data }) : model.send({ text: null }, undefined, [data]); },
  };
  const heard = (content, buffers) => {
    if (content.text !== null) return wire.message(content.text);
    const b = buffers[0];
    wire.message(b instanceof ArrayBuffer ? b : b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength));
  };
  const console_ = new Console(el, wire, { anywhere: false, game: model.get("game") });
  model.on("msg:custom", heard);
  console_.send("hello");
  return () => { model.off("msg:custom", heard); console_.dispose(); };
}

export default { render };
