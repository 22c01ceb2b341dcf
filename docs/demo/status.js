// What the reader is told about loading, and about what went wrong.

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

export class Status {
  constructor() {
    [this.line, this.bar, this.alert] =
      ["status", "loading", "error"].map((id) => document.getElementById(id));
    this.line.setAttribute("aria-live", "off"); // the bar tells how far loading is
    this.sizes = new Map();
    this.received = new Map();
  }

  /** Announces a file that will be loaded. */
  expect(file, bytes) {
    this.sizes.set(file, bytes);
  }

  /** Shows how much has come. Servers that unpack a file send more bytes than it has. */
  progress(file, received) {
    if (!this.sizes.has(file)) return;
    this.received.set(file, Math.min(received, this.sizes.get(file)));
    const [got, all] = [this.received, this.sizes].map((map) => {
      return [...map.values()].reduce((sum, bytes) => sum + bytes, 0);
    });
    Object.assign(this.bar, { value: got, max: all, hidden: false });
    this.line.textContent = `Loading: ${megabytes(got)} of ${megabytes(all)} MB`;
  }

  /** Ends the progress. whole: whether all models are there. */
  complete(whole) {
    this.bar.hidden = true;
    this.line.setAttribute("aria-live", "polite");
    if (!whole) {
      this.line.textContent = "Some models are not available.";
      return;
    }
    const all = [...this.sizes.values()].reduce((sum, bytes) => sum + bytes, 0);
    this.line.textContent = `All models are loaded (${megabytes(all)} MB).`;
  }

  /** Shows an error: a sentence. The first one stays, as later ones may follow from it. */
  fail(error) {
    if (!this.alert.hidden) return;
    this.alert.hidden = false;
    this.alert.textContent = error.message ?? String(error);
    this.line.textContent = "";
    this.bar.hidden = true;
  }
}
