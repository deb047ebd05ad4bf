// Draws the page's charts from the data in it, as its controls say.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const form = document.getElementById("controls");
  const status = document.getElementById("status");
  const titles = {};
  form.querySelectorAll("input[name=cost]").forEach((input) => {
    titles[input.value] = input.parentElement.textContent.trim();
  });

  const axis = {
    labelColor: "var(--muted)", titleColor: "var(--ink)", gridColor: "var(--grid)", domainColor: "var(--rule)",
    tickColor: "var(--rule)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8,
  };
  const config = {
    aria: false, background: null, font: "system-ui, sans-serif", axis, view: { stroke: null }, padding: 2,
    axisX: { grid: false, tickCount: 6 }, axisY: { tickCount: 6, domain: false, ticks: false },
  };
  const options = {
    actions: false, renderer: "svg", config,
    tooltip: { theme: "page", sanitize: (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;") },
  };

  const state = () => {
    const given = new FormData(form);
    return { cost: given.get("cost"), log: given.has("log"), shown: new Set(given.getAll("line")) };
  };

  // One column a key -> one object a point.
  const rows = (lines) => lines.flatMap((own) => own.x.map((x, i) => ({
    line: own.line, seeds: own.seeds, x, median: own.median[i], low: own.low[i], high: own.high[i],
  })));

  const drawn = ({ spec, costs, rows: given }, { cost, log, shown }) => {
    const copy = structuredClone(spec);
    let values = costs ? rows(costs[cost]) : given;
    values = values.filter((one) => one.line === undefined || shown.has(one.line));
    if (costs) {
      for (const { encoding } of copy.layer) {
        encoding.x.title = titles[cost];
        if (log) encoding.x.scale = { type: "symlog", constant: 1, nice: false };
        for (const told of encoding.tooltip || []) if (told.field === "x") told.title = titles[cost];
      }
    }
    copy.data = { values };
    return copy;
  };

  const views = new Map();
  const draw = async (only) => {
    const wanted = state();
    for (const [id, figure] of Object.entries(figures)) {
      if (!only(figure)) continue;
      views.get(id)?.finalize();
      const place = document.getElementById(id).firstElementChild; // what is around it says in words what it shows
      views.set(id, await vegaEmbed(place, drawn(figure, wanted), options));
    }
    document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn || 0) + 1);
    return wanted;
  };

  // One drawing at a time; of changes meanwhile the last counts.
  let running = null, waiting = false;
  const redraw = async () => {
    if (running) { waiting = true; return; }
    do {
      waiting = false;
      running = draw((figure) => figure.costs || figure.rows.some((one) => one.line !== undefined));
      const { cost, shown } = await running;
      status.textContent = `${shown.size} shown, against ${titles[cost]}.`;
    } while (waiting);
    running = null;
  };

  form.hidden = false;
  form.addEventListener("change", redraw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw(() => true);
})();
