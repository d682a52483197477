"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("views");
  const narrow = window.matchMedia("(max-width: 700px)");
  const words = (i) => data.words[i];
  let table = null;

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

  const last = (a, b) => (a[0] === b[0] ? 0 : a[0] === null ? 1 : b[0] === null ? -1 : a[0] - b[0]);
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
    return all.filter((c) => !(narrow.matches && c.minor)).map(({ minor, ...c }) => ({ ...common, ...c }));
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
    return [row.d, row.p, row.a, row.w, row.m, row.t, row.l].map(words).join(" ").toLowerCase();
  }

  function filter() {
    const asked = document.getElementById("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const attack = document.getElementById("attack").value, model = document.getElementById("model").value;
    const keep = (row) =>
      (!attack || words(row.b) === attack) && (!model || words(row.m) === model) && asked.every((word) => text(row).includes(word));
    table.setFilter(keep);
  }

  function draw(view) {
    const found = rows(view), shownColumns = data.columns[view.track + "/" + view.task];
    choose(document.getElementById("attack"), found.map((row) => words(row.b)), "every attack");
    choose(document.getElementById("model"), found.map((row) => words(row.m)), "every model");
    if (table) table.destroy();
    const many = found.length > 14 ? { height: "min(70vh, 720px)" } : {};
    table = new Tabulator("#cells", {
      ...many, data: found, columns: columns(shownColumns), layout: "fitColumns", placeholder: "no cell in this view",
      index: "id",
    });
    const count = (n) => (document.getElementById("count").value = n + " of " + found.length + " cells");
    table.on("dataFiltered", (_, kept) => count(kept.length));
    table.on("tableBuilt", filter);
    table.on("renderComplete", () => performance.getEntriesByName("first-table").length || performance.mark("first-table"));
  }

  function view() {
    const chosen = new FormData(form);
    return { track: chosen.get("track"), task: chosen.get("task"), given: chosen.get("given") };
  }

  function show(write) {
    const now = view();
    for (const section of document.querySelectorAll(".view")) {
      section.classList.toggle("on", section.dataset.track === now.track && section.dataset.task === now.task);
    }
    for (const part of document.querySelectorAll("[data-given]")) {
      part.classList.toggle("hide", now.given !== "any" && part.dataset.given !== now.given);
    }
    if (write) history.replaceState(null, "", "#" + [now.track, now.task, now.given].join("/"));
    draw(now);
  }

  function restore() {
    const asked = decodeURIComponent(location.hash.slice(1)).split("/");
    ["track", "task", "given"].forEach((name, i) => {
      for (const input of form.elements[name]) if (input.value === asked[i]) input.checked = true;
    });
  }

  document.documentElement.classList.add("js");
  restore();
  form.addEventListener("change", () => show(true));
  window.addEventListener("hashchange", () => { restore(); show(false); });
  narrow.addEventListener("change", () => show(false));
  for (const id of ["find", "attack", "model"]) document.getElementById(id).addEventListener("input", filter);
  show(false);
})();
