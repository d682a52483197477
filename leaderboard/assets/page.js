"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("views");
  const narrow = window.matchMedia("(max-width: 700px)");
  const words = (i) => data.words[i];
  const FILTERS = ["find", "attack", "model"];
  let table = null;
  let hidden = new Set(); // titles of columns that are not shown
  let order = null; // [title of a column, "asc" or "desc"]

  function element(tag, text, cls) {
    const made = document.createElement(tag);
    made.textContent = text; // text only: names come from strangers
    if (cls) made.className = cls;
    return made;
  }

  function shown(number, column) {
    if (!number || number[0] === null) return "n/a";
    return (number[0] * (column.percent ? 100 : 1)).toFixed(column.digits);
  }

  function ends(number, column) {
    if (!number || number[1] === null || number[1] === undefined) return "";
    return [number[1], number[2]].map((x) => shown([x], column)).join("–");
  }

  /* A column title is a button, so that it can be reached and pressed from the keyboard; its click sorts. */
  const heading = (cell) => element("button", cell.getValue());

  function named(cell) {
    const row = cell.getRow().getData(), box = document.createElement("div");
    const link = element("a", words(row.d));
    link.href = "cells/" + row.id + ".html";
    box.append(link, element("span", words(row.p), "sub"));
    box.title = words(row.d) + " " + words(row.p);
    return box;
  }

  function place(cell) {
    const row = cell.getRow().getData(), box = document.createElement("div");
    box.append(element("span", words(row.a)), element("span", words(row.w), "sub"));
    box.title = words(row.a) + " " + words(row.w);
    return box;
  }

  function measured(column) {
    return (cell) => {
      const number = cell.getValue(), box = document.createElement("div"), row = cell.getRow().getData();
      box.append(element("span", row.e === undefined ? shown(number, column) : words(row.e)));
      const range = ends(number, column);
      if (range) box.append(element("span", range, "ends"));
      return box;
    };
  }

  /* What was not measured stands last in both directions; for "desc" Tabulator swaps the sides. */
  function last(a, b, aRow, bRow, column, dir) {
    const end = dir === "asc" ? 1 : -1;
    return a[0] === b[0] ? 0 : a[0] === null ? end : b[0] === null ? -end : a[0] - b[0];
  }
  const byWord = (a, b) => words(a).localeCompare(words(b));
  const plain = (cell) => element("span", words(cell.getValue()));

  function columns(shownColumns) {
    const common = { titleFormatter: heading, headerSortTristate: true };
    const all = [
      { title: "Defense", field: "d", formatter: named, sorter: byWord, widthGrow: 3, minWidth: 130 },
      { title: "Attack", field: "a", formatter: place, sorter: byWord, widthGrow: 3, minWidth: 110 },
      { title: "Model", field: "m", formatter: plain, sorter: byWord, minWidth: 110, minor: true },
      { title: "Knowledge", field: "t", formatter: plain, sorter: byWord, widthGrow: 2, minWidth: 110, minor: true },
    ];
    shownColumns.forEach((column, i) =>
      all.push({
        title: column.title, field: "f" + i, formatter: measured(column), hozAlign: "right", headerHozAlign: "right",
        sorter: last, cssClass: "num", minWidth: column.digits > 2 ? 116 : 84, minor: i > 1 || column.minor,
      }),
    );
    all.push(
      { title: "Seeds", field: "s", hozAlign: "right", headerHozAlign: "right", width: 72, minor: true },
      { title: "Doubts", field: "q", hozAlign: "right", headerHozAlign: "right", width: 78, minor: true },
      { title: "Checked", field: "l", formatter: plain, sorter: byWord, width: 116, minor: true },
    );
    const fitting = all.filter((c) => !(narrow.matches && c.minor));
    const kept = fitting.filter((c) => c.field === "d" || !hidden.has(c.title));
    return { titles: fitting.slice(1).map((c) => c.title), kept: kept.map(({ minor, ...c }) => ({ ...common, ...c })) };
  }

  /* The columns that can be hidden, each with a box; the first one names the row and stays. */
  function offer(titles) {
    document.getElementById("columns").replaceChildren(
      ...titles.map((title) => {
        const label = element("label", ""), box = document.createElement("input");
        box.type = "checkbox";
        box.checked = !hidden.has(title);
        box.addEventListener("change", () => {
          if (box.checked) hidden.delete(title);
          else hidden.add(title);
          show(true);
        });
        label.append(box, element("span", title));
        return label;
      }),
    );
  }

  function rows(view) {
    return data.rows
      .filter((row) => row.r === view.track && row.v[view.task] !== undefined)
      .filter((row) => view.given === "any" || row.c || row.k === (view.given === "given"))
      .map((row) => {
        const made = Object.assign({}, row);
        row.v[view.task].forEach((number, i) => (made["f" + i] = number));
        return made;
      });
  }

  function choose(select, values, name) {
    const before = select.value;
    select.replaceChildren(element("option", name));
    select.firstChild.value = "";
    Array.from(new Set(values)).sort().forEach((value) => select.append(element("option", value)));
    select.value = before;
    if (select.selectedIndex < 0) select.value = "";
  }

  function text(row) {
    return [row.d, row.p, row.a, row.b, row.w, row.m, row.t, row.l].map(words).join(" ").toLowerCase();
  }

  function filter() {
    const asked = document.getElementById("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const attack = document.getElementById("attack").value, model = document.getElementById("model").value;
    const keep = (row) =>
      (!attack || words(row.b) === attack) && (!model || words(row.m) === model) && asked.every((word) => text(row).includes(word));
    table.setFilter(keep);
  }

  /* The address holds the whole view: what is shown, the filters, the order and the hidden columns. */
  function remember() {
    const now = view(), more = new URLSearchParams();
    for (const id of FILTERS) if (document.getElementById(id).value) more.set(id, document.getElementById(id).value);
    if (order) more.set("sort", order.join(" "));
    for (const title of hidden) more.append("hide", title);
    const query = more.toString();
    history.replaceState(null, "", "#" + [now.track, now.task, now.given].join("/") + (query ? "?" + query : ""));
  }

  function draw(view, asked) {
    const found = rows(view), shownColumns = data.columns[view.track + "/" + view.task];
    choose(document.getElementById("attack"), found.map((row) => words(row.b)), "every attack");
    choose(document.getElementById("model"), found.map((row) => words(row.m)), "every model");
    if (asked) for (const id of FILTERS) pick(document.getElementById(id), asked.get(id) || "");
    if (table) table.destroy();
    const { titles, kept } = columns(shownColumns);
    offer(titles);
    const sorted = order && kept.find((column) => column.title === order[0]);
    const many = found.length > 14 ? { height: "min(70vh, 720px)" } : {};
    table = new Tabulator("#cells", {
      ...many, data: found, columns: kept, layout: "fitColumns", placeholder: "no cell in this view", index: "id",
      initialSort: sorted ? [{ column: sorted.field, dir: order[1] }] : [],
    });
    const count = (n) => (document.getElementById("count").value = n + " of " + found.length + " cells");
    table.on("dataFiltered", (_, kept) => count(kept.length));
    table.on("tableBuilt", () => {
      filter();
      table.on("dataSorted", (sorters) => {
        order = sorters.length ? [sorters[0].column.getDefinition().title, sorters[0].dir] : null;
        remember();
      });
    });
    table.on("renderComplete", () => performance.getEntriesByName("first-table").length || performance.mark("first-table"));
  }

  function pick(field, value) {
    field.value = value;
    if (field.selectedIndex < 0) field.value = "";
  }

  function view() {
    const chosen = new FormData(form);
    return { track: chosen.get("track"), task: chosen.get("task"), given: chosen.get("given") };
  }

  function show(write, asked) {
    const now = view();
    for (const section of document.querySelectorAll(".view")) {
      section.classList.toggle("on", section.dataset.track === now.track && section.dataset.task === now.task);
    }
    for (const part of document.querySelectorAll("[data-given]")) {
      part.classList.toggle("hide", now.given !== "any" && part.dataset.given !== now.given);
    }
    if (write) remember();
    draw(now, asked);
  }

  /* Take the view from the address; a link to a place on the page changes nothing. */
  function restore() {
    const [path, query] = location.hash.slice(1).split(/\?(.*)/s), parts = decoded(path).split("/");
    if (parts.length !== 3) return null;
    ["track", "task", "given"].forEach((name, i) => {
      for (const input of form.elements[name]) if (input.value === parts[i]) input.checked = true;
    });
    const asked = new URLSearchParams(query || ""), sort = (asked.get("sort") || "").match(/^(.+) (asc|desc)$/);
    hidden = new Set(asked.getAll("hide"));
    order = sort ? [sort[1], sort[2]] : null;
    return asked;
  }

  function decoded(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return "";
    }
  }

  document.documentElement.classList.add("js");
  form.addEventListener("change", () => show(true));
  window.addEventListener("hashchange", () => {
    const asked = restore();
    if (asked) show(false, asked);
  });
  narrow.addEventListener("change", () => show(false));
  for (const id of FILTERS) document.getElementById(id).addEventListener("input", () => { filter(); remember(); });
  show(false, restore());
})();
