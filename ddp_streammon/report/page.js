"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const SHAPES = ["circle", "square", "triangle", "diamond"];
  const WARM = [200, 90, 0];
  const COLD = [33, 102, 172];
  const LEFT = 50;
  const RIGHT = 10;
  const TOP = 14;
  const BOTTOM = 22;
  const FEW = 60;
  const last = Math.max(1, data.last);
  const panels = [];
  let cursor = null;

  // Elements -------------------------------------------------------------------------------------

  function make(tag, attributes, text) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function add(parent, tag, attributes, text) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  const paint = (name) => `var(--${name})`;

  function shape(parent, kind, x, y, size, colour) {
    const at = { fill: colour };
    if (kind === "circle") return add(parent, "circle", { cx: x, cy: y, r: size, ...at });
    if (kind === "square") return add(parent, "rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, ...at });
    const corners = kind === "triangle"
      ? [[0, -1.2], [1.2, 1], [-1.2, 1]]
      : [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]];
    const points = corners.map(([dx, dy]) => `${x + dx * size},${y + dy * size}`).join(" ");
    return add(parent, "polygon", { points, ...at });
  }

  // Numbers --------------------------------------------------------------------------------------

  function number(value) {
    if (value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  function steps(value) {
    if (value >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
    if (value >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
    return String(value);
  }

  function summed(differences) {
    let sum = 0;
    return differences.map((difference) => (sum += difference));
  }

  function nearest(xs, x) {
    let low = 0;
    let high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle;
      else high = middle;
    }
    return xs.length && Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((by) => by * power).find((by) => by >= raw * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(Number((at * step).toPrecision(12)));
    return found;
  }

  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const factors = decades < 2 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(decades / 5));
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      if (power % every) continue;
      for (const factor of factors) {
        const tick = Number((factor * 10 ** power).toPrecision(3));
        if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
      }
    }
    return found.length > 1 ? found : ticks(low, high, 4).filter((tick) => tick > 0);
  }

  // Scales ---------------------------------------------------------------------------------------

  function valueScale(panel, height) {
    let values = panel.lines.flatMap((line) => line.y);
    const bounds = panel.lines.flatMap((line) => (line.low ? [...line.low.y, ...line.high.y] : []));
    const positive = values.filter((value) => value > 0).sort((a, b) => a - b);
    const typical = positive[positive.length >> 1];
    const wild = positive.length === values.length && positive[positive.length - 1] > 50 * typical;
    const log = (panel.log || wild) && positive.length > 0;
    if (log) values = positive;
    let low = values.reduce((a, b) => Math.min(a, b), Infinity);
    let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!Number.isFinite(low)) [low, high] = log ? [0.1, 1] : [0, 1];
    const room = Math.max(high - low, 1e-12 * Math.abs(high)) * 2;
    for (const bound of bounds) {
      if (log && bound <= 0) continue;
      low = Math.min(low, Math.max(bound, low - room));
      high = Math.max(high, Math.min(bound, high + room));
    }
    const bottom = height - BOTTOM;
    if (log) {
      low = Math.max(low, high / 1e12);
      if (high / low < 1.2) [low, high] = [low / 1.2, high * 1.2];
      const span = Math.log(high / low);
      const at = (value) => bottom - (value > 0 ? Math.max(0, Math.log(value / low) / span) : 0) * (bottom - TOP);
      return { at, ticks: logTicks(low, high), log };
    }
    if (panel.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    if (high - low < 1e-9 * Math.max(1e-9, Math.abs(high))) [low, high] = [low - 0.5 * (Math.abs(low) || 1), high + 0.5 * (Math.abs(high) || 1)];
    const margin = 0.04 * (high - low);
    if (!(panel.zero && low === 0)) low -= margin;
    high += margin;
    const at = (value) => bottom - Math.min(1.02, Math.max(-0.02, (value - low) / (high - low))) * (bottom - TOP);
    return { at, ticks: ticks(low, high, 4), log };
  }

  const stepScale = (width) => (step) => LEFT + (step / last) * (width - LEFT - RIGHT);

  function stepAxis(svg, x, width, height) {
    for (const tick of ticks(0, last, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger)) {
      add(svg, "text", { x: x(tick), y: height - 6, "text-anchor": x(tick) > width - 24 ? "end" : "middle" }, steps(tick));
    }
    for (const start of data.starts) {
      add(svg, "line", { x1: x(start), x2: x(start), y1: TOP, y2: height - BOTTOM, stroke: paint("soft"), "stroke-dasharray": "1 3" });
    }
  }

  function markFindings(svg, x, height) {
    for (const mark of [...data.marks].reverse()) {
      const colour = paint(mark.level);
      const at = x(mark.x);
      if (mark.level !== "info") {
        add(svg, "line", { x1: at, x2: at, y1: TOP - 4, y2: height - BOTTOM, stroke: colour, "stroke-width": 1, opacity: 0.55 });
      }
      const head = add(svg, "polygon", { points: `${at - 4},1 ${at + 4},1 ${at},9`, fill: colour, class: "finding" });
      add(head, "title", {}, `step ${mark.x}: ${mark.text}`);
    }
  }

  // Lines ----------------------------------------------------------------------------------------

  function prepareLines(panel) {
    for (const line of panel.lines) {
      line.x = summed(line.x);
      line.bad = summed(line.bad || []);
      for (const bound of [line.low, line.high]) if (bound) bound.x = summed(bound.x);
    }
  }

  function drawLines(panel, svg, width, height) {
    const x = stepScale(width);
    const scale = valueScale(panel, height);
    for (const tick of scale.ticks) {
      const y = scale.at(tick);
      const zero = tick === 0 && panel.zero;
      add(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y, stroke: paint(zero ? "soft" : "grid"), "stroke-width": 1 });
      add(svg, "text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, number(tick));
    }
    stepAxis(svg, x, width, height);
    const place = (points, at) => `${x(points.x[at]).toFixed(1)},${scale.at(points.y[at]).toFixed(1)}`;
    for (const line of panel.lines.filter((of) => of.low)) {
      const there = line.low.x.map((_, at) => place(line.low, at));
      const back = line.high.x.map((_, at) => place(line.high, at)).reverse();
      add(svg, "polygon", { points: [...there, ...back].join(" "), fill: paint(line.c), opacity: 0.16, class: "band" });
      if (line.low.x.length === 1) {
        const at = x(line.low.x[0]);
        add(svg, "line", { x1: at, x2: at, y1: scale.at(line.low.y[0]), y2: scale.at(line.high.y[0]), stroke: paint(line.c), class: "band" });
      }
    }
    for (const line of panel.lines) {
      const points = line.x.map((_, at) => place(line, at)).join(" ");
      const look = { fill: "none", stroke: paint(line.c), "stroke-width": line.x.length > 300 ? 1.1 : 1.7, "stroke-linejoin": "round" };
      if (line.dash) look["stroke-dasharray"] = "5 3";
      add(svg, "polyline", { points, ...look, class: "curve" });
      if (line.x.length <= FEW) {
        line.x.forEach((step, at) => shape(svg, SHAPES[Math.max(0, line.mark) % 4], x(step), scale.at(line.y[at]), 2.4, paint(line.c)));
      }
      for (const step of line.bad) {
        add(svg, "text", { x: x(step), y: height - BOTTOM - 2, "text-anchor": "middle", class: "bad", style: `fill: ${paint("error")}` }, "×");
      }
    }
    markFindings(svg, x, height);
    if (scale.log && !panel.log) panel.unitText.textContent = `${panel.unit} (logarithmic)`;
    return x;
  }

  function legendLines(panel, list) {
    panel.readouts = panel.lines.map((line) => {
      const item = make("li");
      const svg = add(item, "svg", { viewBox: "0 0 26 12", "aria-hidden": "true" });
      const look = { x1: 0, x2: 26, y1: 6, y2: 6, stroke: paint(line.c), "stroke-width": 2 };
      if (line.dash) look["stroke-dasharray"] = "5 3";
      add(svg, "line", look);
      if (line.x.length <= FEW) shape(svg, SHAPES[Math.max(0, line.mark) % 4], 13, 6, 3, paint(line.c));
      const value = make("b");
      item.append(make("span", {}, line.name), value);
      list.append(item);
      return value;
    });
  }

  function readLines(panel, step) {
    panel.lines.forEach((line, number_) => {
      const at = nearest(line.x, step);
      const far = line.x.length && Math.abs(line.x[at] - step) > last / 50;
      const bad = line.bad.length ? line.bad[nearest(line.bad, step)] : undefined;
      const isBad = bad !== undefined && (!line.x.length || Math.abs(bad - step) < Math.abs(line.x[at] - step));
      let text = isBad ? "not finite" : number(line.y[at]);
      if (!isBad && line.low && line.low.x.length) {
        text += ` [${number(line.low.y[nearest(line.low.x, line.x[at])])}, ${number(line.high.y[nearest(line.high.x, line.x[at])])}]`;
      }
      panel.readouts[number_].textContent = text + (far && !isBad ? ` @${steps(line.x[at])}` : "");
    });
  }

  // Whiskers -------------------------------------------------------------------------------------

  function drawWhiskers(panel, svg, width, height) {
    const ends = panel.rows.flatMap((row) => [0, row.value, row.low, row.high, row.detectable]).filter((end) => end !== undefined);
    let [low, high] = [Math.min(...ends), Math.max(...ends)];
    if (high === low) high = low + 1;
    const room = 0.05 * (high - low);
    [low, high] = [low - room, high + room];
    const x = (value) => 8 + ((value - low) / (high - low)) * (width - 16);
    for (const tick of ticks(low, high, Math.max(3, Math.floor(width / 90)))) {
      add(svg, "line", { x1: x(tick), x2: x(tick), y1: 2, y2: height - BOTTOM, stroke: paint(tick === 0 ? "soft" : "grid") });
      add(svg, "text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, number(tick));
    }
    panel.rows.forEach((row, at) => {
      const y = at * 34 + 26;
      const colour = paint(row.c);
      const bounds = row.low === undefined || row.high === undefined ? "" : ` [${number(row.low)}, ${number(row.high)}]`;
      const label = add(svg, "text", { x: 4, y: y - 9, class: "row" });
      const name = row.name.length > 16 ? `${row.name.slice(0, 15)}…` : row.name;
      add(label, "tspan", { style: `fill: ${colour}; font-weight: 600` }, name);
      add(label, "tspan", {}, ` ${row.label}`);
      add(label, "title", {}, row.name);
      const figures = add(svg, "text", { x: width - 4, y: y - 9, "text-anchor": "end", class: "reading" });
      add(figures, "tspan", { style: `fill: ${paint("text")}; font-weight: 600` }, number(row.value));
      const interval = add(figures, "tspan", {}, bounds);
      const free = () => width - 16 - figures.getComputedTextLength() - label.getComputedTextLength();
      if (free() < 0) {
        add(figures, "title", {}, `${number(row.value)}${bounds}`);
        interval.remove();
      }
      if (free() < 0) {
        const length = width - 16 - figures.getComputedTextLength();
        label.setAttribute("textLength", Math.max(40, length));
        label.setAttribute("lengthAdjust", "spacingAndGlyphs");
      }
      if (bounds) {
        add(svg, "line", { x1: x(row.low), x2: x(row.high), y1: y, y2: y, stroke: colour, "stroke-width": 3, opacity: 0.5, class: "whisker" });
      }
      if (row.detectable !== undefined) {
        add(svg, "line", { x1: x(row.detectable), x2: x(row.detectable), y1: y - 5, y2: y + 5, stroke: paint("soft"), "stroke-width": 1.5 });
      }
      add(svg, "circle", { cx: x(row.value), cy: y, r: 4.5, fill: colour, class: "estimate" });
    });
  }

  // Ranks ----------------------------------------------------------------------------------------

  function rgb(variable) {
    const hex = getComputedStyle(document.documentElement).getPropertyValue(`--${variable}`).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  }

  function drawHeat(panel, svg, width, height) {
    const x = stepScale(width);
    const columns = Math.max(...panel.rows.map((row) => row.cells.length));
    const canvas = make("canvas", { width: columns, height: panel.rows.length });
    const context = canvas.getContext("2d");
    const middle = rgb("heat-mid");
    const strange = rgb("error");
    panel.rows.forEach((row, y) => {
      row.cells.forEach((cell, column) => {
        if (cell === null) return;
        const part = cell === "x" ? 1 : Math.min(1, Math.abs(cell) / 200);
        const end = cell === "x" ? strange : cell > 0 ? WARM : COLD;
        context.fillStyle = `rgb(${middle.map((of, at) => Math.round(of + part * (end[at] - of))).join(",")})`;
        context.fillRect(column, y, 1, 1);
      });
    });
    const bottom = height - BOTTOM;
    const tall = (bottom - TOP) / panel.rows.length;
    const end = x(Math.min(last, columns * panel.width));
    const whole = x(columns * panel.width) - LEFT;
    const clip = add(svg, "svg", { x: LEFT, y: TOP, width: end - LEFT, height: bottom - TOP, class: "cells" });
    clip.style.overflow = "hidden";
    clip.style.width = `${end - LEFT}px`;
    add(clip, "image", { href: canvas.toDataURL(), x: 0, y: 0, width: whole, height: bottom - TOP, preserveAspectRatio: "none", style: "image-rendering: pixelated" });
    const every = Math.ceil(13 / tall);
    panel.rows.forEach((row, at) => {
      const y = TOP + at * tall;
      if (at % every === 0 || row.rules.length) {
        const style = row.rules.length ? `fill: ${paint("error")}; font-weight: 700` : "";
        add(svg, "text", { x: LEFT - 6, y: y + tall / 2 + 4, "text-anchor": "end", style }, `${row.rules.length ? "▶ " : ""}${row.rank}`);
      }
      if (row.rules.length) {
        add(svg, "rect", { x: LEFT, y, width: end - LEFT, height: tall, fill: "none", stroke: paint("error"), "stroke-width": 1.5, class: "outlier" });
      }
    });
    stepAxis(svg, x, width, height);
    markFindings(svg, x, height);
    return x;
  }

  function legendHeat(panel, list) {
    const scale = make("li");
    scale.append(make("span", {}, "¼"), make("span", { class: "ramp" }), make("span", {}, "4 times the median"));
    list.append(scale);
    panel.readouts = [make("b")];
    const item = make("li");
    item.append(panel.readouts[0]);
    list.append(item);
    for (const row of panel.rows.filter((of) => of.rules.length)) {
      list.append(make("li", { class: "tag error" }, `▶ rank ${row.rank}: ${row.rules.join(", ")}`));
    }
  }

  function readHeat(panel, step) {
    const column = Math.floor(step / panel.width);
    const told = panel.rows.map((row) => [row.rank, row.cells[column]]).filter(([, cell]) => cell !== null && cell !== undefined);
    const far = told.map(([rank, cell]) => [rank, cell, cell === "x" ? 1e9 : Math.abs(cell)]).sort((a, b) => b[2] - a[2]).slice(0, 3);
    const text = far.map(([rank, cell]) => `rank ${rank}: ${cell === "x" ? "not finite" : `${number(2 ** (cell / 100))}×`}`);
    panel.readouts[0].textContent = text.join("  ");
  }

  // Findings -------------------------------------------------------------------------------------

  function drawSpans(panel, svg, width, height) {
    const x = stepScale(width);
    panel.rows.forEach((row, at) => {
      const y = TOP + at * 26;
      add(svg, "text", { x: LEFT, y: y + 9 }, row.name);
      add(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: y + 17, y2: y + 17, stroke: paint("grid") });
      for (const [first, end] of row.spans) {
        add(svg, "rect", { x: x(first) - 2, y: y + 13, width: Math.max(4, x(end) - x(first) + 4), height: 8, rx: 2, fill: paint(row.level), class: "span" });
      }
    });
    stepAxis(svg, x, width, height);
    return x;
  }

  // Putting it together --------------------------------------------------------------------------

  const KINDS = {
    lines: { draw: drawLines, legend: legendLines, read: readLines, prepare: prepareLines, height: () => 210 },
    heat: { draw: drawHeat, legend: legendHeat, read: readHeat, height: (panel) => TOP + BOTTOM + Math.max(60, Math.min(320, 22 * panel.rows.length)) },
    whiskers: { draw: drawWhiskers, height: (panel) => 34 * panel.rows.length + 8 + BOTTOM },
    spans: { draw: drawSpans, height: (panel) => 26 * panel.rows.length + TOP + BOTTOM },
  };

  function build(panel, number_) {
    const kind = KINDS[panel.kind];
    if (kind.prepare) kind.prepare(panel);
    const figure = make("figure", { id: `panel-${number_}`, class: panel.kind });
    panel.unitText = make("p", { class: "unit" }, panel.unit);
    panel.svg = add(figure, "svg", { role: "img", "aria-label": `${panel.title}. ${panel.note}`, tabindex: kind.read ? 0 : -1 });
    figure.prepend(make("h3", {}, panel.title), panel.unitText);
    if (kind.read) {
      panel.at = make("p", { class: "at" });
      const list = make("ul", { class: "legend" });
      figure.append(panel.at, list);
      kind.legend(panel, list);
      listen(panel);
    }
    figure.append(make("p", { class: "note" }, panel.note));
    document.getElementById("panels").append(figure);
    panels.push(panel);
  }

  function listen(panel) {
    const move = (event) => {
      const box = panel.svg.getBoundingClientRect();
      const part = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
      show(Math.round(Math.min(1, Math.max(0, part)) * last));
    };
    panel.svg.addEventListener("pointermove", move);
    panel.svg.addEventListener("pointerdown", move);
    panel.svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(null));
    panel.svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      show(Math.min(last, Math.max(0, (cursor === null ? last : cursor) + by * Math.max(1, Math.round(last / 200)))));
    });
  }

  function show(step) {
    cursor = step;
    const at = step === null ? last : step;
    const epoch = data.epochs.x.length ? ` · epoch ${number(data.epochs.y[nearest(data.epochs.x, at)])}` : "";
    const near = step === null ? [] : data.marks.filter((mark) => Math.abs(mark.x - step) <= last / 100).slice(0, 3);
    const text = `step ${at.toLocaleString("en")}${epoch}${near.length ? ` · ▼ ${near.map((mark) => mark.text).join(", ")}` : ""}`;
    for (const panel of panels) {
      if (!KINDS[panel.kind].read) continue;
      panel.at.textContent = text;
      KINDS[panel.kind].read(panel, at);
      panel.cross.setAttribute("visibility", step === null ? "hidden" : "visible");
      const x = panel.x(at);
      panel.cross.setAttribute("x1", x);
      panel.cross.setAttribute("x2", x);
    }
  }

  function draw() {
    for (const panel of panels) {
      const kind = KINDS[panel.kind];
      const width = Math.max(200, panel.svg.parentElement.clientWidth - 30);
      const height = kind.height(panel);
      panel.svg.replaceChildren();
      panel.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      panel.svg.style.height = `${height}px`;
      panel.x = kind.draw(panel, panel.svg, width, height);
      panel.cross = add(panel.svg, "line", { y1: TOP, y2: height - BOTTOM, stroke: paint("soft"), visibility: "hidden", class: "cross" });
    }
    show(cursor);
  }

  data.epochs.x = summed(data.epochs.x);
  data.panels.forEach(build);
  draw();
  let wide = document.documentElement.clientWidth;
  window.addEventListener("resize", () => {
    if (document.documentElement.clientWidth === wide) return;
    wide = document.documentElement.clientWidth;
    draw();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  window.addEventListener("beforeprint", draw);
})();
