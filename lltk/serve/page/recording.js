// What has come so far, for a download: the latest whole parts that fit into memory.

const MOST = 256 * 2 ** 20; // bytes

export class Recording {
  #init = null;
  #parts = [];
  #bytes = 0;

  constructor() {
    this.frames = 0;
    this.isWhole = true;
  }

  begin(init) {
    this.#init = init;
  }

  add({ num_frames: frames, keyframe }, bytes) {
    this.#parts.push({ frames, keyframe, bytes });
    this.#bytes += bytes.byteLength;
    this.frames += frames;
    while (this.#bytes > MOST) {
      do this.#drop();
      while (this.#parts.length && !this.#parts[0].keyframe);
      this.isWhole = false;
    }
  }

  save(name) {
    const parts = [this.#init, ...this.#parts.map(({ bytes }) => bytes)];
    const url = URL.createObjectURL(new Blob(parts, { type: "video/mp4" }));
    const link = Object.assign(document.createElement("a"), { href: url, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  #drop() {
    const { bytes, frames } = this.#parts.shift();
    this.#bytes -= bytes.byteLength;
    this.frames -= frames;
  }
}
