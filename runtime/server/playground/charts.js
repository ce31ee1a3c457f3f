// Latency as pictures: a bar for each token's gap while it runs, a line over this tab's runs.
const SHOWN_RUNS = 40, SHOWN_GAPS = 120;

function drawGaps(place, gaps) {
  const shown = gaps.slice(-SHOWN_GAPS), width = 600, height = 34, step = width / SHOWN_GAPS;
  const most = Math.max(quantile(shown, 0.98) || 1, 1e-3);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", height });
  shown.forEach((gap, i) => {
    const tall = Math.max(1.5, Math.min(1, gap / most) * (height - 2));
    drawing.append(svg("rect", { x: (i * step).toFixed(2), y: (height - tall).toFixed(2), width: (step * 0.72).toFixed(2), height: tall.toFixed(2), rx: 0.8 }));
  });
  place.replaceChildren(drawing, element("span", {}, "time of each token"));
}

function niceTop(value) {
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 5, 10].map((factor) => factor * scale).find((top) => top >= value);
}

function chart(title, runs, read, show) {
  const width = 340, height = 150, left = 40, bottom = 18, top = 8;
  const points = runs.slice(-SHOWN_RUNS).map((run, i) => ({ ...run, i, value: read(run) })).filter((p) => p.value !== null && p.value !== undefined);
  const most = niceTop(Math.max(...points.map((p) => p.value), 1e-3));
  const x = (i) => left + 8 + (i * (width - left - 16)) / Math.max(Math.min(runs.length, SHOWN_RUNS) - 1, 9);
  const y = (value) => top + (1 - value / most) * (height - top - bottom);
  const label = points.length ? `${title}: last ${show(points[points.length - 1].value)}, ${points.length} runs` : `${title}: no runs yet`;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
  for (const share of [0, 0.5, 1]) {
    drawing.append(svg("line", { x1: left, x2: width, y1: y(share * most), y2: y(share * most) }));
    if (points.length) drawing.append(svg("text", { x: left - 6, y: y(share * most) + 4, "text-anchor": "end" }, String(+(share * most).toPrecision(3))));
  }
  for (const lane of ["a", "b"]) {
    const own = points.filter((p) => p.lane === lane);
    if (own.length > 1) drawing.append(svg("polyline", { class: lane, points: own.map((p) => `${x(p.i)},${y(p.value)}`).join(" ") }));
    for (const point of own) {
      const dot = svg("circle", { class: lane, cx: x(point.i), cy: y(point.value), r: 3 });
      dot.append(svg("title", {}, `${point.model}: ${show(point.value)}`));
      drawing.append(dot);
    }
  }
  if (!points.length) drawing.append(svg("text", { x: (width + left) / 2, y: height / 2, "text-anchor": "middle" }, "no runs yet"));
  else drawing.append(svg("text", { x: left, y: height - 3 }, "earlier"), svg("text", { x: width, y: height - 3, "text-anchor": "end" }, "later"));
  const figure = element("figure", {}, element("figcaption", {}, title));
  figure.append(drawing);
  return figure;
}
