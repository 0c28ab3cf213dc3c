// Paints cells on the canvas over a picture; tells them after every stroke.
let painting = false;

function cellsOf(canvas) {
  canvas.cells ??= new Uint8Array(canvas.width * canvas.height);
  return canvas.cells;
}

function tell(canvas) {
  trigger("input", { cells: cellsOf(canvas).join("") });
}

function clear() {
  const canvas = element.querySelector("canvas");
  if (!canvas) return;
  cellsOf(canvas).fill(0);
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

function paint(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const size = Number(element.querySelector("select").value);
  const place = (at, start, length, cells) =>
    Math.round(((at - start) / length) * cells - size / 2);
  const left = place(event.clientX, box.left, box.width, canvas.width);
  const top = place(event.clientY, box.top, box.height, canvas.height);
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#ff3d8b";
  for (let y = Math.max(0, top); y < Math.min(canvas.height, top + size); y++) {
    for (let x = Math.max(0, left); x < Math.min(canvas.width, left + size); x++) {
      cellsOf(canvas)[y * canvas.width + x] = 1;
      pen.fillRect(x, y, 1, 1);
    }
  }
}

element.addEventListener("pointerdown", (event) => {
  if (event.target.tagName !== "CANVAS") return;
  painting = true;
  paint(event.target, event);
  event.preventDefault();
});
element.addEventListener("pointermove", (event) => {
  if (painting && event.target.tagName === "CANVAS") paint(event.target, event);
});
window.addEventListener("pointerup", () => {
  const canvas = element.querySelector("canvas");
  if (painting && canvas) tell(canvas);
  painting = false;
});
element.addEventListener("click", (event) => {
  if (!event.target.dataset.clear) return;
  clear();
  tell(element.querySelector("canvas"));
});
// Another picture keeps the canvas, as what is equal in the page is never made anew.
watch("value", clear);
