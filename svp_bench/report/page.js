"use strict";
// Plots, sortable tables, the dialog of records and the switch of published numbers. No request leaves the page: its
// content security policy forbids them. Text from records reaches the document through textContent only.
(async () => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = await read($("#data"));
  const fields = Object.fromEntries(data.pool.fields.map((name, place) => [name, place]));
  const fact = (record, name) => data.pool.values[data.pool.records[record][fields[name]]];

  async function read(script) {
    if (script.dataset.encoding !== "gzip") return JSON.parse(script.textContent);
    if (!window.DecompressionStream) $("#too-old").hidden = false;
    const packed = Uint8Array.from(atob(script.textContent), (character) => character.charCodeAt(0));
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  }

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;"); // for Plotly

  // ---- theme

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const printing = matchMedia("print");
  let onPaper = printing.matches;
  document.documentElement.classList.toggle("paper", onPaper);

  function theme() {
    if (onPaper) return { ink: "#000000", muted: "#444444", grid: "#dddddd" };
    const style = getComputedStyle(document.documentElement);
    return { ink: style.getPropertyValue("--ink").trim(), muted: style.getPropertyValue("--muted").trim(), grid: style.getPropertyValue("--grid").trim() };
  }

  function coloured(value, colours) {
    if (typeof value === "string") return value[0] === "@" ? colours[value.slice(1)] ?? value : value;
    if (Array.isArray(value)) return value.map((item) => coloured(item, colours));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, colours)]));
    return value;
  }

  // ---- plots

  const CONFIG = {
    responsive: true, displaylogo: false, scrollZoom: false, doubleClick: "reset",
    modeBarButtons: [["toImage"]], toImageButtonOptions: { format: "svg" }, // no button that would send a plot anywhere
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  };
  const quoting = () => document.body.classList.contains("quoting");
  const plotted = new Set();

  function figureOf(id) {
    const figure = data.figures[id];
    const quoted = quoting() ? figure.quoted : null;
    return {
      traces: quoted ? (quoted.replace ? quoted.data : [...figure.data, ...quoted.data]) : figure.data,
      layout: quoted ? quoted.layout : figure.layout,
      height: quoted ? quoted.height : figure.height,
    };
  }

  function draw(place) {
    const id = place.dataset.figure;
    if (!id || !place.isConnected) return;
    const figure = figureOf(id);
    place.style.height = `${figure.height}px`;
    show(place, figure.traces, figure.layout, figure.height);
  }

  function show(place, traces, layout, height) {
    const colours = theme();
    const axis = { gridcolor: colours.grid, linecolor: colours.muted, tickcolor: colours.muted, zerolinecolor: colours.grid };
    const base = {
      height, autosize: true, dragmode: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colours.ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { align: "left" },
    };
    const full = { ...base, ...coloured(layout, colours) };
    full.xaxis = { ...axis, ...full.xaxis };
    full.yaxis = { ...axis, ...full.yaxis };
    if (place.clientWidth > 0) full.width = place.clientWidth;
    const first = !plotted.has(place);
    plotted.add(place);
    Plotly.react(place, coloured(traces, colours), full, CONFIG);
    if (first) {
      place.on("plotly_click", (event) => {
        const point = event.points[0];
        const title = point.data.meta?.titles?.[point.pointIndex];
        if (title && point.customdata) open(title, [].concat(point.customdata));
      });
    }
  }

  // Plot what comes near the window; printing plots the rest.
  const waiting = new Set($$("[data-figure]"));
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      if (waiting.delete(entry.target)) draw(entry.target);
    }
  }, { rootMargin: "600px 0px" });
  for (const place of waiting) near.observe(place);

  const visible = (place) => place.offsetParent !== null;
  function drawWaiting() {
    for (const place of [...waiting]) {
      if (visible(place)) {
        waiting.delete(place);
        draw(place);
      }
    }
  }
  function redraw() {
    for (const place of plotted) {
      if (place.dataset.figure) draw(place);
      else place.dispatchEvent(new Event("again"));
    }
  }
  const shade = () => document.documentElement.classList.toggle("dark", dark.matches && !onPaper); // DataTables' own switch
  shade();
  dark.addEventListener("change", () => { shade(); redraw(); });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    requestAnimationFrame(redraw);
  });

  function paper(on) {
    if (onPaper === on) return;
    onPaper = on;
    document.documentElement.classList.toggle("paper", on);
    shade();
    if (on) drawWaiting();
    redraw();
  }
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
  printing.addEventListener("change", (event) => paper(event.matches));

  // ---- switches

  const published = $("#published-switch");
  published.addEventListener("change", () => {
    document.body.classList.toggle("quoting", published.checked);
    redraw();
  });
  document.body.classList.toggle("quoting", published.checked); // a browser may remember the box over a reload

  const openAll = $("#open-all");
  openAll.addEventListener("click", () => {
    const on = openAll.getAttribute("aria-pressed") !== "true";
    openAll.setAttribute("aria-pressed", String(on));
    openAll.textContent = on ? "Close all" : "Open all";
    for (const details of $$("main details")) details.open = on;
  });

  // ---- records

  const TITLES = {
    run_id: "Run", path: "Record", task: "Task", task_version: "Card version", method: "Method", method_args: "Arguments", seed: "Seed",
    kind: "Kind", status: "Status", status_reason: "Reason", created: "Created", metrics: "Metrics", track: "Track", backbone: "Backbone",
    checkpoint: "Checkpoint", checkpoint_digest: "Digest of the weights", protocol: "Protocol", protocol_version: "Protocol version", stage: "Stage", splits: "Splits",
    data_variant: "Data variant", data_status: "Data", data_notes: "Data differ in", data_digest: "Digest of the splits",
    split_digest: "Digest of the test split", config_digest: "Digest of the config", setting_digest: "Digest of the setting", search: "Search",
    package_version: "svp-bench", commit: "Commit", dirty: "Uncommitted changes", libraries: "Libraries", scan_backend: "Scan backend",
    scan_reason: "Reason for the backend", device: "Device", device_count: "Processes", precision: "Precision", parameters: "Parameters",
    times: "Times", epochs: "Epochs", images_per_second: "Training images/s", peak_memory_mib: "Peak memory, MiB", checkpoint_file: "Checkpoint file", cpu: "Processor", threads: "CPU threads",
    package_digest: "Digest of the package", weights_digest: "Digest of the final weights", checkpoint_load: "Changes while loading", card_digests: "Digests of the cards",
    method_source: "Digests of the method files", image_notes: "Skipped or converted images", external_classes: "Classes from outside", not_comparable: "Not comparable because", migrated_from: "Digests before the migration",
  };

  function words(value) {
    if (value === null) return "–";
    if (typeof value === "number") return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6)));
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (Array.isArray(value)) return value.length ? value.map(words).join("; ") : "–";
    if (typeof value === "object") return Object.entries(value).map(([key, item]) => `${key}: ${words(item)}`).join(", ") || "–";
    return value;
  }

  const address = (record) => `${data.root}/${fact(record, "path").split("/").map(encodeURIComponent).join("/")}`;
  const percent = (record) => {
    const top1 = fact(record, "metrics").top1;
    return top1 === undefined ? "no score" : `${top1.toFixed(2)} %`;
  };

  function description(record) {
    const list = element("dl");
    for (const name of data.pool.fields) {
      const value = fact(record, name);
      if (value === null && name !== "checkpoint_digest") continue;
      const detail = element("dd");
      if (name === "path") detail.append(element("a", { href: address(record), textContent: value }));
      else detail.textContent = words(value);
      list.append(element("dt", { textContent: TITLES[name] ?? name }), detail);
    }
    return list;
  }

  const dialog = $("#record-dialog");
  function open(title, records) {
    $("#record-dialog-title").textContent = title;
    const body = $("#record-dialog-body");
    const count = records.length === 1 ? "1 record" : `${records.length} records`;
    body.replaceChildren(element("p", { className: "hint", textContent: `${count}. The link opens the whole record, with its config and one bit a test image.` }));
    for (const record of records) {
      const summary = `${fact(record, "task")}, seed ${fact(record, "seed")}: ${percent(record)}`;
      const details = element("details", { className: "record", open: records.length === 1 }, element("summary", { textContent: summary }));
      const fill = () => details.open && details.childElementCount === 1 && details.append(description(record));
      details.addEventListener("toggle", fill);
      fill();
      body.append(details);
    }
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    $("#record-dialog-title").focus();
  }
  $("#record-dialog-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

  function titleOf(source, record) {
    if (source.dataset.title) return source.dataset.title;
    const named = $(".sr", source); // of a mean: " · records of lora on dtd"
    if (named) return named.textContent.replace(" · records of ", "");
    return `${$("th", source.closest("tr")).textContent.trim()} on ${source.closest("table").dataset.task}, seed ${fact(record, "seed")}`;
  }

  document.addEventListener("click", (event) => {
    const source = event.target.closest("[data-records]");
    if (!source || event.ctrlKey || event.metaKey || event.shiftKey) return; // a link's file opens in a tab as ever
    event.preventDefault();
    const records = source.dataset.records.split(",").filter(Boolean).map(Number);
    if (records.length) open(titleOf(source, records[0]), records);
  });

  // ---- tables

  const missingLast = (compare) => (a, b) => (a === "" || b === "" ? (a === "" ? 1 : 0) - (b === "" ? 1 : 0) : compare(Number(a), Number(b)));
  DataTable.type("score", { order: { asc: missingLast((a, b) => a - b), desc: missingLast((a, b) => b - a) }, className: "num" });
  DataTable.ext.errMode = "throw";

  function sortable(table) {
    const heads = $$("thead th", table);
    const filter = table.dataset.filter;
    const wrapped = new DataTable(table, {
      paging: false, info: false, searching: Boolean(filter), autoWidth: false, order: [],
      layout: { topStart: filter ? "search" : null, topEnd: null, bottomStart: null, bottomEnd: null },
      language: { search: filter ?? "", zeroRecords: "No row fits the filter." },
      columns: heads.map((head) => ({
        orderable: !head.classList.contains("no-sort"),
        type: head.classList.contains("num") ? "score" : "html",
        orderSequence: head.classList.contains("num") ? ["desc", "asc", ""] : ["asc", "desc", ""],
      })),
    });
    return wrapped;
  }
  for (const table of $$("table.sortable")) sortable(table);

  const text = DataTable.render.text();
  new DataTable("#record-table", {
    data: data.pool.records.map((_, place) => place), deferRender: true, pageLength: 25, autoWidth: false, order: [],
    layout: { topStart: "search", topEnd: "pageLength", bottomStart: "info", bottomEnd: "paging" },
    language: { search: "Filter", zeroRecords: "No record fits the filter.", emptyTable: "There are no records." },
    columns: [
      { title: "Task", data: (place) => fact(place, "task"), render: text },
      { title: "Method", data: (place) => fact(place, "method"), render: text },
      { title: "Seed", data: (place) => fact(place, "seed"), className: "num", type: "num" },
      { title: "Top-1", data: (place) => fact(place, "metrics").top1 ?? "", className: "num", type: "score", render: { _: (value) => value, display: (value) => (value === "" ? "–" : value.toFixed(2)) } },
      { title: "Kind", data: (place) => fact(place, "kind"), render: text },
      { title: "Status", data: (place) => fact(place, "status"), render: text },
      { title: "Device", data: (place) => fact(place, "device"), render: text },
      { title: "Created", data: (place) => fact(place, "created").slice(0, 16).replace("T", " "), type: "string", className: "time", render: text },
      { title: "Record", data: (place) => fact(place, "run_id"), render: text, className: "links" },
    ],
    createdRow: (row, place) => {
      const cell = row.lastElementChild;
      const link = element("a", { href: address(place), textContent: fact(place, "run_id") });
      link.dataset.records = place;
      link.dataset.title = `${fact(place, "method")} on ${fact(place, "task")}, seed ${fact(place, "seed")}`;
      cell.replaceChildren(link);
    },
  });

  // ---- learning curves

  const TAGS = { "train/loss": "training loss", "train/top1": "training accuracy", "val/loss": "loss on val", "val/top1": "accuracy on val" };
  const DASHES = ["solid", "dash", "dot", "longdash", "dashdot"];
  for (const controls of $$("[data-curves]")) {
    const suite = controls.dataset.curves;
    const place = document.getElementById(`${suite}-curve`);
    const { sections, runs } = data.curves[suite];
    const [section, task, tag] = ["section", "task", "tag"].map((name) => $(`.curve-${name}`, controls));
    const fill = (select, entries) => {
      const before = select.options.length ? select.value : null;
      select.replaceChildren(...entries.map(([value, textContent]) => element("option", { value, textContent })));
      if (entries.some(([value]) => value === before)) select.value = before;
    };
    const inSection = () => runs.filter((run) => run.section === section.value);
    const onTask = () => inSection().filter((run) => fact(run.record, "task") === task.value);
    const fillTasks = () => fill(task, [...new Set(inSection().map((run) => fact(run.record, "task")))].map((name) => [name, name]));
    const fillTags = () => fill(tag, Object.entries(TAGS).filter(([name]) => onTask().some((run) => run.tags[name])));

    const drawCurves = () => {
      const shown = onTask().filter((run) => run.tags[tag.value]);
      const named = new Set();
      const traces = shown.map((run) => {
        const showlegend = !named.has(run.label);
        named.add(run.label);
        const [x, y] = run.tags[tag.value];
        const name = plain(run.label);
        const seed = fact(run.record, "seed");
        const title = `${run.label} on ${task.value}, seed ${seed}`;
        const dash = DASHES[Math.floor(run.style / data.colours.length) % DASHES.length];
        return {
          type: "scatter", mode: "lines", name, legendgroup: name, showlegend, x, y, opacity: 0.9, hoverinfo: "text",
          line: { color: data.colours[run.style % data.colours.length], width: 1.6, dash },
          hovertext: x.map((step, place) => `${name}, seed ${seed}<br>step ${step}: <b>${y[place]}</b>`),
          customdata: x.map(() => [run.record]), meta: { titles: x.map(() => title) },
        };
      });
      document.getElementById(`${suite}-curve-title`).textContent = `${TAGS[tag.value]}, ${task.value}`;
      show(place, traces, {
        xaxis: { title: { text: "optimizer step", standoff: 8 }, zeroline: false, automargin: true },
        yaxis: { title: { text: TAGS[tag.value], standoff: 10 }, ticksuffix: tag.value.endsWith("top1") ? " %" : "", zeroline: false, automargin: true },
        margin: { l: 10, r: 16, t: 8, b: 40 }, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      }, 440);
      $(`#${CSS.escape(suite)}-curve-table tbody`).replaceChildren(...shown.map((run) => {
        const [steps, values] = run.tags[tag.value];
        return element("tr", {}, element("th", { scope: "row", textContent: run.label }),
          element("td", { className: "num", textContent: fact(run.record, "seed") }),
          element("td", { className: "num", textContent: steps.at(-1) }),
          element("td", { className: "num", textContent: values.at(-1) }));
      }));
    };
    section.addEventListener("change", () => { fillTasks(); fillTags(); drawCurves(); });
    task.addEventListener("change", () => { fillTags(); drawCurves(); });
    tag.addEventListener("change", drawCurves);
    place.addEventListener("again", drawCurves);
    fill(section, Object.entries(sections));
    fillTasks();
    fillTags();
    drawCurves();
  }

  document.documentElement.dataset.ready = "yes";
})();
