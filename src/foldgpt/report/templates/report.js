"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const removed = new Set(data.removed);

  function make(name, attributes, parent, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  const digits = (value) => (value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(1) : value.toFixed(3));

  /* ------------------------------------------------------------------ what all charts have in common */

  /** A chart in `host`: a line that tells the value, and an SVG that is drawn anew when the width changes.
   *  `draw(svg, width)` returns {at(x, y), move(key), tell(), height}. */
  function chart(host, hint, draw) {
    const readout = document.createElement("p");
    readout.className = "readout idle";
    readout.setAttribute("role", "status");
    readout.textContent = hint;
    const svg = make("svg", { tabindex: 0, role: "img", "aria-label": `${host.dataset.name}. ${hint}` });
    host.append(readout, svg);
    let drawn = null;
    let place = null;

    function render() {
      const width = Math.max(260, svg.clientWidth);
      svg.replaceChildren();
      drawn = draw(svg, width);
      svg.setAttribute("viewBox", `0 0 ${width} ${drawn.height}`);
      svg.setAttribute("height", drawn.height);
      if (place !== null) show(place);
    }

    function show(next) {
      if (next === null) return;
      place = next;
      readout.className = "readout";
      readout.textContent = drawn.show(next);
    }

    function pointed(event) {
      const box = svg.getBoundingClientRect();
      show(drawn.at(event.clientX - box.left, event.clientY - box.top));
    }

    svg.addEventListener("pointermove", pointed);
    svg.addEventListener("pointerdown", pointed);
    svg.addEventListener("focus", () => { if (place === null && svg.matches(":focus-visible")) show(drawn.start); });
    svg.addEventListener("keydown", (event) => {
      const next = drawn.move(place === null ? drawn.start : place, event.key);
      if (next === undefined) return;
      event.preventDefault();
      show(next);
    });
    render();
    let width = svg.clientWidth;
    new ResizeObserver(() => {
      if (svg.clientWidth === width) return;
      width = svg.clientWidth;
      render();
    }).observe(host);
  }

  function legend(host, entries) {
    const list = document.createElement("ul");
    list.className = "legend";
    for (const [style, label] of entries) {
      const item = document.createElement("li");
      const key = document.createElement("span");
      key.className = `key ${style}`;
      item.append(key, label);
      list.append(item);
    }
    host.append(list);
  }

  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const step = (count, room) => [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((size) => count / size <= room) || count;

  /* ---------------------------------------------------------------------------------- block influence */

  function logTicks(low, high) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
      for (const lead of [1, 2, 5]) {
        const tick = lead * 10 ** power;
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    return ticks.length > 8 ? ticks.filter((tick) => /^1/.test(tick.toExponential())) : ticks;
  }

  function drawCurves(svg, width) {
    const height = Math.round(clamp(width * 0.45, 240, 380));
    const [left, right, top, bottom] = [50, 14, 10, 42];
    const count = data.numBlocks;
    const values = data.curves.flatMap((curve) => curve.values);
    const low = Math.min(...values);
    const high = Math.max(...values);
    const isLog = low > 0 && high > 10 * low;
    const x = (block) => left + ((block + 0.5) / count) * (width - left - right);
    const scale = isLog
      ? (value) => Math.log(value / (low / 1.25)) / Math.log((high * 1.25) / (low / 1.25))
      : (value) => (value - Math.min(0, low)) / ((high - Math.min(0, low)) * 1.05 || 1);
    const y = (value) => height - bottom - scale(value) * (height - top - bottom);
    const half = (width - left - right) / count / 2;
    for (const block of removed)
      make("rect", { class: "shade", x: x(block) - half, y: top, width: 2 * half, height: height - top - bottom }, svg);
    const ticks = isLog ? logTicks(low / 1.25, high * 1.25) : [0, 0.25, 0.5, 0.75, 1].map((part) => part * high);
    for (const tick of ticks) {
      make("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }, svg);
      make("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, svg, String(Number(tick.toPrecision(2))));
    }
    const every = step(count, width < 480 ? 8 : 18);
    for (let block = 0; block < count; block += every)
      make("text", { x: x(block), y: height - bottom + 18, "text-anchor": "middle" }, svg, block);
    make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, svg, "block (source index)");
    data.curves.forEach((curve, index) => {
      const points = curve.values.map((value, block) => `${x(block).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      make("polyline", { class: `line s${index}`, points, fill: "none", "stroke-width": index ? 1.6 : 2.6, style: "fill:none" }, svg);
    });
    const cursor = make("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" }, svg);
    const dots = data.curves.map((_, index) => make("circle", { class: `s${index}`, r: 4.5, visibility: "hidden" }, svg));
    const ranks = data.curves[0].values.map((value) => data.curves[0].values.filter((other) => other < value).length + 1);
    return {
      height,
      start: 0,
      at: (px) => clamp(Math.floor(((px - left) / (width - left - right)) * count), 0, count - 1),
      move: (block, key) =>
        ({ ArrowLeft: Math.max(0, block - 1), ArrowRight: Math.min(count - 1, block + 1), Home: 0, End: count - 1 })[key],
      show(block) {
        for (const [name, value] of [["x1", x(block)], ["x2", x(block)], ["visibility", "visible"]]) cursor.setAttribute(name, value);
        dots.forEach((dot, index) => {
          for (const [name, value] of [["cx", x(block)], ["cy", y(data.curves[index].values[block])], ["visibility", "visible"]])
            dot.setAttribute(name, value);
        });
        const told = data.curves.map((curve) => `${curve.name} ${digits(curve.values[block])}`).join(" · ");
        return `Block ${block}${removed.has(block) ? " (removed)" : ""}: ${told}. Rank ${ranks[block]} of ${count}, least first.`;
      },
    };
  }

  /* -------------------------------------------------------------------------------------- similarity */

  /* Viridis at five points: even to the eye, and told apart by every kind of colour vision. */
  const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

  function colour(part) {
    const at = clamp(part, 0, 1) * (VIRIDIS.length - 1);
    const from = Math.min(VIRIDIS.length - 2, Math.floor(at));
    const mixed = VIRIDIS[from].map((channel, index) => Math.round(channel + (VIRIDIS[from + 1][index] - channel) * (at - from)));
    return `rgb(${mixed.join(",")})`;
  }

  function drawHeatmap(svg, width) {
    const count = data.cosine.length;
    const [left, right, top] = [42, 6, 6];
    const size = (Math.min(width, 640) - left - right) / count;
    const side = size * count;
    const low = Math.min(...data.cosine.map((row) => Math.min(...row)), 0.9);
    const group = make("g", { "shape-rendering": "crispEdges" }, svg);
    data.cosine.forEach((row, i) =>
      row.forEach((value, j) =>
        make("rect", { x: left + j * size, y: top + i * size, width: size + 0.3, height: size + 0.3, fill: colour((value - low) / (1 - low)) }, group),
      ),
    );
    const every = step(count, width < 480 ? 7 : 16);
    for (let depth = 0; depth < count; depth += every) {
      const middle = (depth + 0.5) * size;
      make("text", { x: left - 7, y: top + middle + 4, "text-anchor": "end" }, svg, depth);
      make("text", { x: left + middle, y: top + side + 17, "text-anchor": "middle" }, svg, depth);
    }
    make("text", { x: left + side / 2, y: top + side + 36, "text-anchor": "middle" }, svg, "blocks passed");
    make("text", { x: 11, y: top + side / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${top + side / 2})` }, svg, "blocks passed");
    const bar = Math.min(240, side);
    const steps = 60;
    for (let part = 0; part < steps; part += 1)
      make("rect", { x: left + (part * bar) / steps, y: top + side + 50, width: bar / steps + 0.5, height: 10, fill: colour(part / (steps - 1)) }, svg);
    make("text", { x: left, y: top + side + 76 }, svg, low.toFixed(2));
    make("text", { x: left + bar, y: top + side + 76, "text-anchor": "end" }, svg, "1.00");
    const cursor = make("rect", { class: "cell-cursor", width: size, height: size, visibility: "hidden" }, svg);
    const named = (depth) => (depth === 0 ? "the embedding" : `block ${depth - 1}`);
    return {
      height: top + side + 82,
      start: [0, 0],
      at(px, py) {
        const [i, j] = [Math.floor((py - top) / size), Math.floor((px - left) / size)];
        return i >= 0 && j >= 0 && i < count && j < count ? [i, j] : null;
      },
      move([i, j], key) {
        return {
          ArrowLeft: [i, Math.max(0, j - 1)],
          ArrowRight: [i, Math.min(count - 1, j + 1)],
          ArrowUp: [Math.max(0, i - 1), j],
          ArrowDown: [Math.min(count - 1, i + 1), j],
          Home: [i, 0],
          End: [i, count - 1],
        }[key];
      },
      show([i, j]) {
        for (const [name, value] of [["x", left + j * size], ["y", top + i * size], ["visibility", "visible"]]) cursor.setAttribute(name, value);
        return i === j
          ? `After ${named(i)}, with itself: 1.000`
          : `After ${named(Math.min(i, j))} and after ${named(Math.max(i, j))}: ${digits(data.cosine[i][j])}`;
      },
    };
  }

  /* ------------------------------------------------------------------------------------------- gates */

  function drawGates(svg, width) {
    const { steps, units } = data.gates;
    const height = Math.round(clamp(width * 0.45, 240, 380));
    const [left, right, top, bottom] = [50, 14, 10, 42];
    const last = steps[steps.length - 1];
    const x = (value) => left + ((value - steps[0]) / (last - steps[0] || 1)) * (width - left - right);
    const y = (value) => height - bottom - value * (height - top - bottom);
    for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
      make("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }, svg);
      make("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, svg, tick);
    }
    const every = step(last - steps[0] + 1, width < 480 ? 5 : 10);
    for (let value = Math.ceil(steps[0] / every) * every; value <= last; value += every)
      make("text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, svg, value);
    make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, svg, "step");
    const lines = units.map((unit) => {
      const points = unit.keep.map((value, index) => `${x(steps[index]).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      return make("polyline", { class: `line gate${unit.removed ? " out" : ""}`, points }, svg);
    });
    const dot = make("circle", { class: "s0", r: 5, visibility: "hidden" }, svg);
    const nearest = (list, value, distance) =>
      list.reduce((best, item, index) => (distance(item, value) < distance(list[best], value) ? index : best), 0);
    return {
      height,
      start: [steps.length - 1, Math.max(0, units.findIndex((unit) => unit.removed))],
      at(px, py) {
        const index = nearest(steps, px, (item, value) => Math.abs(x(item) - value));
        return [index, nearest(units, py, (item, value) => Math.abs(y(item.keep[index]) - value))];
      },
      move([index, unit], key) {
        return {
          ArrowLeft: [Math.max(0, index - 1), unit],
          ArrowRight: [Math.min(steps.length - 1, index + 1), unit],
          ArrowUp: [index, (unit + units.length - 1) % units.length],
          ArrowDown: [index, (unit + 1) % units.length],
          Home: [0, unit],
          End: [steps.length - 1, unit],
        }[key];
      },
      show([index, unit]) {
        lines.forEach((line, other) => line.classList.toggle("here", other === unit));
        for (const [name, value] of [["cx", x(steps[index])], ["cy", y(units[unit].keep[index])], ["visibility", "visible"]])
          dot.setAttribute(name, value);
        const name = units[unit].name[0].toUpperCase() + units[unit].name.slice(1);
        return `Step ${steps[index]}. ${name}: kept with probability ${digits(units[unit].keep[index])}; in the end ${units[unit].removed ? "removed" : "kept"}.`;
      },
    };
  }

  /* ---------------------------------------------------------------------------------------- recovery */

  const short = (tokens) =>
    tokens >= 1e6 ? `${Number((tokens / 1e6).toPrecision(3))} M` : tokens >= 1e3 ? `${Number((tokens / 1e3).toPrecision(3))} k` : String(tokens);

  function niceTicks(high, count) {
    const rough = high / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const size = power * [1, 2, 5, 10].find((lead) => lead * power >= rough);
    return Array.from({ length: Math.floor(high / size + 1e-9) + 1 }, (_, index) => index * size);
  }

  function drawTraining(svg, width) {
    const { tokens, lines, steps, best } = data.training;
    const height = Math.round(clamp(width * 0.45, 240, 380));
    const [left, right, top, bottom] = [54, 18, 10, 42];
    const last = Math.max(tokens[tokens.length - 1], ...steps.tokens, 1);
    const high = Math.max(...lines.flatMap((line) => line.values), ...steps.values) * 1.05 || 1;
    const x = (value) => left + (value / last) * (width - left - right);
    const y = (value) => height - bottom - (value / high) * (height - top - bottom);
    for (const tick of niceTicks(high, 5)) {
      make("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }, svg);
      make("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, svg, String(Number(tick.toPrecision(2))));
    }
    for (const tick of niceTicks(last, width < 480 ? 4 : 8))
      make("text", { x: x(tick), y: height - bottom + 18, "text-anchor": "middle" }, svg, short(tick));
    make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, svg, "tokens");
    const path = (places, values) => values.map((value, index) => `${x(places[index]).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    make("polyline", { class: "line gate", points: path(steps.tokens, steps.values) }, svg);
    lines.forEach((line, index) =>
      make("polyline", { class: `line s${index}`, points: path(tokens, line.values), "stroke-width": 2.4, style: "fill:none" }, svg),
    );
    if (best !== null) make("line", { class: "cursor", x1: x(tokens[best]), x2: x(tokens[best]), y1: top, y2: height - bottom }, svg);
    const dots = lines.map((_, index) => make("circle", { class: `s${index}`, r: 4.5, visibility: "hidden" }, svg));
    return {
      height,
      start: best === null ? 0 : best,
      at: (px) => tokens.reduce((near, item, index) => (Math.abs(x(item) - px) < Math.abs(x(tokens[near]) - px) ? index : near), 0),
      move: (index, key) =>
        ({ ArrowLeft: Math.max(0, index - 1), ArrowRight: Math.min(tokens.length - 1, index + 1), Home: 0, End: tokens.length - 1 })[key],
      show(index) {
        dots.forEach((dot, line) => {
          for (const [name, value] of [["cx", x(tokens[index])], ["cy", y(lines[line].values[index])], ["visibility", "visible"]])
            dot.setAttribute(name, value);
        });
        const told = lines.map((line) => `${line.name} ${digits(line.values[index])}`).join(" · ");
        const before = steps.tokens.filter((item) => item <= tokens[index]).length - 1;
        const trained = before < 0 ? "" : ` · training loss ${digits(steps.values[before])}`;
        return `After ${tokens[index].toLocaleString("en")} tokens${index === best ? " (saved)" : ""}: ${told}${trained}.`;
      },
    };
  }

  /* ------------------------------------------------------------------------------------------- strip */

  function wireStrip() {
    const readout = document.getElementById("strip-readout");
    readout.classList.add("idle");
    const strips = [...document.querySelectorAll(".strip")].map((strip) => [...strip.children]);
    const tell = (cell) => {
      const block = Number(cell.dataset.block);
      const curve = data.curves && data.curves[0];
      const label = cell.parentElement.dataset.label;
      const name = label === "block" ? `Block ${block}` : `${label[0].toUpperCase()}${label.slice(1)} of block ${block}`;
      const influence = curve ? ` Block influence ${digits(curve.values[block])}.` : "";
      readout.classList.remove("idle");
      readout.textContent = `${name}: ${cell.dataset.said}.${influence}`;
    };
    strips.forEach((cells, row) =>
      cells.forEach((cell, column) => {
        cell.addEventListener("pointerenter", () => tell(cell));
        cell.addEventListener("focus", () => tell(cell));
        cell.addEventListener("keydown", (event) => {
          const next = {
            ArrowLeft: cells[column - 1],
            ArrowRight: cells[column + 1],
            ArrowUp: strips[row - 1] && strips[row - 1][column],
            ArrowDown: strips[row + 1] && strips[row + 1][column],
            Home: cells[0],
            End: cells[cells.length - 1],
          }[event.key];
          if (!next) return;
          event.preventDefault();
          for (const other of next.parentElement.children) other.tabIndex = other === next ? 0 : -1;
          next.focus();
        });
      }),
    );
  }

  /* One cell of each strip stands in the order of the tab key; the arrow keys lead to the others. */
  wireStrip();
  const hint = "Point at the chart, or move with the arrow keys.";
  if (data.curves) {
    const host = document.getElementById("curves");
    chart(host, hint, drawCurves);
    if (data.curves.length > 1) legend(host, data.curves.map((curve, index) => [`s${index}`, curve.name]));
    chart(document.getElementById("heatmap"), hint, drawHeatmap);
  }
  if (data.training) {
    const host = document.getElementById("training");
    chart(host, hint, drawTraining);
    legend(host, [...data.training.lines.map((line, index) => [`s${index}`, line.name]), ["gate", "training loss"]]);
  }
  if (data.gates) {
    const host = document.getElementById("gates");
    chart(host, hint, drawGates);
    legend(host, [["gate out", "removed in the end"], ["gate", "kept"]]);
  }
})();
