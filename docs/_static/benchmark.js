/* The form of the benchmark's page: what it chooses becomes signals of the two charts, and a table of numbers. */
document.addEventListener("DOMContentLoaded", async () => {
  "use strict";
  const data = window.fastoptBenchmark;
  const form = document.getElementById("benchmark-form");
  const { run, title, workload } = form.elements;

  /* Offer these; say whether what was chosen before is among them, and so stays chosen. */
  const options = (select, entries) => {
    const before = select.value;
    select.replaceChildren(...entries);
    const stays = [...select.options].some((one) => one.value === before);
    if (stays) select.value = before;
    return stays;
  };
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  const distinct = (values) => [...new Set(values)];
  const rows = () => data.runs[run.value].rows;

  const chooseTitle = () => options(title, distinct(rows().map((row) => row.title)).map((name) => option(name, name)));
  const chooseWorkload = () => {
    const groups = [];
    for (const [section, words] of Object.entries(data.sections)) {
      const measured = rows().filter((row) => row.title === title.value && row.section === section);
      if (measured.length) {
        const group = Object.assign(document.createElement("optgroup"), { label: words });
        group.append(...distinct(measured.map((row) => row.label)).map((label) => option(`${section}/${label}`, label)));
        groups.push(group);
      }
    }
    if (!options(workload, groups)) {
      const curve = groups[0].children; // far beyond the caches, if it was measured there
      workload.value = ([...curve].find((one) => one.label === "5e7") ?? curve[curve.length - 1]).value;
    }
  };
  const choosePeers = () => {
    const present = new Set(Object.values(data.runs).flatMap((one) => one.rows.map((row) => row.contestant)));
    for (const [name, colour] of Object.entries(data.colours)) {
      if (!present.has(name)) continue;
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", name: "peer", value: name });
      box.checked = true;
      const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
      swatch.style.background = name === data.ours ? "currentColor" : colour;
      label.append(box, swatch, name);
      document.getElementById("benchmark-peers").append(label);
    }
  };
  const peers = () => [...form.querySelectorAll("input[name=peer]:checked")].map((box) => box.value);

  const draw = async (name) => {
    const embedded = await window.vegaEmbed(`#benchmark-${name}`, data[name], { renderer: "svg", actions: false });
    return embedded.view;
  };
  const digits = (value) => (value >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3))));
  const time = (ns) => {
    for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["us", 1e3]]) if (ns >= size) return `${digits(ns / size)} ${unit}`;
    return `${digits(ns)} ns`;
  };
  const cell = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
  const tabulate = (chosen) => {
    const body = document.getElementById("benchmark-table").tBodies[0];
    body.replaceChildren(
      ...chosen.map((row) => {
        const line = document.createElement("tr");
        const texts = [time(row.median), `${time(row.q1)} to ${time(row.q3)}`, digits(row.median / row.parameters)];
        texts.push(digits((row.bytes * row.parameters) / row.median), row.contestant === data.ours ? "" : digits(row.faster));
        const name = row.noisy ? `${row.contestant} (noisy)` : row.contestant;
        line.append(Object.assign(cell("th", name), { scope: "row" }), ...texts.map((text) => cell("td", text)));
        return line;
      })
    );
  };

  options(run, Object.entries(data.runs).map(([name, one]) => option(name, `${name}: ${one.machine}`)));
  chooseTitle();
  title.value = decodeURIComponent(location.hash.slice(1)) || "Adam";
  if (!title.value) title.value = "Adam";
  chooseWorkload();
  choosePeers();
  const views = [await draw("curve"), await draw("bars")];

  const show = async () => {
    const [section, ...rest] = workload.value.split("/");
    const label = rest.join("/");
    const signals = { title: title.value, peers: peers(), section, label };
    const [curve, bars] = views;
    for (const view of views) {
      view.data("rows", rows()).signal("title", signals.title).signal("peers", signals.peers);
    }
    bars.signal("section", section).signal("label", label);
    await Promise.all([curve.runAsync(), bars.runAsync()]);
    const chosen = rows().filter(
      (row) => row.title === title.value && row.section === section && row.label === label && signals.peers.includes(row.contestant)
    );
    document.getElementById("benchmark-where").textContent = chosen[0]?.where ? `The arrays lie in: ${chosen[0].where}.` : "";
    tabulate(chosen.sort((a, b) => a.median - b.median));
  };
  form.addEventListener("change", (event) => {
    if (event.target === run) chooseTitle();
    if (event.target === run || event.target === title) chooseWorkload();
    history.replaceState(null, "", `#${encodeURIComponent(title.value)}`);
    show();
  });
  show();
});
