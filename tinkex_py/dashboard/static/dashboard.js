// Ties the parts together: one stream of events, the list of runs, the pictures.
"use strict";

const AGO_AGAIN = 5000; // milliseconds

const curves = new Map(); // run -> {steps, values: Map of name -> array, problem}
const look = { palettes: { light: [], dark: [] }, dark: false, smooth: true };
let charts = [];
let pictures = [];
let stream = null;
let drawing = false;
const stale = new Set();

const runs = new RunList(document.getElementById("runs"), () => listen());
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.target.chart.show(entry.isIntersecting);
}, { rootMargin: "200px" });

function listen() {
  if (stream) stream.close();
  const query = new URLSearchParams();
  for (const name of runs.selected) query.append("run", name);
  history.replaceState(null, "", runs.chosen && runs.selected.length ? `?${query}` : location.pathname);
  stream = new EventSource(`/api/events?${query}`);
  let fresh = true; // after every (re)connection the server tells everything again
  stream.addEventListener("open", () => { fresh = true; connection("live", "live"); });
  stream.addEventListener("error", () => connection("lost", "connection lost, trying again"));
  stream.addEventListener("runs", (event) => {
    if (fresh) runs.reset();
    fresh = false;
    runs.update(JSON.parse(event.data));
  });
  stream.addEventListener("charts", (event) => lay(JSON.parse(event.data)));
  stream.addEventListener("curves", (event) => take(JSON.parse(event.data)));
  showSettings();
}

function connection(state, text) {
  const element = document.getElementById("connection");
  element.dataset.state = state;
  element.textContent = text;
}

// Points of one run replace all from point `from` on.
function take({ run, from, steps, values, problem }) {
  const known = curves.get(run) || { steps: [], values: new Map() };
  known.problem = problem;
  for (const [name, points] of Object.entries(values)) {
    const before = (known.values.get(name) || []).slice(0, from);
    while (before.length < from) before.push(null);
    known.values.set(name, before.concat(points));
  }
  known.steps = known.steps.slice(0, from).concat(steps);
  curves.set(run, known);
  for (const chart of charts) if (chart.plan.lines.some((line) => line.run === run)) stale.add(chart);
  drawSoon();
}

function drawSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    for (const chart of stale) chart.update();
    stale.clear();
    document.body.dataset.drawn = String(Number(document.body.dataset.drawn || 0) + 1);
  });
}

function lay({ pictures: laidOut, palettes }) {
  pictures = laidOut;
  look.palettes = palettes;
  curves.clear(); // the server tells all points again
  rebuild();
}

function rebuild() {
  for (const chart of charts) { seen.unobserve(chart.element); chart.destroy(); }
  charts = [];
  stale.clear();
  look.dark = document.documentElement.dataset.theme === "dark";
  runs.palette = look.palettes[look.dark ? "dark" : "light"];
  runs.render();
  const anyRun = runs.names().length > 0;
  document.getElementById("hint").hidden = anyRun || runs.lines.size === 0;
  const place = document.getElementById("pictures");
  place.replaceChildren(...(anyRun ? pictures.map(section) : []));
  for (const chart of charts) seen.observe(chart.element);
}

function section(picture) {
  const element = document.createElement("section");
  element.id = picture.key;
  const title = document.createElement("h2");
  title.textContent = picture.title;
  const caption = document.createElement("p");
  caption.className = "caption";
  caption.textContent = picture.caption;
  const grid = document.createElement("div");
  grid.className = "grid";
  grid.style.gridTemplateColumns = `repeat(${picture.columns}, minmax(0, 1fr))`;
  for (const plan of picture.charts) {
    const chart = new Chart(plan, look, curves);
    charts.push(chart);
    grid.append(chart.element);
  }
  element.append(title, caption, grid);
  return element;
}

async function showSettings() {
  const names = runs.selected.filter(Boolean);
  const answers = await Promise.all(names.map(async (name) => {
    const answer = await fetch(`/api/runs/${encodeURIComponent(name)}/settings`).catch(() => null);
    return answer && answer.ok ? answer.json() : {};
  }));
  if (names.join("\n") !== runs.selected.filter(Boolean).join("\n")) return; // another selection came in between
  const settings = [...new Set(answers.flatMap((answer) => Object.keys(answer)))];
  const table = document.querySelector("#settings table");
  table.tHead.replaceChildren(row("th", ["setting", ...names]));
  table.tBodies[0].replaceChildren(...settings.map((setting) => row("td", [setting, ...answers.map((answer) => written(answer[setting]))])));
  document.getElementById("settings").hidden = settings.length === 0;
}

function row(kind, texts) {
  const element = document.createElement("tr");
  for (const text of texts) {
    const cell = document.createElement(kind);
    cell.textContent = text;
    element.append(cell);
  }
  return element;
}

function written(setting) {
  if (setting === undefined) return "-";
  return typeof setting === "string" ? setting : JSON.stringify(setting);
}

function setTheme(choice) {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = choice || system;
  document.getElementById("theme").textContent = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  rebuild();
  for (const chart of charts) chart.update();
}

document.getElementById("theme").addEventListener("click", () => {
  const choice = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", choice);
  setTheme(choice);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(localStorage.getItem("theme")));
document.getElementById("smooth").addEventListener("change", (event) => {
  look.smooth = event.target.checked;
  for (const chart of charts) chart.update();
});
document.getElementById("filter").addEventListener("input", (event) => {
  runs.filter = event.target.value.toLowerCase();
  runs.render();
});
let resizing = false;
addEventListener("resize", () => {
  if (resizing) return;
  resizing = true;
  requestAnimationFrame(() => { resizing = false; for (const chart of charts) chart.resize(); });
});
setInterval(() => runs.render(), AGO_AGAIN);
setTheme(localStorage.getItem("theme"));
listen();
