"use strict";
// Curves of the report: drawn as SVG from the page's own data. A point is [step, MB, accuracy, deviation, loss].
(() => {
  const { methods, colours } = JSON.parse(document.getElementById("data").textContent);
  const [HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [380, 52, 12, 10, 40];
  const get = (id) => document.getElementById(id);
  const chart = get("chart"), hidden = new Set(), filtered = new Set();
  const colour = (number) => colours[number % colours.length];

  function element(name, attributes, parent) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (parent) parent.append(made);
    return made;
  }

  function label(parent, text, attributes) {
    element("text", attributes, parent).textContent = text;
  }

  // Round numbers between two ends: steps of 1, 2 or 5 times a power of ten, `least` at least, or the powers themselves.
  function ticks(low, high, log, least = 0) {
    const found = [];
    if (log) {
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
        for (const digit of high / low > 50 ? [1] : [1, 2, 5]) found.push(digit * 10 ** e);
      }
    } else {
      const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
      const step = Math.max(least, [1, 2, 5, 10].find((digit) => digit * power >= rough) * power);
      for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) found.push(k * step);
    }
    return found.filter((tick) => tick >= low - 1e-9 && tick <= high + 1e-9);
  }

  const short = (number) => Number(number.toPrecision(6)).toLocaleString("en").replaceAll(",", "\u202f");
  let places = [], width = 800;

  function draw() {
    const x = Number(get("x").value), y = Number(get("y").value), log = get("log").checked;
    const splits = get("train").checked ? ["train", "val", "test"] : ["val", "test"];
    places = [];
    methods.forEach((method, number) => {
      if (hidden.has(number) || filtered.has(number)) return;
      for (const split of splits) {
        for (const point of method[split]) {
          if (!log || point[x] > 0) places.push({ number, split, point, across: point[x], up: point[y] });
        }
      }
    });
    chart.replaceChildren();
    width = Math.max(300, chart.clientWidth); // a unit is a pixel, so that text keeps its size on a phone
    const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}` }, chart);
    if (!places.length) {
      label(svg, "nothing to show", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" });
      return;
    }
    const ends = (values) => [Math.min(...values), Math.max(...values)];
    let [left, right] = ends(places.map((place) => place.across));
    let [low, high] = ends(places.flatMap(({ point, up }) => (y === 2 ? [up - point[3], up + point[3]] : [up])));
    if (left === right) [left, right] = log ? [left / 2, right * 2] : [left - 1, right + 1];
    const margin = (high - low || 1) * 0.05;
    [low, high] = [low - margin, high + margin];
    const scale = log ? Math.log10 : (value) => value;
    const toX = (value) => LEFT + ((scale(value) - scale(left)) / (scale(right) - scale(left))) * (width - LEFT - RIGHT);
    const toY = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    for (const tick of ticks(low, high, false)) {
      element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: toY(tick), y2: toY(tick) }, svg);
      label(svg, short(tick), { x: LEFT - 6, y: toY(tick) + 4, "text-anchor": "end" });
    }
    for (const tick of ticks(left, right, log, x ? 0 : 1)) { // there is no half a round
      element("line", { class: "grid", x1: toX(tick), x2: toX(tick), y1: TOP, y2: HEIGHT - BOTTOM }, svg);
      label(svg, short(tick), { x: toX(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" });
    }
    const across = x ? "megabytes sent, all clients" : methods[0].step;
    label(svg, across, { x: (LEFT + width) / 2, y: HEIGHT - 4, "text-anchor": "middle" });
    methods.forEach((method, number) => {
      for (const split of splits) {
        const mine = places.filter((place) => place.number === number && place.split === split);
        for (const place of mine) [place.x, place.y] = [toX(place.across), toY(place.up)];
        if (!mine.length) continue;
        if (split === "test") {
          for (const { x: cx, y: cy } of mine) {
            element("path", { d: `M${cx} ${cy - 6}l6 6l-6 6l-6 -6z`, fill: "none", stroke: colour(number), "stroke-width": 2 }, svg);
          }
          continue;
        }
        if (y === 2 && mine.some(({ point }) => point[3])) {
          const edge = (sign) => mine.map(({ x: at, point, up }) => `${at} ${toY(up + sign * point[3])}`);
          const band = [...edge(1), ...edge(-1).reverse()].join("L");
          element("path", { d: `M${band}z`, fill: colour(number), opacity: 0.18 }, svg);
        }
        const d = `M${mine.map(({ x: at, y: to }) => `${at} ${to}`).join("L")}`;
        const dashes = split === "train" ? "4 4" : "none";
        element("path", { class: "curve", d, fill: "none", stroke: colour(number), "stroke-width": 2, "stroke-dasharray": dashes }, svg);
      }
    });
    svg.addEventListener("pointermove", (event) => point(event, svg));
    svg.addEventListener("pointerleave", () => get("tip")?.remove());
  }

  // The nearest point's numbers, in a box beside it.
  function point(event, svg) {
    const box = svg.getBoundingClientRect(), factor = width / box.width;
    const at = [(event.clientX - box.left) * factor, (event.clientY - box.top) * factor];
    const far = ({ x, y }) => (x - at[0]) ** 2 + (y - at[1]) ** 2;
    const near = places.reduce((best, place) => (far(place) < far(best) ? place : best), places[0]);
    const tip = get("tip") ?? chart.appendChild(Object.assign(document.createElement("div"), { id: "tip" }));
    const [step, sent, accuracy, deviation, loss] = near.point, method = methods[near.number];
    const spread = deviation ? ` \u00b1 ${short(deviation)}` : "";
    tip.textContent = `${method.name}\n${method.step} ${step}, ${short(sent)} MB\n${near.split}: ${short(accuracy)}${spread} %, loss ${short(loss)}`;
    tip.style.left = `${Math.min(near.x / factor + 10, box.width - tip.offsetWidth)}px`;
    tip.style.top = `${Math.max(0, near.y / factor - tip.offsetHeight - 10)}px`;
  }

  methods.forEach((method, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = method.name;
    button.style.setProperty("--of", colour(number));
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const shown = hidden.delete(number) || !hidden.add(number);
      button.setAttribute("aria-pressed", String(shown));
      draw();
    });
    get("legend").append(button);
  });

  const filters = [...document.querySelectorAll("[data-axis]")];
  function filter() {
    methods.forEach((method, number) => {
      const fits = filters.every(({ value, dataset }) => !value || method.point[dataset.axis] === value);
      if (fits) filtered.delete(number); else filtered.add(number);
      const row = document.querySelector(`#methods tr[data-number="${number}"]`);
      if (row) row.hidden = !fits;
      get("legend").children[number].hidden = !fits;
    });
    draw();
  }
  for (const control of filters) control.addEventListener("change", filter);
  for (const id of ["x", "y", "log", "train"]) get(id).addEventListener("change", draw);
  addEventListener("resize", draw);
  draw();
})();
