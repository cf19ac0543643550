"use strict";
const { runs } = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main"), tip = document.getElementById("tip");
const state = { axis: "step", smooth: 0, shown: runs.map(() => true), zoom: null };
const charts = [], heats = [];
const COLORS = 8;
const AXES = { step: "steps", tokens: "tokens", hours: "hours" };

// -- small helpers

function el(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}
const color = (i) => `var(--c${i % COLORS})`;
const dash = (i) => (i < COLORS ? null : i < 2 * COLORS ? "6 3" : "2 3");
const dot = (i) => el("i", { class: "dot", style: `background:${color(i)}` });
const last = (values) => { for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null) return values[i]; return null; };
const best = (values) => { const there = values.filter((v) => v !== null); return there.length ? there.reduce((a, b) => Math.min(a, b)) : null; };
function median(values) {
  const sorted = values.filter((v) => v !== null).sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : null;
}

function short(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e15 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return +(value / (name === "k" ? 1e3 : unit)).toPrecision(3) + name;
  return Number.isInteger(value) ? String(value) : String(+value.toPrecision(4));
}
function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 120) return `${+seconds.toPrecision(3)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

// Where a step stands on the chosen x axis, between the lines that say.
function place(run, step) {
  if (state.axis === "step") return step;
  const { step: steps, [state.axis]: values } = run.axes;
  if (!steps.length) return null;
  let low = 0, high = steps.length - 1;
  if (step <= steps[0]) return values[0];
  if (step >= steps[high]) return values[high];
  while (high - low > 1) { const mid = (low + high) >> 1; if (steps[mid] <= step) low = mid; else high = mid; }
  return values[low] + ((step - steps[low]) / (steps[high] - steps[low])) * (values[high] - values[low]);
}

// An exponential mean whose first values are no worse off; gaps stay gaps.
function smoothed(values, weight) {
  let sum = 0, mass = 0;
  return values.map((v) => {
    if (v === null) return null;
    sum = weight * sum + (1 - weight) * v;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999) || raw;
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : +v.toPrecision(12));
  return found;
}
function logTicks(low, high) {
  for (const factors of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const f of factors) { const v = f * 10 ** e; if (v >= low * 0.999 && v <= high * 1.001) found.push(+v.toPrecision(6)); }
    if (found.length >= 3) {
      const every = Math.ceil(found.length / 7);
      return found.filter((_, i) => i % every === 0);
    }
  }
  return ticks(low, high, 4).filter((v) => v > 0);
}

// -- line charts: lines are {run, color, name, x, y, dots}

function chart(title, lines, { log = false, smooths = true, unit = "", wide = false } = {}) {
  const card = el("section", { class: wide ? "card wide" : "card" });
  const own = { lines, smooths, log, view: null };
  const toggle = el("button", { "aria-pressed": log, title: "Logarithmic y axis", onclick: () => {
    own.log = !own.log; toggle.setAttribute("aria-pressed", own.log); draw();
  } }, "log");
  const svg = el("svg:svg", { role: "img", "aria-label": title, tabindex: 0 });
  card.append(el("div", { class: "top" }, el("h3", {}, title, unit ? el("span", { class: "soft" }, ` ${unit}`) : ""), toggle), svg);
  const byRun = lines.every((line) => line.color === line.run);
  if (lines.length > 1 && !byRun)
    card.append(el("div", { class: "legend" }, ...lines.map((line) => el("span", {}, dot(line.color), line.name))));
  const id = `clip${charts.length}`;
  function draw() {
    const width = svg.clientWidth, height = svg.clientHeight;
    if (!width) return;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    own.view = viewOf(own, width, height);
    svg.replaceChildren(...(own.view ? [...axesOf(own.view), ...curvesOf(own.view, id)] : [emptyText(own, width, height)]));
  }
  listen(svg, own);
  charts.push(draw);
  return card;
}

function emptyText(own, width, height) {
  const text = own.log && own.lines.some((line) => state.shown[line.run]) ? "nothing above zero" : "nothing to show";
  return el("svg:text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, text);
}

// The lines of shown runs: where their points stand (px), what can be drawn of them (raw), and that made even.
function shownLines({ lines, log, smooths }) {
  const ok = (v) => v !== null && (!log || v > 0);
  return lines.filter((line) => state.shown[line.run]).map((line) => {
    const raw = line.y.map((v) => (ok(v) ? v : null)), weight = smooths && !line.dots ? state.smooth : 0;
    const px = line.x.map((step) => place(runs[line.run], step));
    return { ...line, px, raw, even: weight ? smoothed(raw, weight) : raw, weight };
  });
}

// The y values that are to be seen between two x values.
function heightsOf(shown, x0, x1, log) {
  let y0 = Infinity, y1 = -Infinity;
  const all = [];
  for (const line of shown) line.px.forEach((x, i) => {
    if (x === null || x < x0 || x > x1 || line.raw[i] === null) return;
    y0 = Math.min(y0, line.even[i]); y1 = Math.max(y1, line.even[i]);
    all.push(line.raw[i]);
  });
  if (!isFinite(y0)) return log ? [0.1, 1] : [0, 1];
  // What lies behind a smooth line may be cut off: a single spike must not flatten all the rest.
  all.sort((a, b) => a - b);
  return state.smooth ? [Math.min(y0, all[Math.floor(0.01 * all.length)]), Math.max(y1, all[Math.ceil(0.99 * all.length) - 1])] : [y0, y1];
}

// What a chart shows and where: its lines, limits, marks, edges, and the places X and Y of values; null without points.
function viewOf(own, width, height) {
  const shown = shownLines(own), { log } = own;
  const xs = shown.flatMap((line) => line.px.filter((v, i) => v !== null && line.raw[i] !== null));
  if (!xs.length) return null;
  let [x0, x1] = state.zoom || [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))];
  if (x1 <= x0) { x0 -= 0.5; x1 += 0.5; }
  const to = log ? Math.log10 : (v) => v, from = log ? (v) => 10 ** v : (v) => v;
  const [floor, ceiling] = heightsOf(shown, x0, x1, log).map(to);
  const room = ceiling > floor ? (ceiling - floor) * 0.06 : log ? 0.1 : Math.abs(ceiling) * 0.05 || 1;
  const low = !log && floor >= 0 && floor - room < 0 ? 0 : floor - room, high = ceiling + room;
  const marks = log ? logTicks(from(low), from(high)) : ticks(low, high, Math.max(Math.floor(height / 40), 2));
  const labels = marks.map(short);
  const left = 12 + 6.4 * Math.max(...labels.map((l) => l.length), 2), right = width - 10, top = 10, bottom = height - 24;
  const X = (v) => left + ((v - x0) / (x1 - x0)) * (right - left), Y = (v) => bottom - ((to(v) - low) / (high - low)) * (bottom - top);
  return { shown, x0, x1, marks, labels, left, right, top, bottom, height, X, Y };
}

function axesOf({ x0, x1, marks, labels, left, right, bottom, height, X, Y }) {
  const made = marks.flatMap((v, i) => [
    el("svg:line", { class: "tick", x1: left, x2: right, y1: Math.round(Y(v)) + 0.5, y2: Math.round(Y(v)) + 0.5 }),
    el("svg:text", { x: left - 6, y: Y(v) + 4, "text-anchor": "end" }, labels[i])]);
  made.push(el("svg:line", { class: "base", x1: left, x2: right, y1: bottom + 0.5, y2: bottom + 0.5 }));
  for (const v of ticks(x0, x1, Math.max(Math.floor((right - left) / 90), 2)))
    if (state.axis !== "step" || Number.isInteger(v)) {
      const x = X(v), anchor = x > right - 16 ? "end" : x < left + 12 ? "start" : "middle";
      made.push(el("svg:text", { x, y: height - 7, "text-anchor": anchor }, short(v)));
    }
  return made;
}

function curvesOf({ shown, left, right, top, bottom, X, Y }, id) {
  const clip = el("svg:clipPath", { id }, el("svg:rect", { x: left - 1, y: top - 6, width: right - left + 2, height: bottom - top + 7 }));
  const inside = el("svg:g", { "clip-path": `url(#${id})` });
  for (const line of shown) {
    const style = `stroke:${color(line.color)}`;
    const there = line.raw.filter((v) => v !== null).length;
    if (line.weight) inside.append(el("svg:path", { class: "raw", d: pathOf(line, line.raw, X, Y), style }));
    inside.append(el("svg:path", { d: pathOf(line, line.even, X, Y), style, "stroke-dasharray": dash(line.color) }));
    if (line.dots ? there < 60 : there < 3)
      line.px.forEach((x, i) => x !== null && line.raw[i] !== null && inside.append(
        el("svg:circle", { cx: X(x), cy: Y(line.raw[i]), r: 3, style: `fill:${color(line.color)}` })));
  }
  return [clip, inside];
}

function pathOf(line, values, X, Y) {
  let pen = "M", text = "";
  line.px.forEach((x, i) => {
    if (x === null || values[i] === null) { pen = "M"; return; }
    text += `${pen}${X(x).toFixed(1)} ${Y(values[i]).toFixed(1)}`;
    pen = "L";
  });
  return text;
}

// -- what a pointer over a chart shows, and how it zooms

function listen(svg, own) {
  const marks = el("svg:g");
  let pressed = null;
  const at = (event) => event.clientX - svg.getBoundingClientRect().left;
  const show = (event) => {
    if (!own.view) return;
    svg.append(marks);
    marks.replaceChildren(...brushOf(own.view, pressed, at(event)));
    pointAt(own.view, at(event), marks, event);
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", (event) => { if (own.view && event.pointerType === "mouse") pressed = at(event); else show(event); });
  svg.addEventListener("pointerup", (event) => {
    if (pressed !== null && Math.abs(at(event) - pressed) > 8) {
      state.zoom = [pressed, at(event)].map((px) => valueAt(own.view, px)).sort((a, b) => a - b);
      redraw();
    }
    pressed = null;
  });
  svg.addEventListener("pointerleave", () => { pressed = null; marks.remove(); tip.hidden = true; });
  svg.addEventListener("dblclick", () => { state.zoom = null; redraw(); });
}

const within = ({ left, right }, px) => Math.min(Math.max(px, left), right);
const valueAt = (view, px) => view.x0 + ((within(view, px) - view.left) / (view.right - view.left)) * (view.x1 - view.x0);

function brushOf(view, pressed, px) {
  if (pressed === null || Math.abs(px - pressed) <= 4) return [];
  const [a, b] = [pressed, px].map((edge) => within(view, edge)).sort((one, other) => one - other);
  return [el("svg:rect", { class: "brush", x: a, width: b - a, y: view.top, height: view.bottom - view.top })];
}

// The number of a line's visible point that is nearest to x; -1 where there is none.
function nearest(line, x, { x0, x1 }) {
  let found = -1;
  line.px.forEach((v, i) => {
    if (v !== null && line.raw[i] !== null && v >= x0 && v <= x1 && (found < 0 || Math.abs(v - x) < Math.abs(line.px[found] - x))) found = i;
  });
  return found;
}

function pointAt(view, px, marks, event) {
  const x = valueAt(view, px);
  const rows = view.shown.map((line) => ({ line, i: nearest(line, x, view) })).filter(({ i }) => i >= 0);
  if (!rows.length) return;
  const far = ({ line, i }) => Math.abs(line.px[i] - x);
  const { line: closest, i: point } = rows.reduce((a, b) => (far(b) < far(a) ? b : a));
  const at = closest.px[point];
  marks.append(el("svg:line", { class: "cross", x1: view.X(at), x2: view.X(at), y1: view.top, y2: view.bottom }));
  const table = el("table", {}, el("tr", {}, el("td", { class: "soft" }, `step ${closest.x[point]}`), el("td", { class: "soft" }, state.axis === "step" ? "" : `${short(at)} ${AXES[state.axis]}`)));
  for (const { line, i } of rows) {
    const cy = Math.min(Math.max(view.Y(line.even[i]), view.top), view.bottom);
    marks.append(el("svg:circle", { cx: view.X(line.px[i]), cy, r: 3.5, style: `fill:${color(line.color)};stroke:var(--card);stroke-width:1.5` }));
    const smooth = line.weight ? ` (${short(line.even[i])} smooth)` : "";
    table.append(el("tr", {}, el("td", {}, dot(line.color), line.name), el("td", {}, `${short(line.raw[i])}${smooth}`)));
  }
  showTip(event, table);
}

function showTip(event, content) {
  tip.replaceChildren(content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  const x = event.clientX + gap + box.width > innerWidth - 8 ? event.clientX - gap - box.width : event.clientX + gap;
  const y = Math.min(event.clientY + gap, innerHeight - box.height - 8);
  tip.style.left = `${Math.max(x, 8)}px`;
  tip.style.top = `${Math.max(y, 8)}px`;
}

// -- heat maps: rows of layers, columns of steps (or experts)

function resolved(name) {
  const probe = el("i", { style: `color:var(${name});display:none` });
  document.body.append(probe);
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return found;
}

function heat(title, rows, columns, values, { log = true, columnName = "step", range = null } = {}) {
  const numbers = values.flat().filter((v) => v !== null && (!log || v > 0));
  const [low, high] = range || [numbers.reduce((a, b) => Math.min(a, b), Infinity), numbers.reduce((a, b) => Math.max(a, b), -Infinity)];
  const to = log ? Math.log : (v) => v;
  const share = (v) => (high > low ? (to(v) - to(low)) / (to(high) - to(low)) : 0.5);
  const tall = Math.min(Math.max(rows.length * 14, 70), 340);
  const canvas = el("canvas", { role: "img", "aria-label": title, style: `height:${tall}px` });
  function draw() {
    const width = canvas.clientWidth, ratio = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(tall * ratio);
    const ink = canvas.getContext("2d"), a = resolved("--heat0"), b = resolved("--heat1");
    values.forEach((row, r) => row.forEach((v, c) => {
      if (v === null || (log && v <= 0)) return;
      const t = Math.min(Math.max(share(v), 0), 1);
      ink.fillStyle = `rgb(${a.map((from, i) => Math.round(from + t * (b[i] - from))).join(",")})`;
      const x0 = Math.round((c / columns.length) * canvas.width), x1 = Math.round(((c + 1) / columns.length) * canvas.width);
      const y0 = Math.round((r / rows.length) * canvas.height), y1 = Math.round(((r + 1) / rows.length) * canvas.height);
      ink.fillRect(x0, y0, x1 - x0, y1 - y0);
    }));
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const c = Math.min(Math.max(Math.floor(((event.clientX - box.left) / box.width) * columns.length), 0), columns.length - 1);
    const r = Math.min(Math.max(Math.floor(((event.clientY - box.top) / box.height) * rows.length), 0), rows.length - 1);
    showTip(event, el("table", {}, el("tr", {}, el("td", { class: "soft" }, `layer ${rows[r]}, ${columnName} ${columns[c]}`), el("td", {}, short(values[r][c])))));
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  heats.push(draw);
  const ends = rows.length > 1 ? `layers ${rows[0]} (top) to ${rows[rows.length - 1]}` : `layer ${rows[0]}`;
  return el("section", { class: "card" },
    el("div", { class: "top" }, el("h3", {}, title), el("span", { class: "soft", style: "font-size:12px" }, ends)), canvas,
    el("div", { class: "axis" }, el("span", {}, `${columnName} ${columns[0]}`), el("span", {}, String(columns[columns.length - 1]))),
    el("div", { class: "scale" }, short(low), el("i"), short(high), log ? el("span", { class: "soft" }, "(log)") : null));
}

// -- what the page shows

const lineOf = (run, name, more = {}) => ({ run, color: run, name: runs[run].name, ...runs[run].series[name], ...more });
const having = (name) => runs.map((_, i) => i).filter((i) => runs[i].series[name]);
const used = new Set();

function plots(specs) {
  const cards = [];
  for (const [name, label, options = {}] of specs) {
    used.add(name);
    const with_ = having(name);
    if (with_.length) cards.push(chart(label, with_.map((i) => lineOf(i, name, { dots: options.dots })), options));
  }
  return cards;
}

// Lines of one run by what follows the slash; of several runs one plot for each of those.
function families(prefix, label, options = {}) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].filter((name) => name.startsWith(`${prefix}/`)).sort();
  names.forEach((name) => used.add(name));
  if (!names.length) return [];
  const part = (name) => name.slice(prefix.length + 1);
  if (runs.length === 1 && names.length <= 3 * COLORS)
    return [chart(label, names.map((name, k) => lineOf(0, name, { color: k, name: part(name), dots: options.dots })), options)];
  return names.map((name) => chart(`${label}: ${part(name)}`, having(name).map((i) => lineOf(i, name, { dots: options.dots })), options));
}

function section(title, ...content) {
  const there = content.flat().filter((item) => item !== null);
  if (there.length) main.append(el("h2", {}, title), ...there);
}
const grid = (cards) => (cards.length ? el("div", { class: "grid" }, ...cards) : null);

function facts(run) {
  const series = (name) => (run.series[name] || { y: [] }).y;
  const speeds = series("tokens_per_second");
  const share = last(series("goodput"));
  return [
    ["step", run.steps ? `${run.step.toLocaleString("en")} / ${run.steps.toLocaleString("en")}` : String(run.step)],
    ["loss, last", short(last(series("loss")))],
    ["validation loss, last", short(last(series("validation_loss")))],
    ["validation loss, best", short(best(series("validation_loss")))],
    ["tokens", short(run.axes.tokens.at(-1))],
    ["tokens/s, median", short(median(speeds))],
    ["MFU, median", median(series("mfu")) === null ? "–" : `${(100 * median(series("mfu"))).toFixed(1)}%`],
    ["time in steps", run.axes.hours.length ? duration(3600 * run.axes.hours.at(-1)) : "–"],
    ["goodput", share === null ? "–" : `${(100 * share).toFixed(1)}%`],
    ["updates skipped", short(last(series("skipped_total")))],
  ];
}
const status = (run) => (run.steps === null ? "" : run.step >= run.steps ? "complete" : "in progress, or stopped");

function table(head, rows, { right = false } = {}) {
  const cells = (row, i) => el("tr", {}, el("th", { scope: "row" }, row[0]), ...row.slice(1).map((cell) => el("td", { class: right ? "right" : null }, cell)));
  return el("div", { class: "scroll", tabindex: 0 }, el("table", { class: "values" },
    head ? el("thead", {}, el("tr", {}, el("th", {}), ...head.map((cell) => el("th", { class: right ? "right" : null, scope: "col" }, ...[cell].flat())))) : "",
    el("tbody", {}, ...rows.map(cells))));
}
const heads = () => runs.map((run, i) => [dot(i), run.name]);

function header() {
  const head = document.getElementById("head");
  if (runs.length > 1) {
    head.append(el("h1", {}, `${runs.length} runs`));
    const all = runs.map(facts);
    const rows = all[0].map(([name], k) => [name, ...all.map((fact) => fact[k][1])]).filter((row) => row.slice(1).some((cell) => cell !== "–"));
    head.append(el("div", { style: "margin-top:14px" }, table(heads(), [["status", ...runs.map(status)], ...rows], { right: true })));
    return;
  }
  const [run] = runs, about = [run.about.model, run.about.parameters && `${run.about.parameters} parameters`, run.about.devices && `devices: ${run.about.devices}`, status(run)];
  head.append(el("h1", {}, run.name), el("div", { class: "soft" }, about.filter(Boolean).join(" · ")));
  const known = facts(run).filter(([, value]) => value !== "–");
  head.append(el("div", { class: "tiles" }, ...known.map(([name, value]) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, name)))));
}

function controls() {
  const nav = document.getElementById("controls");
  const axis = el("span", { class: "segments", role: "group", "aria-label": "x axis" });
  for (const name of Object.keys(AXES))
    axis.append(el("button", { "aria-pressed": name === state.axis, onclick: (event) => {
      state.axis = name; state.zoom = null;
      for (const other of axis.children) other.setAttribute("aria-pressed", other === event.currentTarget);
      redraw();
    } }, AXES[name]));
  const shown = el("span", { class: "num", style: "min-width:2.4em" }, "0");
  const slider = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0, "aria-label": "smoothing", oninput: () => {
    state.smooth = +slider.value; shown.textContent = slider.value; redraw();
  } });
  nav.append(axis, el("label", {}, "smooth", slider, shown));
  if (runs.length > 1)
    nav.append(el("span", { class: "chips" }, ...runs.map((run, i) => el("button", { "aria-pressed": true, onclick: (event) => {
      state.shown[i] = !state.shown[i]; event.currentTarget.setAttribute("aria-pressed", state.shown[i]); redraw();
    } }, dot(i), run.name))));
  const theme = el("button", { title: "Light or dark", "aria-label": "Light or dark", onclick: () => {
    const dark = getComputedStyle(document.body).getPropertyValue("color-scheme") === "dark" || (document.documentElement.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    document.documentElement.style.colorScheme = dark ? "light" : "dark"; redraw();
  } }, "◐");
  nav.append(el("span", { class: "soft hint", style: "font-size:12px" }, "drag in a plot to zoom, double click to go back"), el("span", { style: "flex:1" }), theme);
}

function timeUse() {
  const with_ = runs.filter((run) => Object.keys(run.time).length);
  if (!with_.length) return null;
  const purposes = [...new Set(with_.flatMap((run) => Object.keys(run.time)))].filter((name) => with_.some((run) => run.time[name] > 0));
  const card = el("section", { class: "card wide", style: "margin-top:14px" }, el("div", { class: "top" }, el("h3", {}, "Where the time went")));
  for (const run of with_) {
    const total = Object.values(run.time).reduce((a, b) => a + b, 0) || 1;
    if (runs.length > 1) card.append(el("div", { class: "soft", style: "font-size:12px;margin-top:8px" }, dot(runs.indexOf(run)), run.name));
    card.append(el("div", { class: "bar" }, ...purposes.map((name, k) => el("i", { style: `width:${(100 * (run.time[name] || 0)) / total}%;background:${color(k)}`, title: `${name}: ${duration(run.time[name] || 0)}` }))));
  }
  const rows = purposes.map((name, k) => [el("span", {}, dot(k), name), ...with_.map((run) => {
    const total = Object.values(run.time).reduce((a, b) => a + b, 0) || 1;
    return `${duration(run.time[name] || 0)}  ·  ${((100 * (run.time[name] || 0)) / total).toFixed(1)}%`;
  })]);
  const made = table(with_.length > 1 ? with_.map((run) => [run.name]) : null, rows);
  made.style.border = "0";
  card.append(made);
  return card;
}

function inside() {
  const measures = [...new Set(runs.flatMap((run) => Object.keys(run.layers)))];
  if (runs.some((run) => run.layers.update_norm && run.layers.param_norm)) {
    measures.push("update / parameter norm");
    for (const run of runs) if (run.layers.update_norm && run.layers.param_norm) run.layers["update / parameter norm"] = ratio(run.layers.update_norm, run.layers.param_norm);
  }
  if (!measures.length) return null;
  const box = el("div", { class: "heats" }), at = heats.length;
  const label = (name) => name.replaceAll("_", " ");
  const what = el("select", { "aria-label": "measure", onchange: fill }, ...measures.map((name) => el("option", { value: name }, label(name))));
  const whose = el("select", { "aria-label": "run", onchange: fill }, ...runs.map((run, i) => el("option", { value: i }, run.name)));
  function fill() {
    heats.splice(at);
    const found = runs[+whose.value].layers[what.value];
    box.replaceChildren();
    if (!found) { box.append(el("p", { class: "soft" }, "this run did not measure it")); return; }
    for (const [kind, { layers, values }] of Object.entries(found.kinds)) {
      const positive = values.flat().every((v) => v === null || v > 0);
      box.append(heat([label(what.value), kind].filter(Boolean).join(" · "), layers, found.steps, values, { log: positive }));
    }
    heats.slice(at).forEach((draw) => draw());
  }
  fill();
  return [el("div", { class: "pickers" }, what, runs.length > 1 ? whose : null), box];
}

function ratio(above, below) {
  const kinds = {};
  for (const [kind, { layers, values }] of Object.entries(above.kinds)) {
    const under = below.kinds[kind];
    if (under) kinds[kind] = { layers, values: values.map((row, r) => row.map((v, c) => (v === null || !under.values[r][c] ? null : v / under.values[r][c]))) };
  }
  return { steps: above.steps, kinds };
}

// The largest of all layers over time, a line for each kind of module.
function extremes() {
  const cards = [];
  for (const [measure, label] of [["max_attention_logit", "Largest attention logit"], ["activation_max", "Largest activation"], ["expert_load", "Busiest expert, times an even load"]]) {
    const kinds = [...new Set(runs.flatMap((run) => Object.keys((run.layers[measure] || { kinds: {} }).kinds)))];
    for (const kind of kinds) {
      const lines = runs.flatMap((run, i) => {
        const found = run.layers[measure] && run.layers[measure].kinds[kind];
        if (!found) return [];
        const y = run.layers[measure].steps.map((_, c) => found.values.reduce((top, row) => (row[c] === null ? top : Math.max(top ?? -Infinity, row[c])), null));
        return [{ run: i, color: i, name: run.name, x: run.layers[measure].steps, y }];
      });
      cards.push(chart(kind ? `${label} · ${kind}` : label, lines));
    }
  }
  return cards;
}

function experts() {
  const cards = runs.map((run, i) => {
    if (!run.experts) return null;
    const { step, layers, load } = run.experts;
    const title = `Load of each expert, step ${step}${runs.length > 1 ? ` · ${run.name}` : ""}`;
    return heat(title, layers, load[0].map((_, e) => e), load, { log: false, columnName: "expert" });
  }).filter(Boolean);
  return cards.length ? el("div", { class: "heats", style: "margin-top:14px" }, ...cards) : null;
}

function differences() {
  if (runs.length < 2) return null;
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  const rows = keys.filter((key) => key !== "run_dir" && new Set(runs.map((run) => run.config[key])).size > 1)
    .map((key) => [key, ...runs.map((run) => run.config[key] ?? "–")]);
  return rows.length ? table(heads(), rows) : el("p", { class: "soft" }, "All keys but run_dir are equal.");
}

function about() {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.about)))];
  const rows = keys.map((key) => [key, ...runs.map((run) => String(run.about[key] ?? "–"))]);
  for (const name of [...new Set(runs.flatMap((run) => Object.keys(run.versions)))]) rows.push([name, ...runs.map((run) => run.versions[name] ?? "–")]);
  rows.push(["run directory", ...runs.map((run) => run.path)]);
  return table(runs.length > 1 ? heads() : null, rows);
}

function samples() {
  const cards = runs.flatMap((run, i) => run.samples.map(({ prompt, text }) => el("section", { class: "card" },
    runs.length > 1 ? el("div", { class: "soft", style: "font-size:12px;margin-bottom:6px" }, dot(i), run.name) : null,
    el("pre", {}, el("mark", {}, prompt), text))));
  return grid(cards);
}

function redraw() { for (const draw of charts) draw(); for (const draw of heats) draw(); tip.hidden = true; }

header();
controls();
section("Learning", grid([
  ...plots([["loss", "Training loss", { unit: "nats" }]]),
  ...plots([["validation_loss", "Validation loss", { unit: "nats", dots: true }]]),
  ...families("loss", "Training loss by source", { unit: "nats" }),
  ...families("validation_loss", "Validation loss by source", { unit: "nats", dots: true }),
  ...plots([
    ["accuracy", "Token accuracy"], ["grad_norm", "Gradient norm", { log: true }], ["lr", "Learning rate", { smooths: false }],
    ["mtp_loss", "Multi-token prediction loss", { unit: "nats" }],
    ["expert_load_max", "Busiest expert, times an even load"], ["expert_dropped", "Visits to experts that were dropped"],
    ["skipped_total", "Updates skipped, in all", { smooths: false }], ["spikes_total", "Loss spikes, in all", { smooths: false }],
  ]),
]));
section("Speed", grid(plots([
  ["tokens_per_second", "Tokens per second"], ["mfu", "Model FLOPs utilization"], ["step_seconds", "Seconds a step", { log: true }], ["goodput", "Goodput so far", { smooths: false }],
])), timeUse());
section("Inside the model", inside(), experts(), grid([
  ...extremes(),
  ...families("grad_norm", "Gradient norm outside of layers", { log: true }),
  ...families("param_norm", "Parameter norm outside of layers"),
  ...families("update_norm", "Update norm outside of layers", { log: true }),
]));
const rest = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].filter((name) => !used.has(name) && name !== "tokens").sort();
if (rest.length) {
  const more = el("details", { ontoggle: redraw }, el("summary", {}, `${rest.length} more: ${rest.join(", ")}`));
  more.append(grid(rest.map((name) => chart(name, having(name).map((i) => lineOf(i, name))))));
  main.append(more);
}
section("Samples", samples());
section("What differs between the configs", differences());
section("Model and machine", about());
for (const run of runs)
  if (Object.keys(run.config).length)
    main.append(el("details", {}, el("summary", {}, runs.length > 1 ? `config of ${run.name}` : "config"), table(null, Object.entries(run.config))));
main.append(el("footer", {}, "Written by jaxformers report. This page loads nothing from elsewhere."));
new ResizeObserver(() => redraw()).observe(main);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
redraw();
