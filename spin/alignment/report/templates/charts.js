// The charts: measures over the iterations, metrics over the steps of training, lengths of responses. Drawn by uPlot.
const charts = (() => {
  const all = []; // every chart as {figure, draw, plot, isDrawn}; one that is not drawn still shows its old plot, if any
  let timer = null;

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const seriesColor = (index) => color(`series-${index % 8}`);

  function short(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
  }

  function axis(values, extra = {}) {
    return {
      stroke: () => color("quiet"),
      grid: { stroke: () => color("line"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
      values,
      ...extra,
    };
  }

  // Adds a chart: its series are {label, values, dashed, steps, intervals}, drawn over the numbers xs.
  function add(box, title, xs, series, { xLabel, xAxis = axis((_, ticks) => ticks.map(short)), xRange }) {
    const figure = element("figure", { class: "chart", role: "group", "aria-label": title });
    figure.append(element("figcaption", {}, title));
    box.append(figure);
    const draw = () => {
      const options = {
        width: figure.clientWidth - 26,
        height: 210,
        cursor: { drag: { x: true, y: false }, points: { size: 7 } },
        scales: { x: { time: false, ...(xRange ? { range: xRange } : {}) }, y: { range: (_, low, high) => yRange(series, low, high) } },
        axes: [{ size: 34, ...xAxis }, axis((_, ticks) => ticks.map(short), { size: 56 })],
        series: [{ label: xLabel.name, value: (_, x) => (x === null ? "" : `: ${xLabel.text(x)}`) }, ...series.map(style)],
        hooks: { draw: [(plot) => drawIntervals(plot, series)] },
      };
      const plot = new uPlot(options, [xs, ...series.map((item) => item.values)], figure);
      makeLegendUsable(figure, plot);
      return plot;
    };
    all.push({ title, series, figure, draw, plot: null, isDrawn: false });
    drawSoon();
  }

  // Charts are drawn one at a time, so that the page can be read and scrolled meanwhile.
  function drawSoon() {
    timer ??= setTimeout(() => {
      timer = null;
      const waiting = all.find((chart) => !chart.isDrawn);
      if (!waiting) return;
      waiting.plot?.destroy();
      waiting.plot = waiting.draw();
      waiting.isDrawn = true;
      drawSoon();
    });
  }

  function style(item, index) {
    return {
      label: item.label,
      stroke: seriesColor(item.color ?? index),
      width: item.dashed ? 1.5 : 2,
      dash: item.dashed ? [3, 4] : undefined,
      spanGaps: true,
      paths: item.steps ? uPlot.paths.stepped({ align: 1 }) : undefined,
      points: { show: !item.dashed && !item.steps && item.values.length < 30, size: 6 },
      value: (_, value) => (value === null || value === undefined ? "" : `: ${short(value)}`),
    };
  }

  // The y range takes in the intervals, and 0 if it is near.
  function yRange(series, low, high) {
    const ends = series.flatMap((item) => item.intervals ?? []).filter(Boolean).flat();
    let [least, most] = [Math.min(low ?? 0, ...ends), Math.max(high ?? 1, ...ends)];
    if (least > 0 && least < 0.4 * most) least = 0;
    const margin = (most - least || Math.abs(most) || 1) * 0.08;
    return [least === 0 ? 0 : least - margin, most + margin];
  }

  function drawIntervals(plot, series) {
    const context = plot.ctx;
    series.forEach((item, index) => {
      if (!item.intervals || !plot.series[index + 1].show) return;
      context.save();
      context.strokeStyle = seriesColor(item.color ?? index);
      context.lineWidth = 1.5 * devicePixelRatio;
      context.setLineDash([]);
      item.intervals.forEach((interval, position) => {
        if (!interval) return;
        const x = plot.valToPos(plot.data[0][position], "x", true);
        const [bottom, top] = interval.map((value) => plot.valToPos(value, "y", true));
        const cap = 4 * devicePixelRatio;
        context.beginPath();
        context.moveTo(x, bottom);
        context.lineTo(x, top);
        for (const y of [bottom, top]) {
          context.moveTo(x - cap, y);
          context.lineTo(x + cap, y);
        }
        context.stroke();
      });
      context.restore();
    });
  }

  // A click on a name hides its curve; so does Enter.
  function makeLegendUsable(figure, plot) {
    figure.querySelectorAll(".u-series").forEach((row, index) => {
      if (index === 0) return;
      const name = row.querySelector("th");
      name.tabIndex = 0;
      name.setAttribute("role", "button");
      name.setAttribute("aria-pressed", "true");
      name.title = "show or hide this curve";
      const tell = () => name.setAttribute("aria-pressed", String(plot.series[index].show));
      name.addEventListener("click", () => setTimeout(tell));
      name.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        plot.setSeries(index, { show: !plot.series[index].show });
        tell();
      });
    });
  }

  function clear(box) {
    for (const chart of all.filter(({ figure }) => box.contains(figure))) {
      chart.plot?.destroy();
      all.splice(all.indexOf(chart), 1);
    }
    box.replaceChildren();
  }

  function redraw() {
    for (const chart of all) chart.isDrawn = false;
    drawSoon();
  }

  theme.onChange(redraw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) redraw();
    width = innerWidth;
  });
  // For scripts and tests: whether every chart is drawn, and the values of one by label of its curves.
  const areDrawn = () => all.every((chart) => chart.isDrawn);
  const dataOf = (title) => Object.fromEntries(all.find((chart) => chart.title === title).series.map((item) => [item.label, item.values]));
  return { add, axis, clear, areDrawn, dataOf };
})();

// Measures over the iterations: one chart for each, one curve for each run, the control as a dotted line.
(() => {
  const box = document.getElementById("progress-charts");
  if (!box) return;
  const runs = report.runs.map((name) => ({ name, rows: report.rows.filter((row) => row.run === name) }));
  const isInLine = (row) => row.role === "start" || row.role === "policy";
  const order = (row) => (row.role === "start" ? -1 : (row.iteration ?? Infinity));
  const inLine = report.rows.filter(isInLine).sort((one, other) => (order(one) < order(other) ? -1 : order(one) > order(other) ? 1 : 0));
  const names = [...new Set(inLine.map((row) => row.label))];
  const positions = names.map((_, index) => index);
  const xAxis = charts.axis((_, ticks) => ticks.map((tick) => names[tick] ?? ""), { splits: () => positions, gap: 6 });

  // The curves of a run: self-play; SPIN without the token weights, at the iteration it belongs to; the control, a constant.
  function curvesOf(run, number, key) {
    const curve = (label, rows, placeOf, color) => {
      const at = (name) => names.map((place) => rows.find((row) => placeOf(row) === place)?.[name] ?? null);
      return { label, values: at(key), intervals: at(`${key}_interval`), color };
    };
    const line = run.rows.filter(isInLine);
    const placeOfIteration = (row) => line.find((other) => other.role === "policy" && other.iteration === row.iteration)?.label;
    const plain = run.rows.filter((row) => row.role === "unweighted");
    const control = run.rows.find((row) => row.role === "control" && row[key] !== undefined);
    const named = (text) => `${run.name} ${text}`.trim();
    return [
      curve(run.name || "self-play", line, (row) => row.label, number),
      curve(named("without weights"), plain, placeOfIteration, number + 3),
      ...(control ? [{ label: named(control.label), values: names.map(() => control[key]), dashed: true, color: 7 - number }] : []),
    ].filter((item) => item.values.some((value) => value !== null));
  }

  function addOver(title, series) {
    if (!series.length) return;
    charts.add(box, title, positions, series, {
      xAxis,
      xLabel: { name: "model", text: (x) => names[x] },
      xRange: () => [-0.35, Math.max(0.35, names.length - 0.65)],
    });
  }

  // The scores of groups of prompts, or the parts of a metric: one curve for each, of self-play only.
  function breakdownOf({ kind, key, names: parts }) {
    const places = runs.flatMap((run) => parts.map((part) => ({ run, part })));
    return places.map(({ run, part }, color) => {
      const own = names.map((place) => run.rows.find((row) => isInLine(row) && row.label === place)?.[kind][part]);
      const at = (name) => own.map((found) => found?.[name] ?? null);
      return { label: `${run.name} ${part}`.trim(), values: at(key), intervals: at(`${key}_interval`), color };
    }).filter((item) => item.values.some((value) => value !== null));
  }

  for (const [key, title] of report.measures) addOver(title, runs.flatMap((run, number) => curvesOf(run, number, key)));
  for (const chart of report.breakdowns) addOver(chart.title, breakdownOf(chart));
})();

// Metrics over the steps of training: one chart for each, one curve for each model.
(() => {
  const box = document.getElementById("training-charts");
  const choice = document.getElementById("training-axis");
  if (!box) return;
  const { titles, models } = report.training;
  const numbers = Object.fromEntries(Object.keys(models).map((name, index) => [name, index]));

  function draw() {
    charts.clear(box);
    const offsets = {};
    let offset = 0;
    for (const [name, curves] of Object.entries(models)) {
      offsets[name] = choice.value === "joined" ? offset : 0;
      offset += Math.max(...Object.values(curves).map(([steps]) => steps[steps.length - 1]));
    }
    for (const [key, title] of Object.entries(titles)) {
      const having = Object.keys(models).filter((name) => models[name][key]);
      const tables = having.map((name) => [models[name][key][0].map((step) => step + offsets[name]), models[name][key][1]]);
      const [xs, ...columns] = tables.length > 1 ? uPlot.join(tables) : tables[0];
      const series = having.map((name, index) => ({ label: name, values: columns[index], color: numbers[name], dashed: numbers[name] >= 8 }));
      charts.add(box, title, xs, series, { xLabel: { name: "step", text: String } });
    }
  }

  choice.addEventListener("change", draw);
  draw();
})();

// Lengths of held-out responses: a histogram for each temperature, one outline for each model.
(() => {
  const box = document.getElementById("length-charts");
  if (!box) return;
  for (const [temperature, { edges, models }] of Object.entries(report.lengths)) {
    const series = Object.entries(models).map(([name, shares]) => ({ label: name, values: [...shares, null], steps: true }));
    const title = `Length in tokens, ${temperature === "0" ? "greedy" : `T=${temperature}`} (share of responses)`;
    charts.add(box, title, edges, series, { xLabel: { name: "tokens", text: (x) => `${x}+` } });
  }
})();
