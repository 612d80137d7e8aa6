// The connection: JSON control and binary MP4 over one WebSocket, joined again when it is lost.

const PROTOCOL = "lltk.v1";
const TOKEN = "lltk.token.";
const RETRIES = [0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8]; // seconds, for about as long as sessions are kept

export class Live {
  #token;
  #on;
  #socket = null;
  #first = null;
  #due = null;
  #attempt = 0;
  #timer = 0;
  #error = null;
  #over = false;
  #asked = 0;

  // `on` has a function for each of: message(message), init(bytes), part(metadata, bytes),
  // lost(seconds until the next attempt, error or null), over(error or null), roundTrip(seconds).
  constructor(token, on) {
    this.#token = token;
    this.#on = on;
    this.kept = null; // what it takes to resume: {id, token, sequence}
  }

  start(request) {
    this.#first = { type: "session.start", ...request };
    this.#connect();
  }

  resume(kept) {
    this.kept = kept;
    this.#connect();
  }

  // Whether the message could be sent.
  send(message) {
    const open = this.#socket?.readyState === WebSocket.OPEN;
    if (open) this.#socket.send(JSON.stringify(message));
    return open;
  }

  ping() {
    if (this.send({ type: "session.ping" })) this.#asked = performance.now();
  }

  retry() {
    clearTimeout(this.#timer);
    this.#connect();
  }

  // Let go of the connection without a word to anyone.
  drop() {
    clearTimeout(this.#timer);
    this.#socket.onclose = this.#socket.onmessage = null;
    this.#socket.close();
  }

  #connect() {
    const url = new URL("v1/realtime/video", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = this.#socketOf(url);
    if (!socket) return;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      const { id, token, sequence } = this.kept ?? {};
      this.send(
        this.kept
          ? { type: "session.resume", session_id: id, resume_token: token, after_sequence: sequence }
          : this.#first,
      );
    };
    socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.#take(JSON.parse(data));
      else this.#takeBytes(data);
    };
    socket.onclose = () => this.#closed();
    this.#socket = socket;
    this.#error = this.#due = null;
  }

  // A browser refuses to send a token that holds more than letters, digits and a few signs.
  #socketOf(url) {
    try {
      return new WebSocket(url, this.#token ? [PROTOCOL, TOKEN + this.#token] : [PROTOCOL]);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      queueMicrotask(() => this.#on.over({ code: "unauthorized", message: "The token is wrong." }));
      return null;
    }
  }

  #take(message) {
    if (message.type === "session.created") {
      const { session_id: id, resume_token: token } = message;
      this.kept = { id, token, sequence: this.kept?.id === id ? this.kept.sequence : -1 };
      this.#attempt = 0;
    } else if (message.type === "video.chunk_metadata") {
      this.#due = message;
    } else if (message.type === "session.done") {
      this.#over = true;
    } else if (message.type === "session.pong") {
      this.#on.roundTrip((performance.now() - this.#asked) / 1000);
    }
    // What comes last says why a connection is closed.
    this.#error = message.type === "error" && !message.event_id ? message : null;
    this.#on.message(message);
  }

  #takeBytes(bytes) {
    const metadata = this.#due;
    this.#due = null;
    if (metadata) {
      this.kept.sequence = metadata.sequence;
      this.#on.part(metadata, bytes);
    } else {
      this.#on.init(bytes);
    }
  }

  #closed() {
    const error = this.#error;
    const wait = error?.retry_after ?? RETRIES[this.#attempt];
    if (this.#over || (error && !error.retryable)) {
      this.#on.over(error);
    } else if (wait === undefined) {
      this.#on.over({ code: "lost", message: "The server does not answer." });
    } else {
      this.#attempt += 1;
      this.#timer = setTimeout(() => this.#connect(), wait * 1000);
      this.#on.lost(wait, error);
    }
  }
}
