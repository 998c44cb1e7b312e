"use strict";
document.documentElement.classList.add("js");

// One clip of a data set at a time.
for (const set of document.querySelectorAll(".set")) {
  const clips = [...set.querySelectorAll(".clip")];
  const select = set.querySelector(".picker select");
  if (!select) continue;
  const buttons = [...set.querySelectorAll(".picker button")];
  const show = () => {
    clips.forEach((clip, i) => { clip.hidden = i !== select.selectedIndex; });
    buttons.forEach((button) => { button.disabled = !clips[select.selectedIndex + Number(button.dataset.step)]; });
  };
  select.addEventListener("change", show);
  for (const button of buttons) {
    button.addEventListener("click", () => { select.selectedIndex += Number(button.dataset.step); show(); });
  }
  const open = (hash) => {
    const index = clips.findIndex((clip) => `#${clip.id}` === hash);
    if (index < 0) return;
    select.selectedIndex = index;
    show();
  };
  for (const link of set.querySelectorAll(".group a")) link.addEventListener("click", () => open(link.hash));
  show();
  open(location.hash);
}

for (const clip of document.querySelectorAll(".clip")) {
  const data = JSON.parse(clip.querySelector("script[type='application/json']").textContent);
  const nameOf = (i) => `frame ${data.frames[i]}${data.synthesised[i] ? ", synthesised" : ""}`;
  for (const figure of clip.querySelectorAll(".chart")) readOut(figure, data, nameOf);
  const compare = clip.querySelector(".compare");
  if (compare) sideBySide(clip, compare, data);
}

// A chart tells the figures of the frame under the pointer, or of the one chosen with the arrow keys.
function readOut(figure, data, nameOf) {
  const plot = figure.querySelector(".plot");
  const range = plot.querySelector("input");
  const when = figure.querySelector(".when");
  const names = [...figure.querySelectorAll(".legend li")].map((entry) => entry.childNodes[1].textContent.trim());
  const cells = [...figure.querySelectorAll(".legend b")];
  const means = cells.map((cell) => cell.textContent);
  const values = data.values[figure.dataset.metric];
  const last = data.frames.length - 1;
  const tell = () => {
    const i = Number(range.value);
    plot.classList.add("live");
    plot.querySelector(".cursor").style.left = `${last ? (100 * i) / last : 50}%`;
    when.textContent = nameOf(i);
    cells.forEach((cell, method) => { cell.textContent = values[method][i]; });
    range.setAttribute("aria-valuetext", `${nameOf(i)}: ${names.map((name, m) => `${name} ${values[m][i]}`).join(", ")}`);
  };
  const rest = () => {
    plot.classList.remove("live");
    when.textContent = when.dataset.rest;
    cells.forEach((cell, method) => { cell.textContent = means[method]; });
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    range.value = Math.round((last * (event.clientX - box.left)) / box.width);
    tell();
  });
  plot.addEventListener("pointerleave", () => { if (document.activeElement === range) tell(); else rest(); });
  range.addEventListener("input", tell);
  range.addEventListener("focus", tell);
  range.addEventListener("blur", rest);
}

// Two pictures of one frame with a slider between them.
function sideBySide(clip, compare, data) {
  const stage = compare.querySelector(".stage");
  const split = compare.querySelector(".split");
  const [frame, left, right] = ["frame", "left", "right"].map((role) => compare.querySelector(`[data-role=${role}]`));
  const images = [...stage.querySelectorAll("img")];
  const has = (layer) => images.some((image) => image.dataset.frame === frame.value && image.dataset.layer === layer);
  const nameOf = (select) => select.selectedOptions[0].textContent;
  const show = () => {
    for (const select of [left, right]) {  // synthesised frames have no input
      for (const option of select.options) option.disabled = !has(option.value);
      if (!has(select.value)) select.value = "0";
    }
    for (const image of images) {
      const here = image.dataset.frame === frame.value;
      image.classList.toggle("left", here && image.dataset.layer === left.value);
      image.classList.toggle("right", here && image.dataset.layer === right.value);
    }
    stage.querySelector(".tag.left").textContent = nameOf(left);
    stage.querySelector(".tag.right").textContent = nameOf(right);
    tell();
  };
  const tell = () => {
    const body = [...clip.querySelectorAll(".chart")].map((figure) => {
      const values = data.values[figure.dataset.metric];
      return [figure.querySelector("b").textContent, ...[left, right].map((s) => values[s.value]?.[frame.value] ?? "")];
    });
    compare.querySelector(".reading").replaceChildren(tableOf(["", nameOf(left), nameOf(right)], body));
  };
  const move = () => {
    stage.style.setProperty("--split", `${split.value}%`);
    split.setAttribute("aria-valuetext", `${split.value} % ${nameOf(left)}`);
  };
  for (const select of [frame, left, right]) select.addEventListener("change", show);
  split.addEventListener("input", move);
  compare.querySelector(".swap").addEventListener("click", () => {
    [left.value, right.value] = [right.value, left.value];
    show();
  });
  for (const button of clip.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => {
      frame.value = button.dataset.show;
      show();
      stage.scrollIntoView({ block: "center" });
      split.focus({ preventScroll: true });
    });
  }
  show();
  move();
}

function tableOf(heads, rows) {
  const table = document.createElement("table");
  const add = (part, texts, scope) => {
    const row = part.insertRow();
    texts.forEach((text, i) => {
      const cell = document.createElement(scope === "col" || !i ? "th" : "td");
      if (cell.tagName === "TH") cell.scope = scope;
      cell.textContent = text;
      row.append(cell);
    });
  };
  add(table.createTHead(), heads, "col");
  const body = table.createTBody();
  for (const row of rows) add(body, row, "row");
  return table;
}

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    const status = button.parentElement.querySelector("[role=status]");
    try {
      await navigator.clipboard.writeText(code.textContent);
      status.textContent = "Copied.";
    } catch {  // some browsers forbid it to files
      getSelection().selectAllChildren(code);
      status.textContent = "Selected: copy it with the keyboard.";
    }
  });
}
