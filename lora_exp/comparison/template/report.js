// The report's behaviour: figures, highlights, sorting, samples, CSV. Texts are only ever set as
// textContent: they are other people's.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const make = (name, text, className) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  // -- figures: drawn when they come near, in the colours of the scheme
  const figures = read("figures");
  const darkColours = read("dark-colours");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();
  const picked = new Set();
  let printing = false;

  const coloured = (value) => {
    if (typeof value === "string") return darkColours[value] ?? value;
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
    return value;
  };
  const faded = (figure, first) => {  // `first`: the place of its first group among all
    const isPicked = (group) => picked.has(first + group);
    if (!picked.size) return figure;
    for (const trace of figure.data) {
      if (trace.meta?.group !== undefined && !isPicked(trace.meta.group)) {
        trace.opacity = 0.1;
        if (trace.fill) trace.fillcolor = "rgba(0,0,0,0)";
      }
      if (trace.meta?.groups)
        trace.marker.opacity = trace.meta.groups.map((group) => (isPicked(group) ? 1 : 0.12));
    }
    return figure;
  };
  const draw = (div) => {
    const copy = structuredClone(figures[div.dataset.figure]);
    const figure = faded(dark.matches && !printing ? coloured(copy) : copy, Number(div.dataset.first));
    const { title, showlegend, ...layout } = figure.layout;  // the page has its own heading and legend
    const top = layout.margin?.t > 60 ? layout.margin.t - 30 : 24;
    Object.assign(layout, {
      showlegend: false, margin: { ...layout.template.layout.margin, ...layout.margin, t: top },
      width: printing ? 680 : undefined,
    });
    div.style.height = `${layout.height}px`;
    drawn.set(div, true);
    return Plotly.react(div, figure.data, layout, {
      responsive: true, displaylogo: false, displayModeBar: "hover",
      modeBarButtons: [["toImage", "resetScale2d"]],
      toImageButtonOptions: { filename: div.dataset.figure, scale: 2 },
    });
  };
  const plots = all(".plot");
  plots.forEach((div) => { div.style.height = `${figures[div.dataset.figure].layout.height}px`; });
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries)
      if (isIntersecting) { near.unobserve(target); draw(target); }
  }, { rootMargin: "600px" });
  plots.forEach((div) => near.observe(div));
  const redraw = () => drawn.forEach((_, div) => draw(div));
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => { printing = true; plots.forEach(draw); });
  addEventListener("afterprint", () => { printing = false; redraw(); });

  // -- highlights: a group's button marks it in every figure
  document.addEventListener("click", ({ target }) => {
    const button = target.closest("button[data-group]");
    if (!button) return;
    const group = Number(button.dataset.group);
    picked.has(group) ? picked.delete(group) : picked.add(group);
    all("button[data-group]").forEach((other) => {
      other.setAttribute("aria-pressed", picked.has(Number(other.dataset.group)));
    });
    redraw();
  });

  // -- tables: sorted by a column, saved as CSV
  const key = (cell) => {
    const value = cell.dataset.value ?? cell.textContent.trim();
    return value === "" || value === "-" ? null : Number.isNaN(Number(value)) ? value : Number(value);
  };
  const order = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  };
  all("table.sortable").forEach((table) => all("thead th", table).forEach((head, column) => {
    const button = make("button", head.textContent);
    button.type = "button";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = all("tbody tr", table).map((row) => [key(row.cells[column]), row]);
      rows.sort(([a], [b]) => (a === null || b === null ? order(a, b) : down ? order(b, a) : order(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  }));
  const quoted = (text) => {
    if (/^[=+@\t-]/.test(text) && Number.isNaN(Number(text))) text = `'${text}`;  // no spreadsheet's formula
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (table) => {  // what stands small below a number is a column of its own
    const noted = new Set(all("small", table).map((note) => note.closest("td").cellIndex));
    const fields = (row) => [...row.cells].flatMap((cell, i) => {
      const value = quoted(cell.dataset.value ?? cell.textContent.trim());
      if (!noted.has(i)) return [value];
      return [value, quoted(row.closest("thead") ? `${cell.textContent.trim()}: interval or spread` : cell.querySelector("small")?.textContent.replaceAll("\n", "; ") ?? "")];
    });
    return all("tr", table).map((row) => fields(row).join(",")).join("\n") + "\n";
  };
  all("button[data-csv]").forEach((button) => button.addEventListener("click", () => {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([csv(document.getElementById(button.dataset.csv))], { type: "text/csv" }));
    link.download = `${button.dataset.csv}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  }));

  // -- samples: chosen runs side by side
  const PAGE = 20;
  const samples = document.getElementById("samples-data") && read("samples-data");
  if (samples) {
    const [table, more, count] = ["samples-table", "samples-more", "samples-count"].map((id) => document.getElementById(id));
    const [show, task, words] = ["samples-show", "samples-task", "samples-words"].map((id) => document.getElementById(id));
    const chosen = () => all("#samples-runs input:checked").map((box) => Number(box.value));
    let limit = PAGE;
    // what all prompts begin and end with is their template: it is said once, above the table
    const shared = (texts) => texts.reduce((left, right) => {
      let length = 0;
      while (length < left.length && left[length] === right[length]) length++;
      return left.slice(0, length);
    });
    const prompts = samples.rows.map((row) => samples.texts[row.prompt]);
    const backwards = (text) => [...text].reverse().join("");
    const start = prompts.length > 1 ? shared(prompts).match(/^[^]*[\n>\]]/)?.[0] ?? "" : "";
    const rests = prompts.map((prompt) => prompt.slice(start.length));
    const end = prompts.length > 1 ? backwards(shared(rests.map(backwards))).match(/[\n<[][^]*$/)?.[0] ?? "" : "";
    const bare = new Map(samples.rows.map((row, i) => [row, rests[i].slice(0, rests[i].length - end.length)]));
    if (start || end) {
      const note = document.getElementById("samples-template");
      note.hidden = false;
      note.querySelector("code").textContent = `${start}…${end}`.replaceAll("\n", "↵");
    }

    const text = (index) => (index < 0 ? "" : samples.texts[index]);
    const fill = (cell, value) => {  // tokens of the template recede
      value.split(/(<\|[^|>]*\|>)/).forEach((part, i) => { if (part) cell.append(i % 2 ? make("span", part, "token") : part); });
      return cell;
    };
    const isRight = (row, answer) => answer >= 0 && text(answer).trim() === text(row.expected).trim();
    const wanted = (row, runs) => {
      const answers = runs.map((run) => row.answers[run]).filter((answer) => answer >= 0);
      const right = answers.filter((answer) => isRight(row, answer)).length;
      if (show.value === "differ" && new Set(answers).size < 2) return false;
      if (show.value === "decide" && !(right > 0 && right < answers.length)) return false;
      if (show.value === "wrong" && right > 0) return false;
      if (task && task.value && row.task !== task.value) return false;
      const word = words.value.toLowerCase();
      return !word || [row.prompt, row.expected, ...answers].some((i) => text(i).toLowerCase().includes(word));
    };
    const render = () => {
      const runs = chosen();
      const rows = samples.rows.filter((row) => wanted(row, runs));
      const head = make("tr");
      for (const label of ["prompt", "expected", ...runs.map((run) => samples.runs[run].label)]) {
        const cell = make("th", label);
        cell.scope = "col";
        head.append(cell);
      }
      runs.forEach((run, i) => head.cells[i + 2].prepend(make("span", String(samples.runs[run].number), `chip ${samples.runs[run].colour}`), " "));
      const body = rows.slice(0, limit).map((row) => {
        const line = make("tr");
        line.append(fill(make("td", undefined, "prompt"), bare.get(row)), fill(make("td"), text(row.expected)));
        for (const run of runs) {
          const answer = row.answers[run];
          const cell = fill(make("td", undefined, samples.runs[run].colour), answer < 0 ? "-" : text(answer));
          if (isRight(row, answer)) { cell.classList.add("right"); cell.title = "as expected"; }
          line.append(cell);
        }
        return line;
      });
      table.tHead.replaceChildren(head);
      table.tBodies[0].replaceChildren(...body);
      count.textContent = `${rows.length} of ${samples.rows.length} prompts`;
      more.hidden = rows.length <= limit;
    };
    for (const input of [show, task, words]) input?.addEventListener("input", () => { limit = PAGE; render(); });
    document.getElementById("samples-runs").addEventListener("change", render);
    more.addEventListener("click", () => { limit += 5 * PAGE; render(); });
    render();
  }

  all("button[data-copy]").forEach((button) => button.addEventListener("click", () => {
    const command = document.getElementById(button.dataset.copy);
    navigator.clipboard?.writeText(command.textContent).then(() => { button.textContent = "Copied"; }, () => {
      getSelection().selectAllChildren(command);
    });
  }));
  const open = () => {  // the run that a link leads to
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  addEventListener("hashchange", open);
  open();
})();
