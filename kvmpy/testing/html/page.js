// SPDX-License-Identifier: Apache-2.0
// Everything below makes elements and text nodes; no text of a report is ever parsed as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const WORDS = { pass: "passed", fail: "failed", skip: "skipped", xfail: "failed as expected", lost: "lost" };
  const ORDER = Object.keys(WORDS);
  const BAD = new Set(["fail", "lost"]);
  const CARDS = 12; // failures that are listed at once
  const PAGE = 250; // rows that are made at once
  const SVG = "http://www.w3.org/2000/svg";
  const $ = (id) => document.getElementById(id);

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "on") for (const [event, what] of Object.entries(value)) node.addEventListener(event, what);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  }
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  const seconds = (value) => (value >= 100 ? `${value.toFixed(0)} s` : value >= 1 ? `${value.toFixed(1)} s` : `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`);
  const many = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
  const badge = (verdict) => h("span", { class: `badge v-${verdict}` }, h("span", { class: "glyph", "aria-hidden": "true" }), h("span", { class: "skip-link" }, WORDS[verdict]));
  const runOf = (column) => data.runs[column.run];
  const columnName = (column) => (data.runs.length > 1 ? `${runOf(column).name}, ${column.name}` : column.name);
  // What a verdict of this column stands for, when that is less than hardware.
  const marks = (column) => [runOf(column).platform !== "host" ? `platform ${runOf(column).platform}` : "", column.label].filter(Boolean);

  // ---- one verdict in full

  function codeText(text) {
    const pre = h("pre", { tabindex: "0" });
    for (const line of text.split("\n")) {
      const kind = /^(---|===) /.test(line) ? "section" : /^E {2}/.test(line) ? "bad" : "";
      pre.append(kind ? h("span", { class: kind }, line) : line, "\n");
    }
    return pre;
  }

  function tailTable(entries) {
    const threads = new Set(entries.map((entry) => entry.thread)).size > 1;
    const head = ["ms", ...(threads ? ["thread"] : []), "on", "ioctl", "result", "argument"];
    return h("div", { class: "scroll", tabindex: "0" }, h("table", { class: "tail" },
      h("thead", {}, h("tr", {}, head.map((word) => h("th", { scope: "col" }, word)))),
      h("tbody", {}, entries.map((entry) => h("tr", { class: entry.failed ? "failed" : undefined },
        h("td", { class: "num" }, entry.ms.toFixed(3)),
        threads ? h("td", { class: "num" }, String(entry.thread)) : null,
        h("td", {}, entry.fd),
        h("td", {}, entry.ioctl + (entry.count > 1 ? ` ×${entry.count}` : "")),
        h("td", {}, entry.result),
        h("td", { class: "arg" }, entry.meaning ? h("div", { class: "meaning" }, entry.meaning) : null, entry.arg))))));
  }

  function part(cell) {
    const column = data.columns[cell.c];
    const run = runOf(column);
    const body = h("div", { class: `part v-${cell.v}` },
      h("div", { class: "head" },
        h("b", {}, `${columnName(column)}: ${WORDS[cell.v]}`), h("span", { class: "muted" }, seconds(cell.d)),
        marks(column).map((mark) => h("span", { class: "tag warn" }, mark))));
    if (cell.rep) body.append(h("p", { class: cell.flaky ? "text-bad" : "muted" }, `${cell.flaky ? "flaky" : "repeated"}: ${cell.rep}`));
    if (cell.missing) {
      for (const [what, how] of cell.missing) {
        body.append(h("p", { class: "why" }, what, how ? h("span", { class: "how" }, ` — get it: ${how}`) : null));
      }
    } else if (cell.reason) body.append(h("p", { class: "why" }, cell.reason));
    if (BAD.has(cell.v)) {
      const words = run.platform === "host" ? "kvmpy run" : "kvmpy lab run";
      body.append(h("h3", {}, "again"), h("code", {}, `${words} '${cell.id}'${cell.flaky ? " --repeat 10" : ""} --seed ${run.seed}`));
    }
    if (cell.pm) body.append(h("h3", {}, "post-mortem"), codeText(cell.pm));
    if (cell.io) {
      const table = tailTable(cell.io);
      body.append(h("h3", {}, `last ioctls before it failed (${cell.io.length}), the latest at the end`), table);
      requestAnimationFrame(() => { table.scrollTop = table.scrollHeight; });
    }
    if (cell.maps) {
      body.append(h("h3", {}, "guest memory"));
      const open = BAD.has(cell.v);
      for (const [name, number] of cell.maps) {
        const made = h("details", { open }, h("summary", {}, name));
        made.append(memoryMap(data.maps[number]));
        body.append(made);
      }
    }
    if (cell.details && !(cell.pm && cell.details.length < 200)) {
      body.append(h("details", { open: !cell.pm }, h("summary", {}, "as pytest prints it"), codeText(cell.details)));
    }
    return body;
  }

  // ---- guest memory as a picture

  const hex = (number) => `0x${number.toString(16)}`;
  const size = (bytes) => {
    for (const [unit, length] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024]]) if (bytes >= length) return `${+(bytes / length).toFixed(2)} ${unit}`;
    return `${bytes} B`;
  };
  const MAPPING = /^(\S+) (\S+) (\S+) (\S+) (\S+) ?(.*)$/;

  function swatch(kind, mark) {
    const shapes = [s("rect", { width: 14, height: 14, rx: 2, class: kind })];
    if (mark === "bit") shapes.push(s("circle", { cx: 7, cy: 7, r: 2.5, class: "mark" }));
    if (mark === "odd") shapes.push(s("rect", { x: 1, y: 1, width: 12, height: 12, class: "odd" }));
    if (mark === "big") shapes.push(s("rect", { x: 1, y: 1, width: 12, height: 12, class: "big" }));
    return s("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, shapes);
  }

  function memoryMap(map) {
    const box = h("div", { class: "map" });
    if (!map.segments) return fill(box, {}, [h("p", { class: "facts" }, `no map: ${map.hidden}`)]);
    const pair = (line) => line.split(" ").map(Number);
    const bit = map.encryption;
    const mappings = map.mappings.map((line) => {
      const [, gva, gpa, length, page, kind, flags] = line.match(MAPPING);
      return { gva, gpa: Number(gpa), end: Number(gpa) + Number(length), page: Number(page), kind, flags };
    }).sort((a, b) => a.gpa - b.gpa);
    const privates = map.private.map(pair).map(([gpa, length]) => ({ gpa, end: gpa + length })).sort((a, b) => a.gpa - b.gpa);
    const total = map.segments.reduce((sum, line) => sum + pair(line)[1], 0);
    const kept = privates.reduce((sum, run) => sum + run.end - run.gpa, 0);
    const facts = [`protection ${map.protection}${map.label ? ` (${map.label})` : ""}`, `VM type ${map.type}`, many(map.vcpus, "vCPU"), `${size(total)}, ${size(kept)} of it private`, bit || "no encryption bit", map.launched ? "" : "not launched"];
    box.append(h("p", { class: "facts" }, facts.filter(Boolean).join(" · ")));
    if (map.hidden) box.append(h("p", { class: "facts" }, `page tables hidden: ${map.hidden}`));
    const word = bit ? bit.split(" ")[0] : "bit";
    const legend = [];
    if (kept) legend.push([swatch("private"), "private"]);
    legend.push([swatch(kept ? "shared" : "plain"), kept ? "shared" : "mapped"], [swatch(`faint ${kept ? "shared" : "plain"}`), "not mapped by the guest"]);
    if (bit) legend.push([swatch("private", "bit"), `${word} set in the page table`], [swatch("private", "odd"), `${word} and book disagree`]);
    if (mappings.some((one) => one.page > 4096)) legend.push([swatch("plain", "big"), "2 MiB page"]);
    box.append(h("div", { class: "legend" }, legend.map(([picture, text]) => h("span", {}, picture, text))));
    const narrow = window.innerWidth < 640;
    for (const line of map.segments) box.append(picture(...pair(line), mappings, privates, bit, kept > 0, narrow));
    if (map.cut) box.append(h("p", { class: "facts" }, "cut short: the VM has more runs than are told"));
    if (map.mappings.length) {
      const head = "gva, gpa, size, page size, private, flags";
      box.append(h("details", {}, h("summary", {}, `${many(map.mappings.length, "mapping")} as text`), codeText([head, ...map.mappings].join("\n"))));
    }
    return box;
  }

  const find = (runs, address) => {
    let low = 0;
    let high = runs.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (runs[middle].end <= address) low = middle + 1;
      else high = middle;
    }
    return low < runs.length && runs[low].gpa <= address ? runs[low] : null;
  };

  function picture(start, length, mappings, privates, bit, anyPrivate, narrow) {
    const wide = narrow ? 32 : 64; // pages in a line
    const cell = narrow ? 9 : 12;
    const left = narrow ? 84 : 104;
    const step = wide * 4096;
    const end = start + length;
    const base = Math.floor(start / step) * step;
    const cuts = new Set([base, Math.ceil(end / step) * step]);
    for (const run of [...mappings, ...privates, { gpa: start, end }]) {
      for (const edge of [run.gpa, run.end]) {
        if (edge < start || edge > end) continue;
        cuts.add(Math.floor(edge / step) * step);
        cuts.add(Math.ceil(edge / step) * step);
      }
    }
    const edges = [...cuts].sort((a, b) => a - b);
    const shapes = [];
    let y = 2;
    const state = (address) => {
      const mapping = find(mappings, address);
      const isPrivate = find(privates, address) !== null;
      const kind = isPrivate ? "private" : anyPrivate ? "shared" : "plain";
      const set = mapping !== null && mapping.kind === "private";
      return { mapping, kind, set, odd: mapping !== null && bit !== "" && set !== isPrivate };
    };
    const told = (address, span, one) => `${hex(address)}, ${size(span)}: ${one.kind === "plain" ? "" : `${one.kind}, `}${one.mapping ? `${one.mapping.page > 4096 ? size(one.mapping.page) : "4 KiB"} page of gva ${one.mapping.gva}… ${one.mapping.flags}` : "not mapped"}${one.set ? ", bit set" : ""}${one.odd ? ", the encryption bit disagrees" : ""}`;
    const band = (from, to) => {
      const one = state(from);
      const label = `${size(to - from)}${one.mapping ? ` in ${one.mapping.page > 4096 ? size(one.mapping.page) : "4 KiB"} pages` : " not mapped"}`;
      shapes.push(s("rect", { x: left, y: y + 1, width: wide * cell, height: 9, rx: 2, class: `${one.mapping ? "" : "faint "}${one.kind}` }, s("title", {}, told(from, to - from, one))));
      shapes.push(s("text", { x: 0, y: y + 9 }, hex(from)), s("text", { x: left + wide * cell + 6, y: y + 9 }, narrow ? size(to - from) : label));
      y += 14;
    };
    const lineOf = (from) => {
      for (let at = 0; at < wide; at += 1) {
        const address = from + at * 4096;
        if (address < start || address >= end) continue;
        const one = state(address);
        const joined = one.mapping !== null && one.mapping.page > 4096;
        const x = left + at * cell;
        // Pages of one large page have no gaps between them: a line of them is one shape.
        const span = joined && address % step === 0 && address + step <= Math.min(end, one.mapping.end) && !one.odd ? wide : 1;
        shapes.push(s("rect", { x, y, width: joined ? span * cell : cell - 1, height: joined ? cell + 0.3 : cell - 1, class: `${one.mapping ? "" : "faint "}${one.kind}` }, s("title", {}, told(address, span * 4096, one))));
        if (joined && address % one.mapping.page === 0) bigs.push({ x, y, page: one.mapping.page, set: one.set });
        at += span - 1;
        if (one.set && !joined) shapes.push(s("circle", { cx: x + (cell - 1) / 2, cy: y + (cell - 1) / 2, r: cell / 6, class: "mark" }));
        if (one.odd) shapes.push(s("rect", { x: x + 0.8, y: y + 0.8, width: cell - 2.6, height: cell - 2.6, class: "odd" }));
      }
      shapes.push(s("text", { x: 0, y: y + cell - 3 }, hex(from)));
      y += cell;
    };
    const bigs = [];
    for (let number = 0; number + 1 < edges.length; number += 1) {
      const [from, to] = [edges[number], edges[number + 1]];
      const one = state(Math.max(from, start));
      const huge = one.mapping !== null && one.mapping.page > 4096;
      const lines = (to - from) / step;
      if (lines > 1 && !(huge && lines <= (4 * 2097152) / step)) band(Math.max(from, start), Math.min(to, end));
      else for (let line = from; line < to; line += step) lineOf(line);
    }
    for (const big of bigs) {
      const lines = Math.min(2097152, big.page) / step;
      shapes.push(s("rect", { x: big.x + 0.7, y: big.y + 0.7, width: wide * cell - 1.4, height: lines * cell - 1.4, class: "big" }));
      if (big.set) shapes.push(s("circle", { cx: big.x + (wide * cell) / 2, cy: big.y + (lines * cell) / 2, r: cell / 2, class: "mark" }));
    }
    const width = left + wide * cell + (narrow ? 68 : 190);
    const label = `guest memory from ${hex(start)}, ${size(length)}; the same is told below as text`;
    return s("svg", { viewBox: `0 0 ${width} ${y + 4}`, role: "img", "aria-label": label }, shapes);
  }

  // ---- the table

  const count = data.columns.length;
  document.documentElement.style.setProperty("--count", count);
  if (count > 14) document.documentElement.style.setProperty("--cell", "1.7rem");
  let slowest = 0.001;
  for (const row of data.rows) {
    row.time = row.cells.reduce((sum, cell) => sum + cell.d, 0);
    slowest = Math.max(slowest, row.time);
    row.byColumn = new Map(row.cells.map((cell) => [cell.c, cell]));
    row.bad = row.cells.some((cell) => BAD.has(cell.v));
    row.text = [row.id, row.promise, ...row.cells.flatMap((cell) => [cell.reason || "", ...(cell.missing || []).flat()])].join("\n").toLowerCase();
  }
  const firstOfRun = new Set(data.columns.map((column, at) => (at && column.run !== data.columns[at - 1].run ? at : -1)));

  function header() {
    const line = $("columns");
    line.append(h("span", {}));
    const emulated = data.runs.filter((run) => run.platform !== "host");
    if (data.runs.length > 1 || emulated.length) {
      data.runs.forEach((run, number) => {
        const width = data.columns.filter((column) => column.run === number).length;
        if (width) line.append(h("span", { class: `group${run.platform === "host" ? "" : " emulated"}`, style: `grid-column: span ${width}`, title: `${run.kernel}, ${run.cpu}` }, run.name));
      });
      line.append(h("span", {}), h("span", {}));
    }
    data.columns.forEach((column, at) => {
      line.append(h("span", { class: `col${column.label ? " emulated" : ""}`, title: [columnName(column), ...marks(column)].join("; ") }, column.name + (column.label ? " *" : "")));
      if (firstOfRun.has(at)) line.lastChild.classList.add("first");
    });
    line.append(h("span", { class: "time" }, "duration"));
    const notes = new Set(data.columns.filter((column) => column.label).map((column) => `* ${column.name}: ${column.label}`));
    for (const run of emulated) notes.add(`${run.name}: emulated platform ${run.platform}`);
    if (notes.size) line.after(h("p", { class: "muted", id: "notes" }, [...notes].join(" · ")));
  }

  function cellOf(cell, at) {
    const first = firstOfRun.has(at) ? " first" : "";
    if (!cell) return h("span", { class: `cell empty${first}`, "aria-hidden": "true" }, "·");
    const label = columnName(data.columns[at]);
    const text = `${label}: ${WORDS[cell.v]}${cell.flaky ? ` (flaky: ${cell.rep})` : ""}, ${[seconds(cell.d), ...marks(data.columns[at])].join(", ")}${cell.reason ? `: ${cell.reason}` : ""}`;
    return h("span", { class: `cell v-${cell.v}${cell.flaky ? " flaky" : ""}${first}`, role: "img", "aria-label": text, title: text }, h("span", { class: "glyph", "aria-hidden": "true" }), h("span", { class: "label", "aria-hidden": "true" }, label));
  }

  function rowOf(row) {
    if (row.element) return row.element;
    const [file, ...rest] = row.id.split("::");
    const name = rest.length
      ? h("span", { class: "id" }, h("span", {}, `${file.slice(file.lastIndexOf("/") + 1)}::`), rest.join("::"))
      : h("span", { class: "id" }, file);
    const button = h("button", { type: "button", class: "name nav", "aria-expanded": "false", title: row.id, on: { click: () => unfold() } },
      name, row.promise ? h("span", { class: "promise" }, row.promise) : null);
    const bar = h("span", { class: `bar${row.time > 0.3 * slowest ? " slow" : ""}` }, h("i", {}), seconds(row.time));
    bar.firstChild.style.width = `${Math.max(2, Math.sqrt(row.time / slowest) * 70)}px`;
    const line = h("div", { class: "row" }, button, data.columns.map((_, at) => cellOf(row.byColumn.get(at), at)), bar);
    const unfold = () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      line.classList.toggle("open", open);
      if (open) {
        const worst = [...row.cells].sort((a, b) => BAD.has(b.v) - BAD.has(a.v) || a.c - b.c);
        line.after(h("div", { class: "panel" }, worst.map((cell) => part(cell))));
      } else if (line.nextElementSibling?.classList.contains("panel")) line.nextElementSibling.remove();
    };
    row.element = line;
    return line;
  }

  function fold(row) {
    const button = row.element?.querySelector(".name");
    if (button?.getAttribute("aria-expanded") === "true") button.click();
  }

  function put(container, rows, from) {
    container.append(...rows.slice(from, from + PAGE).map(rowOf));
    if (rows.length > from + PAGE) {
      const more = h("button", { type: "button", class: "more nav", on: { click: () => { more.remove(); put(container, rows, from + PAGE); } } },
        `${many(rows.length - from - PAGE, "more line")}: show the next ${Math.min(PAGE, rows.length - from - PAGE)}`);
      container.append(more);
    }
  }

  // ---- filter

  const wanted = new Set();
  const opened = new Map(); // area -> whether the reader opened or closed it
  const TERM = /^(-?)(?:(area|p|k|v):)?(.+)$/;

  function matcher(text) {
    const terms = text.trim().toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
      const slow = word.match(/^>([\d.]+)s?$/);
      if (slow) return (row) => row.time > Number(slow[1]);
      const [, not, field, value] = word.match(TERM) || [null, "", undefined, word];
      const has = (row) => {
        if (field === "area") return row.area.toLowerCase().startsWith(value);
        if (field === "p") return row.cells.some((cell) => data.columns[cell.c].name.toLowerCase().startsWith(value));
        if (field === "k") return row.cells.some((cell) => runOf(data.columns[cell.c]).name.toLowerCase().includes(value));
        if (field === "v") return row.cells.some((cell) => cell.v === value);
        return row.text.includes(value);
      };
      return not ? (row) => !has(row) : has;
    });
    return (row) => terms.every((term) => term(row)) && (!wanted.size || row.cells.some((cell) => wanted.has(cell.v)));
  }

  function areaOf(name, rows, open) {
    const counts = {};
    for (const row of rows) for (const cell of row.cells) counts[cell.v] = (counts[cell.v] || 0) + 1;
    const seen = ORDER.filter((verdict) => counts[verdict]);
    const body = h("div", { class: "area-body", hidden: !open });
    const spent = rows.reduce((sum, row) => sum + row.time, 0);
    const head = h("button", { type: "button", class: "area-head nav", "aria-expanded": String(open), on: { click: () => {
      const now = head.getAttribute("aria-expanded") !== "true";
      opened.set(name, now);
      toggle(now);
    } } },
    h("span", { class: "fold", "aria-hidden": "true" }, "›"), h("b", {}, name),
    h("span", { class: "bits" }, many(rows.length, "test"), seen.map((verdict) => h("i", { class: `v-${verdict}`, title: WORDS[verdict] }, h("span", { class: "glyph" }), ` ${counts[verdict]}`))),
    h("span", { class: "spring" }),
    h("span", { class: "stack", "aria-hidden": "true" }, seen.map((verdict) => h("i", { class: `v-${verdict}`, style: `flex-grow:${counts[verdict]}` }))),
    h("span", { class: "bits" }, seconds(spent)));
    const toggle = (now) => {
      head.setAttribute("aria-expanded", String(now));
      body.hidden = !now;
      if (now && !body.childElementCount) put(body, rows, 0);
    };
    if (open) put(body, rows, 0);
    return h("section", { class: "area", "aria-label": name }, head, body);
  }

  function show() {
    const text = $("search").value;
    const filtered = text.trim() !== "" || wanted.size > 0;
    const rows = data.rows.filter(matcher(text));
    for (const row of data.rows) fold(row);
    const list = $("rows");
    if ($("order").value === "slow") {
      const sorted = [...rows].sort((a, b) => b.time - a.time);
      list.replaceChildren();
      put(list, sorted, 0);
    } else {
      const areas = new Map();
      for (const row of rows) areas.set(row.area, [...(areas.get(row.area) || []), row]);
      const few = rows.length <= 60 || (filtered && rows.length <= 400);
      list.replaceChildren(...[...areas.keys()].sort().map((name) => {
        const mine = areas.get(name);
        return areaOf(name, mine, opened.get(name) ?? (few || mine.some((row) => row.bad)));
      }));
    }
    $("shown").textContent = filtered ? `${rows.length.toLocaleString("en")} of ${many(data.rows.length, "test")}` : many(data.rows.length, "test");
    if (!rows.length) list.append(h("p", { class: "muted" }, "No test matches. Esc shows everything again."));
    for (const chip of document.querySelectorAll(".chip")) chip.setAttribute("aria-pressed", String(wanted.has(chip.dataset.verdict)));
  }

  const choose = (verdict, only) => {
    if (only) {
      const alone = wanted.size === 1 && wanted.has(verdict);
      wanted.clear();
      if (!alone) wanted.add(verdict);
    } else if (!wanted.delete(verdict)) wanted.add(verdict);
    opened.clear();
    show();
  };

  // ---- lists beside the table

  function lazy(summary, make, open) {
    const made = h("details", { open }, h("summary", { class: "nav" }, summary));
    const once = () => { if (made.open && made.childElementCount === 1) made.append(make()); };
    made.addEventListener("toggle", once);
    once();
    return made;
  }

  function listOf(section, entries) {
    if (!entries.length) return;
    $(section).hidden = false;
    $(section).querySelector(".list").append(...entries);
  }

  function lists() {
    const bad = [];
    const skipped = new Map();
    const expected = new Map();
    const into = (map, key, value) => map.set(key, [...(map.get(key) || []), value]);
    for (const row of data.rows) {
      for (const cell of row.cells) {
        const name = `${cell.id}${data.runs.length > 1 ? ` (${runOf(data.columns[cell.c]).name})` : ""}`;
        if (BAD.has(cell.v)) bad.push([row, cell]);
        if (cell.v === "xfail") into(expected, cell.reason, name);
        if (cell.v === "skip") for (const [what, how] of cell.missing || [[cell.reason || "", ""]]) into(skipped, JSON.stringify([what, how]), name);
      }
    }
    const cards = bad.map(([row, cell]) => () => lazy(
      [badge(cell.v), h("span", { class: "mono" }, row.id), " ", h("span", { class: "tag" }, columnName(data.columns[cell.c])), marks(data.columns[cell.c]).map((mark) => [" ", h("span", { class: "tag warn" }, mark)]).flat(), h("span", { class: "reason" }, cell.reason || "")],
      () => part(cell), bad.length === 1));
    listOf("attention", cards.slice(0, CARDS).map((make) => make()));
    if (cards.length > CARDS) {
      const more = h("button", { type: "button", class: "nav", on: { click: () => more.replaceWith(...cards.slice(CARDS).map((make) => make())) } }, `show ${many(cards.length - CARDS, "more failure")}`);
      $("attention").querySelector(".list").append(more);
    }
    const names = (all) => h("ul", {}, all.map((name) => h("li", { class: "mono" }, name)));
    const sorted = (map) => [...map].sort((a, b) => b[1].length - a[1].length);
    listOf("skips", sorted(skipped).map(([key, all]) => {
      const [what, how] = JSON.parse(key);
      return lazy([h("span", { class: "count" }, String(all.length)), what || "without a reason", how ? h("span", { class: "reason" }, `get it: ${how}`) : null], () => names(all));
    }));
    listOf("expected", sorted(expected).map(([reason, all]) => lazy([h("span", { class: "count" }, String(all.length)), reason], () => names(all))));
  }

  // ---- keys and theme

  const visible = (selector) => [...document.querySelectorAll(selector)].filter((node) => node.offsetParent !== null);

  function move(step, nodes) {
    if (!nodes.length) return;
    const here = nodes.indexOf(document.activeElement);
    let next = here + step;
    if (here < 0) {
      const at = nodes.findIndex((node) => node.getBoundingClientRect().top > 60);
      next = step > 0 ? Math.max(at, 0) : Math.max(at - 1, 0);
    }
    const node = nodes[Math.min(Math.max(next, 0), nodes.length - 1)];
    node.focus();
    node.scrollIntoView({ block: "nearest" });
  }

  const failing = () => visible(".row").filter((line) => line.querySelector(".v-fail, .v-lost")).map((line) => line.querySelector(".name"));

  function theme(name, keep) {
    document.documentElement.dataset.theme = name;
    try {
      if (keep) localStorage.setItem("kvmpy-theme", name);
    } catch { /* a page from a file may have no storage */ }
  }

  function everything() {
    $("search").value = "";
    wanted.clear();
    opened.clear();
    show();
  }

  function unfoldAll() {
    const heads = [...document.querySelectorAll(".area-head")];
    const open = heads.some((head) => head.getAttribute("aria-expanded") !== "true");
    for (const head of heads) if ((head.getAttribute("aria-expanded") === "true") !== open) head.click();
    $("fold").textContent = open ? "fold all" : "unfold all";
  }

  const KEYS = {
    "/": () => $("search").focus(),
    j: () => move(1, visible(".nav")), ArrowDown: () => move(1, visible(".nav")),
    k: () => move(-1, visible(".nav")), ArrowUp: () => move(-1, visible(".nav")),
    n: () => move(1, failing()), p: () => move(-1, failing()),
    e: unfoldAll, t: () => $("theme").click(), "?": () => $("help").showModal(), Escape: everything,
  };
  ORDER.forEach((verdict, at) => { KEYS[String(at + 1)] = () => choose(verdict, true); });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (typing && event.key === "Escape") {
      everything();
      event.target.blur();
    } else if (typing && event.target === $("search") && event.key === "ArrowDown") {
      event.preventDefault();
      move(1, visible("#rows .nav"));
    } else if (!typing && KEYS[event.key]) {
      // Inside a scrolling box the arrows scroll it.
      if (event.key.startsWith("Arrow") && event.target.closest?.("pre, .scroll")) return;
      event.preventDefault();
      KEYS[event.key]();
    }
  });

  let stored = null;
  try { stored = localStorage.getItem("kvmpy-theme"); } catch { /* see theme() */ }
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  theme(stored || (dark.matches ? "dark" : "light"), false);
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light", false));
  $("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark", true));
  $("help-button").addEventListener("click", () => $("help").showModal());
  $("fold").addEventListener("click", unfoldAll);
  $("order").addEventListener("change", show);
  let timer = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { opened.clear(); show(); }, 80);
  });
  for (const chip of document.querySelectorAll(".chip")) chip.addEventListener("click", () => choose(chip.dataset.verdict, false));

  header();
  lists();
  show();
  const place = () => document.documentElement.style.setProperty("--tools", `${document.querySelector(".tools").offsetHeight - 1}px`);
  place();
  window.addEventListener("resize", place);
  document.documentElement.dataset.ready = "yes";
})();
