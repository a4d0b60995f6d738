// The page: a stream of events, the list of runs, the panels, samples and settings.
import { CHARTS, MOST_RUNS, Panel, element, looks, panelsOf, short } from "./panel.js";

const byId = (id) => document.getElementById(id);

const lines = new Map(); // name -> line of the list
const items = new Map(); // name -> item of the list
const curves = new Map(); // name -> {name, place, axes, values, samples, problem}
const stale = new Set(); // names of runs with new points
const view = { axis: "step", smoothing: 0, zoom: null, dark: false, onZoom: zoom };
let selected = new URLSearchParams(location.search).getAll("run").slice(0, MOST_RUNS); // "" keeps a colour free
let isDefault = selected.length === 0;
let stream = null, panels = [], layout = "", frame = 0, settings = [];

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) target.panel.show(isIntersecting);
}, { rootMargin: "200px" });

// The stream

function listen() {
  stream?.close();
  for (const name of curves.keys()) if (!selected.includes(name)) curves.delete(name);
  const query = new URLSearchParams(selected.map((name) => ["run", name]));
  history.replaceState(null, "", isDefault || !selected.length ? location.pathname : `?${query}`);
  stream = new EventSource(`/api/events?${query}`);
  let fresh = true; // the server sends everything after each connection
  const on = (kind, handle) => stream.addEventListener(kind, (event) => handle(JSON.parse(event.data)));
  stream.addEventListener("open", () => { fresh = true; showConnection("live", "live"); });
  stream.addEventListener("error", () => showConnection("lost", "connection lost, trying again"));
  on("curves", takeCurves);
  on("samples", ({ run, samples }) => { curves.get(run).samples = samples; showSamples(); });
  on("runs", (change) => {
    if (fresh) lines.clear();
    fresh = false;
    takeRuns(change);
  });
  loadSettings();
  drawSoon();
}

function showConnection(state, text) {
  byId("connection").textContent = text;
  byId("connection").dataset.state = state;
}

function takeRuns({ changed, gone }) {
  for (const line of changed) lines.set(line.name, line);
  for (const name of gone) { lines.delete(name); curves.delete(name); }
  if (isDefault && !selected.length && lines.size) select([newest()]);
  showList();
  drawSoon();
}

// Points of one run replace all from point `from` on.
function takeCurves({ run, from, axes, values, problem }) {
  const known = curves.get(run) ?? { name: run, axes: {}, values: new Map(), samples: [] };
  const spliced = (before = [], points) => {
    const missing = Array(Math.max(0, from - before.length)).fill(null);
    return [...before.slice(0, from), ...missing, ...points];
  };
  if (from === 0) known.values.clear();
  for (const [axis, positions] of Object.entries(axes)) known.axes[axis] = spliced(known.axes[axis], positions);
  for (const [name, points] of Object.entries(values)) known.values.set(name, spliced(known.values.get(name), points));
  curves.set(run, Object.assign(known, { place: selected.indexOf(run), problem }));
  stale.add(run);
  drawSoon();
}

// The panels

const shown = () => selected.filter((name) => curves.has(name)).map((name) => curves.get(name));

function drawSoon() {
  // The first drawing waits until all runs have arrived.
  const missing = selected.some((name) => lines.has(name) && !lines.get(name).problem && !curves.has(name));
  if (!missing && lines.size) frame ||= requestAnimationFrame(draw);
}

function draw() {
  frame = 0;
  const plans = CHARTS.map((chart) => ({ chart, plans: panelsOf(chart, shown()) })).filter(({ plans }) => plans.length);
  const identity = (key, value) => (key === "run" ? value.name : value);
  const wanted = JSON.stringify([view.dark, plans], identity);
  if (wanted !== layout) lay(plans);
  layout = wanted;
  for (const panel of panels) if (panel.lines.some(({ run }) => stale.has(run.name))) panel.update();
  stale.clear();
  showList();
  byId("hint").hidden = selected.some(Boolean) || !lines.size;
  document.body.dataset.drawn = String(Number(document.body.dataset.drawn ?? 0) + 1);
}

function lay(plans) {
  for (const panel of panels) { seen.unobserve(panel.element); panel.destroy(); }
  panels = [];
  byId("charts").replaceChildren(...plans.map(({ chart, plans: own }) => {
    const made = own.map((plan) => new Panel(chart, plan, view));
    panels.push(...made);
    const grid = element("div", { className: "grid" }, made.map((panel) => panel.element));
    const heading = element("h2", { textContent: chart.title });
    return element("section", { id: chart.key, className: made.length > 1 ? "many" : "" }, [heading, grid]);
  }));
  for (const panel of panels) seen.observe(panel.element);
}

function zoom(range) {
  view.zoom = range;
  byId("reset").hidden = !range;
  for (const panel of panels) panel.zoom();
}

function updateAll() {
  for (const panel of panels) panel.update();
}

// The list of runs

function newest() {
  const rank = (line) => (line.status === "running" ? 1e12 : 0) + line.started_at;
  return [...lines.values()].sort((a, b) => rank(b) - rank(a))[0].name;
}

function select(names) {
  selected = names;
  listen();
  showList();
}

function choose(names) {
  isDefault = false;
  select(names);
}

function toggle(name, wanted) {
  const kept = selected.map((one) => (one !== name && lines.has(one) ? one : ""));
  if (wanted) kept[kept.includes("") ? kept.indexOf("") : kept.length] = name;
  while (kept.length && !kept.at(-1)) kept.pop();
  choose(kept);
}

function showList() {
  const sorted = [...lines.values()].sort((a, b) => b.started_at - a.started_at || a.name.localeCompare(b.name));
  for (const [name, item] of items) if (!lines.has(name)) { item.remove(); items.delete(name); }
  sorted.forEach((line, place) => {
    if (!items.has(line.name)) items.set(line.name, newItem(line.name));
    const item = items.get(line.name);
    showItem(item, line);
    if (byId("runs").children[place] !== item) byId("runs").insertBefore(item, byId("runs").children[place] ?? null);
  });
  byId("empty").hidden = lines.size > 0;
}

function newItem(name) {
  const box = element("input", { type: "checkbox", onchange: () => toggle(name, box.checked) });
  const parts = [box, element("span", { className: "name" }), element("span", { className: "about" })];
  return element("li", {}, [element("label", {}, parts)]);
}

function showItem(item, line) {
  const [box, title, about] = item.firstChild.children;
  const chosen = selected.filter((name) => lines.has(name)), place = selected.indexOf(line.name);
  box.checked = place >= 0;
  box.disabled = place < 0 && chosen.length >= MOST_RUNS;
  item.hidden = !line.name.toLowerCase().includes(byId("filter").value.toLowerCase());
  title.textContent = line.name;
  const { border, stroke } = looks(Math.max(place, 0), view.dark);
  title.style.borderLeft = `.3rem ${border} ${chosen.length > 1 && place >= 0 ? stroke : "transparent"}`;
  about.replaceChildren(...aboutRun(line));
}

function aboutRun(line) {
  const part = (textContent, className = "") => element("span", { textContent, className });
  if (line.problem) return [part(line.problem, "problem")];
  const steps = line.total_steps === null ? line.steps : `${line.steps} of ${line.total_steps}`;
  const texts = [`${steps} steps`];
  if (line.loss_total !== null) texts.push(`loss ${short(line.loss_total)}`);
  if (line.last_step_at !== null) texts.push(`last step ${new Date(1000 * line.last_step_at).toLocaleString()}`);
  texts.push(...[line.reason, line.model].filter(Boolean));
  const { problem, axes } = curves.get(line.name) ?? {};
  if (axes && !problem && (axes.step.at(-1) ?? 0) < line.steps) texts.push("reading its steps");
  const parts = [part(line.status, line.status), ...texts.map((text) => part(` · ${text}`))];
  return problem ? [...parts, part(` · ${problem}`, "problem")] : parts;
}

// Samples and settings

function showTable(id, head, rows) {
  const row = (tag, texts) => element("tr", {}, texts.map((textContent) => element(tag, { textContent })));
  const table = byId(id).querySelector("table");
  table.tHead.replaceChildren(row("th", head));
  table.tBodies[0].replaceChildren(...rows.map((texts) => row("td", texts)));
}

function showSamples() {
  const runs = shown().filter((run) => run.samples.length);
  const texts = (run, step) => run.samples.find(([own]) => own === step)?.[1] ?? {};
  const rows = [];
  for (const step of new Set(runs.flatMap((run) => run.samples.map(([own]) => own)).sort((a, b) => b - a))) {
    for (const prompt of new Set(runs.flatMap((run) => Object.keys(texts(run, step))))) {
      rows.push([step, prompt, ...runs.map((run) => texts(run, step)[prompt] ?? "-")]);
    }
  }
  showTable("samples", ["step", "prompt", ...runs.map((run) => run.name)], rows);
  byId("samples").hidden = rows.length === 0;
}

async function loadSettings() {
  const names = selected.filter(Boolean);
  const loaded = await Promise.all(names.map(async (name) => {
    const response = await fetch(`/api/runs/${encodeURIComponent(name)}/settings`).catch(() => null);
    return [name, response?.ok ? await response.json() : {}];
  }));
  if (names.join("\n") !== selected.filter(Boolean).join("\n")) return; // the selection has changed meanwhile
  settings = loaded;
  showSettings();
}

function showSettings() {
  const text = (value = "-") => (typeof value === "string" ? value : JSON.stringify(value));
  const names = [...new Set(settings.flatMap(([, own]) => Object.keys(own)))];
  const rows = names.map((name) => [name, ...settings.map(([, own]) => text(own[name]))]);
  const filtered = byId("differing").checked && settings.length > 1;
  const differing = rows.filter(([, ...values]) => new Set(values).size > 1);
  showTable("settings", ["setting", ...settings.map(([name]) => name)], filtered ? differing : rows);
  byId("settings").hidden = rows.length === 0;
}

// Controls

function setTheme(choice) {
  view.dark = (choice ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = view.dark ? "dark" : "light";
  byId("theme").textContent = view.dark ? "light" : "dark";
  showList();
  updateAll();
}

function setSmoothing() {
  view.smoothing = byId("smoothing").value / 100;
  byId("width").textContent = `${byId("smoothing").value} %`;
  updateAll();
}

const chosenTheme = () => localStorage.getItem("theme");
byId("theme").onclick = () => { localStorage.setItem("theme", view.dark ? "light" : "dark"); setTheme(chosenTheme()); };
byId("smoothing").oninput = setSmoothing;
byId("axis").onchange = () => { view.axis = byId("axis").value; zoom(null); updateAll(); };
byId("reset").onclick = () => zoom(null);
byId("differing").onchange = showSettings;
byId("filter").oninput = showList;
byId("all").onclick = () => choose([...lines.keys()].filter((name) => !items.get(name).hidden).slice(0, MOST_RUNS));
byId("none").onclick = () => choose([]);
matchMedia("(prefers-color-scheme: dark)").onchange = () => setTheme(chosenTheme());
onresize = () => requestAnimationFrame(() => panels.forEach((panel) => panel.resize()));
// On paper all panels are drawn, in light colours, also those that were never scrolled to.
onbeforeprint = () => { setTheme("light"); panels.forEach((panel) => { panel.draw(); panel.resize(640); }); };
onafterprint = () => { setTheme(chosenTheme()); panels.forEach((panel) => panel.resize()); };
setSmoothing();
setTheme(chosenTheme());
listen();
