// The list of runs at the side, and which of them are selected. The place of a selected run is its colour.
"use strict";

const MOST_SELECTED = 7;

class RunList {
  constructor(element, onChange) {
    this.element = element;
    this.onChange = onChange;
    this.lines = new Map();
    this.items = new Map();
    this.selected = new URLSearchParams(location.search).getAll("run").slice(0, MOST_SELECTED);
    this.chosen = this.selected.length > 0;
    this.filter = "";
    this.palette = [];
  }

  // The selected names without the gaps.
  names() {
    return this.selected.filter((name) => name && this.lines.has(name));
  }

  update({ changed, gone }) {
    for (const line of changed) this.lines.set(line.name, line);
    for (const name of gone) this.lines.delete(name);
    if (!this.chosen && !this.selected.length && this.lines.size) {
      this.selected = [this.newest()];
      this.onChange();
    }
    this.render();
  }

  reset() {
    this.lines.clear();
  }

  newest() {
    const order = (line) => [line.status === "running" ? 1 : 0, line.started_at];
    return [...this.lines.values()].sort((a, b) => order(b)[0] - order(a)[0] || order(b)[1] - order(a)[1])[0].name;
  }

  toggle(name, wanted) {
    this.chosen = true;
    this.selected = this.selected.map((one) => (one && !this.lines.has(one) ? "" : one));
    if (wanted) {
      const gap = this.selected.indexOf("");
      if (gap >= 0) this.selected[gap] = name;
      else if (this.selected.length < MOST_SELECTED) this.selected.push(name);
    } else {
      this.selected = this.selected.map((one) => (one === name ? "" : one));
      while (this.selected.length && !this.selected.at(-1)) this.selected.pop();
    }
    this.onChange();
    this.render();
  }

  render() {
    const sorted = [...this.lines.values()].sort((a, b) => b.started_at - a.started_at || a.name.localeCompare(b.name));
    const full = this.names().length >= MOST_SELECTED;
    const several = this.names().length > 1;
    for (const name of [...this.items.keys()]) {
      if (!this.lines.has(name)) {
        this.items.get(name).remove();
        this.items.delete(name);
      }
    }
    sorted.forEach((line, place) => {
      const item = this.items.get(line.name) || this.makeItem(line.name);
      this.fillItem(item, line, full, several);
      if (this.element.children[place] !== item) this.element.insertBefore(item, this.element.children[place] || null);
    });
    document.getElementById("none").hidden = this.lines.size > 0;
  }

  makeItem(name) {
    const item = document.createElement("li");
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.addEventListener("change", () => this.toggle(name, box.checked));
    const title = document.createElement("span");
    title.className = "name";
    const about = document.createElement("span");
    about.className = "about";
    label.append(box, title, about);
    item.append(label);
    this.items.set(name, item);
    return item;
  }

  fillItem(item, line, full, several) {
    const box = item.querySelector("input");
    const place = this.selected.indexOf(line.name);
    box.checked = place >= 0;
    box.disabled = full && place < 0;
    item.hidden = !line.name.toLowerCase().includes(this.filter);
    const title = item.querySelector(".name");
    title.textContent = line.name;
    if (several && place >= 0 && this.palette[place]) title.prepend(swatch(this.palette[place], false), " ");
    item.querySelector(".about").replaceChildren(...aboutRun(line));
  }
}

function aboutRun(line) {
  if (line.problem) return [part(line.problem, "problem")];
  const parts = [part(line.status, line.status), ` · ${line.steps}${line.total_steps === null ? "" : ` of ${line.total_steps}`} steps`];
  if (line.loss_total !== null) parts.push(` · loss ${Numbers.short(line.loss_total)}`);
  if (line.status === "running" && line.last_step_at !== null) parts.push(` · last step ${Numbers.ago(line.last_step_at)}`);
  if (line.reason) parts.push(` · ${line.reason}`);
  if (line.model) parts.push(` · ${line.model}`);
  return parts;
}

function part(text, kind) {
  const element = document.createElement("span");
  element.className = kind;
  element.textContent = text;
  return element;
}
