// The page's only script: the theme, the sliders, and the numbers below the pointer in a chart.
"use strict";

const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];

// Theme: follows the system until the button is pressed.
const root = document.documentElement, button = document.getElementById("theme");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const nameTheme = () => { button.textContent = isDark() ? "Light" : "Dark"; };
button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
nameTheme();

// Sliders: one frame for each step, of which one is shown.
for (const figure of all(".slider")) {
  const input = figure.querySelector("input"), frames = all(".frame", figure);
  input?.addEventListener("input", () => {
    const step = input.dataset.steps.split(" ")[input.value];
    frames.forEach((frame, i) => { frame.hidden = i !== Number(input.value); });
    input.setAttribute("aria-valuetext", `step ${step}`);
    figure.querySelector("output").textContent = Number(step).toLocaleString("en");
  });
}

// As in the tables: see scale.py.
const short = value => Math.abs(value) >= 1e-3 && Math.abs(value) < 10 ? value.toFixed(4) : String(value);

// Charts: data-chart holds the axes and every curve's points.
for (const figure of all(".chart")) {
  const {x, y, box, series} = JSON.parse(figure.dataset.chart);
  const [left, right, top, bottom] = box, plot = figure.querySelector(".plot");
  const values = all(".legend b", figure);  // of the step, then of each curve
  const start = values.map(value => value.textContent);
  const steps = [...new Set(series.flatMap(points => points.map(point => point[0])))].sort((a, b) => a - b);
  const nearest = (list, step, at) => list.reduce((a, b) => Math.abs(at(b) - step) < Math.abs(at(a) - step) ? b : a);
  const across = step => left + (step - x[0]) / (x[1] - x[0]) * (right - left);
  const up = (value, [low, high, log]) => {
    const f = log ? Math.log : Number;
    return bottom - (f(value) - f(low)) / (f(high) - f(low)) * (bottom - top);
  };
  let current = steps.length - 1;

  const show = i => {
    current = Math.max(0, Math.min(steps.length - 1, i));
    const step = steps[current], found = series.map(points =>  // null where a curve has not begun, or has ended
      step < points[0][0] || step > points.at(-1)[0] ? null : nearest(points, step, point => point[0]));
    values[0].textContent = step.toLocaleString("en");
    found.forEach((point, s) => { values[s + 1].textContent = point ? short(point[1]) : "–"; });
    all(".cursor", plot).forEach((cursor, c) => {
      const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      line.setAttribute("d", `M${across(step)} ${top}V${bottom}`);
      const dots = found.filter(point => point && (point[1] > 0 || !y[c][2])).map(point => {
        const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
        for (const [name, value] of [["cx", across(point[0])], ["cy", up(point[1], y[c])], ["r", 3.5]]) dot.setAttribute(name, value);
        return dot;
      });
      cursor.replaceChildren(line, ...dots);
    });
  };
  const hide = () => {
    values.forEach((value, i) => { value.textContent = start[i]; });
    all(".cursor", plot).forEach(cursor => cursor.replaceChildren());
  };

  plot.addEventListener("pointermove", event => {
    const svg = all("svg", plot).find(one => one.getClientRects().length), rect = svg.getBoundingClientRect();
    const unit = (event.clientX - rect.left) / rect.width * svg.viewBox.baseVal.width;
    const step = x[0] + (unit - left) / (right - left) * (x[1] - x[0]);
    show(steps.indexOf(nearest(steps, step, other => other)));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const far = Math.max(1, Math.round(steps.length / 10));
    const to = {ArrowLeft: current - 1, ArrowRight: current + 1, PageUp: current - far, PageDown: current + far,
                Home: 0, End: steps.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}
