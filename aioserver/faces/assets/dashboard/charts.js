// The charts of the last minutes. uPlot draws the lines; the headings, values and colours are of this page.
import { setText } from "/assets/dashboard/binding.js";
import { count, rate, seconds } from "/assets/dashboard/numbers.js";

const CHARTS = [
  { title: "Connections", format: count, floor: 4, limit: (stats) => stats.connections.limit,
    lines: [["active", "active", "accent"], ["waiting", "waiting", "warning"]] },
  { title: "First token", format: seconds, floor: 0.1,
    lines: [["first_token_p50", "p50", "accent"], ["first_token_p95", "p95", "accent"]] },
  { title: "Rejections a second", format: rate, floor: 2, lines: [["rejected_per_second", "rejected", "bad"]] },
  { title: "Tokens a second", format: count, floor: 10, lines: [["tokens_per_second", "tokens", "accent"]] },
  { title: "Requests a second", format: rate, floor: 2, lines: [["requests_per_second", "requests", "accent"]] },
  { title: "Event loop delay", format: seconds, floor: 0.02, lines: [["lag_max", "highest", "neutral"]] },
];
const clock = new Intl.DateTimeFormat("en", { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const exact = new Intl.DateTimeFormat("en", { timeStyle: "medium", hourCycle: "h23" });

export class Charts {
  #charts;
  #history;

  constructor(box, history) {
    this.#history = history;
    this.#charts = CHARTS.map((definition) => new Chart(box, definition, history));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#charts.forEach((chart) => chart.build()));
    new ResizeObserver(() => this.#charts.forEach((chart) => chart.fit())).observe(box);
  }

  update(stats) {
    setText(document.getElementById("history-title"), `The last ${this.#history.span / 60} minutes`);
    for (const chart of this.#charts) chart.update(stats);
  }
}

class Chart {
  #definition;
  #history;
  #place;
  #values;
  #plot;
  #end = 0;
  #limit = 0;
  #rem = 0; // pixels; every length in a chart is a multiple of the root's font size

  constructor(box, definition, history) {
    this.#definition = definition;
    this.#history = history;
    const figure = box.appendChild(document.createElement("figure"));
    const head = figure.appendChild(document.createElement("figcaption"));
    head.appendChild(document.createElement("h3")).textContent = definition.title;
    this.#values = definition.lines.map(([, label, colour], nth) => legend(head, label, colour, nth));
    this.#place = figure.appendChild(document.createElement("div"));
    this.#place.setAttribute("role", "img");
    this.build();
  }

  build() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const rem = (this.#rem = parseFloat(style.fontSize));
    const font = `${Math.round(rem * 0.75)}px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: colour("muted"), font, ticks: { show: false }, grid: { stroke: colour("border"), width: 1 } };
    const { lines, format } = this.#definition;
    this.#plot?.destroy();
    this.#plot = new uPlot({
      ...this.#size(),
      legend: { show: false },
      padding: [rem * 0.5, rem * 1.25, 0, 0],
      cursor: { sync: { key: "minutes" }, y: false, drag: { x: false, y: false } },
      scales: { x: { range: () => [this.#end - this.#history.span, this.#end] }, y: { range: (_plot, _low, high) => this.#range(high) } },
      axes: [
        { ...axis, grid: { show: false }, size: rem * 1.75, space: rem * 4, incrs: [60, 120, 300], values: (_plot, at) => this.#clock(at) },
        { ...axis, size: rem * 3.25, space: rem * 2.25, values: (_plot, at) => at.map(format) },
      ],
      series: [{}, ...lines.map(([, , tone], nth) => ({
        stroke: colour(tone),
        width: rem / 9,
        dash: nth ? [rem / 3, rem / 4] : undefined,
        fill: nth === 0 && tone === "accent" ? colour("accent-soft") : undefined,
        points: { show: false },
      }))],
      hooks: { draw: [(plot) => this.#drawLimit(plot, colour("muted"), font)], setCursor: [() => this.#showValues()] },
    }, this.#data(), this.#place);
  }

  /** The labels of the time axis. There is none at the left end, where it would touch the other axis. */
  #clock(times) {
    return times.map((time) => (time < this.#end - 0.95 * this.#history.span ? "" : clock.format(time * 1000)));
  }

  fit() {
    if (parseFloat(getComputedStyle(document.documentElement).fontSize) !== this.#rem) this.build();
    const size = this.#size();
    if (size.width !== this.#plot.width || size.height !== this.#plot.height) this.#plot.setSize(size);
  }

  update(stats) {
    this.#end = this.#history.times.at(-1) ?? stats.time;
    this.#limit = this.#definition.limit?.(stats) ?? 0;
    this.#plot.setData(this.#data());
    this.#showValues();
    this.#describe();
  }

  #size() {
    const box = this.#place.getBoundingClientRect();
    return { width: Math.max(100, Math.floor(box.width)), height: Math.max(80, Math.floor(box.height)) };
  }

  #data() {
    return [this.#history.times, ...this.#definition.lines.map(([name]) => this.#history.server[name])];
  }

  /** The range of the axis: it starts at zero, and includes the limit once half of it is used. */
  #range(high) {
    const top = Math.max(this.#definition.floor, (high ?? 0) * 1.1);
    return [0, this.#limit && top >= this.#limit / 2 ? Math.max(top, this.#limit * 1.1) : top];
  }

  #drawLimit(plot, colour, font) {
    if (!this.#limit || this.#limit > plot.scales.y.max) return;
    const { left, width } = plot.bbox;
    const y = Math.round(plot.valToPos(this.#limit, "y", true)) + 0.5;
    const { ctx } = plot;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour;
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(left, y);
    ctx.lineTo(left + width, y);
    ctx.stroke();
    ctx.font = font.replace(/^\d+/, (size) => size * devicePixelRatio);
    ctx.textAlign = "left";
    ctx.textBaseline = "bottom";
    ctx.fillText("limit", left + 4 * devicePixelRatio, y - 2 * devicePixelRatio);
    ctx.restore();
  }

  /** Show the values under the pointer, otherwise the newest. */
  #showValues() {
    const at = this.#plot?.cursor.idx ?? this.#history.times.length - 1;
    const time = this.#plot?.cursor.idx == null ? "" : exact.format(this.#history.times[at] * 1000);
    this.#place.dataset.time = time;
    this.#definition.lines.forEach(([name], nth) => setText(this.#values[nth], this.#definition.format(this.#history.server[name][at])));
  }

  #describe() {
    const parts = this.#definition.lines.map(([name, label]) => {
      const column = this.#history.server[name];
      const highest = column.reduce((a, b) => (b > a ? b : a), 0);
      return `${label} now ${this.#definition.format(column.at(-1))}, highest ${this.#definition.format(highest)}`;
    });
    this.#place.setAttribute("aria-label", `${this.#definition.title} over ${this.#history.span / 60} minutes: ${parts.join("; ")}`);
  }
}

function legend(head, label, colour, nth) {
  const item = head.appendChild(document.createElement("span"));
  item.className = "legend";
  const swatch = item.appendChild(document.createElement("i"));
  swatch.className = nth ? "dashed" : "";
  swatch.dataset.tone = colour;
  item.append(`${label} `);
  return item.appendChild(document.createElement("b"));
}
