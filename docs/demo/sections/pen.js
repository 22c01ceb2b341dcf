// A canvas to draw on, with mouse, finger, stylus or keys.

const WIDTH = 2.6; // of a stroke, in pixels of the small image: about that of MNIST's digits
const SCALE = 10; // pixels of the canvas for one of the small image

// A three, as points in a square of side 1. Each list is a stroke.
const EXAMPLE = [[
  [0.33, 0.28], [0.45, 0.21], [0.58, 0.23], [0.64, 0.33], [0.58, 0.43], [0.47, 0.48],
  [0.6, 0.51], [0.68, 0.62], [0.64, 0.73], [0.52, 0.79], [0.4, 0.77], [0.31, 0.7],
]];

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Pen {
  /** canvas: what the reader sees. size: of the small image. onChange: called after each change. */
  constructor(canvas, size, onChange) {
    Object.assign(this, { canvas, size, onChange, down: false, keys: false });
    canvas.width = canvas.height = size * SCALE;
    this.ink = document.createElement("canvas"); // the drawing without the cursor of the keys
    this.ink.width = this.ink.height = size * SCALE;
    this.at = [size / 2, size / 2];
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, ({ isPrimary }) => {
        if (isPrimary) this.down = false;
      });
    }
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => {
      Object.assign(this, { keys: false, down: false });
      this.#show();
    });
    this.#blank();
  }

  clear() {
    this.#blank();
    this.#changed();
  }

  example() {
    this.#blank();
    for (const stroke of EXAMPLE) {
      const points = stroke.map((point) => point.map((share) => share * this.size));
      points.slice(1).forEach((point, k) => this.#line(points[k], point));
    }
    this.#changed();
  }

  /** Returns the drawing as size x size pixels, 0 .. 255. */
  pixels() {
    const small = document.createElement("canvas");
    small.width = small.height = this.size;
    const context = small.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(this.ink, 0, 0, this.size, this.size);
    const { data } = context.getImageData(0, 0, this.size, this.size);
    return Uint8Array.from({ length: this.size ** 2 }, (_, i) => data[4 * i]);
  }

  #blank() {
    const context = this.ink.getContext("2d");
    context.fillStyle = "black";
    context.fillRect(0, 0, this.ink.width, this.ink.height);
    this.#show();
  }

  #where(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.size,
      ((event.clientY - box.top) / box.height) * this.size,
    ];
  }

  #press(event) {
    if (event.button !== 0 || !event.isPrimary) return; // a second finger draws nothing
    this.canvas.setPointerCapture(event.pointerId);
    Object.assign(this, { down: true, keys: false, at: this.#where(event) });
    this.#line(this.at, this.at); // a dot
    this.#changed();
  }

  #move(event) {
    if (!this.down || this.keys || !event.isPrimary) return;
    // Between two frames a finger moves through several points.
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) {
      const to = this.#where(each);
      this.#line(this.at, to);
      this.at = to;
    }
    this.#changed();
  }

  #key(event) {
    const move = MOVES[event.key];
    if (!move && event.key !== " ") return;
    if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own, as Alt+Left
    event.preventDefault(); // the page must not scroll
    if (!move && event.repeat) return; // the pen is lifted once, however long the key is held
    if (!this.keys) Object.assign(this, { keys: true, down: false });
    if (!move) {
      this.down = !this.down;
      if (this.down) this.#line(this.at, this.at);
    } else {
      const to = this.at.map((value, k) => Math.min(this.size, Math.max(0, value + move[k])));
      if (this.down) this.#line(this.at, to);
      this.at = to;
    }
    this.#changed();
  }

  #line(from, to) {
    const context = this.ink.getContext("2d");
    Object.assign(context, { strokeStyle: "white", lineWidth: WIDTH * SCALE });
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(from[0] * SCALE, from[1] * SCALE);
    context.lineTo(to[0] * SCALE + 0.01, to[1] * SCALE); // not all browsers draw a line of length 0
    context.stroke();
  }

  #changed() {
    this.#show();
    this.onChange();
  }

  #show() {
    const context = this.canvas.getContext("2d");
    context.drawImage(this.ink, 0, 0);
    if (!this.keys) return;
    context.beginPath();
    context.arc(this.at[0] * SCALE, this.at[1] * SCALE, 0.8 * SCALE, 0, 2 * Math.PI);
    Object.assign(context, { strokeStyle: this.down ? "tomato" : "deepskyblue", lineWidth: 4 });
    context.stroke();
  }
}
