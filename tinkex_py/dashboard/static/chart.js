// One chart: axes, lines and a legend that shows the values under the pointer. Laid out by the server, drawn by uPlot.
"use strict";

const MOST_POINTS_UNSMOOTHED = 120;
const CHART_HEIGHT = 230;
const BLACK = -1, GREY = -2;
const LOG_RANGE = 1e-4; // a norm that starts near zero would squeeze all others into one line
const MOST_DECADES_RULED = 3;

class Chart {
  // plan: as the server laid it out. look: {palettes, dark, smooth}. curves: Map of run -> {steps, values}.
  constructor(plan, look, curves) {
    this.plan = plan;
    this.look = look;
    this.curves = curves;
    this.visible = false;
    this.stale = true;
    this.plot = null;
    this.element = document.createElement("div");
    this.element.className = "chart";
    this.element.chart = this;
    if (plan.title) {
      const title = document.createElement("h3");
      title.textContent = plan.title;
      this.element.append(title);
    }
    this.place = document.createElement("div");
    this.element.append(this.legend(), this.place);
  }

  legend() {
    const list = document.createElement("ul");
    list.className = "legend";
    const sum = { label: "sum", colour: BLACK, dashed: false };
    this.outputs = [...this.plan.lines, ...(this.plan.stacked ? [sum] : [])].map((line) => {
      const item = document.createElement("li");
      const label = document.createElement("span");
      label.textContent = line.label;
      const output = document.createElement("output");
      item.append(swatch(this.colour(line), line.dashed), label, output);
      list.append(item);
      return output;
    });
    return list;
  }

  colour(line) {
    if (line.colour === BLACK) return this.look.dark ? "#ffffff" : "#000000";
    if (line.colour === GREY) return this.look.dark ? "#a0a0a0" : "#6e6e6e";
    return this.look.palettes[this.look.dark ? "dark" : "light"][line.colour];
  }

  // Called when there are new points; draws now if it can be seen, else when it is.
  update() {
    this.stale = true;
    if (this.visible) this.draw();
  }

  show(visible) {
    this.visible = visible;
    if (visible && this.stale) this.draw();
  }

  resize() {
    if (this.plot && this.place.clientWidth) this.plot.setSize({ width: this.place.clientWidth, height: CHART_HEIGHT });
  }

  destroy() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
  }

  draw() {
    this.stale = false;
    const { data, series, raw } = this.plan.stacked ? this.stack() : this.lines();
    this.raw = raw;
    const shape = JSON.stringify(series.map((one) => [one.stroke, one.width, one.dash]));
    if (this.plot && this.shape === shape) {
      this.plot.setData(data);
    } else {
      this.destroy();
      this.shape = shape;
      this.plot = new uPlot(this.options(series), data, this.place);
    }
    this.tell(null);
  }

  pointsOf(line) {
    const curves = this.curves.get(line.run);
    return curves ? { steps: curves.steps, values: curves.values.get(line.name) || curves.steps.map(() => null) } : { steps: [], values: [] };
  }

  lines() {
    const log = this.plan.scale === "log";
    const measured = [], tables = [], series = [{}];
    this.plan.lines.forEach((line) => {
      const { steps, values } = this.pointsOf(line);
      const known = log ? values.map((value) => (value > 0 ? value : null)) : values;
      const shown = this.plan.sparse ? known.map((value) => value ?? undefined) : known; // lines go on over undefined
      const average = this.look.smooth && this.plan.noisy && values.length > MOST_POINTS_UNSMOOTHED;
      const stroke = this.colour(line);
      measured.push([steps, values]); // for the legend, which tells no averages
      if (average) {
        tables.push([steps, shown]);
        series.push({ stroke: stroke + "55", width: 0.7, points: { show: false } });
      }
      tables.push([steps, average ? Numbers.smoothed(shown, log) : shown]);
      series.push({
        stroke,
        width: line.colour === BLACK ? 2 : 1.5,
        dash: line.dashed ? [6, 4] : undefined,
        points: this.plan.sparse ? { show: true, size: 5, fill: stroke } : { size: 5, fill: stroke, filter: onlyAlone },
      });
    });
    // On one x axis. `undefined` is "no point of this run", which does not interrupt a line as null does.
    const data = uPlot.join(tables);
    return { data, series, raw: uPlot.join(measured).slice(1) };
  }

  // Areas on top of each other: the highest is drawn first and each lower one over it, so that every strip shows.
  stack() {
    const { steps } = this.pointsOf(this.plan.lines[0]);
    const above = steps.map(() => 0), below = steps.map(() => 0);
    const upper = [], lower = [], raw = [];
    const average = this.look.smooth && steps.length > MOST_POINTS_UNSMOOTHED;
    for (const line of this.plan.lines) {
      const { values } = this.pointsOf(line);
      const shown = average ? Numbers.smoothed(values) : values;
      shown.forEach((value, place) => {
        if (value > 0) above[place] += value;
        else below[place] += value || 0;
      });
      raw.push(values);
      const looks = { stroke: this.colour(line), fill: this.fill(line), width: 0.5, points: { show: steps.length === 1 } };
      upper.unshift([above.slice(), looks]);
      if (shown.some((value) => value < 0)) lower.unshift([below.slice(), looks]);
    }
    const total = above.map((value, place) => value + below[place]);
    raw.push(steps.map((_, place) => raw.reduce((sum, values) => sum + (values[place] || 0), 0)));
    const sum = { stroke: this.look.dark ? "#ffffff" : "#000000", width: 1, points: { show: steps.length === 1 } };
    const areas = [...upper, ...lower];
    return {
      data: [steps, ...areas.map(([values]) => values), total],
      series: [{}, ...areas.map(([, looks]) => looks), sum],
      raw,
    };
  }

  fill(line) {
    const colour = this.colour(line);
    if (!line.dashed) return colour;
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const brush = tile.getContext("2d");
    brush.fillStyle = colour;
    brush.fillRect(0, 0, 8, 8);
    brush.strokeStyle = this.look.dark ? "#000000" : "#ffffff";
    brush.beginPath();
    for (const shift of [-8, 0, 8]) {
      brush.moveTo(shift, 8);
      brush.lineTo(shift + 8, 0);
    }
    brush.stroke();
    return brush.createPattern(tile, "repeat");
  }

  options(series) {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--soft"), grid = style.getPropertyValue("--grid");
    const ruled = { stroke: grid, width: 1 };
    const axis = { stroke: ink, grid: ruled, ticks: ruled };
    const log = this.plan.scale === "log";
    const rows = log ? { ...ruled, filter: fewerRows } : ruled;
    return {
      width: this.place.clientWidth,
      height: CHART_HEIGHT,
      legend: { show: false },
      cursor: { sync: { key: "steps" }, points: { show: false } },
      scales: {
        x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: log ? { distr: 3, range: logRange } : { range: this.plan.limits ? () => this.plan.limits : linearRange(this.plan.stacked) },
      },
      axes: [
        { ...axis, label: "step", labelSize: 18, size: 34, labelFont: "12px system-ui", incrs: wholeIncrements() },
        { ...axis, grid: rows, ticks: rows, label: this.plan.axis, labelSize: 18, size: 66, labelFont: "12px system-ui", values: (_, splits) => splits.map((value) => (value === null ? "" : tick(value))) },
      ],
      series,
      hooks: { setCursor: [(plot) => this.tell(plot.cursor.idx ?? null)] },
    };
  }

  // Shows the values at a place of the x axis, or the last ones.
  tell(place) {
    this.outputs.forEach((output, number) => {
      const values = this.raw[number] || [];
      let value = place === null ? undefined : values[place];
      if (place === null) value = values.findLast((one) => one !== null && one !== undefined);
      output.textContent = Numbers.short(value);
    });
  }
}

function swatch(colour, dashed) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("width", "18");
  picture.setAttribute("height", "6");
  picture.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(space, "line");
  for (const [name, value] of Object.entries({ x1: 0, x2: 18, y1: 3, y2: 3, stroke: colour, "stroke-width": 3 })) line.setAttribute(name, value);
  if (dashed) line.setAttribute("stroke-dasharray", "5 3");
  picture.append(line);
  return picture;
}

// Points that a line does not show: those between missing ones.
function onlyAlone(plot, number, show) {
  if (show) return null;
  const values = plot.data[number];
  const known = (place) => values[place] !== null && values[place] !== undefined;
  const alone = [];
  for (let place = 0; place < values.length; place++) {
    if (!known(place)) continue;
    let before = place - 1, after = place + 1;
    while (before >= 0 && values[before] === undefined) before--;
    while (after < values.length && values[after] === undefined) after++;
    if (!known(before) && !known(after)) alone.push(place);
  }
  return alone.length ? alone : [];
}

function logRange(_, low, high) {
  if (!(high > 0)) return [0.1, 1];
  const lowest = Math.max(low > 0 ? low : 0, high * LOG_RANGE);
  const below = 10 ** Math.floor(Math.log10(lowest)), above = 10 ** Math.floor(Math.log10(high));
  const begin = [5, 2, 1].find((times) => times * below <= lowest) || 1;
  const end = [1, 2, 5, 10].find((times) => times * above > high * 1.001) || 10;
  return [begin * below, end * above];
}

// On a log axis over many decades, only whole decades are ruled.
function fewerRows(_, splits) {
  if (splits.at(-1) / splits[0] < 10 ** MOST_DECADES_RULED) return splits;
  return splits.map((value) => (Math.abs(Math.log10(value) % 1) < 1e-6 || Math.abs(Math.abs(Math.log10(value) % 1) - 1) < 1e-6 ? value : null));
}

function linearRange(withZero) {
  return (_, low, high) => {
    if (low === null || low === undefined || high === null || high === undefined) return [0, 1];
    if (withZero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    const largest = Math.max(Math.abs(low), Math.abs(high));
    // A constant that rounding moves would otherwise fill the axis with its last digits.
    const room = high - low < largest * 1e-6 ? largest / 10 || 1 : (high - low) * 0.06;
    return [low - room, high + room];
  };
}

function tick(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(0).replace("e-", "e−").replace("e+", "e");
  return Number(value.toPrecision(6)).toString();
}

function wholeIncrements() {
  const steps = [];
  for (let power = 1; power <= 1e9; power *= 10) steps.push(power, 2 * power, 5 * power);
  return steps;
}
