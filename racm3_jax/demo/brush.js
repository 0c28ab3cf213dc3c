// Paints cells on the canvas over an image; reports them after every stroke.
let painting = false;
let last = null;

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

// A point on the canvas, in cells.
function placeOf(canvas, event) {
  const box = canvas.getBoundingClientRect();
  return [
    ((event.clientX - box.left) / box.width) * canvas.width,
    ((event.clientY - box.top) / box.height) * canvas.height,
  ];
}

function paint(canvas, x0, y0) {
  const size = Number(element.querySelector("select").value);
  const left = Math.round(x0 - size / 2);
  const top = Math.round(y0 - size / 2);
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#ff3d8b";
  for (let y = Math.max(0, top); y < Math.min(canvas.height, top + size); y++) {
    for (let x = Math.max(0, left); x < Math.min(canvas.width, left + size); x++) {
      cellsOf(canvas)[y * canvas.width + x] = 1;
      pen.fillRect(x, y, 1, 1);
    }
  }
}

// A fast pointer jumps: the cells between two points are painted, too.
function stroke(canvas, event) {
  const [x, y] = placeOf(canvas, event);
  const [fromX, fromY] = last ?? [x, y];
  const steps = 1 + Math.ceil(2 * Math.max(Math.abs(x - fromX), Math.abs(y - fromY)));
  for (let i = 1; i <= steps; i++) {
    paint(canvas, fromX + ((x - fromX) * i) / steps, fromY + ((y - fromY) * i) / steps);
  }
  last = [x, y];
}

element.addEventListener("pointerdown", (event) => {
  if (event.target.tagName !== "CANVAS") return;
  painting = true;
  last = null;
  stroke(event.target, event);
  event.preventDefault();
});
element.addEventListener("pointermove", (event) => {
  if (painting && event.target.tagName === "CANVAS") stroke(event.target, event);
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
// The canvas is kept for another image: the page does not rebuild equal elements.
watch("value", clear);
