// The page: what is written and pressed becomes messages; what comes back is shown.

import { Live } from "./live.js";
import { Player } from "./player.js";
import { Recording } from "./recording.js";

const $ = (id) => document.getElementById(id);
const KINDS = { start: "start", switch: "switch", cut: "cut", append: "later" };
const PHASES = {
  ready: "Ready",
  opening: "Opening",
  queued: "Waiting for room",
  live: "Live",
  paused: "Paused",
  lost: "Connection lost",
  over: "Over",
};

// What a reload finds again, in this tab alone.
const store = {
  read: () => JSON.parse(sessionStorage.getItem("lltk") ?? "{}"),
  write: (changes) => sessionStorage.setItem("lltk", JSON.stringify({ ...store.read(), ...changes })),
};

let phase = "ready";
let live = null;
let config = null;
let recording = new Recording();
let shots = store.read().shots ?? []; // {id, kind, caption, seconds, state, …}
let parts = []; // received and not seen yet: {sequence, first_frame}
let seen = store.read().seen ?? -1; // the sequence that is on the screen
const items = new Map(); // of the list, by the shots' ids

const player = new Player($("video"), shown);
if (takeToken()) store.write({ session: null });
const { session } = store.read();
if (session) begin((made) => made.resume({ ...session, sequence: Math.max(seen - 1, -1) }));
else showPhase("ready");
showShots();

// The token of the address's fragment, which then no longer shows it; whether there was one.
function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return false;
  history.replaceState(null, "", location.pathname);
  const isNew = token !== store.read().token;
  store.write({ token });
  return isNew;
}

// The connection

function begin(first) {
  clearProblem();
  showPhase("opening");
  live = new Live(store.read().token, {
    message,
    init: (bytes) => {
      recording.begin(bytes);
      player.append(bytes);
    },
    part,
    lost,
    over,
    roundTrip: (seconds) => ($("trip").textContent = `${Math.round(seconds * 1000)} ms`),
  });
  first(live);
}

const HEARD = {
  "session.queued": ({ position, length, estimate_s: estimate }) => {
    showPhase("queued", `Place ${position} of ${length}; room in at most ${span(estimate)}.`);
  },
  "session.created": () => {
    const { id, token } = live.kept;
    store.write({ session: { id, token } });
    clearProblem();
    sendShots(["written", "sent"]); // those that were on their way may be lost; no shot is applied twice
    if (player.isOpen) showRunning();
    else showPhase("opening", "The first frames are being made.");
  },
  "video.start": ({ mime, config: given }) => {
    const refusal = Player.refusal(mime);
    if (refusal) {
      stop();
      showProblem(refusal);
      return;
    }
    if (config && config.first_frame !== given.first_frame) recording = new Recording();
    config = given;
    $("video").style.setProperty("--ratio", `${config.width} / ${config.height}`);
    player.open(mime, config);
  },
  "session.interaction.queued": ({ event_id: id, received }) => {
    change(id, { state: "queued", received });
  },
  "video.chunk_metadata": (metadata) => {
    for (const id of metadata.started_event_ids) {
      change(id, { state: "made", chunk: metadata.generation_chunk_index, frame: metadata.first_frame });
    }
  },
  "session.done": () => player.end(),
  error: (error) => {
    if (error.event_id) change(error.event_id, { state: "refused", why: error.message });
  },
};

function message(given) {
  HEARD[given.type]?.(given);
}

function part(metadata, bytes) {
  recording.add(metadata, bytes);
  player.append(bytes);
  parts.push(metadata);
  const { step, commit, text, decode } = metadata.seconds;
  const seconds = step + commit + text;
  if (seconds) $("speed").textContent = `${(config.chunk_frames / Math.max(seconds, decode)).toFixed(1)} fps`;
  $("download").disabled = false;
  if (phase === "opening") {
    showRunning();
    if (phase === "live") play();
  }
}

function lost(seconds, error) {
  showPhase(error?.code === "over_capacity" ? "queued" : "lost");
  showProblem(`${error?.message ?? "The connection is lost."} Trying again in ${span(seconds)}.`, "retry");
}

function over(error) {
  const hasBegun = live.kept !== null;
  live = null;
  player.end();
  if (!hasBegun) shots.filter(({ state }) => state === "sent").forEach(({ id }) => change(id, { state: "written" }));
  showPhase("over");
  if (!error) {
    clearProblem();
  } else {
    const remedy = { unauthorized: "unlock", lost: hasBegun ? "retry" : null }[error.code];
    showProblem(error.message, remedy);
  }
  if (error?.code !== "lost") store.write({ session: null });
}

// What the user does

// Begin a video with what is written.
function start() {
  if (player.isOpen) player.close();
  recording = new Recording();
  [parts, seen, config] = [[], -1, null];
  shots = shots.filter(({ state }) => state === "written");
  store.write({ seen, session: null, isPaused: false });
  const [opening] = shots;
  const request = { shots: [shot(opening)] };
  if ($("seed").value) request.seed = Number($("seed").value);
  Object.assign(opening, { kind: "start", sent: Date.now() });
  showPhase("opening");
  withImage(request).then(
    () => {
      begin((made) => made.start(request));
      change(opening.id, { state: "sent" });
    },
    (error) => {
      showPhase("ready");
      showProblem(error.message, error.remedy);
    },
  );
}

// A request with the chosen image, which the server has taken.
async function withImage(request) {
  const [file] = $("image").files;
  if (!file) return;
  const body = new FormData();
  body.append("file", file);
  body.append("purpose", "vision");
  const headers = store.read().token ? { Authorization: `Bearer ${store.read().token}` } : {};
  const answer = await fetch("v1/files", { method: "POST", headers, body });
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const error = new Error(said.error?.message ?? "The image is refused.");
    throw Object.assign(error, { remedy: answer.status === 401 ? "unlock" : null });
  }
  request.image_reference = { file_id: said.id };
}

// Take what is written in the prompt.
function write(kind) {
  const caption = $("prompt").value.trim();
  if (!caption || !$("director").reportValidity()) {
    $("prompt").focus();
    return;
  }
  const id = `${Date.now().toString(36)}-${shots.length}`;
  shots.push({ id, kind, caption, seconds: Number($("seconds").value), state: "written" });
  $("prompt").value = "";
  showShots();
  $("shots").scrollTop = $("shots").scrollHeight;
  sendShots(["written"]);
}

// Send every shot in one of these states, if there is a session.
function sendShots(states) {
  if (!live?.kept) return;
  for (const written of shots.filter(({ kind, state }) => kind !== "start" && states.includes(state))) {
    const { id, kind, caption, seconds } = written;
    const event = {
      append: { append: [shot(written)] },
      cut: { prompt: caption, cut: true, seconds },
      switch: { prompt: caption },
    }[kind];
    const isSent = live.send({ type: "session.interaction", interaction: { event_id: id, event } });
    if (isSent) change(id, { state: "sent", sent: written.sent ?? Date.now() });
  }
}

const shot = ({ caption, seconds }) => ({ caption, seconds, cut: true });

function play() {
  $("video").play().catch(() => showPhase("paused", "Press play."));
}

function pauseOrPlay() {
  const isPaused = phase === "live";
  store.write({ isPaused });
  live.send({ type: isPaused ? "session.pause" : "session.play" });
  if (isPaused) $("video").pause();
  else play();
  showRunning();
}

function stop() {
  if (live.kept && live.send({ type: "session.stop" })) return;
  live.drop();
  over(null);
}

function download() {
  recording.save(`lltk-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.mp4`);
}

function fullscreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else if ($("frame").requestFullscreen) $("frame").requestFullscreen();
  else $("video").webkitEnterFullscreen(); // iPhones have no other
}

// What is shown

function shown(frame) {
  $("number").textContent = frame;
  while (parts.length && parts[0].first_frame <= frame) seen = parts.shift().sequence;
  const [opening] = shots.filter(({ kind, state }) => kind === "start" && state === "sent").slice(-1);
  if (opening) change(opening.id, { state: "made", chunk: 0, frame: 0 });
  for (const made of shots.filter(({ state }) => state === "made")) {
    if (frame < made.frame) continue;
    const seconds = (Date.now() - made.sent) / 1000;
    change(made.id, { state: "visible", after: seconds });
    if (["switch", "cut"].includes(made.kind)) $("latency").textContent = `${seconds.toFixed(1)} s`;
  }
}

function change(id, changes) {
  const found = shots.find((each) => each.id === id);
  if (!found) return;
  Object.assign(found, changes);
  showShots();
}

function receipt({ kind, state, received, chunk, frame, after, why }) {
  const delay = after === undefined ? "" : `, ${after.toFixed(1)} s after sending`;
  return {
    written: "written",
    sent: "sent",
    queued: kind === "append" ? "queued behind the other shots" : `queued for chunk ${received}`,
    made: `chunk ${chunk} is made, to be seen from frame ${frame}`,
    visible: kind === "append" ? `seen from frame ${frame}` : `seen from frame ${frame}${delay}`,
    refused: `refused: ${why}`,
  }[state];
}

function showShots() {
  store.write({ shots: shots.slice(-100) });
  $("empty").hidden = shots.length > 0;
  for (const [id, item] of items) {
    if (shots.some((each) => each.id === id)) continue;
    item.remove();
    items.delete(id);
  }
  shots.forEach(showShot);
  if (!live) showPhase(phase);
}

function showShot(each) {
  const { id, kind, caption, seconds, state } = each;
  if (!items.has(id)) {
    const made = $("shot").content.cloneNode(true).firstElementChild;
    const remove = made.querySelector("button");
    remove.setAttribute("aria-label", `Remove “${caption}”`);
    remove.onclick = () => {
      shots = shots.filter((other) => other !== each);
      showShots();
    };
    items.set(id, made);
    $("shots").append(made);
  }
  const item = items.get(id);
  item.dataset.state = state;
  const length = kind === "switch" ? "" : `, ${seconds} s`;
  const texts = { caption, kind: KINDS[kind] + length, receipt: receipt(each) };
  for (const [name, text] of Object.entries(texts)) {
    const line = item.querySelector(`.${name}`);
    if (line.textContent !== text) line.textContent = text; // what changes is read aloud
  }
  item.querySelector("button").hidden = state !== "written";
}

function showRunning() {
  showPhase(store.read().isPaused ? "paused" : "live");
}

function showPhase(now, veil = "") {
  phase = now;
  $("status").dataset.phase = now;
  $("status").textContent = PHASES[now];
  const isIdle = now === "ready" || now === "over";
  const isRunning = now === "live" || now === "paused";
  $("veil").textContent = now === "ready" ? "Say what the video shows, and start it." : veil;
  $("veil").hidden = !$("veil").textContent;
  $("go").firstElementChild.textContent = isIdle ? "Start" : "Switch";
  $("go").disabled = !isIdle && !isRunning;
  $("cut").disabled = $("pause").disabled = !isRunning;
  $("fullscreen").disabled = !player.isOpen;
  $("stop").disabled = isIdle;
  $("pause").firstElementChild.textContent = now === "paused" ? "Play" : "Pause";
  $("opening").hidden = !isIdle;
  $("prompt").required = !(isIdle && shots.some(({ state }) => state === "written"));
}

// `remedy` is the id of what helps: a form, or a button.
function showProblem(text, remedy = null) {
  $("problem").textContent = text;
  for (const id of ["unlock", "retry"]) $(id).hidden = id !== remedy;
  $("alert").hidden = false;
  if (remedy === "unlock") $("token").focus();
}

function clearProblem() {
  $("alert").hidden = true;
}

function span(seconds) {
  if (seconds < 100) return `${seconds < 10 ? Number(seconds.toFixed(1)) : Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}

// Each second: where the player is, which lets the next chunk be made.
setInterval(() => {
  if (!live?.kept || !player.isOpen) return;
  const position = $("video").currentTime;
  live.send({ type: "client.playback", position, buffered: player.ahead });
  live.ping();
  store.write({ seen });
}, 1000);

setInterval(() => {
  if (!player.isOpen) return;
  $("fps").textContent = `${player.rate.toFixed(1)} fps`;
  $("buffer").textContent = `${player.ahead.toFixed(1)} s`;
}, 250);

addEventListener("hashchange", () => location.reload()); // a new token
addEventListener("pagehide", () => store.write({ seen }));

// Buttons and keys

$("director").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("prompt").value.trim()) write(live ? "switch" : "append");
  if (!live && shots.some(({ state }) => state === "written")) start();
});
$("cut").onclick = () => write("cut");
$("add").onclick = () => write("append");
$("pause").onclick = pauseOrPlay;
$("stop").onclick = stop;
$("download").onclick = download;
$("fullscreen").onclick = fullscreen;
$("retry").onclick = () => {
  if (live) live.retry();
  else begin((made) => made.resume({ ...store.read().session, sequence: seen }));
};
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  store.write({ token: $("token").value });
  $("token").value = "";
  clearProblem();
  if (shots.some(({ state }) => state === "written")) start();
});

$("image").onchange = async () => {
  const [file] = $("image").files;
  const picture = file && (await createImageBitmap(file).catch(() => null));
  $("preview").hidden = $("no-image").hidden = !picture;
  if (file && !picture) {
    $("image").value = "";
    showProblem(`${file.name} is no image that this browser can read.`);
  }
  if (!picture) return;
  const { width, height } = $("preview");
  const scale = Math.max(width / picture.width, height / picture.height);
  const [wide, high] = [picture.width * scale, picture.height * scale];
  $("preview").getContext("2d").drawImage(picture, (width - wide) / 2, (height - high) / 2, wide, high);
};
$("no-image").onclick = () => {
  $("image").value = "";
  $("image").onchange();
};

$("single-keys").checked = localStorage.getItem("lltk-single-keys") !== "off";
$("single-keys").onchange = () => {
  localStorage.setItem("lltk-single-keys", $("single-keys").checked ? "on" : "off");
};

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Escape") $("prompt").blur();
  if (event.key !== "Enter" || event.isComposing) return;
  event.preventDefault();
  const button = event.shiftKey ? $("cut") : event.ctrlKey || event.metaKey ? $("add") : $("go");
  button.click();
});

const KEYS = { k: "pause", f: "fullscreen", d: "download", X: "stop" };
addEventListener("keydown", (event) => {
  const isText = event.target.matches("textarea, input, select");
  if (isText || event.ctrlKey || event.metaKey || event.altKey || !$("single-keys").checked) return;
  if (event.key === "/") {
    event.preventDefault();
    $("prompt").focus();
  } else if (Object.hasOwn(KEYS, event.key)) {
    $(KEYS[event.key]).click();
  }
});
