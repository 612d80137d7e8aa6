// The player: MP4 fragments into a <video>, and which frame it shows.

const KEPT = 30; // seconds behind the playhead that stay in the browser's buffer
const Source = self.MediaSource ?? self.ManagedMediaSource; // iPhones have the latter alone

export class Player {
  #video;
  #shown;
  #source = null;
  #buffer = null;
  #waiting = [];
  #recent = [];
  #ends = false;

  // `shown` is called with the number of each frame that is seen.
  constructor(video, shown) {
    this.#video = video;
    this.#shown = shown;
    this.fps = 0;
    const watch = (now, { mediaTime, presentedFrames }) => {
      this.frame = Math.round(mediaTime * this.fps);
      this.#recent.push([now, presentedFrames]);
      if (this.#recent.length > 48) this.#recent.shift();
      this.#shown(this.frame);
      video.requestVideoFrameCallback(watch);
    };
    video.requestVideoFrameCallback(watch);
  }

  static refusal(mime) {
    if (!Source) return "This browser has no media source, so it cannot show a live video.";
    return Source.isTypeSupported(mime) ? null : `This browser cannot decode ${mime}.`;
  }

  get isOpen() {
    return this.#source !== null;
  }

  // Seconds of video beyond the playhead.
  get ahead() {
    const { buffered, currentTime } = this.#video;
    return buffered.length ? Math.max(buffered.end(buffered.length - 1) - currentTime, 0) : 0;
  }

  // Frames a second that were presented lately.
  get rate() {
    const now = performance.now();
    const recent = this.#recent.filter(([time]) => now - time < 2000);
    if (recent.length < 2) return 0;
    const [[begin, before], [end, after]] = [recent[0], recent.at(-1)];
    return ((after - before) * 1000) / (end - begin);
  }

  // A video begins; a second one goes on in the same timeline.
  open(mime, { fps, first_frame: first }) {
    this.fps = fps;
    const offset = () => this.#do(() => (this.#buffer.timestampOffset = first / fps));
    if (this.#source) {
      this.#do(() => this.#buffer.changeType(mime)); // a server that was restarted may have another codec
      offset();
      return;
    }
    this.#source = new Source();
    this.#ends = false;
    this.#video.disableRemotePlayback = true; // a managed source demands it
    this.#video.src = URL.createObjectURL(this.#source);
    this.#source.addEventListener(
      "sourceopen",
      () => {
        URL.revokeObjectURL(this.#video.src);
        this.#source.duration = Infinity;
        this.#buffer = this.#source.addSourceBuffer(mime);
        this.#buffer.addEventListener("updateend", () => this.#next());
        this.#next();
      },
      { once: true },
    );
    offset();
  }

  append(bytes) {
    this.#do(() => this.#buffer.appendBuffer(bytes));
  }

  // Nothing follows: playing stops at the last frame.
  end() {
    this.#ends = true;
    this.#next();
  }

  close() {
    this.#source = this.#buffer = null;
    this.#waiting = [];
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  #do(work) {
    this.#waiting.push(work);
    this.#next();
  }

  #next() {
    if (!this.#buffer || this.#buffer.updating) return;
    this.#settle();
    if (this.#trim()) return;
    while (this.#waiting.length && !this.#buffer.updating) {
      try {
        this.#waiting[0]();
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        if (!this.#trim(2)) setTimeout(() => this.#next(), 500);
        return;
      }
      this.#waiting.shift();
    }
    if (this.#ends && !this.#buffer.updating && this.#source.readyState === "open") {
      this.#source.endOfStream();
    }
  }

  // Go where there is video: its begin after a reload, or the end of a gap.
  #settle() {
    const { buffered, currentTime } = this.#video;
    const slack = 0.5 / this.fps;
    for (let i = 0; i < buffered.length; i += 1) {
      if (buffered.end(i) > currentTime + slack) {
        if (buffered.start(i) > currentTime + slack) this.#video.currentTime = buffered.start(i);
        return;
      }
    }
  }

  // Let go of what was seen long ago; whether that has begun.
  #trim(kept = KEPT) {
    const { buffered, currentTime } = this.#video;
    if (!buffered.length || currentTime - buffered.start(0) < 2 * kept) return false;
    this.#buffer.remove(0, currentTime - kept);
    return true;
  }
}
