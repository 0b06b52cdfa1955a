"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// The tip beside the marker that the pointer or the focus is on.
const tip = document.getElementById("tip");
function show(text, box) {
  const [head, ...lines] = text.split("\n"), title = document.createElement("b");
  title.textContent = head;
  tip.replaceChildren(title, lines.length ? "\n" + lines.join("\n") : "");
  const width = tip.offsetWidth, height = tip.offsetHeight;
  const left = box.right + 8 + width < innerWidth ? box.right + 8 : Math.max(4, box.left - width - 8);
  tip.style.left = Math.max(4, Math.min(left, innerWidth - width - 4)) + "px";
  tip.style.top = Math.max(4, Math.min(box.top - 10, innerHeight - height - 4)) + "px";
  tip.style.visibility = "visible";
}
const hide = () => { tip.style.visibility = "hidden"; };
const tell = (point) => show(point.ariaLabel, (point.querySelector(".spot") ?? point).getBoundingClientRect());
for (const point of all(".point")) {
  const title = point.querySelector("title");
  point.ariaLabel = title.textContent;
  title.remove(); // the tip takes its place
  const own = point.closest(".tradeoff") ? [] : ["mouseenter", "click"]; // there the nearest point is found, below
  for (const event of ["focus", ...own]) point.addEventListener(event, () => tell(point));
  for (const event of ["blur", ...(own.length ? ["mouseleave"] : [])]) point.addEventListener(event, hide);
}
addEventListener("scroll", () => { // what has the focus may just have been scrolled to
  if (document.activeElement.matches(".point")) tell(document.activeElement);
  else hide();
}, {passive: true, capture: true});
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

// Filters: what is not ticked goes from charts and tables, and the Pareto fronts are those of the rest.
const boxes = all(".filters input"), state = document.querySelector(".state");
const members = all("[data-revive]"), charts = all(".tradeoff");
const shown = (element) => !element.classList.contains("off");

function front(points) {
  const known = points.map((point) => ({point, cost: Number(point.dataset.cost), gain: Number(point.dataset.gain)}));
  known.sort((one, two) => one.cost - two.cost || two.gain - one.gain);
  let best = {cost: NaN, gain: -Infinity};
  return new Set(known.filter((one) => {
    const on = one.gain > best.gain || (one.gain === best.gain && one.cost === best.cost); // equal points are on it together
    if (on) best = one;
    return on;
  }).map((one) => one.point));
}

function redraw(chart) {
  const points = all(".point", chart), on = front(points.filter(shown));
  for (const point of points) point.classList.toggle("front", on.has(point));
  const corners = [...on].map((point) => point.dataset.at.split(" ").map(Number)).sort((one, two) => one[0] - two[0]);
  const steps = corners.map(([x, y], index) => (index ? `H${x}V${y}` : `M${x} ${y}`));
  chart.querySelector(".frontier").setAttribute("d", steps.join(""));
  enter(chart, [...on][0] ?? points.find(shown));
}

function filter() {
  const off = boxes.filter((box) => !box.checked);
  for (const one of members) one.classList.toggle("off", off.some((box) => one.dataset[box.dataset.axis] === box.value));
  charts.forEach(redraw);
  const rows = all("table.grid")[0] ? all("tbody tr", all("table.grid")[0]) : [];
  state.querySelector("output").textContent = `${rows.filter(shown).length} of ${rows.length} shown.`;
  state.querySelector("button").disabled = off.length === 0;
  hide();
}
for (const box of boxes) {
  box.hidden = false;
  box.checked = true; // a browser may remember another state
  box.addEventListener("change", filter);
}
state?.querySelector("button").addEventListener("click", () => {
  for (const box of boxes) box.checked = true;
  filter();
  boxes[0].focus();
});

// Pointer and finger find the nearest point.
function nearest(chart, event) {
  let found = null, least = 24; // pixels
  for (const point of all(".point", chart).filter(shown)) {
    const box = point.querySelector(".spot").getBoundingClientRect();
    const far = Math.hypot(event.clientX - (box.left + box.right) / 2, event.clientY - (box.top + box.bottom) / 2);
    if (far < least) [found, least] = [point, far];
  }
  return found;
}
function mark(chart, point) {
  for (const other of all(".near", chart)) other.classList.remove("near");
  point?.classList.add("near");
  if (point) tell(point);
  else hide();
}
for (const chart of charts) {
  for (const event of ["pointermove", "click"]) chart.addEventListener(event, (one) => mark(chart, nearest(chart, one)));
  chart.addEventListener("pointerleave", () => mark(chart, null));
}

// One stop of the tab key for each chart; within it arrows: left and right by cost, up and down by what it is traded for.
function enter(chart, point) {
  for (const other of all(".point", chart)) other.setAttribute("tabindex", other === point ? "0" : "-1");
}
for (const chart of charts) {
  chart.addEventListener("keydown", (event) => {
    const by = {ArrowRight: "cost", ArrowLeft: "cost", ArrowUp: "gain", ArrowDown: "gain", Home: "cost", End: "cost"}[event.key];
    if (!by) return;
    event.preventDefault(); // the page does not scroll
    const points = all(".point", chart).filter(shown).sort((one, two) => one.dataset[by] - two.dataset[by]);
    const step = ["ArrowRight", "ArrowUp"].includes(event.key) ? 1 : -1, last = points.length - 1;
    const place = {Home: 0, End: last}[event.key] ?? points.indexOf(document.activeElement) + step;
    const next = points[Math.max(0, Math.min(last, place))];
    enter(chart, next);
    next.focus();
  });
}
if (state) {
  state.hidden = false;
  filter();
}

// Tables sort by the button in a column's head: upwards, then downwards; what was not measured stays last.
for (const table of all("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    body.append(...[...body.rows].sort((one, two) => {
      const a = value(one), b = value(two);
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return sign * (Number(a) - Number(b) || a.localeCompare(b, "en"));
    }));
  }));
}

// A link to a variant opens its story.
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let one = target; one; one = one.parentElement) if (one.tagName === "DETAILS") one.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", reveal);
reveal();
