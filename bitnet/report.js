// Reads values off the charts and heat maps under the pointer. The page says everything else without it.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const short = value => {
    const size = Math.abs(value);
    if (size >= 1e4) return Math.round(value).toLocaleString("en");
    return size && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
  };
  const written = (form, value) => form === "percent" ? +(100 * value).toPrecision(4) + "%" : short(value);
  const numbers = text => text.split(",").map(Number);

  const points = path => path.known ??= path.getAttribute("d").slice(1).split("L").map(part => part.split("h")[0].split(" ").map(Number));

  function place(event) {
    tip.style.display = "block";
    const { width, height } = tip.getBoundingClientRect();
    const left = event.clientX + 16 + width > innerWidth ? event.clientX - width - 16 : event.clientX + 16;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY - 12, innerHeight - height - 8)) + "px";
  }

  function row(name, value, css) {
    const line = document.createElement("div"), left = document.createElement("span"), right = document.createElement("span");
    left.textContent = name;
    left.className = css;
    right.textContent = value;
    line.append(left, right);
    return line;
  }

  function heading(text) {
    const head = document.createElement("b");
    head.textContent = text;
    return head;
  }

  function inPicture(svg, event) {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    return [(event.clientX - box.left) / box.width * view.width, (event.clientY - box.top) / box.height * view.height];
  }

  for (const svg of document.querySelectorAll("svg.chart")) {
    const [left, top, width, height] = numbers(svg.dataset.box);
    const [x0, x1] = numbers(svg.dataset.x), [y0, y1] = numbers(svg.dataset.y), log = svg.dataset.log === "1";
    const rule = document.createElementNS(svg.namespaceURI, "path");
    rule.setAttribute("class", "pointer");
    const value = y => {
      const share = 1 - (y - top) / height;
      return log ? y0 * (y1 / y0) ** share : y0 + (y1 - y0) * share;
    };
    svg.addEventListener("pointermove", event => {
      const x = Math.min(Math.max(inPicture(svg, event)[0], left), left + width), rows = [];
      for (const path of svg.querySelectorAll("path.line")) {
        if (getComputedStyle(path).display === "none") continue;
        const near = points(path).reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
        if (Math.abs(near[0] - x) > width / 8) continue;
        const css = [...path.classList].filter(name => name !== "line" && name !== "dots").join(" ") + " key";
        rows.push(row(path.querySelector("title").textContent, written(svg.dataset.form, value(near[1])), css));
      }
      rule.setAttribute("d", `M${x} ${top}v${height}`);
      svg.append(rule);
      tip.replaceChildren(heading(svg.dataset.unit.replace(/s$/, "") + " " + short(Math.round(x0 + (x1 - x0) * (x - left) / width))), ...rows);
      place(event);
    });
    svg.addEventListener("pointerleave", () => { tip.style.display = "none"; rule.remove(); });
  }

  for (const svg of document.querySelectorAll("svg.heat")) {
    const [left, top, width, height] = numbers(svg.dataset.box), [low, high, gamma] = numbers(svg.dataset.range);
    const steps = numbers(svg.dataset.steps), names = svg.dataset.rows.split("\n");
    let alpha = null;
    const picture = new Image();
    picture.onload = () => {
      const canvas = Object.assign(document.createElement("canvas"), { width: picture.width, height: picture.height });
      const context = canvas.getContext("2d");
      context.drawImage(picture, 0, 0);
      alpha = context.getImageData(0, 0, picture.width, picture.height).data;
    };
    svg.addEventListener("pointerenter", () => { picture.src ||= svg.querySelector("image").getAttribute("href"); });
    svg.addEventListener("pointermove", event => {
      const [x, y] = inPicture(svg, event);
      const column = Math.min(Math.max(Math.floor((x - left) / width * steps.length), 0), steps.length - 1);
      const line = Math.min(Math.max(Math.floor((y - top) / height * names.length), 0), names.length - 1);
      if (!alpha) return;
      const share = (alpha[4 * (line * steps.length + column) + 3] / 255) ** (1 / gamma);
      tip.replaceChildren(heading(names[line]), row("step " + short(steps[column]), written(svg.dataset.form, +(low + (high - low) * share).toPrecision(3)), ""));
      place(event);
    });
    svg.addEventListener("pointerleave", () => { tip.style.display = "none"; });
  }
})();
