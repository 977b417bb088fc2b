"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows;
  const size = rows.name.length;
  const tip = document.getElementById("tip");
  const root = document.documentElement;
  const shown = new Set(); // classes that alone are shown; none: all
  const maps = []; // of each layer, what draws it
  const views = {}; // for tests and the console
  window.featureReport = { data, views, maps };

  // What a label or a file name holds is only ever text.
  const make = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") made.className = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  };

  const unpack = (text, Kind) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Kind(bytes.buffer);
  };
  const neighbours = data.neighbours.map((of) => of && {
    per: of.per, rows: unpack(of.rows, Int32Array), cosines: unpack(of.cosines, Int16Array),
  });

  // ---- theme ----
  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let chosenTheme = null;
  const isDark = () => (chosenTheme === null ? systemDark.matches : chosenTheme === "dark");
  const colours = () => {
    const style = getComputedStyle(root);
    const of = (name) => style.getPropertyValue(name).trim();
    return { ink: of("--ink"), paper: of("--paper"), quiet: of("--quiet"), line: of("--line") };
  };
  const config = () => {
    const c = colours();
    const font = getComputedStyle(document.body).fontFamily;
    return {
      background: "transparent", font, view: { stroke: null },
      axis: { labelColor: c.ink, titleColor: c.ink, gridColor: c.line, domainColor: c.quiet, tickColor: c.quiet,
        titleFontWeight: 500, labelFontSize: 11, titleFontSize: 12, gridOpacity: 0.7 },
      legend: { labelColor: c.ink, titleColor: c.ink, titleFontWeight: 500, labelFontSize: 11, titleFontSize: 12 },
      title: { color: c.ink, anchor: "start", fontWeight: 500 }, text: { color: c.ink }, rule: { color: c.ink },
    };
  };
  const applyTheme = () => {
    root.dataset.theme = isDark() ? "dark" : "light";
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
  };
  button.addEventListener("click", () => { chosenTheme = isDark() ? "light" : "dark"; applyTheme(); drawAll(); });
  systemDark.addEventListener("change", () => { if (chosenTheme === null) { applyTheme(); drawAll(); } });

  // ---- samples ----
  const label = (c) => (c === null || c === undefined ? "" : data.classes[c]);
  const isWrong = (i) => rows.predicted !== null && rows.target !== null && rows.predicted[i] !== rows.target[i];
  const truth = (i) => (rows.words ? rows.words[i][0] : rows.target ? label(rows.target[i]) : "");
  const guess = (i) => (rows.words ? rows.words[i][1] : rows.predicted ? label(rows.predicted[i]) : "");
  const number = (v) => (v === null ? "not defined" : String(v).replace("-", "\u2212"));
  const describe = (i) => {
    const parts = [rows.name[i]];
    if (truth(i)) parts.push(`target ${truth(i)}`);
    if (guess(i)) parts.push(`predicted ${guess(i)}`);
    return parts.join(", ");
  };
  const tile = (i, side) => {
    const sheet = data.sheet;
    const at = rows.picture ? rows.picture[i] : -1;
    if (!sheet || at < 0) return null;
    const scale = side / Math.max(sheet.width, sheet.height);
    const rowsOfSheet = Math.ceil(sheet.tiles / sheet.columns);
    const made = make("span", { class: `tile${scale > 1.5 ? " small" : ""}`, role: "img", "aria-label": `picture of ${describe(i)}` });
    made.style.width = `${sheet.width * scale}px`;
    made.style.height = `${sheet.height * scale}px`;
    made.style.backgroundImage = `url(${sheetUrl})`;
    made.style.backgroundSize = `${sheet.columns * sheet.width * scale}px ${rowsOfSheet * sheet.height * scale}px`;
    const x = (at % sheet.columns) * sheet.width * scale;
    const y = Math.floor(at / sheet.columns) * sheet.height * scale;
    made.style.backgroundPosition = `${-x}px ${-y}px`;
    return made;
  };
  // One copy of the sheet in memory, not one in each style.
  let sheetUrl = null;
  if (data.sheet) {
    const [, kind, text] = /^data:([^;]+);base64,(.*)$/.exec(data.sheet.url);
    sheetUrl = URL.createObjectURL(new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], { type: kind }));
    data.sheet.url = "";
  }
  const caption = (i, ...more) => {
    const made = make("figcaption");
    made.append(make("b", {}, rows.name[i]));
    if (truth(i)) made.append(make("br"), truth(i));
    if (guess(i) && (rows.words || isWrong(i))) {
      made.append(make("br"), make("span", rows.words ? {} : { class: "wrong" }, rows.words ? `said ${guess(i)}` : `taken for ${guess(i)}`));
    }
    for (const text of more) made.append(make("br"), text);
    return made;
  };
  const figure = (i, side, ...more) => {
    const made = make("figure", { "data-row": i });
    const picture = tile(i, side);
    if (picture) made.append(picture);
    made.append(caption(i, ...more));
    return made;
  };

  // ---- under the cursor ----
  const hover = (event, i) => {
    if (i === null) { tip.hidden = true; return; }
    const more = rows.loss && rows.loss[i] !== null ? [`loss ${number(rows.loss[i])}`] : [];
    tip.replaceChildren(figure(i, 128, ...more));
    tip.dataset.row = i;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 12 : event.clientX + 16;
    const top = Math.min(event.clientY + 12, innerHeight - box.height - 8);
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  };

  // ---- charts ----
  const embed = (element, spec, extra = {}) => vegaEmbed(element, spec, {
    renderer: "svg", mode: "vega-lite", ast: false, config: config(), tooltip: { theme: isDark() ? "dark" : "light" },
    actions: { export: true, source: false, compiled: false, editor: false }, ...extra,
  });
  const drawPlain = (article, panel) => {
    article.querySelectorAll(".chart").forEach(async (element) => {
      const spec = panel.charts[Number(element.dataset.chart)];
      const title = article.querySelector("h3").textContent;
      const made = await embed(element, { ...structuredClone(spec), autosize: { type: "fit-x", contains: "padding" }, description: title });
      views[`${article.id}/${element.dataset.chart}`] = made.view;
    });
  };
  const drawGallery = (article, panel) => {
    const gallery = article.querySelector(".gallery");
    const some = panel.gallery.filter((entry) => isShown(entry.row));
    gallery.classList.toggle("text", !data.sheet);
    gallery.replaceChildren(...some.map((entry) => figure(entry.row, 96, entry.note)));
    if (!some.length) gallery.append(make("p", { class: "quiet" }, "none"));
  };
  const isShown = (i) => shown.size === 0 || rows.target === null || shown.has(rows.target[i]);

  class SampleMap {
    constructor(article, panel, layer) {
      Object.assign(this, { article, panel, layer, picked: -1, view: null, drawing: 0 });
      this.colour = article.querySelector(".colour");
      this.embedding = article.querySelector(".embedding");
      this.chosen = article.querySelector(".chosen");
      for (const name of Object.keys(panel.colours)) this.colour.append(make("option", { value: name }, name));
      panel.maps.forEach((map, k) => this.embedding.append(make("option", { value: k }, map.name)));
      article.querySelector(".of-map").hidden = panel.maps.length < 2;
      const which = article.querySelector(".which");
      which.addEventListener("change", () => {
        const row = which.value === "" ? -1 : rows.index.indexOf(Number(which.value));
        which.setCustomValidity(row < 0 ? "no sample of this number is on the page" : "");
        if (row >= 0) this.choose(row);
        else which.reportValidity();
      });
      this.colour.addEventListener("change", () => this.draw());
      this.embedding.addEventListener("change", () => this.draw());
      this.legend();
    }
    legend() {
      const legend = this.article.querySelector(".legend");
      if (rows.target === null) { legend.remove(); return; }
      data.classes.forEach((name, c) => {
        if (!data.counts[c]) return;
        const dot = make("span", { class: "dot" });
        dot.style.background = data.palette[c];
        const chip = make("button", { type: "button", "aria-pressed": "false", "data-class": c, title: `${name}: ${data.counts[c]} samples` }, dot, make("span", {}, name));
        chip.addEventListener("click", () => toggle(c));
        legend.append(chip);
      });
      const all = make("button", { type: "button", class: "all" }, "all");
      all.addEventListener("click", () => toggle(null));
      legend.append(all);
    }
    points() {
      const map = this.panel.maps[Number(this.embedding.value) || 0];
      const made = [];
      for (let i = 0; i < size; i++) {
        const point = { i, x: map.x[i], y: map.y[i] };
        if (rows.target) point.c = rows.target[i];
        if (rows.predicted) point.ok = isWrong(i) ? "wrong" : "right";
        if (rows.loss) point.l = rows.loss[i];
        if (rows.values) rows.values[i].forEach((v, k) => { point[`t${k}`] = v; });
        made.push(point);
      }
      return made;
    }
    async draw() {
      const turn = ++this.drawing;
      const map = this.panel.maps[Number(this.embedding.value) || 0];
      const spec = structuredClone(this.panel.spec);
      const c = colours();
      const start = { shown: [...shown], picked: this.picked, near: this.near(), ink: c.ink, paper: c.paper };
      for (const param of spec.params) param.value = start[param.name];
      spec.layer[0].encoding.color = this.panel.colours[this.colour.value];
      if (window.matchMedia("(pointer: fine)").matches) {
        spec.layer[0].params = [{ name: "zoom", select: { type: "interval", zoom: "wheel![event.shiftKey]" }, bind: "scales" }];
      }
      ["x", "y"].forEach((axis, k) => {
        spec.encoding[axis].title = map.axes[k];
        spec.encoding[axis].scale.domain = map.domains[k];
      });
      spec.datasets = { points: this.points() };
      spec.autosize = { type: "fit-x", contains: "padding" };
      spec.height = innerWidth < 600 ? 340 : 460;
      spec.description = `Map of ${size} samples`;
      const element = this.article.querySelector(".chart.map");
      const made = await embed(element, spec, { renderer: size > 1500 ? "canvas" : "svg" });
      if (turn !== this.drawing) { made.finalize(); return; }
      if (this.made) this.made.finalize();
      this.made = made;
      this.view = views[this.article.id] = made.view;
      element.onpointermove = (event) => { if (event.pointerType !== "touch") hover(event, this.at(event)); };
      element.onpointerleave = () => { tip.hidden = true; };
      element.onclick = (event) => {
        const row = event.target.closest("details") ? null : this.at(event);
        if (row !== null) this.choose(row);
      };
    }
    // Where a sample is on the screen; and the sample that is nearest to the pointer, if it is near: fingers are wide.
    place(row) {
      const drawn = this.article.querySelector(".chart.map canvas, .chart.map svg").getBoundingClientRect();
      const map = this.panel.maps[Number(this.embedding.value) || 0];
      const [left, top] = this.view.origin();
      const padding = this.view.padding();
      return [drawn.left + left + padding.left + this.view.scale("x")(map.x[row]), drawn.top + top + padding.top + this.view.scale("y")(map.y[row])];
    }
    at(event) {
      const map = this.panel.maps[Number(this.embedding.value) || 0];
      const [x0, y0] = this.place(0);
      const [sx, sy] = [this.view.scale("x"), this.view.scale("y")];
      const [x, y] = [event.clientX - x0 + sx(map.x[0]), event.clientY - y0 + sy(map.y[0])];
      let best = null;
      let least = event.pointerType === "mouse" ? 100 : 400; // squared pixels
      for (let i = 0; i < size; i++) {
        if (!isShown(i)) continue;
        const distance = (sx(map.x[i]) - x) ** 2 + (sy(map.y[i]) - y) ** 2;
        if (distance < least) { least = distance; best = i; }
      }
      return best;
    }
    near() {
      const of = neighbours[this.layer];
      if (this.picked < 0 || !of) return [];
      return [...of.rows.slice(this.picked * of.per, (this.picked + 1) * of.per)];
    }
    choose(row) {
      this.picked = row;
      this.article.querySelector(".which").value = rows.index[row];
      const of = neighbours[this.layer];
      const near = this.near();
      const list = make("div", { class: "near" });
      near.forEach((other, k) => {
        const cosine = of.cosines[row * of.per + k] / 1e4;
        const go = make("button", { type: "button", "aria-label": `${describe(other)}, cosine ${cosine.toFixed(2)}` }, figure(other, 72, `cosine ${cosine.toFixed(2).replace("-", "\u2212")}`));
        go.addEventListener("click", () => this.choose(other));
        list.append(go);
      });
      const more = rows.loss && rows.loss[row] !== null ? [`loss ${number(rows.loss[row])}`] : [];
      this.chosen.replaceChildren(make("h4", {}, "Chosen sample"), figure(row, 128, ...more),
        make("h4", {}, "Its nearest neighbours"), make("p", { class: "quiet" }, "by the cosine of the centred features, in all directions"), list);
      this.update();
    }
    update() {
      if (!this.view) return;
      this.view.signal("shown", [...shown]).signal("picked", this.picked).signal("near", this.near()).runAsync();
    }
  }

  const toggle = (c) => {
    if (c === null) shown.clear();
    else if (!shown.delete(c)) shown.add(c);
    document.querySelectorAll(".legend").forEach((legend) => {
      legend.classList.toggle("some", shown.size > 0);
      legend.querySelectorAll("[data-class]").forEach((chip) => chip.setAttribute("aria-pressed", String(shown.has(Number(chip.dataset.class)))));
    });
    maps.forEach((map) => map.update());
    document.querySelectorAll("article").forEach((article) => {
      const panel = data.panels[article.id];
      if (panel && panel.gallery) drawGallery(article, panel);
    });
  };

  const drawn = new Set();
  const draw = (article) => {
    const panel = data.panels[article.id];
    drawn.add(article);
    if (panel.maps) {
      let map = maps.find((one) => one.article === article);
      if (!map) maps.push(map = new SampleMap(article, panel, Number(article.id.split("-").pop())));
      map.draw();
    } else if (panel.gallery) drawGallery(article, panel);
    else drawPlain(article, panel);
  };
  const drawAll = () => drawn.forEach(draw);
  applyTheme();
  document.querySelectorAll("article").forEach((article) => {
    const folded = article.closest("details.layer");
    if (!folded || folded.open) draw(article);
    else folded.addEventListener("toggle", () => { if (folded.open && !drawn.has(article)) draw(article); });
  });
})();
