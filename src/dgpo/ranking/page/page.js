"use strict";
// Shows groups and sends answers. Texts of the run are set as textContent, never as HTML.

const KEYS = "1234567890qwertyuiopdfghjklxcvbnm"; // S skips, Z enlarges
const TINY = 128; // pictures up to so many pixels are enlarged without smoothing
const TASKS = {
  likes: "Choose the pictures you like.",
  order: "Choose the pictures from the best on; those you leave out tie for the last place.",
  stars: "Give every picture one to five stars.",
};
const HINTS = {
  likes: "1 2 3 … choose · arrows and Space too · Z enlarge",
  order: "1 2 3 … next best · arrows and Space too · Z enlarge",
  stars: "1 to 5 stars for the outlined picture · arrows move · Z enlarge",
};
const SOURCES = { image: "What is to be changed", mask: "Where (white)" };
const $ = (id) => document.getElementById(id);

let rater = localStorage.getItem("dgpo-rater") || "";
let token = sessionStorage.getItem("dgpo-token") || "";
let mode = ""; // what the server asks for, until the person chooses
let current = null; // the group on the page
let at = 0; // the outlined tile
let since = 0;
let busy = false; // from an answer, or a step back, until the next group is on the page
let sent = ""; // the group whose answer was saved last, until another is on the page
let timer = 0;
const pictures = new Map(); // address -> promise of an object URL

async function ask(path, body) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, body
    ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  if (answer.ok) return answer;
  const error = new Error(await reason(answer));
  error.status = answer.status;
  throw error;
}

async function reason(answer) {
  try {
    const { detail } = await answer.json();
    return typeof detail === "string" ? detail : detail[0].msg;
  } catch {
    return `status ${answer.status}`;
  }
}

const asJson = async (path, body) => (await ask(path, body)).json();
const named = (path) => `${path}?rater=${encodeURIComponent(rater)}`;

function picture(group, name) {
  const path = `v1/groups/${group.id}/${name}.png`;
  if (!pictures.has(path)) {
    const made = ask(path).then((a) => a.blob()).then((b) => URL.createObjectURL(b));
    made.catch(() => pictures.delete(path));
    pictures.set(path, made);
  }
  return pictures.get(path);
}

function forget(except) {
  const kept = except.map((group) => `v1/groups/${group.id}/`);
  for (const [path, made] of pictures) {
    if (kept.some((start) => path.startsWith(start))) continue;
    pictures.delete(path);
    made.then((url) => URL.revokeObjectURL(url), () => {});
  }
}

function show(what) {
  for (const id of ["enter", "wait", "work"]) $(id).hidden = id !== what;
  document.querySelector("footer").hidden = what !== "work";
  $("modes").hidden = $("who").hidden = what === "enter";
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text;
}

function failed(error, again) {
  if (error.status === 401) return enter(token ? "This token is not the right one." : "");
  if (error.status && error.status < 500) return problem(error.message);
  problem(error.status
    ? `${error.message} Trying again.`
    : "No connection: the run may have ended. What was ranked is saved; trying again.");
  clearTimeout(timer);
  timer = setTimeout(again, 2000);
}

function enter(text) {
  problem(text || "");
  show("enter");
  current = null;
  $("status").textContent = "";
  $("name").value = rater;
  if (text !== undefined) $("token-line").hidden = false;
  (rater && !$("token-line").hidden ? $("token") : $("name")).focus();
}

async function load() {
  clearTimeout(timer);
  try {
    const work = await asJson(named("v1/groups"));
    problem("");
    status(work.status);
    forget(work.groups);
    if (!work.groups.length) {
      current = null;
      $("note").textContent = work.status.note;
      show("wait");
      timer = setTimeout(load, 1000);
      return;
    }
    await open(work.groups[0]);
    for (const next of work.groups.slice(1)) {
      for (const name of [...next.places, ...next.sources.map(under)]) picture(next, name).catch(() => {});
    }
  } catch (error) {
    failed(error, load);
  }
}

function status(now) {
  if (!mode) setMode(now.ask);
  const people = Object.keys(now.all_ranked).length;
  const parts = [`${now.ranked} ranked by you`, `${now.waiting} waiting`];
  if (people > 1) parts.push(`${people} raters`);
  if (now.agreement !== null) {
    parts.push(`they agree on ${Math.round(100 * now.agreement)}% of ${now.pairs} pairs`);
  }
  $("status").textContent = parts.join(" · ");
  $("who").textContent = rater;
}

const under = (source) => `source/${source}`;

async function open(group) {
  const urls = await Promise.all(group.places.map((place) => picture(group, place)));
  const sources = await Promise.all(group.sources.map((source) => picture(group, under(source))));
  current = { ...group, likes: new Set(), order: [], stars: new Map() };
  sent = "";
  take(group.answer);
  at = 0;
  $("prompt").textContent = group.prompt;
  $("grid").replaceChildren(...urls.map(tile));
  $("sources").replaceChildren(...sources.map((url, i) => shown(url, SOURCES[group.sources[i]])));
  $("sources").hidden = !sources.length;
  show("work");
  await Promise.all([...$("board").querySelectorAll("img")].map((img) => img.decode().catch(() => {})));
  fit();
  paint();
  focus(0);
  since = performance.now();
}

/** Put an earlier answer back on the page. */
function take(answer) {
  if (!answer || answer.kind === "skip") return;
  setMode(answer.kind);
  if (answer.kind === "likes") answer.liked.forEach((place) => current.likes.add(place));
  if (answer.kind === "order") current.order = [...answer.best_first];
  if (answer.kind === "stars") answer.stars.forEach((stars, place) => current.stars.set(place, stars));
}

/** A picture that a prompt speaks of. */
function shown(url, text) {
  const box = document.createElement("figure");
  const button = document.createElement("button");
  button.type = "button";
  button.append(drawn(url, text));
  button.onclick = () => enlarge(button.firstChild);
  box.append(button, Object.assign(document.createElement("figcaption"), { textContent: text }));
  return box;
}

function drawn(url, text) {
  const img = document.createElement("img");
  img.alt = text;
  img.draggable = false;
  img.onload = () => img.classList.toggle("tiny", img.naturalWidth <= TINY);
  img.src = url;
  return img;
}

function tile(url, index) {
  const place = current.places[index];
  const box = document.createElement("div");
  box.className = "tile";
  const pick = document.createElement("button");
  pick.type = "button";
  pick.className = "pick";
  pick.append(drawn(url, `picture ${index + 1}`));
  pick.onclick = () => { focus(index); if (mode !== "stars") toggle(place); };
  pick.ondblclick = () => { if (mode === "stars") enlarge(); };
  const key = document.createElement("kbd");
  key.className = "key";
  key.textContent = KEYS[index] ? KEYS[index].toUpperCase() : "";
  const mark = document.createElement("span");
  mark.className = "mark";
  const stars = document.createElement("div");
  stars.className = "stars";
  for (let count = 1; count <= 5; count += 1) {
    const star = document.createElement("button");
    star.type = "button";
    star.tabIndex = -1;
    star.textContent = "★";
    star.setAttribute("aria-label", `${count} of 5 stars for picture ${index + 1}`);
    star.onclick = () => { focus(index); rate(place, count); };
    stars.append(star);
  }
  box.append(pick, key, mark, stars);
  return box;
}

function toggle(place) {
  if (mode === "likes") {
    if (!current.likes.delete(place)) current.likes.add(place);
  } else {
    const rank = current.order.indexOf(place);
    if (rank < 0) current.order.push(place);
    else current.order.splice(rank, 1);
  }
  paint();
}

function rate(place, count) {
  current.stars.set(place, count);
  paint();
}

/** Marks, buttons and hints as the state says. */
function paint() {
  if (!current) return;
  const total = current.places.length;
  [...$("grid").children].forEach((box, index) => {
    const place = current.places[index];
    const rank = current.order.indexOf(place);
    const stars = current.stars.get(place) || 0;
    const text = { likes: current.likes.has(place) ? "♥" : "", order: rank < 0 ? "" : `${rank + 1}`, stars: "" }[mode];
    box.classList.toggle("on", Boolean(text));
    box.classList.toggle("off", !text && mode === "order" && current.order.length > 0);
    box.querySelector(".mark").textContent = text;
    box.querySelector(".mark").hidden = !text;
    box.querySelector(".key").hidden = mode === "stars" || !KEYS[index];
    box.querySelector(".stars").hidden = mode !== "stars";
    [...box.querySelectorAll(".stars button")].forEach((star, i) => star.classList.toggle("lit", i < stars));
    box.querySelector(".pick").setAttribute("aria-pressed", String(Boolean(text)));
  });
  $("task").textContent = TASKS[mode];
  $("keys").textContent = HINTS[mode];
  const count = { likes: current.likes.size, order: current.order.length, stars: current.stars.size }[mode];
  const label = {
    likes: count ? `Done: ${count} liked` : "None of them",
    order: `Done: ${count} of ${total} in order`,
    stars: `Done: ${count} of ${total} rated`,
  }[mode];
  const enough = { likes: true, order: count > 0, stars: count === total }[mode];
  $("done").replaceChildren(label, " ", Object.assign(document.createElement("kbd"), { textContent: "Enter" }));
  $("done").disabled = busy || !enough;
  $("skip").disabled = $("back").disabled = busy;
}

function setMode(next) {
  mode = next;
  for (const button of $("modes").children) {
    button.setAttribute("aria-checked", String(button.dataset.mode === mode));
  }
  paint();
  if (current) fit();
}

/** The number of columns with which the pictures are largest and all are seen. */
function fit() {
  const img = $("grid").querySelector("img");
  if (!img || !img.naturalWidth) return;
  const { clientWidth: wide, clientHeight: high } = $("grid");
  const ratio = img.naturalHeight / img.naturalWidth;
  const total = current.places.length;
  const extra = mode === "stars" ? 36 : 0;
  let best = { side: 0, columns: 1 };
  for (let columns = 1; columns <= total; columns += 1) {
    const rows = Math.ceil(total / columns);
    const across = (wide - 24 - 12 * (columns - 1)) / columns;
    const down = ((high - 24 - 12 * (rows - 1)) / rows - extra) / ratio;
    const side = Math.floor(Math.min(across, down));
    if (side > best.side) best = { side, columns };
  }
  const side = Math.max(best.side, 110);
  const columns = best.side < 110 ? Math.max(1, Math.floor((wide - 12) / 122)) : best.columns;
  $("grid").style.gridTemplateColumns = `repeat(${Math.min(columns, total)}, ${side}px)`;
  $("grid").dataset.columns = Math.min(columns, total);
}

function focus(index) {
  at = Math.min(Math.max(index, 0), current.places.length - 1);
  const picks = [...$("grid").querySelectorAll(".pick")];
  picks.forEach((pick, i) => { pick.tabIndex = i === at ? 0 : -1; });
  picks[at].focus({ focusVisible: true });
}

function enlarge(img = $("grid").querySelectorAll("img")[at]) {
  const big = $("large").querySelector("img");
  big.src = img.src;
  big.className = img.className;
  $("large").showModal();
}

function answer() {
  if (mode === "likes") return { kind: "likes", liked: [...current.likes].sort((a, b) => a - b) };
  if (mode === "order") return { kind: "order", best_first: current.order };
  return { kind: "stars", stars: current.places.map((_, place) => current.stars.get(place)) };
}

async function send(said) {
  if (busy || !current || current.id === sent) return;
  busy = true;
  clearTimeout(timer);
  paint();
  const seconds = (performance.now() - since) / 1000;
  await post(current.id, { rater, answer: said, seconds: Math.min(seconds, 86400) });
}

async function post(id, body) {
  let note = "";
  try {
    const { in_time: inTime } = await asJson(`v1/groups/${id}`, body);
    sent = id;
    if (!inTime) note = "Saved. Training had used your earlier answer already; the dataset has the new one.";
  } catch (error) {
    if (!error.status || error.status >= 500) return failed(error, () => post(id, body)); // kept until it is saved
    if (error.status === 401) { busy = false; return failed(error); }
    note = error.message; // the server does not know this group any more
  }
  await loaded(load);
  if (note) problem(note);
}

async function back() {
  if (busy) return;
  busy = true;
  clearTimeout(timer);
  paint();
  await loaded(async () => {
    try {
      const work = await asJson(named("v1/last"));
      problem("");
      await open(work.groups[0]);
    } catch (error) {
      failed(error, load);
    }
  });
}

/** Keys speak of the group on the page: none is heard until the next one has taken its place. */
async function loaded(next) {
  try {
    await next();
  } finally {
    busy = false;
    paint();
  }
}

function key(event) {
  if (!current || $("work").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if ($("large").open) {
    if (name === "z") $("large").close();
    return;
  }
  const onButton = event.target.closest("button:not(.pick)");
  const columns = Number($("grid").dataset.columns) || 1;
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (name in moves) focus(at + moves[name]);
  else if (name === "Enter" && !onButton) { if (!$("done").disabled) send(answer()); }
  else if (name === "Backspace") back();
  else if (name === "s") send({ kind: "skip" });
  else if (name === "z") enlarge();
  else if (name === " " && !onButton) { if (mode !== "stars") toggle(current.places[at]); }
  else if (mode === "stars" && name >= "1" && name <= "5") {
    rate(current.places[at], Number(name));
    const left = current.places.map((place, i) => [place, i]).filter(([place]) => !current.stars.has(place));
    const next = left.find(([, i]) => i > at) || left[0];
    if (next) focus(next[1]);
  } else if (mode !== "stars" && KEYS.includes(name) && KEYS.indexOf(name) < current.places.length) {
    focus(KEYS.indexOf(name));
    toggle(current.places[at]);
  } else return;
  event.preventDefault();
}

$("enter").onsubmit = (event) => {
  event.preventDefault();
  rater = $("name").value.trim().replace(/\s+/g, " ");
  if ($("token").value) token = $("token").value.trim();
  localStorage.setItem("dgpo-rater", rater);
  sessionStorage.setItem("dgpo-token", token);
  $("token").value = "";
  if (rater) load();
};
$("modes").onclick = (event) => { if (event.target.dataset.mode) setMode(event.target.dataset.mode); };
$("who").onclick = () => { if (!busy) { clearTimeout(timer); enter(); } };
$("done").onclick = () => send(answer());
$("skip").onclick = () => send({ kind: "skip" });
$("back").onclick = back;
$("large").onclick = () => $("large").close();
document.addEventListener("keydown", key);
window.addEventListener("resize", () => { if (current) fit(); });
if (rater) load();
else enter();
