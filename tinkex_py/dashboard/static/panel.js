// The charts: which curves they show, and one panel of them drawn by uPlot.

const HEIGHT = 230;
const COLOURS = {
  // M. Okabe and K. Ito, "Color Universal Design"; the yellow is darker on white.
  light: ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B5A000"],
  dark: ["#4BA3DB", "#E69F00", "#1DBF94", "#F07830", "#8CCEF5", "#DE9CC1", "#F0E442"],
};
// On the canvas, and as a border in legends and lists.
const DASHES = [[[], "solid"], [[6, 4], "dashed"], [[2, 3], "dotted"], [[9, 3, 2, 3], "double"]];
const LOG_RANGE = 1e-5; // a norm that starts near zero would squeeze the other curves into one line
const STEPS = [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8].flatMap((power) => [power, 2 * power, 5 * power]); // of the x axis
const TIMES = [["days", 86400], ["hours", 3600], ["minutes", 60], ["seconds", 1]];

export const MOST_RUNS = COLOURS.light.length * DASHES.length;

const chart = (key, title, unit, names, options = {}) => ({ key, title, unit, names, ...options });
const term = (measure) => new RegExp(`^term/[^]+/${measure}$`);
const NORMS = /^grad_norm\/|^term\/[^]+\/grad_norm_weighted$/;
// `names` are those of tinkex_py.runs.scalars; the curves of a `separate` chart have different units.
export const CHARTS = [
  chart("losses", "Losses", "loss", /^loss\/(total|base)$/),
  chart("rollouts", "Rollouts", "value", /^rollout\//, { separate: true }),
  chart("evaluation", "Evaluation", "value", /^evaluation\//, { separate: true }),
  chart("contributions", "Contributions", "weight x value", term("contribution")),
  chart("gradient_norms", "Gradient norms", "L2 norm", NORMS, { log: true }),
  chart("shares", "Shares of the total gradient", "share", term("share_of_total")),
  chart("cosines_with_base", "Cosines with the base loss", "cosine", term("cosine_with_base")),
  chart("cosines_with_total", "Cosines with the total", "cosine", term("cosine_with_total")),
  chart("weights", "Weights", "weight", term("weight")),
  chart("violations", "Violations of bounds", "violation", term("violation"), { separate: true }),
  chart("optimizer", "Optimizer", "value", /^optimizer\//, { separate: true }),
  chart("times", "Step time", "seconds", /^time\//),
];

export function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function looks(place, dark) {
  const colours = COLOURS[dark ? "dark" : "light"];
  const [dash, border] = DASHES[Math.floor(place / colours.length) % DASHES.length];
  return { stroke: colours[place % colours.length], dash, border, width: 1.5 };
}

// Spreadsheets take a text that begins with one of these characters for a formula; an apostrophe makes it a text again.
const csvCell = (text) => `"${/^[\s=+@＝＋－＠-]/.test(text) ? "'" : ""}${text.replaceAll('"', '""')}"`;

export const short = (value) => (value == null ? "" : String(Number(value.toPrecision(5))));

// Of one run, all curves share a panel and each term has a colour. Of several runs, each curve has a panel and each
// run has a colour.
export function panelsOf(chart, runs) {
  const several = runs.length > 1;
  const names = [...new Set(runs.flatMap((run) => [...run.values.keys()]))].filter((name) => chart.names.test(name));
  const line = (run, name) => (several
    ? { run, name, label: run.name, place: run.place }
    : { run, name, label: labelOf(name), place: termPlace(run, name) });
  const lines = (name) => runs.filter((run) => run.values.has(name)).map((run) => line(run, name));
  if (several || chart.separate) return names.map((name) => ({ title: labelOf(name), lines: lines(name) }));
  return names.length ? [{ title: "", lines: names.flatMap(lines) }] : [];
}

function labelOf(name) {
  const end = name.startsWith("term/") ? name.lastIndexOf("/") : name.length;
  const label = name.slice(name.indexOf("/") + 1, end);
  return { base_loss: "base loss", base: "base loss", queue: "in the queue" }[label] ?? label;
}

function termPlace(run, name) {
  const label = labelOf(name);
  if (label === "base loss" || label === "in the queue") return "soft";
  const terms = [...run.values.keys()].filter((other) => other.endsWith("/weight")).map(labelOf);
  return name.startsWith("term/") ? terms.indexOf(label) : "ink";
}

// A centred moving average over a part of the points, and over fewer towards the ends; null is ignored.
function smoothed(values, part) {
  const sums = [0], counts = [0], widest = Math.round((part * values.length) / 2);
  values.forEach((value, place) => {
    sums.push(sums[place] + (value ?? 0));
    counts.push(counts[place] + (value === null ? 0 : 1));
  });
  return values.map((_, place) => {
    const reach = Math.min(widest, place, values.length - 1 - place);
    const count = counts[place + reach + 1] - counts[place - reach];
    return count ? (sums[place + reach + 1] - sums[place - reach]) / count : null;
  });
}

// The value at an index, or the nearest one between two known ones: runs have points at different steps.
function near(values, index) {
  let before = index, after = index;
  while (before >= 0 && values[before] == null) before--;
  while (after < values.length && values[after] == null) after++;
  if (before < 0 || after === values.length) return null;
  return values[index - before <= after - index ? before : after];
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);

export class Panel {
  // view: {axis, smoothing, zoom, dark, onZoom}, shared by all panels.
  constructor(chart, { title, lines }, view) {
    const state = { log: Boolean(chart.log), hidden: new Set(), visible: false, stale: true, plot: null };
    Object.assign(this, { chart, title, lines, view, ...state });
    const button = (textContent, onclick) => element("button", { type: "button", textContent, onclick });
    this.logButton = button("log", () => { this.log = !this.log; this.draw(); });
    this.place = element("div");
    const caption = element("figcaption", {}, [
      element("h3", { textContent: title }),
      this.logButton,
      button("CSV", () => this.download("csv", new Blob([this.csv()], { type: "text/csv" }))),
      button("PNG", () => this.canvas().toBlob((blob) => this.download("png", blob))),
    ]);
    this.element = element("figure", { className: "chart", panel: this }, [caption, this.place]);
  }

  update() {
    this.stale = true;
    if (this.visible) this.draw();
  }

  show(visible) {
    this.visible = visible;
    if (visible && this.stale) this.draw();
  }

  resize(width = this.place.clientWidth) {
    if (this.plot && width) this.plot.setSize({ width, height: HEIGHT });
  }

  destroy() {
    this.plot?.destroy();
    this.plot = null;
  }

  zoom() {
    if (!this.visible) this.stale = true;
    else this.plot?.setData(this.plot.data); // reads the range of the x axis again
  }

  draw() {
    this.stale = false;
    const { axis, smoothing, dark } = this.view;
    const last = Math.max(0, ...this.lines.map(({ run }) => run.axes[axis].at(-1) ?? 0));
    const times = TIMES.find(([, seconds]) => last >= 2 * seconds) ?? TIMES.at(-1);
    const [unit, size] = axis === "seconds" ? times : [axis, 1];
    const joined = (change) => uPlot.join(this.lines.map(({ run, name }) => {
      const values = run.values.get(name).map((value) => (this.log && !(value > 0) ? null : value));
      return [run.axes[axis].map((position) => position / size), change(values)];
    }));
    const isSmoothed = smoothing > 0 && !this.chart.separate;
    this.averages = isSmoothed ? joined((values) => smoothed(values, smoothing)) : null;
    const data = joined((values) => values), shape = JSON.stringify([unit, isSmoothed, this.log, dark]);
    if (this.plot && this.shape === shape) {
      this.plot.setData(data);
      return;
    }
    this.destroy();
    this.shape = shape;
    this.logButton.ariaPressed = String(this.log);
    this.plot = new uPlot(this.options(unit), data, this.place);
  }

  options(unit) {
    const rule = { stroke: css("grid"), width: 1 };
    const axis = { stroke: css("soft"), grid: rule, ticks: rule, labelSize: 18, labelFont: "12px system-ui" };
    const values = (_, splits) => splits.map(short);
    const widest = (_, texts) => 20 + 7 * Math.max(3, ...(texts ?? []).map((text) => text.length));
    const range = (_, low, high) => this.view.zoom ?? (low === high ? [low - 1, high + 1] : [low, high]);
    const logRange = (_, low, high) => (
      high > 0 ? uPlot.rangeLog(Math.max(low, high * LOG_RANGE), high, 10, true) : [0.1, 1]
    );
    const follows = (type) => type === "mousemove" || type === "mouseleave";
    return {
      width: this.place.clientWidth,
      height: HEIGHT,
      scales: { x: { time: false, range }, y: this.log ? { distr: 3, range: logRange } : {} },
      axes: [{ ...axis, values, label: unit, size: 34, incrs: STEPS }, { ...axis, values, label: this.chart.unit, size: widest }],
      series: [
        { label: unit, value: (_, x) => (x === null ? "last" : short(x)) },
        ...this.lines.map((line, number) => this.series(line, number + 1)),
      ],
      legend: { markers: {
        dash: (_, number) => this.looks(number).border,
        stroke: (_, number) => this.looks(number).stroke,
      } },
      cursor: {
        sync: { key: "charts", filters: { pub: follows, sub: follows } },
        points: { show: false },
        drag: { setScale: false, x: true, y: false },
        bind: { dblclick: () => () => this.view.onZoom(null) },
      },
      hooks: {
        drawSeries: [(plot, number) => this.drawAverage(plot, number)],
        setSelect: [(plot) => this.select(plot)],
        setSeries: [(_, number, { show }) => {
          if (show !== undefined) this.hidden[show ? "delete" : "add"](this.lines[number - 1].label);
        }],
      },
    };
  }

  looks(number) {
    const { place } = this.lines[number - 1];
    if (place === "ink") return { stroke: css("ink"), dash: [], border: "solid", width: 2 };
    if (place === "soft") return { stroke: css("soft"), dash: [6, 4], border: "dashed", width: 1.5 };
    return looks(place, this.view.dark);
  }

  // The measured values, pale if there is an average. The legend shows the values at the pointer, else the last ones.
  series({ label }, number) {
    const { stroke, dash, width } = this.looks(number);
    const value = ({ data, cursor: { idx } }) => (
      short(idx == null ? data[number].findLast((one) => one != null) : near(data[number], idx))
    );
    const line = { label, value, spanGaps: true, show: !this.hidden.has(label) };
    if (this.averages) return { ...line, stroke: `${stroke}55`, width: 0.7, points: { show: false } };
    const points = { size: 5, fill: stroke, ...(this.chart.separate ? { show: true } : {}) };
    return { ...line, stroke, dash, width, points };
  }

  drawAverage(plot, number) {
    if (!this.averages) return;
    const { ctx, bbox, data: [positions] } = plot, { stroke, dash, width } = this.looks(number);
    const line = new Path2D();
    this.averages[number].forEach((value, place) => {
      if (value != null) line.lineTo(plot.valToPos(positions[place], "x", true), plot.valToPos(value, "y", true));
    });
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.strokeStyle = stroke;
    ctx.lineWidth = width * devicePixelRatio;
    ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
    ctx.stroke(line);
    ctx.restore();
  }

  select(plot) {
    const { left, width } = plot.select;
    if (!width) return;
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.view.onZoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
  }

  csv() {
    const { axis } = this.view;
    const shown = this.lines.filter(({ label }) => !this.hidden.has(label));
    const tables = shown.map(({ run, name }) => [run.axes[axis], run.values.get(name)]);
    const [x, ...columns] = tables.length ? uPlot.join(tables) : [[]];
    const head = [axis, ...shown.map(({ label }) => label)].map(csvCell);
    const rows = x.map((at, place) => [at, ...columns.map((values) => values[place] ?? "")]);
    return [head, ...rows].map((row) => `${row.join(",")}\n`).join("");
  }

  // The plot below its title and legend, which are not on the canvas of uPlot.
  canvas() {
    const plot = this.plot.ctx.canvas, line = 18;
    const shown = this.lines.map(({ label }, at) => ({ label, ...this.looks(at + 1) }))
      .filter(({ label }) => !this.hidden.has(label));
    const above = devicePixelRatio * line * (shown.length + 1.5);
    const canvas = element("canvas", { width: plot.width, height: plot.height + above });
    const brush = canvas.getContext("2d");
    brush.fillStyle = css("ground");
    brush.fillRect(0, 0, canvas.width, canvas.height);
    brush.drawImage(plot, 0, above);
    brush.scale(devicePixelRatio, devicePixelRatio);
    brush.font = "13px system-ui";
    brush.fillStyle = css("ink");
    brush.fillText([this.chart.title, this.title].filter(Boolean).join(": "), 10, line);
    shown.forEach(({ label, stroke, dash }, row) => {
      const y = line * (row + 2);
      brush.strokeStyle = stroke;
      brush.lineWidth = 2;
      brush.setLineDash(dash);
      brush.stroke(new Path2D(`M10 ${y - 4}H38`));
      brush.fillText(label, 45, y);
    });
    return canvas;
  }

  download(extension, blob) {
    const href = URL.createObjectURL(blob);
    const name = [this.chart.key, this.title].filter(Boolean).join("-");
    element("a", { href, download: `${name.replace(/[\p{C}/\\]/gu, "_")}.${extension}` }).click();
    URL.revokeObjectURL(href);
  }
}
