// @ts-check
/**
 * An AIConexus agent in one file: for browsers, and for Node.js from 18 on. It depends on nothing.
 *
 *     import { Agent, CallTimeoutError, CapabilityError, Identity } from "./aiconexus.js";
 *     import { PeerError, UnknownAgentError } from "./aiconexus.js";
 *
 *     const me = new Agent({
 *       gateway: "ws://127.0.0.1:8000/ws",
 *       identity: await Identity.load("me"), // in Node.js: Identity.generate() or Identity.fromSeed(seed)
 *       capabilities: {
 *         double: async ({ value }) => 2 * value,
 *         count: async function* ({ to }, { progress, signal }) {
 *           for (let number = 0; number < to && !signal.aborted; number++) {
 *             progress({ done: number });
 *             yield number; // a part of a stream
 *           }
 *         },
 *       },
 *     });
 *     me.addEventListener("state", ({ detail }) => console.log(detail)); // "registered", "reconnecting", …
 *     me.addEventListener("peer", ({ detail: peer }) => console.log(peer.did, "is connected"));
 *     me.addEventListener("peerlost", ({ detail: { peer, reason } }) => console.log(peer.did, "is gone:", reason));
 *     me.addEventListener("warning", ({ detail: text }) => console.warn(text));
 *     await me.start();
 *
 *     const stop = new AbortController(); // stop.abort() ends what has its signal, as with fetch
 *     for await (const found of me.discover({ tag: "legal" })) {
 *       try {
 *         const peer = await me.connect(found.did, { timeout: 10_000, signal: stop.signal });
 *         try {
 *           const clauses = await peer.execute("extract_clauses", { text, kinds: ["compete"] }, {
 *             timeout: 30_000,
 *             signal: stop.signal,
 *             onProgress: (value) => console.log("so far", value),
 *             onReceipt: ({ request, response }) => console.log("both have signed", request, response),
 *           });
 *           for await (const part of peer.stream("explain", { clauses })) console.log(part); // `break` cancels it
 *         } finally {
 *           await peer.release();
 *         }
 *       } catch (error) {
 *         // `code` is for programs, `message` for people; the class AIConexusError has the tree of all errors.
 *         if (error === stop.signal.reason) break;
 *         else if (error instanceof UnknownAgentError) console.log("it is not online");
 *         else if (error instanceof PeerError) console.log("no connection, or it was lost", error.code);
 *         else if (error instanceof CallTimeoutError) console.log("it took too long");
 *         else if (error instanceof CapabilityError) console.log("over there it failed:", error.message);
 *         else throw error;
 *       }
 *     }
 *     await me.close();
 *
 * An identity is registered once at a time: of two tabs that load the same one, the later replaces the earlier, whose
 * state becomes "closed" (`closedBecause.code` is "replaced") and which does not come back by itself. Give each tab a
 * name of its own (`Identity.load(name)`) where several are to run, or `Identity.generate()` where none is to be kept.
 *
 * It implements PROTOCOL_DESIGN.md; the numbers of sections in comments are those of that document. From the top:
 *
 *     limits, errors          what may happen, with the names that travel
 *     bytes, DIDs, keys       sections 4 and 5: base58btc, did:key, Ed25519 by WebCrypto, SHA-256
 *     JSON, messages, cards   sections 3, 5, 6: strict parsing, RFC 8785, signatures, replay guard
 *     gateway                 sections 6, 7, 11: handshake, session, reconnection
 *     directory               section 9: DISCOVER and PRESENCE
 *     frames, outbox          section 13.6: attachments, fair turns, credit
 *     calls, peer             sections 13.2 to 13.7: what two agents say to each other
 *     signaling               section 13.1: from a DID to an open DataChannel
 *     agent                   what an application uses
 *
 * What Node.js lacks is given as options: `WebSocket` (before Node.js 22; npm: ws), `RTCPeerConnection` (npm: werift).
 * Browsers must have Ed25519 in WebCrypto: Chromium from 137, Firefox from 129, Safari from 17 on. All times in the API
 * are in milliseconds, as everywhere in JavaScript.
 */

// =================================================================================================================
// Limits (section 12)
// =================================================================================================================

export const PROTOCOL_VERSION = "1.0";
export const SUBPROTOCOL = "ioap.v1";
export const CHANNEL_LABEL = "ioap";

/** The limits of section 12 that concern an agent; bytes, milliseconds, or as named. */
export const LIMITS = Object.freeze({
  MESSAGE_MAX_BYTES: 65_536, // one message through the gateway
  MESSAGE_MAX_DEPTH: 32, // nesting of objects and arrays; the envelope is level 1
  DATA_MESSAGE_MAX_BYTES: 262_144, // one message on the DataChannel
  INLINE_MAX_BYTES: 16_384, // an envelope with JSON that could be attached
  CHUNK_MAX_BYTES: 16_384, // in one DATA frame
  FRAME_HEAD_BYTES: 17, // before them: kind and call
  ATTACHMENTS_MAX: 64, // of one message
  ATTACHMENTS_MAX_BYTES: 268_435_456, // of one peer that are kept at one time
  ATTACHED_JSON_MAX_BYTES: 16_777_216, // of JSON among the attachments of one message
  CALL_WINDOW_BYTES: 1_048_576, // of one call and direction without CREDIT
  CALL_CREDIT_BYTES: 262_144, // taken, until CREDIT is due
  CAPABILITIES_MAX: 32,
  CAPABILITIES_MAX_BYTES: 8_192,
  REPLAY_GUARD_CAPACITY: 65_536, // ids
  CLOCK_SKEW_MS: 120_000, // of a timestamp, either way
  REGISTER_CLOCK_SKEW_MS: 60_000, // of the gateway's REGISTER
  REGISTER_TIMEOUT_MS: 10_000,
  REQUEST_TIMEOUT_MS: 10_000, // for an answer of the gateway
  CONNECT_TIMEOUT_MS: 20_000, // from OFFER to an open DataChannel
  CALL_TIMEOUT_MS: 60_000, // for an execution whose caller names no other
  STREAM_TIMEOUT_MS: 3_600_000, // for a stream whose caller names no other
  PEER_PING_INTERVAL_MS: 5_000, // of silence before a PING
  PEER_PONG_TIMEOUT_MS: 10_000, // after it without any packet: the peer is dead
  PEER_STALL_MS: 60_000, // a peer may take nothing of what waits for it
  PEER_IDLE_MS: 300_000, // without a call, until a connection that was not released is let go
  RECONNECT_BASE_MS: 500,
  RECONNECT_MAX_MS: 30_000,
  RETRY_AFTER_MAX_MS: 3_600_000, // whatever a CLOSE asks for
});

const HIGH_WATER_BYTES = 131_072; // of `bufferedAmount`; a PING waits behind it: a second at 1 Mbit/s
const LOW_WATER_BYTES = 32_768;
const UNREAD_MAX_BYTES = 8_388_608; // of what a peer has sent and nobody has verified yet
const UNSENT_MAX_BYTES = 4_194_304; // of answers to a peer that does not read
const EXECUTIONS_MAX = 64; // at one time, for one peer
const PEERS_MAX = 256; // when a stranger asks for one more
const ATTEMPTS_MAX = 64; // connections in the making
const BEGINS_MAX = 8; // of one attempt: somebody may offer anew for ever
const SENDS_MAX = 5; // of one OFFER, where messages get lost
const CANDIDATES_MAX = 100; // of one agent: each is sent packets, wherever it points (RFC 8445 section 19.5.1)
const EARLY_SENDERS_MAX = 64; // agents whose candidates wait for their OFFER
const ASK_MS = 2_000; // before a connect() gives up, for the gateway to say what it knows
const CONTEST_MS = 6_000; // for the loser of a glare to answer
const RETRY_MS = 200; // before a message that was refused for the moment is sent again
const RENEWAL_MIN_MS = 200; // no gateway can make this agent busy with new TURN credentials
const TIMER_MAX_MS = 2_000_000_000; // setTimeout counts in 31 bits
const GOODBYE_MS = 1_000; // for the closing of a channel
const ANSWERS_MAX = 4_096; // requests of one agent that are remembered
const ANSWER_TEXTS_MAX = 64; // final responses to one agent that are kept for a request that comes again
const PAGE_SIZE = 100; // agents of one page; with small cards two thirds of a message
const TIMEOUT_MAX_MS = 86_400_000; // whoever needs longer should not hold a connection for it
const ERROR_TEXT_MAX = 4_096; // characters of an exception's text that travel

// =================================================================================================================
// Errors (section 10) and close codes (section 11)
// =================================================================================================================

/** @typedef {{num: number, name: string, code: string, temporary: boolean}} Cause */

/** All causes by name, as an ERROR's `details` has them. @type {Readonly<Record<string, Cause>>} */
export const CAUSES = (() => {
  const codes = [
    [
      "MALFORMED_MESSAGE",
      100,
      "not_json not_object invalid_utf8 lone_surrogate too_deep too_large duplicate_key " +
        "escaped_key escaped_value unknown_field missing_field wrong_type bad_id bad_did unknown_type binary_frame " +
        "unexpected_type invalid_payload invalid_ext not_canonical number_out_of_range bad_frame",
    ],
    [
      "INVALID_SIGNATURE",
      200,
      "bad_signature missing_signature wrong_sender wrong_key wrong_nonce wrong_audience " +
        "stale_timestamp replayed wrong_recipient",
    ],
    ["UNKNOWN_AGENT", 300, "not_online away_expired away_full unreachable"],
    [
      "CONNECTION_REFUSED",
      400,
      "data_plane_only slow_consumer not_offered declined busy overloaded rate_limited " + "gateway_full",
    ],
    ["TIMEOUT", 500, "register_timeout deadline"],
    ["UNSUPPORTED_VERSION", 600, "unsupported_version"],
    ["INTERNAL_ERROR", 700, "internal unconfirmed"],
  ];
  const lasting = new Set(["data_plane_only", "not_offered", "declined", "unsupported_version"]);
  /** @type {Record<string, Cause>} */
  const causes = {};
  for (const [code, first, names] of /** @type {[string, number, string][]} */ (codes)) {
    names.split(" ").forEach((name, index) => {
      causes[name] = { num: first + index, name, code, temporary: first >= 300 && !lasting.has(name) };
    });
  }
  return Object.freeze(causes);
})();

/** @typedef {{number: number, name: string, reconnect: boolean, retryAfter: number}} CloseCode */

/** Close codes of the WebSocket, and how long to wait before a return. @type {ReadonlyMap<number, CloseCode>} */
export const CLOSE_CODES = new Map(
  /** @type {[number, string, number?][]} */ ([
    [1000, "normal"],
    [1001, "going_away", 500],
    [1002, "protocol_error", 5000],
    [1003, "unsupported_data", 5000],
    [1005, "no_status", 500],
    [1006, "abnormal", 500],
    [1007, "invalid_text", 5000],
    [1009, "too_large", 5000],
    [1011, "internal_error", 1000],
    [1012, "service_restart", 1000],
    [1013, "try_again_later", 5000],
    [4001, "draining", 500],
    [4002, "internal", 1000],
    [4003, "slow_consumer", 1000],
    [4004, "no_pong", 500],
    [4005, "rate_limited", 5000],
    [4006, "idle", 1000],
    [4007, "register_timeout", 1000],
    [4500, "protocol_violation"],
    [4502, "authentication_failed"],
    [4503, "not_allowed"],
    [4504, "replaced"],
    [4505, "unsupported_version"],
  ]).map(([number, name, retryAfter]) => [
    number,
    { number, name, reconnect: retryAfter !== undefined, retryAfter: retryAfter ?? 0 },
  ]),
);

/** Look a close code up; one that is not in the table follows its range. @param {number} number @returns {CloseCode} */
export function closeCode(number) {
  return (
    CLOSE_CODES.get(number) ?? {
      number,
      name: "unknown",
      reconnect: !(number >= 4500 && number <= 4999),
      retryAfter: 1000,
    }
  );
}

/**
 * The earliest return after a CLOSE, in milliseconds: what its reason text says, else the table.
 * @param {CloseCode} close @param {string} reason
 */
export function retryAfter(close, reason) {
  let wanted;
  try {
    wanted = JSON.parse(reason)?.r;
  } catch {
    // Any text may stand there.
  }
  const milliseconds = Number.isSafeInteger(wanted) && wanted >= 0 ? wanted : close.retryAfter;
  return Math.min(milliseconds, LIMITS.RETRY_AFTER_MAX_MS);
}

/**
 * Base of all errors of this module. `temporary`: whether the same may succeed later, as far as can be known.
 *
 *     AIConexusError
 *     ├── DIDError                     not a canonical Ed25519 did:key
 *     ├── MessageError                 a message that must be refused; `code` is the cause
 *     │   ├── MalformedMessageError
 *     │   └── InvalidSignatureError    not from whom it should be, stale, or a replay
 *     ├── RemoteError                  an ERROR that arrived; `code` is its code, `reason` its cause
 *     │   ├── UnknownAgentError
 *     │   ├── PeerRefusedError
 *     │   └── RemoteTimeoutError
 *     ├── GatewayError
 *     │   ├── GatewayUnreachableError  no connection, or no answer in time
 *     │   ├── GatewayIdentityError     it does not prove its key
 *     │   ├── RegistrationError        it refused our REGISTER
 *     │   ├── GatewayClosedError       closed for good (a terminal close code)
 *     │   ├── NotConnectedError        nothing can be sent now
 *     │   └── IncompleteAnswerError    it could not ask all who is there
 *     ├── PeerError
 *     │   ├── PeerConnectError         no DataChannel could be opened
 *     │   ├── PeerIdentityError        the other end is not who it should be
 *     │   └── PeerLostError            the connection went away under a running call
 *     └── CallError                    an execution that did not succeed; `code` is `ext.error.name`
 *         ├── UnknownCapabilityError
 *         ├── InvalidArgumentsError
 *         ├── CapabilityError          the capability threw
 *         ├── CallTimeoutError
 *         ├── CallCancelledError
 *         └── CallBusyError            it takes no more at present
 */
export class AIConexusError extends Error {
  temporary = false;

  /** @param {string} message @param {string} code For programs. @param {unknown} [cause] */
  constructor(message, code, cause) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = new.target.name;
    /** For programs; never changes. */
    this.code = code;
  }
}

export class DIDError extends AIConexusError {
  /** @param {string} message */
  constructor(message) {
    super(message, "bad_did");
  }
}

/** @typedef {{field?: string, id?: string|null}} Place */

export class MessageError extends AIConexusError {
  /** @param {string} name Of the cause. @param {string} [text] @param {Place} [place] */
  constructor(name, text, { field, id } = {}) {
    super(text ?? name.replaceAll("_", " "), name);
    this.temporary = CAUSES[name].temporary;
    this.field = field;
    /** `id` of the refused message, where it could be read: the `correlation_id` of the ERROR. */
    this.messageId = id ?? null;
    /** What could be read of the message; nothing in it is proven. @type {Record<string, any>} */
    this.envelope = {};
  }

  /** Whether the message is not from whom it should be, or not as they sent it. */
  get isForged() {
    return (
      CAUSES[this.code].code === "INVALID_SIGNATURE" && this.code !== "stale_timestamp" && this.code !== "replayed"
    );
  }
}
export class MalformedMessageError extends MessageError {}
export class InvalidSignatureError extends MessageError {}

export class RemoteError extends AIConexusError {
  /** @param {string} message @param {ErrorPayload} payload */
  constructor(message, payload) {
    super(message, payload.code);
    const details = payload.details ?? {};
    /** The cause: `details.name`, or "". */
    this.reason = details.name ?? "";
    this.temporary = details.temporary ?? false;
    /** Milliseconds, if the sender named any. */
    this.retryAfter = details.retry_after_ms;
  }
}
export class UnknownAgentError extends RemoteError {}
export class PeerRefusedError extends RemoteError {}
export class RemoteTimeoutError extends RemoteError {}

/** @param {ErrorPayload} payload @param {string} [text] */
function remoteError(payload, text = payload.message) {
  const kinds = { UNKNOWN_AGENT: UnknownAgentError, CONNECTION_REFUSED: PeerRefusedError, TIMEOUT: RemoteTimeoutError };
  const Kind = kinds[/** @type {keyof typeof kinds} */ (payload.code)] ?? RemoteError;
  return new Kind(text, payload);
}

export class GatewayError extends AIConexusError {}
export class GatewayUnreachableError extends GatewayError {
  temporary = true;
}
export class GatewayIdentityError extends GatewayError {}
export class RegistrationError extends GatewayError {
  /** @param {string} message @param {string} code @param {RemoteError} [cause] The ERROR, if one came. */
  constructor(message, code, cause) {
    super(message, code, cause);
    this.temporary = cause?.temporary ?? false;
  }
}
export class GatewayClosedError extends GatewayError {}
export class NotConnectedError extends GatewayError {}
export class IncompleteAnswerError extends GatewayError {
  temporary = true;
}

export class PeerError extends AIConexusError {
  temporary = true;
}
export class PeerConnectError extends PeerError {}
export class PeerIdentityError extends PeerError {
  temporary = false;
}
export class PeerLostError extends PeerError {}

export class CallError extends AIConexusError {}
export class UnknownCapabilityError extends CallError {}
export class InvalidArgumentsError extends CallError {}
export class CapabilityError extends CallError {}
export class CallTimeoutError extends CallError {}
export class CallCancelledError extends CallError {}
export class CallBusyError extends CallError {
  temporary = true;
}

/** @param {string} name `ext.error.name` @param {string} text */
function callError(name, text) {
  const kinds = {
    unknown_capability: UnknownCapabilityError,
    invalid_arguments: InvalidArgumentsError,
    capability_error: CapabilityError,
    timeout: CallTimeoutError,
    cancelled: CallCancelledError,
    busy: CallBusyError,
  };
  const Kind = Object.hasOwn(kinds, name) ? kinds[/** @type {keyof typeof kinds} */ (name)] : CallError;
  return new Kind(text, name);
}

// =================================================================================================================
// Bytes
// =================================================================================================================

const encoder = new TextEncoder();

/** Node.js 18 has WebCrypto, but not as a global. @type {Crypto} */
const webcrypto = globalThis.crypto ?? (await import(/** @type {any} */ ("node:crypto"))).webcrypto;

/** @param {string} text */
const utf8 = (text) => encoder.encode(text);

/**
 * Bytes of a text in UTF-8, without making them where that is not needed.
 * @param {string} text
 * @param {number} limit
 */
const isLonger = (text, limit) => text.length > limit || (3 * text.length > limit && utf8(text).length > limit);

/** @param {Uint8Array} bytes */
export const toHex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** @param {string} hex */
export const fromHex = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));

/** @param {Uint8Array} bytes */
const toBase64 = (bytes) => btoa(String.fromCharCode(...bytes));

/** @param {readonly Uint8Array[]} chunks */
const bytesOf = (chunks) => chunks.reduce((sum, { length }) => sum + length, 0);

/** @param {readonly Uint8Array[]} chunks */
function concat(chunks) {
  const bytes = new Uint8Array(bytesOf(chunks));
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.length;
  }
  return bytes;
}

/**
 * @param {unknown} value
 * @returns {Uint8Array | null} The bytes of a buffer or a view, shared; null if it is neither.
 */
function asBytes(value) {
  if (value instanceof Uint8Array) return value;
  if (value instanceof ArrayBuffer) return new Uint8Array(value);
  return ArrayBuffer.isView(value) ? new Uint8Array(value.buffer, value.byteOffset, value.byteLength) : null;
}

/** WebCrypto takes views of an ArrayBuffer only, and ours always are. @param {Uint8Array} bytes */
const source = (bytes) => /** @type {BufferSource} */ (/** @type {unknown} */ (bytes));

const BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";

/** @param {Uint8Array} bytes */
function toBase58(bytes) {
  let number = BigInt("0x" + (toHex(bytes) || "0"));
  let text = "";
  for (; number > 0n; number /= 58n) text = BASE58[Number(number % 58n)] + text;
  const zeros = bytes.findIndex((byte) => byte !== 0);
  return "1".repeat(zeros < 0 ? bytes.length : zeros) + text;
}

/** SHA-256 (FIPS 180-4) in steps: WebCrypto hashes only what it has as a whole, and a stream has no end yet. */
class Sha256 {
  static #K = new Int32Array(64); // the fractional parts of the cube roots of the first 64 primes,
  static #H = new Int32Array(8); // and of the square roots of the first 8

  static {
    const isPrime = (/** @type {number} */ n) => {
      for (let d = 2; d * d <= n; d++) if (n % d === 0) return false;
      return true;
    };
    const fraction = (/** @type {number} */ x) => ((x - Math.floor(x)) * 0x1_0000_0000) | 0;
    for (let n = 2, count = 0; count < 64; n++) {
      if (!isPrime(n)) continue;
      if (count < 8) Sha256.#H[count] = fraction(Math.sqrt(n));
      Sha256.#K[count++] = fraction(Math.cbrt(n));
    }
  }

  #state = Sha256.#H.slice();
  #words = new Int32Array(64);
  #block = new Uint8Array(64);
  #filled = 0;
  #length = 0;

  /** @param {Uint8Array} bytes */
  update(bytes) {
    this.#length += bytes.length;
    let at = 0;
    while (at < bytes.length) {
      const taken = Math.min(64 - this.#filled, bytes.length - at);
      this.#block.set(bytes.subarray(at, at + taken), this.#filled);
      this.#filled += taken;
      at += taken;
      if (this.#filled === 64) this.#compress();
    }
    return this;
  }

  /** The digest in lower-case hexadecimal digits; nothing can be added after it. */
  hex() {
    const bits = BigInt(this.#length) * 8n;
    const padding = new Uint8Array(((119 - (this.#length % 64)) % 64) + 9);
    padding[0] = 0x80;
    new DataView(padding.buffer).setBigUint64(padding.length - 8, bits);
    this.update(padding);
    return Array.from(this.#state, (word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
  }

  #compress() {
    const w = this.#words;
    const block = this.#block;
    for (let i = 0; i < 16; i++) {
      w[i] = (block[4 * i] << 24) | (block[4 * i + 1] << 16) | (block[4 * i + 2] << 8) | block[4 * i + 3];
    }
    for (let i = 16; i < 64; i++) {
      const x = w[i - 15];
      const y = w[i - 2];
      const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
      const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
      w[i] = (w[i - 16] + s0 + w[i - 7] + s1) | 0;
    }
    let [a, b, c, d, e, f, g, h] = this.#state;
    for (let i = 0; i < 64; i++) {
      const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + Sha256.#K[i] + w[i]) | 0;
      const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, i) => (this.#state[i] = (this.#state[i] + word) | 0));
    this.#filled = 0;
  }
}

/** @param {Uint8Array} bytes */
async function sha256(bytes) {
  return toHex(new Uint8Array(await webcrypto.subtle.digest("SHA-256", source(bytes))));
}

// =================================================================================================================
// DIDs and signatures (sections 4 and 5.1)
// =================================================================================================================

const DID_PREFIX = "did:key:";
const DID_LENGTH = 56;

/** Write a public key of 32 bytes as a did:key. @param {Uint8Array} publicKey */
export function encodeDid(publicKey) {
  return `${DID_PREFIX}z${toBase58(concat([Uint8Array.of(0xed, 0x01), publicKey]))}`;
}

/**
 * Read the public key of a DID, strictly.
 * @param {unknown} text
 * @returns {Uint8Array} 32 bytes.
 * @throws {DIDError}
 */
export function decodeDid(text) {
  if (typeof text !== "string") throw new DIDError("a DID is a string");
  const shown = JSON.stringify(text.slice(0, 64));
  if (!text.startsWith(`${DID_PREFIX}z`)) throw new DIDError(`a DID begins with did:key:z, not as ${shown}`);
  if (text.length !== DID_LENGTH) throw new DIDError(`a DID has ${DID_LENGTH} characters, not as ${shown}`);
  let number = 0n;
  for (const letter of text.slice(DID_PREFIX.length + 1)) {
    const digit = BASE58.indexOf(letter);
    if (digit < 0) throw new DIDError(`base58btc has no ${JSON.stringify(letter)}: ${shown}`);
    number = number * 58n + BigInt(digit);
  }
  const bytes = fromHex(number.toString(16).padStart(68, "0"));
  if (bytes.length !== 34 || bytes[0] !== 0xed || bytes[1] !== 0x01) throw new DIDError(`no Ed25519 key: ${shown}`);
  const key = bytes.subarray(2);
  if (encodeDid(key) !== text) throw new DIDError(`not how this key is written: ${shown}`);
  return key;
}

/** Abbreviate a DID for people. @param {string} did */
export const shortDid = (did) => `${did.slice(0, 12)}…${did.slice(-4)}`;

const FIELD_PRIME = (1n << 255n) - 19n;
const GROUP_ORDER = (1n << 252n) + 27742317777372353535851937790883648493n;
const HALF = (1n << 255n) - 1n;
// y of the points of order 1, 2, 4 and 8 (RFC 7748 has the curve; libsodium refuses the same).
const SMALL_ORDER_Y = new Set([
  0n,
  1n,
  FIELD_PRIME - 1n,
  FIELD_PRIME,
  FIELD_PRIME + 1n,
  littleEndian(fromHex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")),
  littleEndian(fromHex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a")),
]);

/** @param {Uint8Array} bytes */
function littleEndian(bytes) {
  return BigInt("0x" + toHex(bytes.slice().reverse()));
}

/** Keys that were imported, by DID: the same few agents are verified again and again. @type {Map<string, CryptoKey>} */
const importedKeys = new Map();

/** @param {string} did */
async function publicKeyOf(did) {
  let key = importedKeys.get(did);
  if (key === undefined) {
    key = await webcrypto.subtle.importKey("raw", source(decodeDid(did)), "Ed25519", false, ["verify"]);
    if (importedKeys.size >= 256) importedKeys.delete(/** @type {string} */ (importedKeys.keys().next().value));
    importedKeys.set(did, key);
  }
  return key;
}

/**
 * Tell whether `signature` over `data` was made with the key in `did`.
 *
 * Strictly, as section 5.1 demands: what WebCrypto leaves to its library is checked here first.
 * @param {string} did @param {Uint8Array} data @param {Uint8Array} signature
 */
export async function verifySignature(did, data, signature) {
  if (signature.length !== 64) return false;
  const y = littleEndian(decodeDid(did)) & HALF;
  if (y >= FIELD_PRIME || SMALL_ORDER_Y.has(y)) return false;
  if (SMALL_ORDER_Y.has(littleEndian(signature.subarray(0, 32)) & HALF)) return false;
  if (littleEndian(signature.subarray(32)) >= GROUP_ORDER) return false;
  try {
    return await webcrypto.subtle.verify("Ed25519", await publicKeyOf(did), source(signature), source(data));
  } catch {
    return false; // no point of the curve
  }
}

/** An Ed25519 key pair and its DID. The private key cannot be read back. */
export class Identity {
  #privateKey;

  /** @param {CryptoKey} privateKey @param {Uint8Array} publicKey */
  constructor(privateKey, publicKey) {
    this.#privateKey = privateKey;
    this.did = encodeDid(publicKey);
  }

  /** The public key as REGISTER carries it: the part of the DID behind `did:key:`. */
  get publicKey() {
    return this.did.slice(DID_PREFIX.length);
  }

  /** Make a new key. */
  static async generate() {
    return Identity.#of(await generateKeys());
  }

  /** The key of a seed (RFC 8032 section 5.1.5). @param {Uint8Array} seed 32 bytes. */
  static async fromSeed(seed) {
    if (seed.length !== 32) throw new RangeError(`a seed has 32 bytes, not ${seed.length}`);
    const pkcs8 = concat([fromHex("302e020100300506032b657004220420"), seed]); // RFC 8410 section 7
    // WebCrypto derives no public key: it is read from a copy that may be exported.
    const copy = await webcrypto.subtle.importKey("pkcs8", source(pkcs8), "Ed25519", true, ["sign"]);
    const { x = "" } = await webcrypto.subtle.exportKey("jwk", copy);
    const publicKey = Uint8Array.from(atob(x.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));
    return new Identity(
      await webcrypto.subtle.importKey("pkcs8", source(pkcs8), "Ed25519", false, ["sign"]),
      publicKey,
    );
  }

  /**
   * The key that this origin keeps in IndexedDB under a name; made at the first time. Scripts of the page can use it,
   * but not even they can copy it.
   * @param {string} [name]
   * @throws {AIConexusError} `no_storage`: nothing can be kept here, as in Node.js.
   */
  static async load(name = "default") {
    if (globalThis.indexedDB === undefined) {
      const text =
        "this runtime has no IndexedDB to keep a key in: take Identity.generate() or Identity.fromSeed(seed)";
      throw new AIConexusError(text, "no_storage");
    }
    const request = indexedDB.open("aiconexus", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("identities");
    const database = await fulfilled(request);
    try {
      const read = database.transaction("identities").objectStore("identities").get(name);
      /** @type {CryptoKeyPair | undefined} */
      let keys = await fulfilled(read);
      if (keys === undefined) {
        const made = await generateKeys();
        const store = database.transaction("identities", "readwrite").objectStore("identities");
        // Another tab may have been faster: `add` keeps what is there.
        keys = await fulfilled(store.add(made, name)).then(
          () => made,
          () => undefined,
        );
        keys ??= await fulfilled(database.transaction("identities").objectStore("identities").get(name));
      }
      return await Identity.#of(/** @type {CryptoKeyPair} */ (keys));
    } finally {
      database.close();
    }
  }

  /** @param {CryptoKeyPair} keys */
  static async #of({ privateKey, publicKey }) {
    return new Identity(privateKey, new Uint8Array(await webcrypto.subtle.exportKey("raw", publicKey)));
  }

  /** @param {Uint8Array} data @returns {Promise<Uint8Array>} 64 bytes. */
  async sign(data) {
    return new Uint8Array(await webcrypto.subtle.sign("Ed25519", this.#privateKey, source(data)));
  }
}

async function generateKeys() {
  return /** @type {CryptoKeyPair} */ (await webcrypto.subtle.generateKey("Ed25519", false, ["sign", "verify"]));
}

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
function fulfilled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = (event) => {
      event.preventDefault(); // the transaction of a failed `add` is not to be reported as well
      reject(request.error);
    };
  });
}

// =================================================================================================================
// JSON (sections 3 and 5.1)
// =================================================================================================================

/** @typedef {null | boolean | number | string | any[] | {[key: string]: any}} Json */

const LONE_SURROGATE = /[\ud800-\udfff]/u; // with the flag u, pairs are one character beyond these
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/y;
const PLAIN = /[^"\\\u0000-\u001f]*/y;
const ESCAPES = /** @type {Record<string, string>} */ ({
  '"': '"',
  "\\": "\\",
  "/": "/",
  b: "\b",
  f: "\f",
  n: "\n",
  r: "\r",
  t: "\t",
});

/**
 * Where a number was written with a fraction or an exponent though it has an integer's value: `1.0` is no integer
 * (section 3.2), but JavaScript has one kind of number only. By object or array, then by key.
 * @type {WeakMap<object, Set<string | number>>}
 */
const writtenAsFloat = new WeakMap();

/** @param {any} holder @param {string | number} key */
const isInteger = (holder, key) => Number.isSafeInteger(holder[key]) && !writtenAsFloat.get(holder)?.has(key);

/**
 * Parse one JSON text as strictly as section 3 demands. `JSON.parse` would let duplicate keys and large integers pass.
 * @param {string} text
 * @param {{isCanonical?: boolean}} [options] `isCanonical`: a large integer is a double, as RFC 8785 writes it.
 * @returns {Json}
 * @throws {MalformedMessageError}
 */
export function parseJson(text, { isCanonical = false } = {}) {
  let at = 0;

  /** @param {string} [name] @param {string} [field] @returns {never} */
  function refuse(name = "not_json", field) {
    throw new MalformedMessageError(name, `${name.replaceAll("_", " ")} at character ${at}`, { field });
  }
  function skipSpace() {
    for (; at < text.length; at++) {
      const code = text.charCodeAt(at);
      if (code !== 0x20 && code !== 0x0a && code !== 0x0d && code !== 0x09) return;
    }
  }
  /** @param {number} depth @param {object} [holder] @param {string | number} [key] @returns {Json} */
  function value(depth, holder, key) {
    skipSpace();
    switch (text[at]) {
      case "{":
        return object(depth + 1);
      case "[":
        return array(depth + 1);
      case '"':
        return string();
      case "t":
        return literal("true", true);
      case "f":
        return literal("false", false);
      case "n":
        return literal("null", null);
      default:
        return number(holder, key);
    }
  }
  /** @template T @param {string} word @param {T} meaning @returns {T} */
  function literal(word, meaning) {
    if (!text.startsWith(word, at)) refuse();
    at += word.length;
    return meaning;
  }
  /** @param {object} [holder] @param {string | number} [key] */
  function number(holder, key) {
    NUMBER.lastIndex = at;
    const found = NUMBER.exec(text);
    if (found === null) return refuse();
    const result = Number(found[0]);
    const isFloat = found[1] !== undefined || found[2] !== undefined;
    if (!Number.isFinite(result)) refuse("number_out_of_range");
    if (!isFloat && !isCanonical && !Number.isSafeInteger(result)) refuse("not_canonical");
    if (isFloat && Number.isInteger(result) && holder !== undefined && key !== undefined) {
      if (!writtenAsFloat.has(holder)) writtenAsFloat.set(holder, new Set());
      writtenAsFloat.get(holder)?.add(key);
    }
    at += found[0].length;
    return result;
  }
  function string() {
    let result = "";
    for (at++; ;) {
      PLAIN.lastIndex = at;
      const plain = /** @type {RegExpExecArray} */ (PLAIN.exec(text))[0];
      result += plain;
      at += plain.length;
      if (text[at] === '"') break;
      if (text[at] !== "\\") refuse();
      const escape = text[at + 1] ?? "";
      if (escape === "u") {
        const digits = text.slice(at + 2, at + 6);
        if (!/^[0-9a-fA-F]{4}$/.test(digits)) refuse();
        result += String.fromCharCode(parseInt(digits, 16));
        at += 6;
      } else {
        if (!Object.hasOwn(ESCAPES, escape)) refuse();
        result += ESCAPES[escape];
        at += 2;
      }
    }
    at++;
    if (LONE_SURROGATE.test(result)) refuse("lone_surrogate");
    return result;
  }
  /** @param {number} depth */
  function array(depth) {
    if (depth > LIMITS.MESSAGE_MAX_DEPTH) refuse("too_deep");
    /** @type {any[]} */
    const result = [];
    at++;
    skipSpace();
    if (text[at] === "]") {
      at++;
      return result;
    }
    for (;;) {
      result.push(value(depth, result, result.length));
      skipSpace();
      const next = text[at++];
      if (next === "]") return result;
      if (next !== ",") refuse();
    }
  }
  /** @param {number} depth */
  function object(depth) {
    if (depth > LIMITS.MESSAGE_MAX_DEPTH) refuse("too_deep");
    /** @type {Record<string, any>} */
    const result = {};
    at++;
    skipSpace();
    if (text[at] === "}") {
      at++;
      return result;
    }
    for (;;) {
      skipSpace();
      if (text[at] !== '"') refuse();
      const key = string();
      if (Object.hasOwn(result, key)) refuse("duplicate_key", key.slice(0, 64));
      skipSpace();
      if (text[at++] !== ":") refuse();
      const item = value(depth, result, key);
      // A plain assignment would set the prototype.
      if (key === "__proto__") Object.defineProperty(result, key, { value: item, enumerable: true });
      else result[key] = item;
      skipSpace();
      const next = text[at++];
      if (next === "}") return result;
      if (next !== ",") refuse();
    }
  }

  const result = value(0);
  skipSpace();
  if (at !== text.length) refuse();
  return result;
}

/** @param {any} value @param {number} depth @param {boolean} isCanonical @returns {string} */
function writeJson(value, depth, isCanonical) {
  switch (typeof value) {
    case "string":
      if (LONE_SURROGATE.test(value)) {
        throw new MalformedMessageError("lone_surrogate", "a text holds half a surrogate pair");
      }
      return JSON.stringify(value); // for well-formed strings these are the escapes of RFC 8785
    case "number":
      if (!Number.isFinite(value)) throw new MalformedMessageError("not_canonical", `JSON has no ${value}`);
      // On the wire an integer literal must be safe; what is signed has RFC 8785's form all the same.
      if (!isCanonical && Number.isInteger(value) && !Number.isSafeInteger(value)) return value.toExponential();
      return Object.is(value, -0) ? "0" : String(value);
    case "boolean":
      return String(value);
    case "object":
      break;
    default:
      throw new MalformedMessageError("not_canonical", `JSON has no ${typeof value}`);
  }
  if (value === null) return "null";
  if (typeof value.toJSON === "function") return writeJson(value.toJSON(), depth, isCanonical);
  if (depth > LIMITS.MESSAGE_MAX_DEPTH)
    throw new MalformedMessageError("too_deep", "it nests more than 32 levels deep");
  if (Array.isArray(value)) {
    return `[${value.map((item) => writeJson(item ?? null, depth + 1, isCanonical)).join(",")}]`;
  }
  const prototype = Object.getPrototypeOf(value);
  if (prototype !== null && Object.getPrototypeOf(prototype) !== null) {
    throw new MalformedMessageError("not_canonical", `${value.constructor?.name ?? "this object"} is not a JSON type`);
  }
  const keys = Object.keys(value).filter((key) => value[key] !== undefined);
  if (isCanonical) keys.sort(); // by UTF-16 code units, as RFC 8785 section 3.2.3 wants
  const members = keys.map(
    (key) => `${writeJson(key, 0, isCanonical)}:${writeJson(value[key], depth + 1, isCanonical)}`,
  );
  return `{${members.join(",")}}`;
}

/**
 * The canonical form of a JSON value (RFC 8785).
 * @param {unknown} value
 * @throws {MalformedMessageError} It has none.
 */
export const canonicalize = (value) => writeJson(value, 1, true);

/** The compact text of a JSON value, as it travels. @param {unknown} value */
export const serialize = (value) => writeJson(value, 1, false);

// =================================================================================================================
// Messages (sections 3, 5, 9)
// =================================================================================================================

/**
 * @typedef {object} Envelope
 * @property {string} id
 * @property {string | null} [correlation_id]
 * @property {string} timestamp
 * @property {string} from
 * @property {string} to
 * @property {string} type
 * @property {any} payload By `type`: section 9.
 * @property {string} version
 * @property {string | null} [signature]
 * @property {Record<string, any>} [ext]
 */

/**
 * @typedef
 *   {{num?: number, name?: string, temporary?: boolean, retry_after_ms?: number, field?: string}} ErrorDetails
 * @typedef {{code: string, message: string, details?: ErrorDetails | null}} ErrorPayload
 */

const UUID = /^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$/;
const TIMESTAMP = /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?Z$/;

/** Says whether the value at a key fits. @typedef {(value: any, holder: any, key: string) => boolean} Check */

/** @type {Check} */
const isText = (value) => typeof value === "string";
/** @type {Check} */
const isBoolean = (value) => typeof value === "boolean";
/** @type {Check} */
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
/** @param {number} least @param {number} [most] @returns {Check} */
const isIntegerFrom =
  (least, most = Infinity) =>
  (value, holder, key) =>
    isInteger(holder, key) && value >= least && value <= most;
/** Counted in code points, as JSON Schema and Python do. @param {number} least @param {number} most @returns {Check} */
const isTextOf = (least, most) => (value) =>
  typeof value === "string" && value.length >= least && (value.length <= most || [...value].length <= most);
/** @param {Check} check @param {number} [most] @returns {Check} */
const isListOf =
  (check, most = Infinity) =>
  (value) =>
    Array.isArray(value) &&
    value.length <= most &&
    value.every((item, i) => check(item, value, /** @type {any} */ (i)));
/** @param {...string} names @returns {Check} */
const isOneOf =
  (...names) =>
  (value) =>
    names.includes(value);

/** @typedef {{check: Check, isRequired: boolean, isNullable: boolean}} Field */

/** @param {Check} check @returns {Field} */
const required = (check) => ({ check, isRequired: true, isNullable: false });
/** @param {Check} check @returns {Field} */
const optional = (check) => ({ check, isRequired: false, isNullable: true });
/** Optional, and never null. @param {Check} check @returns {Field} */
const absentOr = (check) => ({ check, isRequired: false, isNullable: false });
const anything = optional(() => true);

/** The payloads of section 9. @type {Readonly<Record<string, Readonly<Record<string, Field>>>>} */
const PAYLOADS = {
  REGISTER: { public_key: required(isText) },
  UNREGISTER: { reason: optional(isText) },
  OFFER: { sdp: required(isText) },
  ANSWER: { sdp: required(isText) },
  ICE_CANDIDATE: {
    candidate: required(isTextOf(0, 1024)),
    sdp_mid: optional(isTextOf(0, 64)),
    sdp_mline_index: optional(isIntegerFrom(0)),
  },
  INTENT: {
    query: optional(isText),
    context: anything,
    task: optional(isText),
    params: optional(isObject),
    status: optional(isText),
    required_input: optional((value, ...place) => isText(value, ...place) || isListOf(isText)(value, ...place)),
    cost: optional(isText),
  },
  EXEC_REQUEST: {
    args: required(isObject),
    timeout_ms: optional(isIntegerFrom(1)),
    stream: optional(isBoolean),
  },
  EXEC_RESPONSE: {
    result: anything,
    error: optional(isText),
    status: required(isOneOf("success", "error", "partial", "progress", "cancelled")),
    execution_time_ms: optional((value) => typeof value === "number" && value >= 0),
    stream_url: optional(isText),
  },
  ERROR: {
    code: required((value) => Object.values(CAUSES).some((cause) => cause.code === value)),
    message: required(isText),
    details: optional((value) => isObject(value, null, "") && isErrorDetails(value)),
  },
  PING: { sequence: optional(isIntegerFrom(-Infinity)) },
  PONG: { sequence: optional(isIntegerFrom(-Infinity)) },
  DISCOVER: {
    capability: optional(isText),
    tag: optional(isText),
    text: optional(isTextOf(1, 256)),
    dids: optional(isListOf(isText, 200)),
    watch: optional(isBoolean),
    limit: absentOr(isIntegerFrom(1, 200)),
    cursor: optional(isText),
  },
  PRESENCE: {
    agents: absentOr(isListOf(isObject)),
    event: optional(isOneOf("join", "leave", "away", "update", "missed")),
    cursor: optional(isText),
    partial: optional(isBoolean),
  },
};

/** @type {Readonly<Record<string, Check>>} */
const ERROR_DETAILS = {
  num: isIntegerFrom(-Infinity),
  name: isText,
  temporary: isBoolean,
  retry_after_ms: isIntegerFrom(0),
  field: isText,
};

/** @param {Record<string, any>} details */
function isErrorDetails(details) {
  return Object.entries(ERROR_DETAILS).every(
    ([key, check]) => (details[key] ?? null) === null || check(details[key], details, key),
  );
}

/**
 * @param {Record<string, any>} object
 * @param {Readonly<Record<string, Field>>} fields
 * @returns {string | null} What is wrong.
 */
function misfit(object, fields) {
  for (const key of Object.keys(object)) if (!Object.hasOwn(fields, key)) return `${key.slice(0, 64)} is unknown`;
  for (const [key, field] of Object.entries(fields)) {
    if (!Object.hasOwn(object, key)) {
      if (field.isRequired) return `${key} is missing`;
    } else if (!(object[key] === null && field.isNullable) && !field.check(object[key], object, key)) {
      return `${key} is wrong`;
    }
  }
  return null;
}

/** Milliseconds since the epoch, with a fraction; NaN if it is no timestamp. @param {string} text */
export function parseTimestamp(text) {
  const found = TIMESTAMP.exec(text);
  if (found === null) return NaN;
  const seconds = Date.parse(`${found[1]}Z`);
  // Date.parse moves what no calendar has, such as February 30 or 24:00:00, to the next day.
  if (Number.isNaN(seconds) || new Date(seconds).toISOString().slice(0, 19) !== found[1]) return NaN;
  return seconds + Number(`0${found[2] ?? ""}`) * 1000;
}

/** @param {Record<string, any>} envelope @returns {string | null} */
const readableId = (envelope) => (typeof envelope.id === "string" && UUID.test(envelope.id) ? envelope.id : null);

/**
 * Parse an envelope. Nothing about it is proven yet.
 * @param {string} text
 * @param {number} [limit] Bytes.
 * @returns {Envelope}
 * @throws {MalformedMessageError}
 */
export function decode(text, limit = LIMITS.MESSAGE_MAX_BYTES) {
  if (LONE_SURROGATE.test(text)) throw new MalformedMessageError("lone_surrogate");
  if (isLonger(text, limit)) throw new MalformedMessageError("too_large", `at most ${limit} bytes are read`);
  const envelope = /** @type {any} */ (parseJson(text));
  if (!isObject(envelope, null, "")) throw new MalformedMessageError("not_object");
  try {
    checkEnvelope(envelope);
  } catch (error) {
    if (error instanceof MessageError) error.envelope = envelope;
    throw error;
  }
  return envelope;
}

/** @param {Record<string, any>} envelope @throws {MalformedMessageError} */
function checkEnvelope(envelope) {
  const id = readableId(envelope);
  /** @param {string} name @param {string} field @param {string} [text] @returns {never} */
  const refuse = (name, field, text) => {
    throw new MalformedMessageError(name, `${field}: ${text ?? name.replaceAll("_", " ")}`, { field, id });
  };
  if (typeof envelope.version === "string" && envelope.version !== PROTOCOL_VERSION) {
    refuse("unsupported_version", "version");
  }
  for (const field of ["id", "timestamp", "from", "to", "type", "payload", "version"]) {
    if (!Object.hasOwn(envelope, field)) refuse("missing_field", field);
    if (field !== "payload" && typeof envelope[field] !== "string") refuse("wrong_type", field);
  }
  if (!isObject(envelope.payload, null, "")) refuse("wrong_type", "payload");
  for (const field of Object.keys(envelope)) {
    if (["id", "timestamp", "from", "to", "type", "payload", "version"].includes(field)) continue;
    if (field === "ext") {
      if (!isObject(envelope.ext, null, "")) refuse("wrong_type", field);
    } else if (field === "correlation_id" || field === "signature") {
      if (envelope[field] !== null && typeof envelope[field] !== "string") refuse("wrong_type", field);
    } else {
      refuse("unknown_field", field.slice(0, 64));
    }
  }
  if (id === null) refuse("bad_id", "id");
  if (typeof envelope.correlation_id === "string" && !UUID.test(envelope.correlation_id)) {
    refuse("bad_id", "correlation_id");
  }
  for (const field of ["from", "to"]) {
    try {
      decodeDid(envelope[field]);
    } catch (error) {
      refuse("bad_did", field, /** @type {Error} */ (error).message);
    }
  }
  if (Number.isNaN(parseTimestamp(envelope.timestamp))) refuse("wrong_type", "timestamp");
  if (!Object.hasOwn(PAYLOADS, envelope.type)) refuse("unknown_type", "type");
  const { type, payload } = envelope;
  const wrong = misfit(payload, PAYLOADS[type]);
  if (wrong !== null) refuse("invalid_payload", "payload", wrong);
  if (type === "INTENT" && [payload.query, payload.task, payload.status].every((value) => (value ?? null) === null)) {
    refuse("invalid_payload", "payload", "an INTENT needs query, task or status");
  }
}

/**
 * Build an envelope, not signed yet.
 * @param {string} from @param {string} to @param {string} type @param {Record<string, any>} payload
 * @param {{correlationId?: string | null, ext?: Record<string, any>}} [more]
 * @returns {Envelope}
 */
export function createMessage(from, to, type, payload, { correlationId = null, ext } = {}) {
  /** @type {Envelope} */
  const envelope = {
    id: webcrypto.randomUUID?.() ?? randomUuid(), // a page of an http origin other than localhost has none
    correlation_id: correlationId,
    timestamp: new Date().toISOString(),
    from,
    to,
    type,
    payload,
    version: PROTOCOL_VERSION,
  };
  if (ext !== undefined) envelope.ext = ext;
  return envelope;
}

/** RFC 9562 section 5.4. */
function randomUuid() {
  const bytes = webcrypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  return uuidOf(bytes);
}

/** @param {Uint8Array} bytes 16 of them. */
const uuidOf = (bytes) => toHex(bytes).replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");

/** What is signed of an envelope or a card. @param {Record<string, any>} signed */
function signedBytes(signed) {
  const { signature: _, ...rest } = signed;
  return utf8(canonicalize(rest));
}

/**
 * Sign an envelope; the text of the result is ready to be sent.
 * @template {Record<string, any>} T
 * @param {T} envelope @param {Identity} identity
 * @returns {Promise<T & {signature: string}>}
 */
export async function sign(envelope, identity) {
  return { ...envelope, signature: toBase64(await identity.sign(signedBytes(envelope))) };
}

/** @param {Record<string, any>} signed @param {string} did */
async function isSignedBy(signed, did) {
  // One signature has one text (RFC 4648 section 3.5): the standard alphabet, padded, trailing bits zero.
  if (typeof signed.signature !== "string" || !/^[A-Za-z0-9+/]{85}[AQgw]==$/.test(signed.signature)) return false;
  const signature = Uint8Array.from(atob(signed.signature), (letter) => letter.charCodeAt(0));
  return verifySignature(did, signedBytes(signed), signature);
}

/**
 * Prove a parsed envelope, in the order of section 5.2.
 * @param {Envelope} envelope
 * @param {{recipient: string, guard: ReplayGuard, sender?: string, now?: number}} options
 * @throws {InvalidSignatureError}
 */
export async function verify(envelope, { recipient, guard, sender, now }) {
  const { id } = envelope;
  if (sender !== undefined && envelope.from !== sender) {
    throw new InvalidSignatureError("wrong_sender", `sent by ${envelope.from}, not by ${sender}`, {
      field: "from",
      id,
    });
  }
  if ((envelope.signature ?? null) === null) {
    throw new InvalidSignatureError("missing_signature", undefined, { field: "signature", id });
  }
  if (!(await isSignedBy(envelope, envelope.from))) {
    throw new InvalidSignatureError("bad_signature", undefined, { field: "signature", id });
  }
  if (envelope.to !== recipient) {
    throw new InvalidSignatureError("wrong_recipient", `addressed to ${envelope.to}`, { field: "to", id });
  }
  guard.accept(envelope, now);
}

/**
 * Remembers the ids that were accepted for as long as their timestamps would pass, and refuses them (section 5.2).
 *
 * It is bounded: who sent the most is forgotten first, and of whom something was forgotten nothing older is accepted.
 */
export class ReplayGuard {
  /** @type {Map<string, {seen: Map<string, number>, floor: number}>} By sender: times by id. */
  #senders = new Map();
  #count = 0;
  #floor = -Infinity; // for all senders
  #sweptAt = -Infinity;

  /** @param {number} [window] Milliseconds, either way. @param {number} [capacity] Ids. */
  constructor(window = LIMITS.CLOCK_SKEW_MS, capacity = LIMITS.REPLAY_GUARD_CAPACITY) {
    this.window = window;
    this.capacity = capacity;
  }

  get size() {
    return this.#count;
  }

  /**
   * Remember an envelope whose signature was verified.
   * @param {Envelope} envelope
   * @param {number} [now] Milliseconds since the epoch.
   * @throws {InvalidSignatureError} `stale_timestamp` or `replayed`.
   */
  accept({ id, from, timestamp }, now = Date.now()) {
    const moment = parseTimestamp(timestamp);
    const place = { field: "timestamp", id };
    if (Math.abs(moment - now) > this.window) {
      const text = `the message is ${((now - moment) / 1000).toFixed(0)} s old; check the clocks of both machines`;
      throw new InvalidSignatureError("stale_timestamp", text, place);
    }
    const sender = this.#senders.get(from);
    if (moment <= Math.max(this.#floor, sender?.floor ?? -Infinity)) {
      throw new InvalidSignatureError("stale_timestamp", "not newer than others that had to be forgotten", place);
    }
    const key = id.toLowerCase(); // RFC 9562 section 4: as UUIDs are compared
    if (sender?.seen.has(key)) throw new InvalidSignatureError("replayed", undefined, { field: "id", id });
    // A clock that was set back must not make it forget nothing any more.
    if (!(this.#sweptAt <= now && now < this.#sweptAt + this.window)) this.#sweep(now);
    if (this.#count >= this.capacity) {
      this.#sweep(now);
      if (this.#count >= this.capacity) this.#makeRoom();
    }
    if (sender === undefined || !this.#senders.has(from)) {
      this.#senders.set(from, { seen: new Map([[key, moment]]), floor: sender?.floor ?? -Infinity });
    } else {
      sender.seen.set(key, moment);
    }
    this.#count++;
  }

  /** @param {number} now */
  #sweep(now) {
    this.#sweptAt = now;
    for (const [did, sender] of this.#senders) {
      for (const [id, moment] of sender.seen) if (moment < now - this.window) this.#forget(sender, id, moment, true);
      if (sender.seen.size === 0) this.#senders.delete(did);
    }
  }

  /** Forget an eighth, of those who sent the most; where all have sent one each, the oldest. */
  #makeRoom() {
    const room = this.capacity - Math.max(1, Math.floor(this.capacity / 8));
    while (this.#count > room) {
      const largest = [...this.#senders.values()].reduce((a, b) => (b.seen.size > a.seen.size ? b : a));
      const isShared = largest.seen.size <= 1;
      /** @type {[{seen: Map<string, number>, floor: number}, string, number][]} */
      const entries = [...(isShared ? this.#senders.values() : [largest])].flatMap((sender) =>
        [...sender.seen].map(([id, moment]) => /** @type {any} */ ([sender, id, moment])),
      );
      entries.sort((a, b) => a[2] - b[2]);
      const many = isShared ? this.#count - room : Math.max(1, Math.min(this.#count - room, largest.seen.size >> 1));
      for (const [sender, id, moment] of entries.slice(0, many)) this.#forget(sender, id, moment, isShared);
    }
    for (const [did, sender] of this.#senders) if (sender.seen.size === 0) this.#senders.delete(did);
  }

  /**
   * @param {{seen: Map<string, number>, floor: number}} sender
   * @param {string} id
   * @param {number} moment
   * @param {boolean} isForAll
   */
  #forget(sender, id, moment, isForAll) {
    sender.seen.delete(id);
    this.#count--;
    if (isForAll) this.#floor = Math.max(this.#floor, moment);
    else sender.floor = Math.max(sender.floor, moment);
  }
}

/** @param {string} cause @param {string} [message] @param {{field?: string}} [details] @returns {ErrorPayload} */
function errorPayload(cause, message, details = {}) {
  const { num, name, code, temporary } = CAUSES[cause];
  return {
    code,
    message: wellFormed(message ?? name.replaceAll("_", " "), 512),
    details: { num, name, temporary, ...details },
  };
}

/** @param {MessageError} error */
const refusalOf = (error) =>
  errorPayload(error.code, error.message, error.field === undefined ? {} : { field: wellFormed(error.field, 64) });

/** Cut a text to size and replace what JSON may not hold. @param {string} text @param {number} [length] */
const wellFormed = (text, length = ERROR_TEXT_MAX) => text.slice(0, length).replace(/[\ud800-\udfff]/gu, "\ufffd");

// =================================================================================================================
// Cards (section 6)
// =================================================================================================================

/**
 * @typedef {object} CapabilityCard What an agent tells others of one capability.
 * @property {string} name
 * @property {string} [description]
 * @property {string[]} [tags]
 * @property {string} [version]
 * @property {Record<string, any>} [input] JSON Schema of the arguments object.
 * @property {Record<string, any>} [output] JSON Schema of the result; of each part, where it streams.
 * @property {boolean} [stream] Whether the result comes in parts.
 * @property {Record<string, any>} [metadata]
 */

/** @typedef {{type: "CARD", did: string, issued_at: number, capabilities: CapabilityCard[], signature: string}} Card */

/** @type {Readonly<Record<string, Field>>} */
const CARD = {
  type: required(isOneOf("CARD")),
  did: required(isText),
  issued_at: required(isIntegerFrom(0)),
  capabilities: required(isListOf(isObject, LIMITS.CAPABILITIES_MAX)),
  signature: required(isText),
};
/** @type {Readonly<Record<string, Field>>} */
const CAPABILITY = {
  name: required(isTextOf(1, 64)),
  description: absentOr(isTextOf(0, 1024)),
  tags: absentOr(isListOf(isTextOf(1, 64), 16)),
  version: absentOr(isTextOf(0, 32)),
  input: optional(isObject),
  output: optional(isObject),
  stream: absentOr(isBoolean),
  metadata: absentOr(isObject),
};

/** @param {any[]} capabilities @returns {string | null} What is wrong with them. */
function misfitOfCapabilities(capabilities) {
  for (const capability of capabilities) {
    const known = Object.fromEntries(Object.entries(capability).filter(([key]) => Object.hasOwn(CAPABILITY, key)));
    const wrong = misfit(known, CAPABILITY);
    if (wrong !== null) return `a capability: ${wrong}`;
  }
  if (new Set(capabilities.map(({ name }) => name)).size !== capabilities.length) return "a name stands twice";
  const size = utf8(canonicalize(capabilities)).length;
  if (capabilities.length > LIMITS.CAPABILITIES_MAX || size > LIMITS.CAPABILITIES_MAX_BYTES) {
    return (
      `${capabilities.length} capabilities of together ${size} bytes; ` +
      `at most ${LIMITS.CAPABILITIES_MAX} of ${LIMITS.CAPABILITIES_MAX_BYTES} are kept`
    );
  }
  return null;
}

/** @param {CapabilityCard[]} capabilities @param {Identity} identity @returns {Promise<Card>} */
export async function signCard(capabilities, identity, issuedAt = Date.now()) {
  const wrong = misfitOfCapabilities(capabilities);
  if (wrong !== null) throw new MalformedMessageError("invalid_ext", wrong, { field: "ext.card.capabilities" });
  return sign({ type: /** @type {const} */ ("CARD"), did: identity.did, issued_at: issuedAt, capabilities }, identity);
}

/**
 * Check a card that somebody handed on.
 * @param {any} card Parsed JSON. @param {string} did Whose card it must be.
 * @returns {Promise<Card>}
 * @throws {MessageError} It is no card, or not signed by `did`.
 */
export async function verifyCard(card, did) {
  decodeDid(did);
  let wrong = isObject(card, null, "") ? misfit(card, CARD) : "not an object";
  if (wrong === null && card.did !== did) wrong = `did is ${card.did}, not ${did}`;
  wrong ??= misfitOfCapabilities(card.capabilities);
  if (wrong !== null) throw new MalformedMessageError("invalid_ext", `card: ${wrong}`, { field: "card" });
  if (!(await isSignedBy(card, did))) {
    throw new InvalidSignatureError("bad_signature", `the card of ${did} was not signed by it`, { field: "signature" });
  }
  return card;
}

// =================================================================================================================
// Waiting
// =================================================================================================================

/**
 * @template T
 * @typedef {{promise: Promise<T>, resolve: (value: T) => void, reject: (reason: unknown) => void, isSettled: boolean}}
 *   Deferred
 */

/** @template T @returns {Deferred<T>} A promise that may fail without anybody waiting for it. */
function deferred() {
  /** @type {any} */
  const result = { isSettled: false };
  result.promise = new Promise((resolve, reject) => {
    result.resolve = (/** @type {T} */ value) => {
      result.isSettled = true;
      resolve(value);
    };
    result.reject = (/** @type {unknown} */ reason) => {
      result.isSettled = true;
      reject(reason);
    };
  });
  result.promise.catch(() => {});
  return result;
}

/** @param {number} milliseconds @returns {Promise<void>} */
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/**
 * Wait for a promise, at most so long.
 * @template T
 * @param {Promise<T>} promise @param {number} milliseconds @param {() => Error} late Makes the error of its lateness.
 * @returns {Promise<T>}
 */
function within(promise, milliseconds, late) {
  /** @type {any} */
  let timer;
  const timeout = new Promise((_, reject) => (timer = setTimeout(() => reject(late()), milliseconds)));
  return /** @type {Promise<T>} */ (Promise.race([promise, timeout])).finally(() => clearTimeout(timer));
}

/**
 * Wait for a promise that the caller may give up, as `fetch` lets it.
 * @template T @param {Promise<T>} promise @param {AbortSignal} [signal] @returns {Promise<T>}
 */
function unlessAborted(promise, signal) {
  if (signal === undefined) return promise;
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) abort();
    signal.addEventListener("abort", abort);
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
  });
}

/** Values on their way from who makes them to one reader. @template T */
class Queue {
  /** @type {T[]} */
  #values = [];
  /** @type {Deferred<void> | null} */
  #arrival = null;

  /** @param {T} value */
  put(value) {
    this.#values.push(value);
    this.#arrival?.resolve();
    this.#arrival = null;
  }

  clear() {
    this.#values = [];
  }

  async take() {
    while (this.#values.length === 0) {
      this.#arrival ??= deferred();
      await this.#arrival.promise;
    }
    return /** @type {T} */ (this.#values.shift());
  }
}

// =================================================================================================================
// Gateway (sections 6, 7, 8, 11)
// =================================================================================================================

/** @typedef {"disconnected" | "connecting" | "registered" | "reconnecting" | "closed"} GatewayState */

/**
 * @typedef {object} Session What the gateway granted.
 * @property {string} id For people and logs.
 * @property {boolean} resumed Whether this continues the session before a drop.
 * @property {RTCIceServer[]} iceServers
 * @property {number | null} iceServersTtl Milliseconds for which they can be used; null if there is no end.
 * @property {string} gatewayDid
 * @property {string[]} features
 * @property {Record<string, any>} limits
 */

/** What the gateway may send unsigned: it could drop or invent these anyway. */
const UNSIGNED_BY_GATEWAY = new Set(["ERROR", "PING", "PONG", "PRESENCE"]);
const FROM_AGENTS = new Set(["OFFER", "ANSWER", "ICE_CANDIDATE", "ERROR"]);

/**
 * The STUN and TURN servers of a REGISTER, without what RTCPeerConnection would not take: it refuses all for one.
 * @param {Envelope} envelope
 * @returns {{iceServers: RTCIceServer[], iceServersTtl: number | null}}
 */
function readIceServers({ ext = {} }) {
  const iceServers = [];
  for (const server of Array.isArray(ext.ice_servers) ? ext.ice_servers : []) {
    const isCredential = typeof server?.username === "string" && typeof server.credential === "string";
    const urls = [server?.urls ?? []].flat().filter((url) => {
      const found = /^(stun|turn)s?:[^?/\s]+(\?transport=(udp|tcp))?$/.exec(url);
      return found !== null && (found[1] === "turn" ? isCredential : found[2] === undefined);
    });
    const { username, credential } = server ?? {};
    if (urls.length > 0) iceServers.push({ urls, ...(isCredential ? { username, credential } : {}) });
  }
  const ttl = ext.ice_servers_ttl_ms;
  return { iceServers, iceServersTtl: Number.isSafeInteger(ttl) && ttl > 0 ? ttl : null };
}

/** When to come back: exponential, with full jitter (section 11). */
class Backoff {
  attempts = 0;

  /** @param {number} [notBefore] */
  next(notBefore = 0) {
    const ceiling = Math.min(LIMITS.RECONNECT_MAX_MS, LIMITS.RECONNECT_BASE_MS * 2 ** Math.min(this.attempts++, 16));
    return notBefore + Math.random() * ceiling;
  }

  /** @param {number} lived Milliseconds of a session; a good one begins the count anew. */
  ended(lived) {
    if (lived >= LIMITS.RECONNECT_MAX_MS) this.attempts = 0;
  }
}

/**
 * The connection of one agent to its gateway. It registers, sends, verifies what arrives, and comes back after a drop.
 *
 * @typedef {object} GatewayHooks
 * @property {(envelope: Envelope) => void} received A verified message that no request waited for.
 * @property {(error: MessageError, envelope: Record<string, any>) => void} rejected A message that did not verify.
 * @property {(state: GatewayState) => void} stateChanged
 * @property {(text: string) => void} warn
 */
class Gateway {
  /** @type {GatewayState} */
  state = "disconnected";
  /** @type {Session | null} */
  session = null;
  /** @type {GatewayError | null} Why it is closed for good. */
  closedBecause = null;

  #url;
  #identity;
  #expectedDid;
  #isHidden;
  #capabilities;
  #WebSocket;
  #hooks;
  /** @type {WebSocket | null} Of the present session. */
  #socket = null;
  /** @type {WebSocket | null} Also while it registers. */
  #dialled = null;
  /** @type {{did: string, token: string} | null} */
  #resume = null;
  /** @type {Card | null} */
  #card = null;
  #guard = new ReplayGuard();
  #backoff = new Backoff();
  #isLeaving = false;
  /** @type {any} */
  #renewal;
  /** Ends the wait for the next attempt. */
  #wake = () => {};
  /** @type {Deferred<void>} Done when the state is registered or closed. */
  #settled = deferred();
  /** @type {Map<string, {to: string, answer: Deferred<Envelope>}>} Requests, by id. */
  #pending = new Map();
  /** @type {Set<string>} Ids of our own ERRORs: should one be undeliverable, that is nobody's business. */
  #answerIds = new Set();

  /**
   * @param {string} url @param {Identity} identity @param {GatewayHooks} hooks
   * @param {{
   *   gatewayDid?: string, hidden: boolean, capabilities: CapabilityCard[], WebSocket: typeof WebSocket
   * }} options
   */
  constructor(url, identity, hooks, { gatewayDid, hidden, capabilities, WebSocket }) {
    this.#url = new URL(url);
    if (!["ws:", "wss:"].includes(this.#url.protocol)) {
      throw new TypeError(`the gateway's URL looks like wss://host/ws, not ${this.#url.protocol}`);
    }
    this.#url.hash = ""; // a WebSocket must not have one
    if (gatewayDid !== undefined) decodeDid(gatewayDid);
    this.#identity = identity;
    this.#hooks = hooks;
    this.#expectedDid = gatewayDid;
    this.#isHidden = hidden;
    this.#capabilities = capabilities;
    this.#WebSocket = WebSocket;
  }

  /** What `ext.aud` names: the URL without userinfo, query and fragment. */
  get url() {
    return `${this.#url.protocol}//${this.#url.host}${this.#url.pathname}`;
  }

  /** Register. One attempt: what fails at first is most often a wrong URL. */
  async start() {
    if (this.state !== "disconnected") throw new NotConnectedError(`it is ${this.state}`, this.state);
    if (this.#capabilities.length > 0) this.#card = await signCard(this.#capabilities, this.#identity);
    const started = deferred();
    this.#run(started).catch(started.reject);
    await started.promise;
  }

  /** End the session. UNREGISTER leaves before the first `await`, so also where a page is about to go. */
  async close() {
    if (this.state === "closed") return;
    this.#isLeaving = true;
    const socket = this.#dialled;
    if (this.#socket !== null && this.session !== null) {
      const goodbye = createMessage(this.#identity.did, this.session.gatewayDid, "UNREGISTER", {});
      this.#socket.send(serialize(goodbye));
    }
    this.#finish(null);
    socket?.close(1000);
  }

  // --- the connection --------------------------------------------------------------------------------------------

  /** @param {Deferred<any>} started */
  async #run(started) {
    this.#setState("connecting");
    for (;;) {
      const { close, reason, error, lived } = await this.#connectAndRead(() => started.resolve(undefined));
      this.#backoff.ended(lived);
      if (this.#isLeaving) {
        started.reject(new NotConnectedError("the agent was closed", "closed"));
        return;
      }
      if (!close.reconnect) {
        const text = `the gateway ${this.url} closed the connection for good: ${close.name}; ${error.message}`;
        this.#finish(started.isSettled ? new GatewayClosedError(text, close.name, error) : error);
        started.reject(error);
        return;
      }
      if (!started.isSettled) {
        this.#setState("disconnected");
        started.reject(error);
        return;
      }
      this.#dropped();
      const wait = this.#backoff.next(retryAfter(close, reason));
      this.#hooks.warn(`${error.message}; next attempt in ${(wait / 1000).toFixed(1)} s`);
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, wait);
        this.#wake = () => {
          clearTimeout(timer); // it would keep a process from ending
          resolve(undefined);
        };
      });
      if (this.#isLeaving) return;
    }
  }

  /**
   * Hold one connection from the dial to its end.
   * @param {() => void} registered
   * @returns {Promise<{close: CloseCode, reason: string, error: GatewayError, lived: number}>}
   */
  #connectAndRead(registered) {
    return new Promise((resolve) => {
      /** @type {WebSocket} */
      const socket = new this.#WebSocket(this.#url.href, SUBPROTOCOL);
      this.#dialled = socket;
      let registeredAt = NaN;
      let heardAt = Date.now();
      let isOver = false;
      /** @type {GatewayError | null} */
      let fault = null;
      /** @type {{gatewayDid: string, features: string[], limits: any, interval: number} | null} */
      let challenge = null;
      /** @type {string | null} */
      let proofId = null;
      /** @type {any} */
      let pinging;

      const end = (/** @type {number} */ code, /** @type {string} */ reason) => {
        if (isOver) return;
        isOver = true;
        clearTimeout(registering);
        clearInterval(pinging);
        clearTimeout(this.#renewal);
        if (this.#socket === socket) this.#socket = null;
        this.#dialled = null;
        const close = closeCode(code);
        const text = `the gateway ${this.url} ended the connection: ${close.name}`;
        const error = fault ?? new GatewayUnreachableError(text, close.name);
        resolve({ close, reason, error, lived: Date.now() - registeredAt });
      };
      const giveUp = (/** @type {GatewayError} */ error, code = 1006) => {
        fault ??= error;
        socket.close();
        end(code, ""); // a broken network answers no CLOSE; nobody should wait for it
      };
      const registering = setTimeout(
        () => giveUp(new GatewayUnreachableError(`the gateway ${this.url} did not answer in time`, "timeout")),
        LIMITS.REGISTER_TIMEOUT_MS,
      );

      const handle = async (/** @type {unknown} */ data) => {
        if (isOver) return;
        if (this.#socket === socket) return this.#take(data);
        if (typeof data !== "string") throw new GatewayIdentityError("the gateway sent a binary frame", "binary_frame");
        if (challenge === null) {
          const found = await this.#readChallenge(data);
          challenge = found;
          const proof = await this.#proof(found);
          proofId = proof.id;
          socket.send(serialize(proof));
          return;
        }
        this.session = await this.#readAnswer(data, challenge, /** @type {string} */ (proofId));
        clearTimeout(registering);
        registeredAt = Date.now();
        this.#socket = socket;
        const { interval } = challenge;
        // Browsers answer the gateway's pings but do not show them: ask by a PING of the protocol (section 7).
        pinging = setInterval(() => {
          const silence = Date.now() - heardAt;
          if (silence > 2 * interval) giveUp(new GatewayUnreachableError("the gateway is silent", "silent"));
          else if (silence > interval) this.#ping();
        }, interval / 2);
        this.#setState("registered");
        this.#renewIceServers();
        registered();
      };

      // Verification takes turns of the event loop: one message after the other keeps them in order.
      let turn = Promise.resolve();
      let unread = 0;
      socket.binaryType = "arraybuffer";
      socket.onmessage = ({ data }) => {
        heardAt = Date.now();
        const size = data.length ?? data.byteLength ?? 0;
        unread += size;
        if (unread > UNREAD_MAX_BYTES) {
          giveUp(new GatewayUnreachableError("the gateway sends faster than signatures can be verified", "flood"));
          return;
        }
        turn = turn
          .then(() => {
            unread -= size;
            return handle(data);
          })
          .catch((error) => {
            // Who refuses also closes, with the code that says whether to come back.
            if (error instanceof RegistrationError) fault ??= error;
            else if (error instanceof GatewayIdentityError) giveUp(error);
            else
              giveUp(new GatewayIdentityError(`the gateway cannot be understood: ${error.message}`, "protocol", error));
          });
      };
      socket.onclose = ({ code, reason }) => void turn.then(() => end(code, reason));
      socket.onerror = () => {
        fault ??= new GatewayUnreachableError(`no connection to the gateway ${this.url}`, "unreachable");
        if (socket.readyState === 3) setTimeout(() => end(1006, ""), 0); // where no close event follows
      };
    });
  }

  /** Check the gateway's first message. @param {string} text */
  async #readChallenge(text) {
    const envelope = this.#decodeFromGateway(text);
    const { from, ext = {}, payload, type } = envelope;
    if (this.#expectedDid !== undefined && from !== this.#expectedDid) {
      throw new GatewayIdentityError(`this gateway is ${from}, not ${this.#expectedDid}`, "wrong_gateway");
    }
    await this.#prove(envelope, { recipient: from, guard: new ReplayGuard(LIMITS.REGISTER_CLOCK_SKEW_MS) });
    if (type !== "REGISTER" || typeof ext.nonce !== "string") {
      throw new GatewayIdentityError("its first message is no REGISTER with a nonce; is it a gateway?", "no_gateway");
    }
    if (DID_PREFIX + payload.public_key !== from) {
      throw new GatewayIdentityError("the public_key of the gateway is not the key in its DID", "wrong_key");
    }
    const interval = Number.isSafeInteger(ext.ping_interval_ms) ? Math.max(1000, ext.ping_interval_ms) : 25_000;
    return {
      gatewayDid: from,
      nonce: ext.nonce,
      features: Array.isArray(ext.features) ? ext.features.filter((name) => typeof name === "string") : [],
      limits: isObject(ext.limits, null, "") ? ext.limits : {},
      interval,
    };
  }

  /**
   * Our REGISTER: nonce and audience are signed together, so nobody can pass the proof on.
   * @param {{gatewayDid: string, nonce: string}} challenge
   */
  async #proof({ gatewayDid, nonce }) {
    /** @type {Record<string, any>} */
    const ext = { nonce, aud: this.url, ...this.#shown() };
    // The token is a secret of the gateway that issued it: another one that answers here does not get it.
    if (this.#resume?.did === gatewayDid) ext.resume = this.#resume.token;
    const payload = { public_key: this.#identity.publicKey };
    return sign(createMessage(this.#identity.did, gatewayDid, "REGISTER", payload, { ext }), this.#identity);
  }

  /** What others may see of this agent, as REGISTER has it. */
  #shown() {
    return { ...(this.#card === null ? {} : { card: this.#card }), ...(this.#isHidden ? { hidden: true } : {}) };
  }

  /**
   * Check the answer to our REGISTER.
   * @param {string} text
   * @param {{gatewayDid: string, features: string[], limits: any}} challenge
   * @param {string} proofId
   * @returns {Promise<Session>}
   */
  async #readAnswer(text, { gatewayDid, features, limits }, proofId) {
    const envelope = this.#decodeFromGateway(text);
    await this.#prove(envelope, { recipient: this.#identity.did, sender: gatewayDid, guard: this.#guard });
    const { session, resume_token: token, resumed } = envelope.ext ?? {};
    if (envelope.type !== "REGISTER" || envelope.correlation_id !== proofId || typeof session !== "string") {
      throw new RegistrationError("the gateway did not answer REGISTER with a session", "no_session");
    }
    if (this.session !== null && this.session.gatewayDid !== gatewayDid) {
      this.#hooks.warn(`another gateway answers at ${this.url}: ${gatewayDid}`);
    }
    this.#resume = typeof token === "string" ? { did: gatewayDid, token } : null;
    return {
      id: session,
      resumed: resumed === true,
      ...readIceServers(envelope),
      gatewayDid,
      features,
      limits,
    };
  }

  /** @param {string} text */
  #decodeFromGateway(text) {
    const envelope = decode(text);
    if (envelope.type === "ERROR") {
      // Unsigned, and that is enough: who could forge it could also cut the connection.
      const { message } = envelope.payload;
      throw new RegistrationError(
        `the gateway refused to register this agent: ${message}`,
        envelope.payload.details?.name ?? envelope.payload.code,
        remoteError(envelope.payload),
      );
    }
    return envelope;
  }

  /** @param {Envelope} envelope @param {{recipient: string, guard: ReplayGuard, sender?: string}} options */
  async #prove(envelope, options) {
    try {
      await verify(envelope, options);
    } catch (error) {
      const text = /** @type {MessageError} */ (error);
      throw new GatewayIdentityError(`the gateway does not prove its key: ${text.message}`, text.code, error);
    }
  }

  #dropped() {
    this.#setState("reconnecting");
    // What agents answer waits at the gateway; what it answers itself was lost with the connection.
    for (const [id, { to, answer }] of this.#pending) {
      if (to !== this.session?.gatewayDid) continue;
      this.#pending.delete(id);
      answer.reject(this.#lostError());
    }
  }

  /** @param {GatewayError | null} error */
  #finish(error) {
    this.closedBecause = error;
    this.#socket = null;
    this.#setState("closed");
    clearTimeout(this.#renewal);
    this.#wake();
    for (const { answer } of this.#pending.values()) answer.reject(this.#closedError());
    this.#pending.clear();
  }

  #lostError() {
    return new NotConnectedError("the connection broke before the gateway answered: ask again", "lost");
  }

  #closedError() {
    return this.closedBecause ?? new NotConnectedError("this agent was closed", "closed");
  }

  /** @param {GatewayState} state */
  #setState(state) {
    if (this.state === state || this.state === "closed") return;
    this.state = state;
    if (state === "registered" || state === "closed") this.#settled.resolve(undefined);
    else if (this.#settled.isSettled) this.#settled = deferred();
    this.#hooks.stateChanged(state);
  }

  // --- sending ---------------------------------------------------------------------------------------------------

  /**
   * Send a message, signed; while there is no connection it waits for the next, unless it is for the gateway itself.
   * @param {Envelope} envelope @param {number} [timeout]
   * @returns {Promise<Envelope>} As it was sent.
   */
  async send(envelope, timeout = LIMITS.REQUEST_TIMEOUT_MS) {
    const isForGateway = envelope.to === this.session?.gatewayDid;
    const signed = await sign(envelope, this.#identity);
    const text = serialize(signed);
    const announced = this.session?.limits.message_max_bytes;
    const limit = Math.min(Number.isSafeInteger(announced) ? announced : Infinity, LIMITS.MESSAGE_MAX_BYTES);
    if (isLonger(text, limit)) throw new MalformedMessageError("too_large", `at most ${limit} bytes can be sent`);
    // What is for this gateway is not for the next, which may be another one.
    if (isForGateway && this.#socket?.readyState !== 1) throw this.#lostError();
    (await this.#connected(timeout)).send(text);
    return signed;
  }

  /** The socket of the session; while there is none, that of the next. @param {number} timeout */
  async #connected(timeout) {
    const deadline = Date.now() + timeout;
    while (this.#socket === null || this.#socket.readyState !== 1) {
      if (this.state === "closed") throw this.#closedError();
      if (this.state === "disconnected")
        throw new NotConnectedError("not registered: call start() first", "disconnected");
      const late = () => new NotConnectedError(`no connection to ${this.url} in time`, "timeout");
      // A socket that is closing takes no message any more, and has its close event in a moment.
      const change = this.state === "registered" ? sleep(10) : this.#settled.promise;
      await within(change, Math.max(0, deadline - Date.now()), late);
    }
    return this.#socket;
  }

  /**
   * Ask the gateway itself; while there is no connection, the one that answers next: it may have another key.
   * @param {string} type @param {Record<string, any>} payload @param {{id?: string, timeout?: number}} [options]
   */
  async ask(type, payload, { id, timeout = LIMITS.REQUEST_TIMEOUT_MS } = {}) {
    await this.#connected(timeout);
    const { gatewayDid } = /** @type {Session} */ (this.session);
    const message = createMessage(this.#identity.did, gatewayDid, type, payload);
    return this.request(id === undefined ? message : { ...message, id }, timeout);
  }

  /**
   * Send a message and return its answer; only whom it is for can answer, and the gateway by ERROR.
   * @param {Envelope} envelope @param {number} [timeout]
   */
  async request(envelope, timeout = LIMITS.REQUEST_TIMEOUT_MS) {
    const id = envelope.id.toLowerCase();
    const pending = { to: envelope.to, answer: deferred() };
    this.#pending.set(id, pending);
    try {
      await this.send(envelope, timeout);
      const late = () => new GatewayUnreachableError(`no answer to ${envelope.type} in time`, "timeout");
      const answer = await within(pending.answer.promise, timeout, late);
      if (answer.type === "ERROR") {
        throw remoteError(answer.payload, `${this.url} refused ${envelope.type}: ${answer.payload.message}`);
      }
      return answer;
    } finally {
      this.#pending.delete(id);
    }
  }

  /** Ask for new TURN credentials before the last ones expire, as long as this connection lasts. */
  #renewIceServers() {
    clearTimeout(this.#renewal);
    const ttl = this.session?.iceServersTtl ?? null;
    if (ttl === null) return;
    // At random, so that not all come at once; and so early that one attempt may fail.
    const wait = Math.max(RENEWAL_MIN_MS, Math.min(ttl * (0.2 + 0.2 * Math.random()), TIMER_MAX_MS));
    this.#renewal = setTimeout(async () => {
      if (this.session === null || this.state !== "registered") return;
      const ext = this.#shown();
      const more = Object.keys(ext).length > 0 ? { ext } : {};
      const payload = { public_key: this.#identity.publicKey };
      const message = createMessage(this.#identity.did, this.session.gatewayDid, "REGISTER", payload, more);
      try {
        const answer = await this.request(message);
        this.session = { ...this.session, ...readIceServers(answer) };
      } catch (error) {
        this.#hooks.warn(`no new TURN credentials: ${/** @type {Error} */ (error).message}`);
      }
      if (this.state === "registered") this.#renewIceServers();
    }, wait);
  }

  #ping() {
    if (this.#socket === null || this.session === null) return;
    this.#socket.send(serialize(createMessage(this.#identity.did, this.session.gatewayDid, "PING", {})));
  }

  // --- receiving -------------------------------------------------------------------------------------------------

  /** @param {unknown} data */
  async #take(data) {
    /** @type {Envelope | null} */
    let envelope = null;
    try {
      if (typeof data !== "string") throw new MalformedMessageError("binary_frame");
      envelope = decode(data);
      await this.#verify(envelope);
    } catch (error) {
      if (!(error instanceof MessageError)) throw error;
      await this.#reject(error, envelope);
      return;
    }
    const asked = envelope.correlation_id?.toLowerCase() ?? "";
    const pending = this.#pending.get(asked);
    const isFromGateway = envelope.from === this.session?.gatewayDid;
    // An event of a watch names the DISCOVER, too, but does not answer it.
    const isAnswer = !(envelope.type === "PRESENCE" && (envelope.payload.event ?? null) !== null);
    if (
      pending !== undefined &&
      isAnswer &&
      (envelope.from === pending.to || (isFromGateway && envelope.type === "ERROR"))
    ) {
      pending.answer.resolve(envelope);
    } else if (envelope.type === "PING") {
      this.#socket?.send(
        serialize(
          createMessage(this.#identity.did, envelope.from, "PONG", envelope.payload, { correlationId: envelope.id }),
        ),
      );
    } else if (!(envelope.type === "ERROR" && this.#answerIds.has(asked))) {
      this.#hooks.received(envelope);
    }
  }

  /** @param {Envelope} envelope */
  async #verify(envelope) {
    const gateway = this.session?.gatewayDid;
    const { from, to, type, id } = envelope;
    const isUnsigned = (envelope.signature ?? null) === null;
    if (isUnsigned && from === gateway && to === this.#identity.did && UNSIGNED_BY_GATEWAY.has(type)) return;
    await verify(envelope, { recipient: this.#identity.did, guard: this.#guard });
    if (from !== gateway && !FROM_AGENTS.has(type)) {
      throw new MalformedMessageError("unexpected_type", `an agent does not send ${type} by the gateway`, {
        field: "type",
        id,
      });
    }
  }

  /**
   * Tell the sender, if it is proven who that is: nobody can make this agent write to a third party.
   * @param {MessageError} error @param {Envelope | null} envelope
   */
  async #reject(error, envelope) {
    this.#hooks.warn(`a message was dropped (${error.code}): ${error.message}`);
    this.#hooks.rejected(error, envelope ?? error.envelope);
    if (envelope === null || error.code === "replayed" || envelope.type === "ERROR") return;
    if (envelope.to !== this.#identity.did || envelope.from === this.#identity.did) return;
    if (!(await isSignedBy(envelope, envelope.from))) return;
    this.reply(envelope, refusalOf(error));
  }

  /** Send an ERROR, and do not wait. @param {Envelope} envelope @param {ErrorPayload} payload */
  reply(envelope, payload) {
    const answer = createMessage(this.#identity.did, envelope.from, "ERROR", payload, { correlationId: envelope.id });
    this.#answerIds.add(answer.id);
    if (this.#answerIds.size > 64)
      this.#answerIds.delete(/** @type {string} */ (this.#answerIds.values().next().value));
    this.send(answer).catch((error) => this.#hooks.warn(`${shortDid(envelope.from)} was not told: ${error.message}`));
  }
}

// =================================================================================================================
// Directory (section 9: DISCOVER, PRESENCE)
// =================================================================================================================

/**
 * @typedef {{did: string, status: "online" | "away" | "offline", card: Card | null, capabilities: CapabilityCard[]}}
 *   Found
 */
/** @typedef {{event: "join" | "update" | "away" | "leave", agent: Found}} PresenceEvent */
/** @typedef {{capability?: string, tag?: string, text?: string, dids?: string[]}} Query */

/** Asks the gateway who is there, and hears who comes and goes. */
class Directory {
  #gateway;
  #did;
  #warn;
  /**
   * @type {Map<string, (envelope: Envelope | null) => void>} Watches by the id of their DISCOVER; null: another
   *   connection.
   */
  #watches = new Map();

  /** @param {Gateway} gateway @param {string} did @param {(text: string) => void} warn */
  constructor(gateway, did, warn) {
    this.#gateway = gateway;
    this.#did = did;
    this.#warn = warn;
  }

  /** Take an event of a watch. @param {Envelope} envelope */
  received(envelope) {
    this.#watches.get(envelope.correlation_id?.toLowerCase() ?? "")?.(envelope);
  }

  /** The gateway is another one, or closed: all watches are gone. */
  renewed() {
    for (const tell of [...this.#watches.values()]) tell(null);
  }

  /**
   * @param {Query} query @param {{limit?: number, timeout?: number}} options `timeout` of each page.
   * @returns {AsyncGenerator<Found, void, void>}
   */
  async *discover({ capability, tag, text, dids }, { limit = Infinity, timeout }) {
    let count = 0;
    let isWhole = true;
    const size = Math.max(1, Math.min(limit, PAGE_SIZE));
    for await (const page of this.#pages({ capability, tag, text, dids, limit: size }, { timeout })) {
      isWhole &&= page.partial !== true;
      for (const entry of page.agents ?? []) {
        const found = await this.#read(entry);
        if (found === null) continue;
        if (count++ >= limit) return;
        yield found;
      }
      if (count >= limit) return;
    }
    if (!isWhole) {
      throw new IncompleteAnswerError(`${this.#gateway.url} could not ask everybody who knows who is there`, "partial");
    }
  }

  /**
   * @param {Query} query @param {{signal?: AbortSignal, timeout?: number}} options `timeout` of each page.
   * @returns {AsyncGenerator<PresenceEvent, void, void>}
   */
  async *watch({ capability, tag, text, dids }, { signal, timeout }) {
    const query = { capability, tag, text, dids, limit: PAGE_SIZE };
    /** @type {Map<string, Found>} */
    const known = new Map();
    /** @type {Set<string>} Of whom something was told that is not read yet: a page is older than that. */
    const told = new Set();
    /** @type {Queue<any>} Payloads; null: the connection is another one. */
    const queue = new Queue();
    const backoff = new Backoff();
    let id = "";
    /** @type {Session | null} In which it has begun: it ends with that. */
    let begun = null;
    /** @type {any} */
    let retry;

    const begin = () => {
      this.#watches.delete(id);
      id = createMessage(this.#did, this.#did, "DISCOVER", {}).id;
      this.#watches.set(id, (envelope) => {
        for (const entry of envelope?.payload.agents ?? []) told.add(String(entry.did));
        queue.put(envelope?.payload ?? null);
      });
      return id;
    };
    /** @param {Found} found @returns {PresenceEvent | null} What it means that an agent is so now. */
    const apply = (found) => {
      const before = known.get(found.did);
      if (found.status === "offline") return known.delete(found.did) ? { event: "leave", agent: found } : null;
      known.set(found.did, found);
      const isSame = before?.status === found.status && before.card?.signature === found.card?.signature;
      if (before !== undefined && isSame) return null;
      return { event: found.status === "away" ? "away" : before === undefined ? "join" : "update", agent: found };
    };
    const directory = this;
    /** @param {string} [watchId] Also watch, by a DISCOVER with this id. */
    async function* compare(watchId) {
      const present = new Set();
      let isWhole = true;
      try {
        const asked = watchId === undefined ? query : { ...query, watch: true };
        for await (const page of directory.#pages(asked, { id: watchId, timeout })) {
          if (watchId !== undefined) {
            begun = directory.#gateway.session; // later pages may come in a later session
            watchId = undefined;
          }
          isWhole &&= page.partial !== true;
          for (const entry of page.agents ?? []) {
            present.add(entry.did);
            const found = await directory.#read(entry);
            const event = found === null || told.has(found.did) ? null : apply(found);
            if (event !== null) yield event;
          }
        }
      } catch (error) {
        // It begins again with the next connection, or ends with the agent.
        if (error instanceof NotConnectedError || directory.#gateway.state === "closed") return;
        if (!(error instanceof RemoteError && error.temporary) && !(error instanceof GatewayUnreachableError))
          throw error;
        // It may have begun, though nobody said so.
        if (watchId !== undefined && error instanceof GatewayUnreachableError) directory.#end(watchId);
        clearTimeout(retry);
        retry = setTimeout(() => queue.put(watchId === undefined ? { event: "missed" } : null), backoff.next(1000));
        return;
      }
      if (!isWhole) {
        clearTimeout(retry);
        retry = setTimeout(() => queue.put({ event: "missed" }), backoff.next(1000));
        return;
      }
      backoff.attempts = 0;
      for (const [did, found] of [...known]) {
        if (present.has(did) || told.has(did)) continue;
        const event = apply({ ...found, status: "offline" });
        if (event !== null) yield event;
      }
    }

    try {
      begin();
      queue.put(null); // where there is no connection now, the next one begins it
      for (;;) {
        const payload = await unlessAborted(queue.take(), signal);
        told.clear();
        if (payload === null && this.#gateway.state === "closed") return;
        if (payload === null && this.#gateway.state !== "registered") continue;
        if (payload === null && this.#gateway.session !== begun) {
          yield* compare(begin());
        } else if (payload === null || payload.event === "missed") {
          yield* compare();
        } else {
          for (const entry of payload.agents ?? []) {
            const found = await this.#read(entry);
            const event = found === null ? null : apply(found);
            if (event !== null) yield event;
          }
        }
      }
    } catch (error) {
      if (!signal?.aborted) throw error;
    } finally {
      clearTimeout(retry);
      this.#watches.delete(id);
      this.#end(id);
    }
  }

  /** @param {string} id */
  #end(id) {
    const { session, state } = this.#gateway;
    if (session === null || state !== "registered") return;
    const end = createMessage(this.#did, session.gatewayDid, "DISCOVER", { watch: false }, { correlationId: id });
    this.#gateway.request(end).catch((error) => this.#warn(`the end of a watch is not confirmed: ${error.message}`));
  }

  /**
   * @param {Record<string, any>} query
   * @param {{id?: string, timeout?: number}} [options] `id` of the first DISCOVER; `timeout` of each.
   * @returns {AsyncGenerator<any, void, void>}
   */
  async *#pages(query, { id, timeout } = {}) {
    const fields = Object.entries(query).filter(([, value]) => value !== undefined);
    let payload = Object.fromEntries(fields);
    for (;;) {
      const answer = await this.#gateway.ask("DISCOVER", payload, { id, timeout });
      if (answer.type !== "PRESENCE") {
        throw new MalformedMessageError("unexpected_type", `the gateway answered DISCOVER with ${answer.type}`);
      }
      yield answer.payload;
      if ((answer.payload.cursor ?? null) === null) return;
      const { watch: _, ...rest } = payload;
      payload = { ...rest, cursor: answer.payload.cursor };
      id = undefined;
    }
  }

  /**
   * An agent of a PRESENCE; null if the gateway tells lies about it.
   * @param {any} entry
   * @returns {Promise<Found | null>}
   */
  async #read({ did, status, card: value }) {
    try {
      decodeDid(did);
      const card = (value ?? null) === null ? null : await verifyCard(value, did);
      return {
        did,
        status: ["away", "offline"].includes(status) ? status : "online",
        card,
        capabilities: card?.capabilities ?? [],
      };
    } catch (error) {
      this.#warn(`an agent of the gateway's directory is left out: ${/** @type {Error} */ (error).message}`);
      return null;
    }
  }
}

// =================================================================================================================
// Frames and attachments (section 13.6)
// =================================================================================================================

const DATA = 1;
const CREDIT = 2;
const END = 3;

/**
 * @param {string} call
 * @param {number} kind
 * @param {number} size
 * @returns {DataView} Of a frame with room for `size` bytes behind its head.
 */
function frameOf(call, kind, size) {
  const frame = new Uint8Array(LIMITS.FRAME_HEAD_BYTES + size);
  frame[0] = kind;
  frame.set(fromHex(call.replaceAll("-", "")), 1);
  return new DataView(frame.buffer);
}

/** @param {string} call Id of the EXEC_REQUEST. @param {Uint8Array} chunk 1 to 16,384 bytes. */
export function dataFrame(call, chunk) {
  const frame = new Uint8Array(frameOf(call, DATA, chunk.length).buffer);
  frame.set(chunk, LIMITS.FRAME_HEAD_BYTES);
  return frame;
}

/** @param {string} call @param {string} digest SHA-256 of the stream that ends, in hexadecimal digits. */
export function endFrame(call, digest) {
  const frame = new Uint8Array(frameOf(call, END, 32).buffer);
  frame.set(fromHex(digest), LIMITS.FRAME_HEAD_BYTES);
  return frame;
}

/** @param {string} call @param {number} taken Bytes, since the call began. */
export function creditFrame(call, taken) {
  const view = frameOf(call, CREDIT, 8);
  view.setBigUint64(LIMITS.FRAME_HEAD_BYTES, BigInt(taken));
  return new Uint8Array(view.buffer);
}

/**
 * @param {Uint8Array} frame
 * @returns {{kind: "data", call: string, chunk: Uint8Array} | {kind: "credit", call: string, taken: number}
 *   | {kind: "end", call: string, digest: string}}
 * @throws {MalformedMessageError} `bad_frame`
 */
export function parseFrame(frame) {
  const size = frame.length - LIMITS.FRAME_HEAD_BYTES;
  const call = size > 0 ? uuidOf(frame.subarray(1, LIMITS.FRAME_HEAD_BYTES)) : "";
  if (frame[0] === DATA && size >= 1 && size <= LIMITS.CHUNK_MAX_BYTES) {
    return { kind: "data", call, chunk: frame.subarray(LIMITS.FRAME_HEAD_BYTES) };
  }
  if (frame[0] === CREDIT && size === 8) {
    const taken = new DataView(frame.buffer, frame.byteOffset + LIMITS.FRAME_HEAD_BYTES, 8).getBigUint64(0);
    if (taken <= BigInt(Number.MAX_SAFE_INTEGER)) return { kind: "credit", call, taken: Number(taken) };
  }
  if (frame[0] === END && size === 32)
    return { kind: "end", call, digest: toHex(frame.subarray(LIMITS.FRAME_HEAD_BYTES)) };
  throw new MalformedMessageError("bad_frame", `${frame.length} bytes that are no frame`);
}

/**
 * @typedef {{at: string, as: "json" | "bytes", size?: number, sha256?: string}} Attachment Without `size` it is a
 *   stream.
 */
/**
 * @typedef {{at: string, as: "json" | "bytes", data: Uint8Array | null}} Detached What travels beside an envelope;
 *   null: a stream.
 */

/** @type {Readonly<Record<string, Field>>} */
const ATTACHMENT = {
  at: required(isText),
  as: required(isOneOf("json", "bytes")),
  size: absentOr(isIntegerFrom(0)),
  sha256: absentOr((value) => typeof value === "string" && /^[0-9a-f]{64}$/.test(value)),
};

/**
 * The error of a capability that gave what no message can carry; any other error as it is.
 * @param {string} what
 * @param {unknown} error
 */
const unsendable = (what, error) =>
  error instanceof MessageError
    ? new CapabilityError(`${what} cannot be sent: ${error.message}`, "capability_error", error)
    : error;

/** @param {unknown} value @returns {Detached | null} What a result is beside its envelope; null if it fits into it. */
function detachResult(value) {
  const bytes = asBytes(value);
  if (bytes === null && !isLonger(serialize(value), LIMITS.INLINE_MAX_BYTES - 1024)) return null;
  const data = bytes ?? utf8(canonicalize(value));
  if (isTooLarge([[data.length, bytes === null]])) throw new MalformedMessageError("too_large", tooLarge(data.length));
  return { at: "/result", as: bytes === null ? "json" : "bytes", data };
}

/**
 * @param {Record<string, any>} args
 * @returns {{inline: Record<string, any>, detached: Detached[], source: AsyncIterable<unknown> | null}}
 */
function detachArguments(args) {
  /** @type {Record<string, any>} */
  let inline = {};
  /** @type {Detached[]} */
  const detached = [];
  /** @type {Detached[]} */
  const streams = [];
  let source = null;
  for (const [name, value] of Object.entries(args)) {
    const at = `/args/${name.replaceAll("~", "~0").replaceAll("/", "~1")}`;
    const bytes = asBytes(value);
    const stream = asStream(value);
    if (bytes !== null) detached.push({ at, as: "bytes", data: bytes });
    else if (stream === null) inline[name] = value;
    else {
      streams.push({ at, as: "bytes", data: null });
      source = stream;
    }
  }
  if (streams.length > 1) throw new MalformedMessageError("invalid_ext", "one argument can be a stream of bytes");
  detached.push(...streams);
  if (isLonger(serialize(inline), LIMITS.INLINE_MAX_BYTES - 1024)) {
    detached.unshift({ at: "/args", as: "json", data: utf8(canonicalize(inline)) });
    inline = {};
  }
  if (detached.length > LIMITS.ATTACHMENTS_MAX) {
    throw new MalformedMessageError("too_large", `at most ${LIMITS.ATTACHMENTS_MAX} arguments of bytes can be sent`);
  }
  return { inline, detached, source };
}

/**
 * @param {any} value
 * @returns {AsyncIterable<unknown> | null} What gives bytes one after the other; null if it does not.
 */
function asStream(value) {
  if (isAsyncIterable(value)) return value;
  if (typeof value?.getReader !== "function") return null;
  return (async function* () {
    // a ReadableStream, of a browser in which these cannot be iterated
    const reader = value.getReader();
    try {
      for (;;) {
        const { done, value: chunk } = await reader.read();
        if (done) return;
        yield chunk;
      }
    } finally {
      await reader.cancel();
    }
  })();
}

/** @param {Detached[]} detached @param {Record<string, any>} ext @param {boolean} isSigned */
async function describe(detached, ext, isSigned) {
  if (detached.length === 0) return ext;
  const attachments = [];
  for (const { at, as, data } of detached) {
    if (data === null) attachments.push({ at, as });
    else attachments.push({ at, as, size: data.length, ...(isSigned ? { sha256: await sha256(data) } : {}) });
  }
  return { ...ext, attachments };
}

/** @param {number} size Bytes that are attached, and refused. */
function tooLarge(size) {
  const { ATTACHMENTS_MAX_BYTES, ATTACHED_JSON_MAX_BYTES } = LIMITS;
  return `${size} bytes are attached; at most ${ATTACHMENTS_MAX_BYTES} are kept, and ${ATTACHED_JSON_MAX_BYTES} of JSON`;
}

/**
 * Tells whether attachments are more than anybody may attach to one message.
 * @param {[number, boolean][]} sizes Bytes of each, and whether they are JSON.
 */
function isTooLarge(sizes) {
  const all = sizes.reduce((sum, [size]) => sum + size, 0);
  const json = sizes.reduce((sum, [size, isJson]) => sum + (isJson ? size : 0), 0);
  return all > LIMITS.ATTACHMENTS_MAX_BYTES || json > LIMITS.ATTACHED_JSON_MAX_BYTES;
}

/** The attachments of one envelope, as their bytes come in. */
export class Assembly {
  #envelope;
  /** @type {{attachment: Attachment, chunks: Uint8Array[], missing: number, digest: Sha256 | null}[]} */
  #parts;
  #next = 0;

  /** @param {Envelope} envelope An EXEC_REQUEST or EXEC_RESPONSE. @throws {MalformedMessageError} `invalid_ext` */
  constructor(envelope) {
    this.#envelope = envelope;
    const attachments = envelope.ext?.attachments ?? [];
    if (!isListOf(isObject, LIMITS.ATTACHMENTS_MAX)(attachments, null, "")) this.#refuse("not a list of attachments");
    const places = new Set();
    /** Name of the argument that is a stream of bytes. @type {string | null} */
    this.stream = null;
    for (const attachment of attachments) {
      const known = Object.fromEntries(Object.entries(attachment).filter(([key]) => Object.hasOwn(ATTACHMENT, key)));
      const wrong = misfit(known, ATTACHMENT);
      if (wrong !== null) this.#refuse(`an attachment: ${wrong}`);
      if (!this.#isFree(attachment) || places.has(attachment.at)) this.#refuse(`${attachment.at} is no place for one`);
      places.add(attachment.at);
      if (attachment.size === undefined) {
        const isLast = attachment === attachments.at(-1) && envelope.type === "EXEC_REQUEST";
        if (!isLast || attachment.as !== "bytes" || attachment.sha256 !== undefined)
          this.#refuse(`${attachment.at} cannot be a stream`);
        this.stream = argumentName(attachment.at);
      } else if (attachment.sha256 === undefined && (envelope.signature ?? null) !== null) {
        this.#refuse(`the digest of ${attachment.at} is missing: this message is signed`);
      }
    }
    this.#parts = attachments
      .filter((/** @type {Attachment} */ { size }) => size !== undefined)
      .map((/** @type {Required<Attachment>} */ attachment) => ({
        attachment,
        chunks: [],
        missing: attachment.size,
        digest: attachment.sha256 === undefined ? null : new Sha256(),
      }));
    /** Bytes of all together. */
    this.size = this.#parts.reduce((sum, { missing }) => sum + missing, 0);
    /** Whether they are more than anybody may attach to one message. */
    this.isTooLarge = isTooLarge(this.#parts.map(({ attachment, missing }) => [missing, attachment.as === "json"]));
    /** Bytes that are still to come. */
    this.missing = this.size;
    this.#skipEmpty();
  }

  /** Bytes of the attachment that is being collected: a frame never holds some of two. */
  get room() {
    return this.#parts[this.#next]?.missing ?? 0;
  }

  #skipEmpty() {
    while (this.#parts[this.#next]?.missing === 0) this.#next++;
  }

  /** @param {Attachment} attachment */
  #isFree({ at, as }) {
    const { type, payload } = this.#envelope;
    if (type === "EXEC_RESPONSE") return at === "/result" && (payload.result ?? null) === null;
    if (at === "/args") return as === "json" && Object.keys(payload.args).length === 0;
    const name = argumentName(at);
    return name !== null && !Object.hasOwn(payload.args, name);
  }

  /** @param {string} text @returns {never} */
  #refuse(text) {
    throw new MalformedMessageError("invalid_ext", `ext.attachments: ${text}`, {
      field: "ext.attachments",
      id: this.#envelope.id,
    });
  }

  /** Take the next bytes, at most as many as there is `room` for. @param {Uint8Array} chunk */
  add(chunk) {
    const part = this.#parts[this.#next];
    part.digest?.update(chunk);
    part.chunks.push(chunk);
    part.missing -= chunk.length;
    this.missing -= chunk.length;
    this.#skipEmpty();
  }

  /**
   * The payload with everything at its place, once nothing is missing.
   * @throws {MalformedMessageError} It is not what the envelope says.
   */
  payload() {
    const payload = { ...this.#envelope.payload };
    /** @type {Record<string, any>} */
    const more = {};
    for (const { attachment, chunks, digest } of this.#parts) {
      const { at, as, sha256: expected } = attachment;
      if (digest !== null && digest.hex() !== expected) this.#refuse(`what came for ${at} is not what its digest says`);
      const value = as === "bytes" ? concat(chunks) : this.#parse(concat(chunks));
      const name = argumentName(at);
      if (at === "/result") payload.result = value;
      else if (name !== null) more[name] = value;
      else if (isObject(value, null, "")) payload.args = value;
      else this.#refuse("the arguments are no object");
    }
    if (this.#envelope.type !== "EXEC_REQUEST") return payload;
    for (const name of [...Object.keys(more), this.stream ?? ""]) {
      if (Object.hasOwn(payload.args, name)) this.#refuse(`the argument ${name.slice(0, 64)} comes twice`);
    }
    payload.args = { ...payload.args, ...more };
    return payload;
  }

  /** @param {Uint8Array} bytes */
  #parse(bytes) {
    try {
      const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
      const value = parseJson(text, { isCanonical: true });
      if (canonicalize(value) === text) return value;
    } catch (error) {
      this.#refuse(`not JSON: ${/** @type {Error} */ (error).message}`);
    }
    return this.#refuse("not in canonical form (RFC 8785)");
  }
}

/** @param {string} at A JSON Pointer (RFC 6901). @returns {string | null} */
function argumentName(at) {
  const found = /^\/args\/((?:[^~/]|~[01])*)$/su.exec(at);
  return found === null ? null : found[1].replaceAll("~1", "/").replaceAll("~0", "~");
}

/** The running digest over the parts of a stream, as its last response signs it. */
export class StreamDigest {
  #hash = new Sha256();
  #parts = 0;

  /** @param {unknown} part Bytes or JSON. */
  add(part) {
    const bytes = asBytes(part);
    const data = bytes ?? utf8(canonicalize(part));
    const head = new DataView(new ArrayBuffer(9));
    head.setUint8(0, (bytes === null ? "j" : "b").charCodeAt(0));
    head.setBigUint64(1, BigInt(data.length));
    this.#hash.update(new Uint8Array(head.buffer)).update(data);
    this.#parts++;
  }

  /** `ext.stream`; nothing can be added after it. */
  summary() {
    return { parts: this.#parts, sha256: this.#hash.hex() };
  }
}

/** The running digest over a stream of bytes in a request. */
class InputDigest {
  #hash = new Sha256();
  #size = 0;

  /** @param {Uint8Array} bytes */
  add(bytes) {
    this.#size += bytes.length;
    this.#hash.update(bytes);
  }

  /** `ext.input`; nothing can be added after it. */
  summary() {
    return { size: this.#size, sha256: this.#hash.hex() };
  }
}

/**
 * An argument that is a stream: what a capability iterates over, while it comes. Reading it gives the sender credit.
 * @implements {AsyncIterable<Uint8Array>}
 */
class Input {
  /** @type {Queue<Uint8Array | Error | null>} Null: its end. */
  #chunks = new Queue();
  #digest = new InputDigest();
  #took;
  isEnded = false;
  /** What was read, once that is all of it. @type {{size: number, sha256: string} | null} */
  read = null;

  /** @param {() => void} took Called when a chunk was read. */
  constructor(took) {
    this.#took = took;
  }

  /** @param {Uint8Array} chunk */
  put(chunk) {
    this.#digest.add(chunk);
    this.#chunks.put(chunk);
  }

  /** The sender says that this was all. @param {string} digest */
  end(digest) {
    this.isEnded = true;
    this.#summary = this.#digest.summary();
    const isWhole = this.#summary.sha256 === digest;
    this.#chunks.put(
      isWhole ? null : new InvalidArgumentsError("what came of the stream is not what was sent", "invalid_arguments"),
    );
  }

  /** Nothing more will come. @param {Error} error */
  fail(error) {
    if (!this.isEnded) this.#chunks.put(error);
    this.isEnded = true;
  }

  /** @type {{size: number, sha256: string} | null} */
  #summary = null;

  async *[Symbol.asyncIterator]() {
    for (;;) {
      const chunk = await this.#chunks.take();
      if (chunk === null) {
        this.read = this.#summary;
        return;
      }
      if (chunk instanceof Error) throw chunk;
      this.#took();
      yield chunk;
    }
  }
}

// =================================================================================================================
// The channel and what waits for it (sections 13.2 and 13.6)
// =================================================================================================================

/**
 * @typedef
 *   {{
 *     text: string | Uint8Array | null, attached: Uint8Array[], isCounted: boolean, isProgress: boolean,
 *     sent: (() => void) | null
 *   }} Item
 */
/**
 * @typedef {{items: Item[], counted: number, taken: number}} Lane `counted` bytes were sent that need credit; for
 *   `taken` there was some.
 */

/**
 * What waits to be sent over one DataChannel. The calls take turns, and each keeps within its credit: a turn is one
 * text or one DATA frame, so a call with 1 GB to send holds up the others by 16 KiB at a time.
 */
class Outbox {
  #channel;
  /** @type {string[]} */
  #urgent = [];
  /** @type {Map<string, Lane>} In the order of their turns. */
  #lanes = new Map();
  #isHanding = false;
  /** Bytes that were given to the channel. */
  handed = 0;
  /** Characters of texts that wait. */
  texts = 0;
  /** Bytes of attachments that wait. */
  attached = 0;

  /** @param {RTCDataChannel} channel */
  constructor(channel) {
    this.#channel = channel;
    channel.bufferedAmountLowThreshold = LOW_WATER_BYTES;
    channel.addEventListener("bufferedamountlow", () => this.pump());
  }

  get isCongested() {
    return this.#channel.bufferedAmount >= HIGH_WATER_BYTES;
  }

  /** Bytes that have left. */
  get left() {
    return this.handed - this.#channel.bufferedAmount;
  }

  /** Send a text before everything that belongs to calls: PING, PONG, ERROR, INTENT. @param {string} text */
  urgent(text) {
    this.#urgent.push(text);
    this.texts += text.length;
    this.pump();
  }

  /**
   * Add a message of a call behind those that wait of it.
   * @param {string} call @param {string | Uint8Array | null} text An envelope, or a frame; null for bytes alone.
   * @param {{attached?: Uint8Array[], isCounted?: boolean, isProgress?: boolean}} [options] `isCounted`: the text needs
   *   credit, too; `isProgress`: a later one takes its place.
   * @returns {Promise<void>} Done when all of it was sent, or dropped.
   */
  put(call, text, { attached = [], isCounted = false, isProgress = false } = {}) {
    const lane = this.#lane(call);
    const last = lane.items.at(-1);
    if (isProgress && last?.isProgress && last.text !== null) {
      this.texts += (text?.length ?? 0) - last.text.length;
      last.text = text;
      return Promise.resolve();
    }
    this.texts += text?.length ?? 0;
    this.attached += bytesOf(attached);
    return new Promise((sent) => {
      lane.items.push({ text, attached: attached.filter(({ length }) => length > 0), isCounted, isProgress, sent });
      this.pump();
    });
  }

  /** @param {string} call @param {number} taken */
  credit(call, taken) {
    const lane = this.#lanes.get(call);
    if (lane === undefined || taken <= lane.taken || taken > lane.counted) return;
    lane.taken = taken;
    this.pump();
  }

  /** Send a CREDIT frame. @param {string} call @param {number} taken */
  grant(call, taken) {
    if (this.#channel.readyState === "open") this.#send(creditFrame(call, taken));
  }

  /** Whether the first message of a call still waits: the other side knows nothing of it. @param {string} call */
  isUnsent(call) {
    const lane = this.#lanes.get(call);
    return lane?.counted === 0 && (lane.items[0]?.text ?? null) !== null;
  }

  /** Forget what waits of a call. @param {string} call */
  drop(call) {
    const lane = this.#lanes.get(call);
    if (lane === undefined) return;
    for (const item of lane.items.splice(0)) {
      this.texts -= item.text?.length ?? 0;
      this.attached -= bytesOf(item.attached);
      item.sent?.();
    }
  }

  /** Nothing is put any more for a call of which nothing waits. @param {string} call */
  end(call) {
    this.#lanes.delete(call);
  }

  clear() {
    for (const call of [...this.#lanes.keys()]) {
      this.drop(call);
      this.end(call);
    }
    this.#urgent = [];
  }

  /** Hand over as much as the channel should hold. */
  pump() {
    if (this.#isHanding) return; // what a `sent` calls may put more
    this.#isHanding = true;
    try {
      while (this.#channel.readyState === "open" && !this.isCongested) {
        const message = this.#next();
        if (message === null) break;
        this.#send(message);
      }
    } finally {
      this.#isHanding = false;
    }
  }

  /** @param {string | Uint8Array} message */
  #send(message) {
    this.handed += typeof message === "string" ? utf8(message).length : message.length;
    this.#channel.send(/** @type {any} */ (message));
  }

  /** @param {string} call @returns {Lane} */
  #lane(call) {
    let lane = this.#lanes.get(call);
    if (lane === undefined) this.#lanes.set(call, (lane = { items: [], counted: 0, taken: 0 }));
    return lane;
  }

  /** @returns {string | Uint8Array | null} */
  #next() {
    const urgent = this.#urgent.shift();
    if (urgent !== undefined) {
      this.texts -= urgent.length;
      return urgent;
    }
    for (const [call, lane] of this.#lanes) {
      const item = lane.items[0];
      if (item === undefined) continue;
      const needsCredit = item.text === null || item.isCounted;
      if (needsCredit && lane.counted - lane.taken >= LIMITS.CALL_WINDOW_BYTES) continue;
      this.#lanes.delete(call); // to the end of the row
      this.#lanes.set(call, lane);
      return this.#take(call, lane, item);
    }
    return null;
  }

  /** @param {string} call @param {Lane} lane @param {Item} item */
  #take(call, lane, item) {
    /** @type {string | Uint8Array} */
    let message;
    if (item.text !== null) {
      message = item.text;
      item.text = null;
      this.texts -= message.length;
      if (item.isCounted && typeof message === "string") lane.counted += utf8(message).length;
    } else {
      const chunk = item.attached[0].subarray(0, LIMITS.CHUNK_MAX_BYTES);
      message = dataFrame(call, chunk);
      lane.counted += chunk.length;
      this.attached -= chunk.length;
      item.attached[0] = item.attached[0].subarray(chunk.length);
      if (item.attached[0].length === 0) item.attached.shift();
    }
    if (item.attached.length === 0) {
      lane.items.shift();
      item.sent?.();
    }
    return message;
  }
}

// =================================================================================================================
// Calls (sections 13.3 to 13.6)
// =================================================================================================================

/** What has come of one call: counts bytes, collects attachments, and says when credit is due. */
class Arrival {
  /** @type {{assembly: Assembly, envelope: Envelope, text: string} | null} */
  collecting = null;
  #arrived = 0;
  #granted = 0;
  /** @type {number[]} Of each complete part that waits for its reader: the bytes of this call that came before it. */
  #waiting = [];
  #partBegin = 0;

  /** Bytes that came beyond what the sender was allowed. A reader's memory depends on it. */
  get isFlooded() {
    // Twice the window: the last text may be long, and nobody counts to the byte.
    return this.#arrived - this.#granted > 2 * LIMITS.CALL_WINDOW_BYTES;
  }

  /** @param {number} bytes */
  count(bytes) {
    this.#arrived += bytes;
  }

  beginPart() {
    this.#partBegin = this.#arrived;
  }

  /** A part is complete and waits for its reader. */
  hold() {
    this.#waiting.push(this.#partBegin);
  }

  /** Its reader has taken the first part that waited. */
  took() {
    this.#waiting.shift();
  }

  /** How many bytes to grant now; null if it is too early for that. */
  credit() {
    // What is being collected behind nothing else is granted at once, or it might never be complete.
    const taken = this.#waiting.length > 0 ? this.#waiting[0] : this.#arrived;
    if (taken - this.#granted < LIMITS.CALL_CREDIT_BYTES) return null;
    return (this.#granted = taken);
  }
}

/**
 * @typedef {{request: string, response: string}} Receipt A signed EXEC_REQUEST and the signed EXEC_RESPONSE that ended
 *   it.
 */
/**
 * @typedef {object} CallOptions
 * @property {number} [timeout] Milliseconds; the other agent is told.
 * @property {AbortSignal} [signal] Cancels the execution over there, too.
 * @property {(value: any) => void} [onProgress] Called with what the capability tells meanwhile.
 * @property {(receipt: Receipt) => void} [onReceipt] Called with what both have signed, whatever that says. Only these
 *   very texts verify.
 */

/** A call of this side. Its parts come in order, then its end. */
class OutgoingCall {
  arrival = new Arrival();
  digest = new StreamDigest();
  /** @type {Queue<{part: any} | {result: any, isStream: boolean} | {error: unknown}>} */
  events = new Queue();
  count = 0;
  kept = 0; // bytes of parts that wait for their reader
  /**
   * What was sent of the stream in the request, once that is all of it.
   * @type {{size: number, sha256: string} | null}
   */
  fed = null;
  isOver = false;

  /** The text of the EXEC_REQUEST. */
  request = "";

  /** @param {string} capability @param {CallOptions} options */
  constructor(capability, { onProgress, onReceipt }) {
    this.capability = capability;
    this.onProgress = onProgress;
    this.onReceipt = onReceipt;
  }

  /** @param {{result: any, isStream: boolean} | {error: unknown}} event */
  end(event) {
    this.isOver = true;
    this.events.put(event);
  }
}

/** A call of the other side: of a capability, or an INTENT. */
class IncomingCall {
  arrival = new Arrival();
  digest = new StreamDigest();
  controller = new AbortController();
  begunAt = Date.now();
  isOver = false;
  /** The stream in the request. @type {Input | null} */
  input = null;
  /** @type {any} */
  timer;

  /** @param {Envelope} envelope */
  constructor(envelope) {
    this.envelope = envelope;
    this.isIntent = envelope.type === "INTENT";
    this.isStream = envelope.payload.stream === true;
    const asked = this.isIntent ? envelope.ext?.timeout_ms : envelope.payload.timeout_ms;
    this.timeout = Math.min(asked ?? LIMITS.CALL_TIMEOUT_MS, TIMEOUT_MAX_MS);
  }

  get id() {
    return this.envelope.id.toLowerCase();
  }
}

/** @typedef {{signature: string, since: number, isOver: boolean, text: string | null}} Answer */

/**
 * The last requests of other agents and their final responses: a request that comes twice is executed once, also over
 * a later connection. They are kept for as long as their timestamps would pass.
 */
class Answers {
  /** @type {Map<string, Map<string, Answer>>} By agent, then by the id of its request; in the order of arrival. */
  #agents = new Map();

  /** @param {Envelope} request */
  find({ from, id }) {
    return this.#agents.get(from)?.get(id.toLowerCase());
  }

  /** @param {Envelope} request */
  begin({ from, id, signature }) {
    const now = Date.now();
    for (const [did, answers] of this.#agents) {
      for (const [key, { since }] of answers) {
        if (now - since < 2 * LIMITS.CLOCK_SKEW_MS && answers.size < ANSWERS_MAX) break;
        answers.delete(key);
      }
      if (answers.size === 0) this.#agents.delete(did);
    }
    if (!this.#agents.has(from)) this.#agents.set(from, new Map());
    this.#agents
      .get(from)
      ?.set(id.toLowerCase(), { signature: signature ?? "", since: now, isOver: false, text: null });
  }

  /** @param {Envelope} request @param {string | null} text Null if it cannot be repeated. */
  end(request, text) {
    const answer = this.find(request);
    if (answer === undefined) return;
    answer.isOver = true;
    answer.text = text;
    const told = [...(this.#agents.get(request.from)?.values() ?? [])].filter(({ text }) => text !== null);
    for (const old of told.slice(0, -ANSWER_TEXTS_MAX)) old.text = null;
  }
}

/**
 * @typedef {object} Intent What another agent asks.
 * @property {string} caller Its DID.
 * @property {string} [query] In words,
 * @property {string} [task] or by name,
 * @property {Record<string, any>} [params] with what belongs to it.
 * @property {any} [context]
 */
/** @typedef {{status: string, requiredInput?: string | string[], cost?: string}} Quote The answer to an intent. */
/**
 * @typedef {object} Call What a capability is told of the call that it runs for.
 * @property {string} caller DID of the agent that asked; its signature was verified.
 * @property {AbortSignal} signal Aborted when the caller cancels, is lost, or the deadline passes.
 * @property {number} deadline When it must be done: milliseconds since the epoch.
 * @property {(value: any) => void} progress Tells the caller how far it is, if it wants to know: anything short.
 */
/**
 * @typedef {{local: string, remote: string, protocol: string, kind: string, roundTrip: number | null}} Path How two
 *   agents are connected; milliseconds.
 */

/**
 * What a Peer needs of its agent.
 * @typedef {object} PeerHooks
 * @property {Identity} identity
 * @property {Answers} answers
 * @property {(intent: Intent, call: Call) => Promise<Quote> | Quote} onIntent
 * @property {(name: string, args: Record<string, any>, call: Call) => unknown} onExecute Returns a promise, or an async
 *   iterable.
 * @property {number} idleTimeout Milliseconds.
 * @property {(peer: Peer, reason: string) => void} closed
 * @property {(text: string) => void} warn
 */

/**
 * An agent that this one is connected with. Connections are made by `Agent.connect`.
 *
 * Everything that arrives goes through one queue: a signature is verified in turns of the event loop, and order counts.
 */
export class Peer {
  #hooks;
  #pc;
  #channel;
  #outbox;
  #limit;
  #guard = new ReplayGuard(); // of its own: a peer that floods it shuts nobody else out
  /** @type {Map<string, {kind: "INTENT" | "PING", answer: Deferred<any>}>} */
  #questions = new Map();
  /** @type {Map<string, OutgoingCall>} */
  #calls = new Map();
  /** @type {Map<string, IncomingCall>} Until it is answered. */
  #serving = new Map();
  #running = 0; // until what runs has ended, and its answer has left
  #holders = 0;
  #expired = 0; // of those that held it until it was idle: they may still release it
  #preparing = 0; // calls that are about to be sent
  #usedAt = Date.now(); // by a call, or a connect()
  #kept = 0; // bytes of attachments that are announced, or wait for their reader
  #unread = 0;
  #turn = Promise.resolve();
  /** @type {Promise<void> | null} */
  #closing = null;
  #reason = "";
  /** @type {"open" | "closing" | "closed"} */
  #state = "open";
  #isExpiring = false;
  #settled = deferred();
  /** @type {any} */
  #timer;
  #heardAt = Date.now();
  #pingedAt = NaN;
  #aliveAt = Date.now();
  #received = 0;
  #left = 0;
  #leftAt = Date.now();

  /**
   * @param {string} did @param {RTCPeerConnection} pc @param {Channel} channel @param {number} limit Bytes of a message
   * that it takes. @param {PeerHooks} hooks
   */
  constructor(did, pc, channel, limit, hooks) {
    /** Its DID. */
    this.did = did;
    this.#hooks = hooks;
    this.#pc = pc;
    this.#channel = channel;
    this.#limit = limit;
    this.#outbox = new Outbox(channel.raw);
    this.#settled.resolve(undefined);
    channel.onClose = () => this.#lost(this.#reason || "the connection broke");
    channel.receive((data) => this.#arrived(data));
    this.#watch();
  }

  /** "open", "closing", "closed" */
  get state() {
    return this.#state;
  }

  // --- what this side asks ---------------------------------------------------------------------------------------

  /**
   * Ask what something would take, in words or by name.
   * @param {string | {query?: string, task?: string, params?: Record<string, any>, context?: any}} intent
   * @param {{timeout?: number, signal?: AbortSignal}} [options] `timeout` in milliseconds; the other agent is told.
   * @returns {Promise<Quote>}
   * @throws {CallTimeoutError} @throws {RemoteError} @throws {PeerLostError}
   */
  async intent(intent, { timeout = LIMITS.CALL_TIMEOUT_MS, signal } = {}) {
    const payload = typeof intent === "string" ? { query: intent } : intent;
    if (!isPlain(payload) || (payload.query === undefined && payload.task === undefined))
      throw new TypeError("an intent needs a query or a task");
    const { status, required_input: requiredInput, cost } = await this.#ask("INTENT", payload, timeout, signal);
    return {
      status,
      ...((requiredInput ?? null) === null ? {} : { requiredInput }),
      ...((cost ?? null) === null ? {} : { cost }),
    };
  }

  /**
   * Execute a capability of the other agent and return its result: JSON, or a Uint8Array. The parts of a stream come as
   * one list, or, if all are bytes, joined.
   * @param {string} capability
   * @param {Record<string, any>} [args] By name: JSON, or bytes (ArrayBuffer, typed arrays); one of them may be a
   *   stream of bytes (ReadableStream, async iterable) that is sent while it is made.
   * @param {CallOptions} [options]
   * @returns {Promise<any>}
   * @throws {CallError} It did not succeed.
   * @throws {PeerLostError} The connection went away; whether it was executed is not known.
   * @throws {PeerIdentityError} The answer was not signed by the other agent.
   */
  async execute(capability, args = {}, options = {}) {
    const isStream = options.onProgress !== undefined;
    const parts = [];
    for await (const event of this.#call(capability, args, options, isStream)) {
      if ("part" in event) parts.push(event.part);
      else if (!event.isStream) return event.result;
    }
    const bytes = parts.filter((part) => part instanceof Uint8Array);
    return parts.length > 0 && bytes.length === parts.length ? concat(bytes) : parts;
  }

  /**
   * Execute a capability and iterate over the parts of its result as they come; one that has no parts gives one.
   * Leaving the loop cancels the execution. What is not read holds up the sender, not the memory.
   * @param {string} capability @param {Record<string, any>} [args] @param {CallOptions} [options]
   * @returns {AsyncGenerator<any, void, void>} Errors as for `execute`.
   */
  async *stream(capability, args = {}, options = {}) {
    const { timeout = LIMITS.STREAM_TIMEOUT_MS } = options;
    for await (const event of this.#call(capability, args, { ...options, timeout }, true)) {
      if ("part" in event) yield event.part;
      else if (!event.isStream) yield event.result;
    }
  }

  /** The time of a PING and its PONG in milliseconds. @param {{timeout?: number}} [options] */
  async ping({ timeout = LIMITS.PEER_PONG_TIMEOUT_MS } = {}) {
    const begin = performance.now();
    await this.#ask("PING", {}, timeout);
    return performance.now() - begin;
  }

  /**
   * Over which addresses the data goes; null where the WebRTC implementation does not tell.
   * @returns {Promise<Path | null>}
   */
  async path() {
    const stats = await statsOf(this.#pc);
    const pairId = [...stats.values()].find(
      ({ type, selectedCandidatePairId: id }) => type === "transport" && id,
    )?.selectedCandidatePairId;
    const pair =
      stats.get(pairId) ??
      [...stats.values()].find(
        ({ type, nominated, state }) => type === "candidate-pair" && nominated && state === "succeeded",
      );
    const local = stats.get(pair?.localCandidateId);
    const remote = stats.get(pair?.remoteCandidateId);
    if (local === undefined || remote === undefined) return null;
    const address = (/** @type {any} */ { address, ip, port }) => `${address || ip || "hidden"}:${port}`;
    const kinds = [local.candidateType, remote.candidateType];
    return {
      local: address(local),
      remote: address(remote),
      protocol: local.protocol ?? "udp",
      kind: kinds[0] === kinds[1] ? kinds[0] : kinds.join("/"),
      roundTrip: Number.isFinite(pair.currentRoundTripTime) ? pair.currentRoundTripTime * 1000 : null,
    };
  }

  /** Need the connection no longer. It is closed when the other side does not need it either. */
  async release() {
    if (this.#expired > 0) this.#expired--;
    else if (this.#holders > 0) this.#holders--;
    await this.#closeIfDone();
  }

  /**
   * Say goodbye and close the connection for both sides; the goodbye leaves before the first `await`.
   * @param {string} [reason]
   */
  close(reason = "it is done") {
    return (this.#closing ??= this.#close(reason));
  }

  /** @param {string} reason */
  async #close(reason) {
    if (this.#state === "closed") return;
    this.#setState("closing");
    this.#reason = `this side closed the connection: ${reason}`;
    try {
      if (this.#channel.raw.readyState === "open") {
        this.#channel.raw.send(serialize(this.#message("UNREGISTER", { reason: wellFormed(reason) })));
      }
      this.#channel.raw.close(); // after what was handed to it has left (RFC 8831 section 6.7)
      await Promise.race([this.#channel.closed, sleep(GOODBYE_MS)]);
    } catch {
      // It broke meanwhile: nobody is there to be told.
    } finally {
      this.#lost(this.#reason);
    }
  }

  /** Count one more who needs the connection: until `release`, at most until it is idle. */
  hold() {
    this.#holders++;
    this.#usedAt = Date.now();
  }

  /** Wait until it is open or closed. */
  async settled() {
    while (this.#state === "closing") await this.#settled.promise;
    return this.#state;
  }

  /**
   * @param {"INTENT" | "PING"} kind
   * @param {Record<string, any>} payload
   * @param {number} timeout
   * @param {AbortSignal} [signal]
   * @param {Record<string, any>} [ext]
   */
  async #ask(kind, payload, timeout, signal, ext) {
    signal?.throwIfAborted();
    this.#checkTimeout(timeout);
    this.#checkOpen();
    const plain = this.#message(kind, payload, { ext: kind === "INTENT" ? { timeout_ms: Math.ceil(timeout) } : ext });
    const question = { kind, answer: deferred() };
    this.#questions.set(plain.id, question);
    try {
      this.#outbox.urgent(this.#text(kind === "INTENT" ? await sign(plain, this.#hooks.identity) : plain));
      const late = () => new CallTimeoutError(`no answer from ${shortDid(this.did)} in ${timeout / 1000} s`, "timeout");
      return await within(unlessAborted(question.answer.promise, signal), timeout, late);
    } finally {
      if (this.#questions.delete(plain.id) && kind === "INTENT") this.#cancel(plain.id);
      if (kind === "INTENT") this.#usedAt = Date.now();
    }
  }

  /**
   * @param {string} capability @param {Record<string, any>} args @param {CallOptions} options @param {boolean} isStream
   * @returns {AsyncGenerator<{part: any} | {result: any, isStream: boolean}, void, void>}
   */
  async *#call(capability, args, { timeout = LIMITS.CALL_TIMEOUT_MS, signal, ...listeners }, isStream) {
    if (typeof capability !== "string") throw new TypeError("a capability is called by its name, a string");
    if (!isPlain(args)) throw new TypeError(`${capability}: arguments go by name, in an object: { text: "…" }`);
    signal?.throwIfAborted();
    this.#checkTimeout(timeout);
    this.#checkOpen();
    const call = new OutgoingCall(capability, listeners);
    let id = "";
    const abort = () => this.#giveUp(id, call, signal?.reason);
    const late = () =>
      this.#giveUp(id, call, new CallTimeoutError(`${capability}: no result in ${timeout / 1000} s`, "timeout"));
    const timer = setTimeout(late, timeout);
    signal?.addEventListener("abort", abort);
    try {
      this.#preparing++;
      try {
        const { text, attached, source, envelope } = await this.#request(capability, args, timeout, isStream);
        id = envelope.id;
        call.request = text;
        if (!call.isOver) {
          this.#checkOpen(); // signing takes a moment
          this.#calls.set(id, call);
          void this.#outbox.put(id, text, { attached });
          if (source !== null) void this.#feed(id, call, source);
        }
      } finally {
        this.#preparing--;
      }
      for (;;) {
        const event = await call.events.take();
        if ("error" in event) throw event.error;
        if ("part" in event) {
          this.#keep(call, event.part instanceof Uint8Array ? -event.part.length : 0);
          call.arrival.took();
          this.#credit(id, call.arrival);
        }
        yield event;
        if ("result" in event) return;
      }
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", abort);
      this.#giveUp(id, call, undefined);
      this.#usedAt = Date.now();
    }
  }

  /**
   * End a call of this side, if it has not ended: its reader gets the error at once, and the other side is told.
   * @param {string} id @param {OutgoingCall} call @param {unknown} error
   */
  #giveUp(id, call, error) {
    this.#keep(call, -call.kept);
    call.events.clear();
    call.end({ error });
    const isUnsent = this.#outbox.isUnsent(id);
    this.#outbox.drop(id);
    this.#outbox.end(id);
    if (!this.#calls.delete(id)) return;
    this.#release(call);
    if (!isUnsent) this.#cancel(id);
  }

  /** @param {OutgoingCall} call @param {number} bytes More, or less, that wait for its reader. */
  #keep(call, bytes) {
    call.kept += bytes;
    this.#kept += bytes;
  }

  /** @param {string} capability @param {Record<string, any>} args @param {number} timeout @param {boolean} isStream */
  async #request(capability, args, timeout, isStream) {
    try {
      const { inline, detached, source } = detachArguments(args);
      const attached = detached.flatMap(({ data }) => data ?? []);
      if (isTooLarge(detached.map(({ as, data }) => [data?.length ?? 0, as === "json"])))
        throw new MalformedMessageError("too_large", tooLarge(bytesOf(attached)));
      const payload = { args: inline, timeout_ms: Math.ceil(timeout), ...(isStream ? { stream: true } : {}) };
      const ext = await describe(detached, { capability }, true);
      const envelope = await sign(this.#message("EXEC_REQUEST", payload, { ext }), this.#hooks.identity);
      return { text: this.#text(envelope), attached, source, envelope };
    } catch (error) {
      if (!(error instanceof MessageError)) throw error;
      throw new InvalidArgumentsError(`the arguments cannot be sent: ${error.message}`, "invalid_arguments", error);
    }
  }

  /**
   * Send the stream in a request as its source gives it.
   * @param {string} id
   * @param {OutgoingCall} call
   * @param {AsyncIterable<unknown>} source
   */
  async #feed(id, call, source) {
    const digest = new InputDigest();
    try {
      for await (const value of source) {
        const data = asBytes(value);
        if (data === null) throw new TypeError("a stream of bytes gives bytes");
        if (!this.#calls.has(id)) return;
        if (data.length === 0) continue; // a frame has at least one byte
        digest.add(data);
        await this.#outbox.put(id, null, { attached: [data] });
        if (!this.#calls.has(id)) return;
      }
      call.fed = digest.summary();
      await this.#outbox.put(id, endFrame(id, call.fed.sha256));
    } catch (error) {
      this.#giveUp(
        id,
        call,
        new InvalidArgumentsError(`the stream of bytes failed: ${error}`, "invalid_arguments", error),
      );
    }
  }

  /** Tell the other side that nobody waits any more. @param {string} id */
  #cancel(id) {
    if (this.#channel.raw.readyState !== "open" || this.#state === "closed") return;
    const cancel = this.#message("INTENT", { status: "cancel" }, { correlationId: id });
    void this.#sign(cancel, (text) => this.#outbox.urgent(text));
  }

  /** @param {number} timeout */
  #checkTimeout(timeout) {
    if (!(timeout > 0 && timeout <= TIMEOUT_MAX_MS))
      throw new RangeError(`a timeout is above 0 and at most a day, not ${timeout} ms`);
  }

  #checkOpen() {
    if (this.#state === "closed" || this.#channel.raw.readyState !== "open") {
      throw new PeerLostError(`${shortDid(this.did)} is not connected: ${this.#reason}`, "lost");
    }
  }

  // --- what arrives ----------------------------------------------------------------------------------------------

  /** @param {unknown} data */
  #arrived(data) {
    if (this.#state === "closed") return;
    this.#heardAt = this.#aliveAt = Date.now();
    this.#pingedAt = NaN;
    const bytes = typeof data === "string" ? null : asBytes(data);
    const size = typeof data === "string" ? data.length : (bytes?.length ?? 0);
    this.#unread += size;
    if (this.#unread > UNREAD_MAX_BYTES) {
      this.#lost("it sends faster than its signatures can be verified");
      return;
    }
    this.#turn = this.#turn.then(async () => {
      this.#unread -= size;
      if (this.#state === "closed") return;
      try {
        if (typeof data === "string") await this.#takeText(data);
        else if (bytes !== null) this.#takeFrame(bytes);
      } catch (error) {
        this.#hooks.warn(`a message of ${shortDid(this.did)} was lost: ${/** @type {Error} */ (error).message}`);
      }
    });
  }

  /** @param {string} text */
  async #takeText(text) {
    /** @type {Envelope | null} */
    let envelope = null;
    try {
      envelope = decode(text, LIMITS.DATA_MESSAGE_MAX_BYTES);
      await this.#prove(envelope);
      await this.#take(envelope, text);
    } catch (error) {
      if (!(error instanceof MessageError)) throw error;
      if (error.code === "replayed" && envelope !== null && this.#repeat(envelope)) return;
      this.#refuse(error, envelope);
    }
  }

  /** @param {Envelope} envelope */
  async #prove(envelope) {
    const { type, payload, from, to, id } = envelope;
    const isFinal = ["success", "error", "cancelled"].includes(payload.status);
    const { did } = this.#hooks.identity;
    if (type === "INTENT" || type === "EXEC_REQUEST" || (type === "EXEC_RESPONSE" && isFinal)) {
      await verify(envelope, { recipient: did, sender: this.did, guard: this.#guard });
      return;
    }
    if (from !== this.did) throw new InvalidSignatureError("wrong_sender", undefined, { field: "from", id });
    if (to !== did) throw new InvalidSignatureError("wrong_recipient", undefined, { field: "to", id });
  }

  /** @param {MessageError} error @param {Envelope | null} envelope */
  #refuse(error, envelope) {
    this.#hooks.warn(`a message of ${shortDid(this.did)} is refused (${error.code}): ${error.message}`);
    const { type, correlation_id: correlationId } = envelope ?? error.envelope;
    const asked = typeof correlationId === "string" ? correlationId.toLowerCase() : "";
    if (error.code !== "replayed") {
      this.#fail(
        asked,
        error.isForged
          ? new PeerIdentityError(`what came in answer is not from ${this.did}: ${error.message}`, error.code, error)
          : new CallError(`the answer of ${shortDid(this.did)} cannot be used: ${error.message}`, error.code, error),
      );
    }
    if (type !== "ERROR") this.#error(error.messageId, refusalOf(error)); // or two would never stop
  }

  /** Fail what this side asked, whatever it is. @param {string} id @param {Error} error */
  #fail(id, error) {
    this.#questions.get(id)?.answer.reject(error);
    this.#questions.delete(id);
    const call = this.#calls.get(id);
    if (call === undefined) return;
    this.#calls.delete(id);
    this.#release(call);
    call.end({ error });
  }

  /** Forget the attachments that were being collected. @param {{arrival: Arrival}} call */
  #release({ arrival }) {
    this.#kept -= arrival.collecting?.assembly.size ?? 0;
    arrival.collecting = null;
  }

  /** @param {Envelope} envelope @param {string} text */
  async #take(envelope, text) {
    const { type, payload, correlation_id: correlationId, id } = envelope;
    const asked = correlationId?.toLowerCase() ?? "";
    switch (type) {
      case "INTENT":
        return this.#takeIntent(envelope, asked);
      case "EXEC_REQUEST":
        return this.#takeRequest(envelope);
      case "EXEC_RESPONSE":
        return this.#takeResponse(envelope, asked, text);
      case "ERROR":
        return this.#takeError(asked, payload);
      case "PING":
        return this.#takePing(envelope);
      case "PONG":
        return this.#answer(asked, "PING", envelope.ext?.done === true);
      case "UNREGISTER":
        this.#setState("closing");
        this.#reason = `it closed the connection: ${payload.reason ?? "it gave no reason"}`;
        this.#channel.raw.close();
        return void Promise.race([this.#channel.closed, sleep(GOODBYE_MS)]).then(() => this.#lost(this.#reason));
      default:
        throw new MalformedMessageError("unexpected_type", `${type} has no place on the DataChannel`, {
          field: "type",
          id,
        });
    }
  }

  /** @param {string} asked @param {"INTENT" | "PING"} kind @param {any} value */
  #answer(asked, kind, value) {
    const question = this.#questions.get(asked);
    if (question?.kind !== kind) return; // it was given up, and its answer crossed the cancel
    this.#questions.delete(asked);
    question.answer.resolve(value);
  }

  /** @param {string} asked @param {ErrorPayload} payload */
  #takeError(asked, payload) {
    this.#fail(
      asked,
      payload.code === "TIMEOUT" ? new CallTimeoutError(payload.message, "timeout") : remoteError(payload),
    );
  }

  /** @param {Envelope} envelope */
  #takePing({ id, payload, ext }) {
    if (ext?.done !== true) {
      this.#outbox.urgent(this.#text(this.#message("PONG", payload, { correlationId: id })));
      this.#checkUnsent();
      return;
    }
    const done = this.#isDone;
    this.#outbox.urgent(this.#text(this.#message("PONG", payload, { correlationId: id, ext: { done } })));
    if (!done || this.#state === "closed") return;
    // It will close the connection, or take that back by a request.
    this.#setState("closing");
    this.#isExpiring = true;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#lost("it did not close"), LIMITS.PEER_PONG_TIMEOUT_MS);
  }

  /** The peer, which was done, has asked for something: the connection stays. */
  #keepOpen() {
    if (!this.#isExpiring) return;
    this.#isExpiring = false;
    this.#setState("open");
    this.#watch();
  }

  /** @param {Envelope} envelope @param {string} asked */
  async #takeIntent(envelope, asked) {
    const { payload, ext, id } = envelope;
    if (asked !== "") {
      if (payload.status === "cancel") this.#cancelled(asked, "the caller cancelled");
      else if (typeof payload.status === "string") this.#answer(asked, "INTENT", payload);
      else this.#fail(asked, new CallError(`${shortDid(this.did)} answered the INTENT without a status`, "no_status"));
      return;
    }
    if ((payload.query ?? payload.task ?? null) === null) {
      throw new MalformedMessageError("invalid_payload", "an INTENT that asks needs query or task", {
        field: "payload",
        id,
      });
    }
    if (ext !== undefined && Object.hasOwn(ext, "timeout_ms") && !isIntegerFrom(1)(ext.timeout_ms, ext, "timeout_ms")) {
      throw new MalformedMessageError("invalid_ext", "ext.timeout_ms is wrong", { field: "ext.timeout_ms", id });
    }
    const call = this.#begin(envelope);
    if (call === null) return;
    const { query, task, params, context } = payload;
    const given = Object.entries({ query, task, params, context }).filter(([, value]) => (value ?? null) !== null);
    const intent = { caller: this.did, ...Object.fromEntries(given) };
    void this.#serve(call, (context) => this.#hooks.onIntent(intent, context));
  }

  // --- calls of this side ----------------------------------------------------------------------------------------

  /** @param {Envelope} envelope @param {string} asked @param {string} text */
  #takeResponse(envelope, asked, text) {
    const call = this.#calls.get(asked);
    if (call === undefined) return; // it is over: this has crossed its end
    this.#release(call); // an envelope that comes earlier ends the attachments before it
    const { status } = envelope.payload;
    call.arrival.beginPart();
    if (status === "partial" || status === "progress") call.arrival.count(utf8(text).length);
    const assembly = new Assembly(envelope);
    if (assembly.isTooLarge || this.#kept + assembly.size > LIMITS.ATTACHMENTS_MAX_BYTES) {
      throw new MalformedMessageError("too_large", `${assembly.size} bytes are more than are kept`, {
        id: envelope.id,
      });
    }
    this.#kept += assembly.size;
    call.arrival.collecting = { assembly, envelope, text };
    this.#completeResponse(asked, call);
  }

  /** @param {string} id @param {OutgoingCall} call */
  #completeResponse(id, call) {
    const { assembly, envelope, text } = /** @type {NonNullable<Arrival["collecting"]>} */ (call.arrival.collecting);
    if (call.arrival.isFlooded) {
      const error = new MalformedMessageError("bad_frame", "more came than there was credit for", { id });
      this.#fail(id, new CallError(`${shortDid(this.did)} sends more than it may`, "bad_frame", error));
      this.#error(id, refusalOf(error));
      return;
    }
    if (assembly.missing > 0) {
      this.#credit(id, call.arrival);
      return;
    }
    this.#release(call);
    let payload;
    try {
      payload = assembly.payload();
    } catch (error) {
      const { message } = /** @type {MessageError} */ (error);
      this.#fail(
        id,
        new PeerIdentityError(`the answer of ${this.did} cannot be used: ${message}`, "bad_attachment", error),
      );
      return;
    }
    if (payload.status === "progress") {
      this.#tell(call.onProgress, payload.result ?? null);
    } else if (payload.status === "partial") {
      const part = payload.result ?? null;
      call.digest.add(part);
      call.count++;
      call.arrival.hold();
      this.#keep(call, part instanceof Uint8Array ? part.length : 0);
      call.events.put({ part });
    } else {
      this.#tell(call.onReceipt, { request: call.request, response: text });
      this.#finish(id, call, envelope, payload);
      return;
    }
    this.#credit(id, call.arrival);
  }

  /**
   * Call what the application gave us; what it throws is its own matter.
   * @template T
   * @param {((value: T) => void) | undefined} listener
   * @param {T} value
   */
  #tell(listener, value) {
    try {
      listener?.(value);
    } catch (error) {
      this.#hooks.warn(`a listener failed: ${error}`);
    }
  }

  /** @param {string} id @param {OutgoingCall} call @param {Envelope} envelope @param {any} payload */
  #finish(id, call, { ext = {} }, { status, result, error }) {
    this.#calls.delete(id);
    this.#outbox.drop(id); // of a stream that the other side has read enough of
    const { input = null } = ext;
    if (input !== null && (input.size !== call.fed?.size || input.sha256 !== call.fed?.sha256)) {
      call.end({
        error: new PeerIdentityError(`what ${this.did} has read is not the stream that was sent`, "bad_stream"),
      });
      return;
    }
    if (status !== "success") {
      const name = status === "cancelled" ? "cancelled" : ext.error?.name;
      call.end({
        error: callError(
          typeof name === "string" ? name : "error",
          error ?? `${call.capability} failed without saying why`,
        ),
      });
      return;
    }
    const isStream = (ext.stream ?? null) !== null || call.count > 0;
    if (isStream) {
      const { parts, sha256: digest } = call.digest.summary();
      if (ext.stream?.parts !== parts || ext.stream?.sha256 !== digest) {
        const text = `the ${parts} parts that came are not the stream that ${this.did} has signed`;
        call.end({ error: new PeerIdentityError(text, "bad_stream") });
        return;
      }
    }
    call.end({ result: result ?? null, isStream });
  }

  /** @param {string} id @param {Arrival} arrival */
  #credit(id, arrival) {
    const taken = arrival.credit();
    if (taken !== null) this.#outbox.grant(id, taken);
  }

  /** @param {Uint8Array} bytes */
  #takeFrame(bytes) {
    /** @type {ReturnType<typeof parseFrame>} */
    let frame;
    try {
      frame = parseFrame(bytes);
    } catch (error) {
      this.#refuse(/** @type {MessageError} */ (error), null);
      return;
    }
    const { call: id } = frame;
    if (frame.kind === "credit") {
      this.#outbox.credit(id, frame.taken);
      return;
    }
    const outgoing = this.#calls.get(id);
    const incoming = this.#serving.get(id);
    const call = outgoing ?? incoming;
    if (call === undefined) return;
    const { arrival } = call;
    const { collecting } = arrival;
    const input = collecting === null && incoming?.input?.isEnded === false ? incoming.input : null;
    if (frame.kind === "end" && input !== null) {
      input.end(frame.digest);
      return;
    }
    if (frame.kind === "data" && input !== null && !arrival.isFlooded) {
      arrival.beginPart();
      arrival.count(frame.chunk.length);
      arrival.hold();
      input.put(frame.chunk);
      return;
    }
    if (frame.kind === "end" || collecting === null || collecting.assembly.room < frame.chunk.length) {
      const error = new MalformedMessageError("bad_frame", "data that no attachment has announced", { id });
      this.#refuse(error, null);
      this.#fail(id, new CallError(`${shortDid(this.did)} sent data that nothing has announced`, "bad_frame", error));
      if (incoming !== undefined) this.#abandon(incoming, error.message);
      return;
    }
    collecting.assembly.add(frame.chunk);
    arrival.count(frame.chunk.length);
    if (outgoing !== undefined) this.#completeResponse(id, outgoing);
    else if (incoming !== undefined) this.#completeRequest(incoming);
  }

  // --- calls of the other side -----------------------------------------------------------------------------------

  /** Accept a call, if there is room. @param {Envelope} envelope @returns {IncomingCall | null} */
  #begin(envelope) {
    this.#keepOpen();
    const call = new IncomingCall(envelope);
    // Frames of the one would pass for frames of the other.
    if (this.#calls.has(call.id)) throw new InvalidSignatureError("replayed", undefined, { field: "id", id: call.id });
    this.#serving.set(call.id, call);
    const isFull = this.#running >= EXECUTIONS_MAX || this.#serving.size > EXECUTIONS_MAX;
    if (isFull || this.#outbox.texts > UNSENT_MAX_BYTES || this.#outbox.attached > LIMITS.ATTACHMENTS_MAX_BYTES) {
      this.#failCall(
        call,
        "busy",
        `busy: ${this.#running} calls of yours run, or their answers wait to be read; try again`,
      );
      return null;
    }
    if (!call.isIntent) this.#hooks.answers.begin(envelope);
    call.timer = setTimeout(() => this.#abort(call, "timeout", `no result in ${call.timeout / 1000} s`), call.timeout);
    return call;
  }

  /** @param {Envelope} envelope */
  #takeRequest(envelope) {
    const { ext, id } = envelope;
    if (typeof ext?.capability !== "string") {
      throw new MalformedMessageError("invalid_ext", "ext.capability must name what to execute", {
        field: "ext.capability",
        id,
      });
    }
    if (this.#hooks.answers.find(envelope) !== undefined) {
      // it came over an earlier connection
      if (this.#repeat(envelope)) return;
      throw new InvalidSignatureError("replayed", undefined, { field: "id", id });
    }
    const assembly = new Assembly(envelope);
    const call = this.#begin(envelope);
    if (call === null) return;
    if (assembly.isTooLarge) {
      this.#failCall(call, "invalid_arguments", tooLarge(assembly.size));
    } else if (this.#kept + assembly.size > LIMITS.ATTACHMENTS_MAX_BYTES) {
      this.#failCall(call, "busy", `busy: ${this.#kept} bytes of your calls are kept here; try again`);
    } else {
      this.#kept += assembly.size;
      call.arrival.collecting = { assembly, envelope, text: "" };
      this.#completeRequest(call);
    }
  }

  /** @param {IncomingCall} call */
  #completeRequest(call) {
    const { assembly, envelope } = /** @type {NonNullable<Arrival["collecting"]>} */ (call.arrival.collecting);
    this.#credit(call.id, call.arrival);
    if (assembly.missing > 0) return;
    this.#release(call);
    let payload;
    try {
      payload = assembly.payload();
    } catch (error) {
      this.#failCall(call, "invalid_arguments", /** @type {Error} */ (error).message);
      return;
    }
    if (assembly.stream !== null) {
      call.input = new Input(() => {
        call.arrival.took();
        this.#credit(call.id, call.arrival);
      });
      payload.args[assembly.stream] = call.input;
    }
    void this.#serve(call, (context) => this.#hooks.onExecute(envelope.ext?.capability, payload.args, context));
  }

  /** Answer a request that came before as it was answered then; false if that cannot be. @param {Envelope} envelope */
  #repeat(envelope) {
    const answer = envelope.type === "EXEC_REQUEST" ? this.#hooks.answers.find(envelope) : undefined;
    if (answer === undefined || answer.signature !== envelope.signature) return false;
    if (!answer.isOver) return true;
    if (answer.text === null) return false;
    this.#outbox.urgent(answer.text);
    return true;
  }

  /**
   * See a call to its end, whatever that is, and send its one answer.
   * @param {IncomingCall} call @param {(context: Call) => unknown} run
   */
  async #serve(call, run) {
    this.#running++;
    try {
      let value = run({
        caller: this.did,
        signal: call.controller.signal,
        deadline: call.begunAt + call.timeout,
        progress: (value) => this.#progress(call, value),
      });
      if (isAsyncIterable(value)) await this.#serveStream(call, value);
      else {
        value = await value;
        await (call.isIntent ? this.#quote(call, /** @type {Quote} */ (value)) : this.#succeed(call, value));
      }
    } catch (error) {
      if (error instanceof CallError) this.#failCall(call, error.code, error.message);
      else {
        const isPlain = error instanceof Error && error.name === "Error"; // a name that says nothing
        this.#failCall(call, "capability_error", isPlain ? error.message : String(error));
      }
    } finally {
      this.#running--;
    }
  }

  /** @param {IncomingCall} call @param {AsyncIterable<unknown>} parts */
  async #serveStream(call, parts) {
    const iterator = parts[Symbol.asyncIterator]();
    const collected = [];
    let size = 0;
    try {
      for (;;) {
        const { done, value } = await iterator.next();
        if (done) break;
        if (call.isOver) return;
        if (call.isStream) {
          await this.#part(call, value);
        } else {
          collected.push(value);
          size += asBytes(value)?.length ?? 0;
          if (size > LIMITS.ATTACHMENTS_MAX_BYTES)
            throw new CapabilityError("its parts are too much for one result", "capability_error");
        }
        if (call.isOver) return;
      }
    } finally {
      if (call.isOver) await iterator.return?.();
    }
    if (call.isStream) {
      await this.#respond(call, { status: "success" }, [], { stream: call.digest.summary() });
    } else {
      const bytes = collected.map(asBytes);
      const isAllBytes = bytes.length > 0 && bytes.every((part) => part !== null);
      await this.#succeed(call, isAllBytes ? concat(/** @type {Uint8Array[]} */ (bytes)) : collected);
    }
  }

  /**
   * Send a part, and wait until it has left: that is what slows a capability down.
   * @param {IncomingCall} call
   * @param {unknown} value
   */
  async #part(call, value) {
    try {
      const detached = detachResult(value ?? null);
      call.digest.add(value ?? null);
      const payload = { status: "partial", ...(detached === null ? { result: value ?? null } : {}) };
      const ext = await describe(detached === null ? [] : [detached], {}, false);
      if (call.isOver) return;
      const text = this.#text(this.#message("EXEC_RESPONSE", payload, { correlationId: call.id, ext }));
      await this.#outbox.put(call.id, text, { attached: detached?.data ? [detached.data] : [], isCounted: true });
    } catch (error) {
      throw unsendable("a part", error);
    }
  }

  /** @param {IncomingCall} call @param {unknown} value */
  #progress(call, value) {
    if (!call.isStream || call.isOver) return;
    const payload = { status: "progress", result: value ?? null };
    try {
      const text = this.#text(this.#message("EXEC_RESPONSE", payload, { correlationId: call.id }));
      if (isLonger(text, LIMITS.INLINE_MAX_BYTES)) throw new MalformedMessageError("too_large", "it is short");
      void this.#outbox.put(call.id, text, { isCounted: true, isProgress: true });
    } catch (error) {
      throw unsendable("the progress", error);
    }
  }

  /** @param {IncomingCall} call @param {unknown} value */
  async #succeed(call, value = null) {
    try {
      const detached = detachResult(value);
      await this.#respond(
        call,
        { status: "success", ...(detached === null ? { result: value } : {}) },
        detached === null ? [] : [detached],
      );
    } catch (error) {
      throw unsendable("the result", error);
    }
  }

  /** @param {IncomingCall} call @param {Quote} quote */
  async #quote(call, { status, requiredInput, cost }) {
    const payload = {
      status,
      ...(requiredInput === undefined ? {} : { required_input: requiredInput }),
      ...(cost === undefined ? {} : { cost }),
    };
    const text = this.#text(
      await sign(this.#message("INTENT", payload, { correlationId: call.id }), this.#hooks.identity),
    );
    if (this.#over(call)) this.#outbox.urgent(text);
  }

  /**
   * Send the final response, behind the parts that wait.
   * @param {IncomingCall} call @param {Record<string, any>} payload @param {Detached[]} [detached]
   * @param {Record<string, any>} [ext]
   */
  async #respond(call, payload, detached = [], ext = {}) {
    payload = { ...payload, execution_time_ms: Date.now() - call.begunAt };
    ext = { ...inputOf(call), ...ext };
    const message = this.#message("EXEC_RESPONSE", payload, {
      correlationId: call.id,
      ext: await describe(detached, ext, true),
    });
    const text = this.#text(await sign(message, this.#hooks.identity));
    if (!this.#over(call)) return;
    // A stream cannot be told again, nor what was attached.
    this.#hooks.answers.end(call.envelope, detached.length > 0 || ext.stream !== undefined ? null : text);
    await this.#outbox.put(call.id, text, { attached: detached.flatMap(({ data }) => data ?? []) });
    this.#outbox.end(call.id);
  }

  /**
   * Answer a call by its failure; what waits of it is dropped.
   * @param {IncomingCall} call
   * @param {string} name
   * @param {string} text
   */
  #failCall(call, name, text) {
    if (!this.#over(call)) return;
    this.#outbox.drop(call.id);
    text = wellFormed(text);
    if (call.isIntent) {
      const cause = name === "busy" ? "busy" : name === "timeout" ? "deadline" : "internal";
      this.#error(call.id, errorPayload(cause, text));
      return;
    }
    const payload = {
      status: name === "cancelled" ? "cancelled" : "error",
      error: text,
      execution_time_ms: Date.now() - call.begunAt,
    };
    const message = this.#message("EXEC_RESPONSE", payload, {
      correlationId: call.id,
      ext: { ...inputOf(call), error: { name } },
    });
    void this.#sign(message, async (answer) => {
      this.#hooks.answers.end(call.envelope, answer);
      await this.#outbox.put(call.id, answer);
      this.#outbox.end(call.id);
    });
  }

  /** @param {string} id @param {string} text */
  #cancelled(id, text) {
    const call = this.#serving.get(id);
    if (call !== undefined) this.#abort(call, "cancelled", text);
  }

  /**
   * Stop what runs. Its caller has the answer at once, also if it does not stop.
   * @param {IncomingCall} call
   * @param {string} name
   * @param {string} text
   */
  #abort(call, name, text) {
    call.controller.abort(callError(name, text));
    this.#failCall(call, name, text);
  }

  /** End a call that was answered by an ERROR. @param {IncomingCall} call @param {string} text */
  #abandon(call, text) {
    if (!this.#over(call)) return;
    call.controller.abort(new CallCancelledError(text, "cancelled"));
    this.#hooks.answers.end(call.envelope, null);
    this.#outbox.drop(call.id);
    this.#outbox.end(call.id);
  }

  /** Mark a call as answered; false if it was before. @param {IncomingCall} call */
  #over(call) {
    if (call.isOver) return false;
    call.isOver = true;
    clearTimeout(call.timer);
    call.input?.fail(new CallCancelledError("the call is over", "cancelled"));
    this.#serving.delete(call.id);
    this.#usedAt = Date.now();
    this.#release(call);
    return true;
  }

  // --- messages --------------------------------------------------------------------------------------------------

  /**
   * @param {string} type
   * @param {Record<string, any>} payload
   * @param {{correlationId?: string, ext?: Record<string, any>}} [more]
   */
  #message(type, payload, more = {}) {
    const ext = more.ext !== undefined && Object.keys(more.ext).length > 0 ? more.ext : undefined;
    return createMessage(this.#hooks.identity.did, this.did, type, payload, { ...more, ext });
  }

  /**
   * Sign a message of which nobody waits to be told.
   * @param {Envelope} envelope
   * @param {(text: string) => unknown} then
   */
  async #sign(envelope, then) {
    try {
      await then(this.#text(await sign(envelope, this.#hooks.identity)));
    } catch (error) {
      this.#hooks.warn(`${envelope.type} could not be sent: ${error}`);
    }
  }

  /** @param {Envelope} envelope */
  #text(envelope) {
    const text = serialize(envelope);
    if (isLonger(text, this.#limit))
      throw new MalformedMessageError("too_large", `at most ${this.#limit} bytes can be sent to this peer`);
    return text;
  }

  /** @param {string | null} id Of what is refused. @param {ErrorPayload} payload */
  #error(id, payload) {
    if (this.#channel.raw.readyState !== "open") return;
    this.#outbox.urgent(this.#text(this.#message("ERROR", payload, id === null ? {} : { correlationId: id })));
    this.#checkUnsent();
  }

  #checkUnsent() {
    if (this.#outbox.texts > UNSENT_MAX_BYTES) this.#lost("it sends without reading the replies");
  }

  // --- its state and its end (section 13.7) ----------------------------------------------------------------------

  /** How many calls of this side are not answered. */
  get #asked() {
    const intents = [...this.#questions.values()].filter(({ kind }) => kind === "INTENT").length;
    return intents + this.#preparing + this.#calls.size;
  }

  get #isDone() {
    return this.#holders + this.#asked === 0;
  }

  async #closeIfDone() {
    if (!this.#isDone || this.#state !== "open") return;
    this.#setState("closing");
    let isDone = false;
    try {
      isDone = await this.#ask("PING", {}, LIMITS.PEER_PONG_TIMEOUT_MS, undefined, { done: true });
    } catch {
      // The keep-alive sees to a peer that does not answer.
    }
    if (isDone && this.#isDone) await this.close();
    else if (this.state === "closing" && this.#closing === null && !this.#isExpiring) this.#setState("open");
  }

  /** @param {"open" | "closing" | "closed"} state */
  #setState(state) {
    if (this.#state === "closed") return;
    this.#state = state;
    if (state !== "closing") this.#settled.resolve(undefined);
    else if (this.#settled.isSettled) this.#settled = deferred();
  }

  /** Look again when the next thing can be due. */
  #watch() {
    const now = Date.now();
    const isPinged = !Number.isNaN(this.#pingedAt);
    const wait = isPinged
      ? LIMITS.PEER_PONG_TIMEOUT_MS / 4
      : Math.max(0, this.#heardAt + LIMITS.PEER_PING_INTERVAL_MS - now);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.#check(Date.now() - now - wait), wait);
  }

  /**
   * Ping a silent peer, give up a dead one.
   * @param {number} late Milliseconds: whoever slept has not read what came.
   */
  async #check(late) {
    const received = await bytesReceived(this.#pc);
    if (this.#state === "closed" || this.#isExpiring) return;
    const now = Date.now();
    if (received !== this.#received || late > LIMITS.PEER_PING_INTERVAL_MS) this.#aliveAt = now;
    this.#received = received;
    if (this.#outbox.left !== this.#left || !this.#outbox.isCongested) {
      this.#left = this.#outbox.left;
      this.#leftAt = now;
    }
    if (now - this.#leftAt >= LIMITS.PEER_STALL_MS) {
      this.#lost("it has read nothing for a minute");
    } else if (
      !Number.isNaN(this.#pingedAt) &&
      now - Math.max(this.#aliveAt, this.#pingedAt) >= LIMITS.PEER_PONG_TIMEOUT_MS
    ) {
      const silence = (LIMITS.PEER_PING_INTERVAL_MS + LIMITS.PEER_PONG_TIMEOUT_MS) / 1000;
      this.#lost(`it was silent for ${silence} s: it is gone, or its event loop is blocked`);
    } else {
      if (this.#asked + this.#serving.size + this.#running > 0) this.#usedAt = now;
      const isIdle = now - this.#usedAt >= this.#hooks.idleTimeout;
      if (isIdle) {
        this.#usedAt = now; // to ask again if the other side needs it now
        this.#expired += this.#holders;
        this.#holders = 0;
      }
      if (Number.isNaN(this.#pingedAt) && now - this.#heardAt >= LIMITS.PEER_PING_INTERVAL_MS) {
        this.#pingedAt = now;
        // Where nobody needs the connection, asking that does for a PING.
        if (this.#isDone && this.#state === "open") void this.#closeIfDone();
        else this.ping().catch(() => {});
      } else if (isIdle) {
        void this.#closeIfDone(); // now: somebody may ping it so often that it is never silent
      }
      this.#watch();
    }
  }

  /** It is over, for whatever reason. @param {string} reason */
  #lost(reason) {
    if (this.#state === "closed") return;
    this.#setState("closed");
    this.#reason = reason;
    clearTimeout(this.#timer);
    const text = `${shortDid(this.did)} went away: ${reason}`;
    for (const id of [...this.#questions.keys(), ...this.#calls.keys()])
      this.#fail(id, new PeerLostError(text, "lost"));
    for (const call of [...this.#serving.values()]) this.#abandon(call, text);
    this.#outbox.clear();
    this.#channel.raw.close();
    this.#pc.close();
    this.#hooks.closed(this, reason);
  }
}

/** `ext.input` of a final response, if the stream in the request was read to its end. @param {IncomingCall} call */
const inputOf = ({ input }) => ((input?.read ?? null) === null ? {} : { input: input?.read });

/** @param {unknown} value @returns {value is AsyncIterable<unknown>} */
const isAsyncIterable = (value) => typeof (/** @type {any} */ (value)?.[Symbol.asyncIterator]) === "function";

/** @param {RTCPeerConnection} pc @returns {Promise<Map<string, any>>} Reports by id; none where there are none. */
async function statsOf(pc) {
  try {
    return new Map(/** @type {any} */ (await pc.getStats()));
  } catch {
    return new Map();
  }
}

/** Bytes of DTLS packets that have come, where the implementation tells. @param {RTCPeerConnection} pc */
async function bytesReceived(pc) {
  const reports = [...(await statsOf(pc)).values()].filter(({ type }) => type === "transport");
  return reports.reduce((sum, { bytesReceived: bytes }) => sum + (Number(bytes) || 0), 0);
}

/** One open RTCDataChannel. What arrives before there is a receiver waits: the first may come with what opens it. */
class Channel {
  /** @type {unknown[]} */
  #early = [];
  /** @type {((data: unknown) => void) | null} */
  #receiver = null;
  /** Called when nothing more will come or go. @type {() => void} */
  onClose = () => {};

  /** @param {RTCDataChannel} raw */
  constructor(raw) {
    this.raw = raw;
    /** @type {Promise<void>} */
    this.opened = new Promise((resolve) => {
      raw.onopen = () => resolve();
      if (raw.readyState === "open") resolve();
    });
    /** @type {Promise<void>} */
    this.closed = new Promise((resolve) => {
      raw.onclose = () => {
        resolve();
        this.onClose();
      };
    });
    raw.binaryType = "arraybuffer";
    raw.onmessage = ({ data }) => {
      if (this.#receiver === null) this.#early.push(data);
      else this.#receiver(data);
    };
  }

  /** @param {(data: unknown) => void} receiver It must not throw. */
  receive(receiver) {
    this.#receiver = receiver;
    for (const data of this.#early.splice(0)) receiver(data);
  }
}

// =================================================================================================================
// Signaling (section 13.1)
// =================================================================================================================

/** What passes by itself in a moment. */
const PASSING = new Set(["rate_limited", "overloaded", "unreachable", "unconfirmed"]);

/** Why an OFFER was not answered, by what the gateway says of its receiver. */
const UNANSWERED = Object.freeze({
  "": "it has not answered the OFFER; it may be busy, or an ANSWER was lost: try again",
  online: "it is online, but has not answered the OFFER; it may be busy: try again",
  away: "it is away: its connection to the gateway is interrupted; try again, it may return",
  offline: "it has not answered the OFFER, and is not online any more",
  unknown: "it has not answered the OFFER, and the gateway does not answer either",
});

/** @typedef {{candidate: string, sdp_mid?: string | null, sdp_mline_index?: number | null}} Candidate */

/** One way to a connection with one agent. It belongs to whoever waits for it, whichever side's offer it comes of. */
class Attempt {
  /** @type {Deferred<Peer>} */
  result = deferred();
  waiting = 0;
  begins = 0;
  /** @type {any} */
  expiry;
  /** @type {any} */
  contest;

  // Of the connection that is being made now:
  /** @type {RTCPeerConnection | null} */
  pc = null;
  isOffering = false;
  isAnswered = false;
  isContested = false; // the other side has offered, too, and lost
  isRetried = false;
  sends = 0;
  /** The `id` of the OFFER that counts: what candidates of both sides name. */
  offerId = "";
  /** Of the last OFFER or ANSWER of this side. */
  sentId = "";
  /** @type {Envelope | null} The OFFER of the other side. */
  offer = null;
  /** @type {Candidate[]} Of this side, until the description that they belong to was sent. */
  gathered = [];
  /** @type {Map<string, Candidate>} Those that were sent, by the id of their message. */
  trickled = new Map();
  /** @type {Candidate[] | null} Of the other side, until its description is there. */
  early = [];
  candidates = 0;
  limit = 65_536;
  /** What the gateway says of the other agent. @type {keyof typeof UNANSWERED} */
  status = "";

  /** @param {string} did */
  constructor(did) {
    this.did = did;
  }

  /** How far it came and what to do, in words. @param {boolean} hasGateway */
  describe(hasGateway) {
    const ice = `(ICE ${this.pc?.iceConnectionState ?? "closed"})`;
    if (!this.isOffering) return `its offer was answered, but the connection did not open ${ice}`;
    if (this.isAnswered) return `it has answered, but the connection did not open ${ice}`;
    const isSent = this.sentId !== "";
    if (!hasGateway) {
      const what = isSent ? "it may or may not have the OFFER" : "the OFFER could not be sent";
      return `the gateway is away, ${what}; this agent returns to it: try again`;
    }
    return isSent ? UNANSWERED[this.status] : "the OFFER could not be sent yet: give it more time";
  }
}

/**
 * From a DID to an open connection, by way of a gateway that nobody trusts. Everything received was verified before.
 *
 *     connect() ──▶ offering ──ANSWER──▶ opening ──▶ opened
 *                      │ OFFER of a lower DID   ▲
 *                      ▼                        │
 *     OFFER ─────▶ answering ───────────────────┘
 *                      └─▶ offering, where the other side has given up its offer and somebody here waits
 *
 * @typedef {object} SignalingHooks
 * @property {(envelope: Envelope) => Promise<Envelope>} send
 * @property {(envelope: Envelope, payload: ErrorPayload) => void} reply
 * @property {() => RTCPeerConnection} connection Makes one.
 * @property {(did: string) => Promise<string | null>} admit Null, or the cause why a stranger may not connect.
 * @property {(did: string, pc: RTCPeerConnection, channel: Channel, limit: number) => Peer} opened
 * @property {() => string | undefined} gatewayDid
 * @property {() => boolean} hasGateway Whether it is there now.
 * @property {(did: string) => Promise<Found["status"]>} statusOf Asks the gateway, for ASK_MS at most.
 * @property {(text: string) => void} warn
 */
class Signaling {
  #did;
  #hooks;
  /** @type {Map<string, Attempt>} */
  #attempts = new Map();
  /** @type {Map<string, Envelope>} The last OFFER of each stranger that may be admitted. */
  #asking = new Map();
  /** @type {string[]} Ids of the last OFFERs that were answered. */
  #answered = [];
  /**
   * @type {Map<string, {since: number, found: {candidate: Candidate, offerId: string | null}[]}>} Candidates before
   *   their OFFER.
   */
  #early = new Map();
  #isClosed = false;

  /** @param {string} did @param {SignalingHooks} hooks */
  constructor(did, hooks) {
    this.#did = did;
    this.#hooks = hooks;
  }

  /** How many others are about to connect that this side does not wait for. */
  get strangers() {
    return this.#asking.size + [...this.#attempts.values()].filter(({ waiting }) => waiting === 0).length;
  }

  /** @param {string} did @param {number} timeout @param {AbortSignal} [signal] @returns {Promise<Peer>} */
  async connect(did, timeout, signal) {
    const attempt = this.#attempts.get(did) ?? new Attempt(did);
    if (!this.#attempts.has(did)) this.#offer(attempt);
    attempt.waiting++;
    const late = () =>
      new PeerConnectError(
        `no connection to ${shortDid(did)} in ${timeout / 1000} s: ${attempt.describe(this.#hooks.hasGateway())}`,
        "timeout",
      );
    const asking = setTimeout(() => void this.#askGateway(attempt), timeout - Math.min(ASK_MS, timeout / 2));
    try {
      return await within(unlessAborted(attempt.result.promise, signal), timeout, late);
    } finally {
      clearTimeout(asking);
      attempt.waiting--;
      // The other side's wish to connect is not ours to give up.
      if (attempt.waiting === 0 && attempt.isOffering)
        this.#end(attempt, new PeerConnectError("nobody waits for it any more", "abandoned"));
    }
  }

  close() {
    this.#isClosed = true;
    for (const attempt of [...this.#attempts.values()])
      this.#end(attempt, new PeerConnectError("this agent was closed", "closed"));
  }

  /** Signal again what may have got lost with the connection to the gateway. */
  gatewayReturned() {
    for (const attempt of this.#attempts.values()) this.#signalAgain(attempt);
  }

  // --- what arrives ----------------------------------------------------------------------------------------------

  /** @param {Envelope} envelope */
  received(envelope) {
    if (this.#isClosed) return;
    switch (envelope.type) {
      case "OFFER":
        return this.#takeOffer(envelope, false);
      case "ANSWER":
        return this.#takeAnswer(envelope);
      case "ICE_CANDIDATE":
        return this.#takeCandidate(envelope);
      case "ERROR":
        return this.#takeError(envelope);
    }
  }

  /**
   * A message that did not verify: it may be the ANSWER that somebody waits for.
   * @param {MessageError} error
   * @param {Record<string, any>} envelope
   */
  rejected(error, { correlation_id: asked }) {
    const attempt = error.code === "replayed" ? undefined : this.#attemptOf(asked);
    if (attempt === undefined || !attempt.isOffering || attempt.isAnswered) return;
    const text = `what came in answer to the OFFER to ${shortDid(attempt.did)} cannot be used: ${error.message}`;
    this.#end(
      attempt,
      error.isForged ? new PeerIdentityError(text, error.code, error) : new PeerConnectError(text, error.code, error),
    );
  }

  /** @param {Envelope} offer @param {boolean} isAdmitted */
  #takeOffer(offer, isAdmitted) {
    const did = offer.from;
    let attempt = this.#attempts.get(did);
    if (!isAdmitted && (attempt === undefined || attempt.waiting === 0)) {
      void this.#ask(offer);
      return;
    }
    if (attempt === undefined) {
      attempt = new Attempt(did);
    } else if (attempt.isOffering && !attempt.isAnswered && this.#did < did) {
      // Glare, and ours wins. Should the other side never have got it, it waits for nothing: offer again.
      if (!attempt.isContested) {
        attempt.isContested = true;
        const contested = attempt;
        attempt.contest = setTimeout(() => this.#signalAgain(contested), CONTEST_MS);
      }
      return;
    } else if (attempt.begins >= BEGINS_MAX) {
      this.#hooks.reply(offer, errorPayload("busy"));
      return;
    }
    this.#answer(attempt, offer);
  }

  /** Ask the agent whether a stranger may connect; the last OFFER of each counts. @param {Envelope} offer */
  async #ask(offer) {
    const did = offer.from;
    const isAsked = this.#asking.has(did);
    if (!isAsked && this.#asking.size + this.#attempts.size >= ATTEMPTS_MAX) {
      this.#hooks.reply(offer, errorPayload("busy"));
      return;
    }
    this.#asking.set(did, offer);
    if (isAsked) return;
    const refusal = await this.#hooks.admit(did).catch((error) => {
      this.#hooks.warn(`whether ${did} may connect cannot be told: ${error.message}`);
      return "declined";
    });
    const last = this.#asking.get(did) ?? offer;
    this.#asking.delete(did);
    if (this.#isClosed) return;
    if (refusal === null || (this.#attempts.get(did)?.waiting ?? 0) > 0) this.#takeOffer(last, true);
    else this.#hooks.reply(last, errorPayload(refusal));
  }

  /** @param {Envelope} envelope */
  #takeAnswer(envelope) {
    const { from, payload, correlation_id: asked } = envelope;
    const attempt = this.#attemptOf(asked);
    if (attempt === undefined) {
      const isCopy = this.#answered.includes(asked?.toLowerCase() ?? "");
      // Or it crosses our next OFFER, which replaces the one that it answers.
      if (!isCopy && !this.#attempts.get(from)?.isOffering) {
        this.#hooks.reply(envelope, errorPayload("declined", "the OFFER that this answers was given up"));
      }
    } else if (!attempt.isOffering || attempt.isAnswered) {
      // A copy.
    } else if (from !== attempt.did) {
      this.#end(attempt, new PeerIdentityError(`${from} answered the OFFER to ${attempt.did}`, "wrong_sender"));
    } else {
      attempt.isAnswered = true;
      this.#answered.push(attempt.sentId);
      if (this.#answered.length > ATTEMPTS_MAX) this.#answered.shift();
      void this.#describeRemote(attempt, "answer", payload.sdp).catch((error) => {
        this.#end(
          attempt,
          new PeerConnectError(`the ANSWER of ${shortDid(from)} cannot be used: ${error.message}`, "bad_answer", error),
        );
      });
    }
  }

  /** @param {Envelope} envelope */
  #takeCandidate(envelope) {
    const { from, payload, correlation_id: asked } = envelope;
    const offerId = asked?.toLowerCase() ?? null;
    const attempt = this.#attempts.get(from);
    if (attempt !== undefined && attempt.pc !== null && (offerId === null || offerId === attempt.offerId)) {
      if (++attempt.candidates > CANDIDATES_MAX) return;
      if (attempt.early === null) this.#addCandidate(attempt.pc, payload);
      else attempt.early.push(payload);
      if (offerId !== null || attempt.early === null) return;
    }
    // Its OFFER may be on the way, also while it has ours: should its own win, they belong to that.
    const now = Date.now();
    for (const [did, { since }] of this.#early) if (since < now - LIMITS.CONNECT_TIMEOUT_MS) this.#early.delete(did);
    let early = this.#early.get(from);
    if (early === undefined) this.#early.set(from, (early = { since: now, found: [] }));
    if (early.found.length < CANDIDATES_MAX) early.found.push({ candidate: payload, offerId });
    if (this.#early.size > EARLY_SENDERS_MAX)
      this.#early.delete(/** @type {string} */ (this.#early.keys().next().value));
  }

  /** @param {Envelope} envelope */
  #takeError({ from, payload, correlation_id: asked }) {
    const isFrom = (/** @type {Attempt} */ { did }) => from === did || from === this.#hooks.gatewayDid();
    const name = payload.details?.name ?? "";
    const id = asked?.toLowerCase() ?? "";
    for (const attempt of this.#attempts.values()) {
      const candidate = attempt.trickled.get(id);
      if (candidate === undefined || !isFrom(attempt)) continue;
      attempt.trickled.delete(id);
      // Once more: a connection may depend on it.
      if (PASSING.has(name)) this.#later(attempt, payload, () => void this.#trickle(attempt, candidate, false));
      return;
    }
    const attempt = this.#attemptOf(asked);
    if (attempt === undefined || !isFrom(attempt)) return;
    if (PASSING.has(name) && !attempt.isRetried) {
      attempt.isRetried = true;
      this.#later(attempt, payload, () => this.#signalAgain(attempt));
    } else if (payload.code === "UNKNOWN_AGENT" && attempt.isContested && attempt.sends < SENDS_MAX) {
      this.#signalAgain(attempt); // the other side is there: it has just offered
    } else {
      const error = this.#errorOf(attempt.did, payload, name);
      if (name === "declined" && !attempt.isOffering) this.#answeredInVain(attempt, error);
      else this.#end(attempt, error);
    }
  }

  /** @param {Attempt} attempt @param {ErrorPayload} payload @param {() => void} action */
  #later(attempt, payload, action) {
    const { pc } = attempt;
    setTimeout(
      () => {
        if (attempt.pc === pc && !attempt.result.isSettled) action();
      },
      (payload.details?.retry_after_ms ?? RETRY_MS) + Math.random() * RETRY_MS,
    );
  }

  /** @param {string} did @param {ErrorPayload} payload @param {string} name */
  #errorOf(did, payload, name) {
    if (payload.code === "INVALID_SIGNATURE" && name !== "stale_timestamp") {
      return new PeerIdentityError(
        `${shortDid(did)} refused the OFFER, it was altered on its way: ${payload.message}`,
        name,
      );
    }
    return remoteError(
      payload,
      `${shortDid(did)} ${name === "not_online" ? "is not online" : `cannot be reached: ${payload.message}`}`,
    );
  }

  // --- attempts --------------------------------------------------------------------------------------------------

  /** @param {Attempt} attempt */
  #offer(attempt) {
    void this.#negotiate(attempt, null, async (pc) => {
      const channel = pc.createDataChannel(CHANNEL_LABEL, { ordered: true });
      this.#await(attempt, pc, new Channel(channel));
      await pc.setLocalDescription(await pc.createOffer());
      await this.#signal(attempt, pc);
    });
  }

  /** @param {Attempt} attempt @param {Envelope} offer */
  #answer(attempt, offer) {
    void this.#negotiate(attempt, offer, async (pc) => {
      pc.ondatachannel = ({ channel }) => {
        const isUsable =
          channel.label === CHANNEL_LABEL &&
          channel.ordered !== false &&
          (channel.maxRetransmits ?? null) === null &&
          (channel.maxPacketLifeTime ?? null) === null;
        if (isUsable) this.#await(attempt, pc, new Channel(channel));
        else channel.close();
      };
      try {
        await this.#describeRemote(attempt, "offer", offer.payload.sdp);
      } catch (error) {
        const refusal =
          error instanceof MessageError
            ? error
            : new MalformedMessageError("invalid_payload", String(error), { field: "payload.sdp" });
        this.#hooks.reply(offer, refusalOf(refusal));
        throw error;
      }
      await pc.setLocalDescription(await pc.createAnswer());
      await this.#signal(attempt, pc);
    });
    attempt.expiry = setTimeout(() => {
      this.#answeredInVain(
        attempt,
        new PeerConnectError(`${shortDid(attempt.did)} did not open the connection`, "timeout"),
      );
    }, LIMITS.CONNECT_TIMEOUT_MS);
  }

  /**
   * Begin anew: what came before does not count any more.
   * @param {Attempt} attempt @param {Envelope | null} offer Of the other side; null to make one.
   * @param {(pc: RTCPeerConnection) => Promise<void>} steps
   */
  async #negotiate(attempt, offer, steps) {
    const { pc: before } = attempt;
    attempt.pc = null; // some implementations tell of a close while it is being made
    before?.close();
    clearTimeout(attempt.expiry);
    clearTimeout(attempt.contest);
    this.#attempts.set(attempt.did, attempt);
    let pc;
    try {
      pc = this.#hooks.connection();
      Object.assign(attempt, {
        pc,
        offer,
        isOffering: offer === null,
        isAnswered: false,
        isContested: false,
        isRetried: false,
        status: "",
        sends: 0,
        offerId: offer?.id.toLowerCase() ?? "",
        sentId: "",
        gathered: [],
        trickled: new Map(),
        early: [],
        candidates: 0,
        begins: attempt.begins + 1,
      });
      if (offer !== null) {
        const early = this.#early.get(attempt.did)?.found ?? [];
        this.#early.delete(attempt.did);
        attempt.early = early
          .filter(({ offerId }) => offerId === null || offerId === attempt.offerId)
          .map(({ candidate }) => candidate);
      }
      const made = pc;
      pc.onicecandidate = ({ candidate }) => void this.#trickle(attempt, ourCandidate(candidate), true, made);
      pc.onconnectionstatechange = () => {
        if (attempt.pc !== made || !["failed", "closed"].includes(made.connectionState)) return;
        const error = new PeerConnectError(
          `no path to ${shortDid(attempt.did)} (ICE ${made.iceConnectionState}); behind two NATs take a TURN server`,
          "failed",
        );
        if (attempt.isOffering) this.#end(attempt, error);
        else this.#answeredInVain(attempt, error);
      };
      await steps(pc);
    } catch (error) {
      if (pc !== undefined && attempt.pc !== pc) return; // another one counts since
      const { message } = /** @type {Error} */ (error);
      this.#end(
        attempt,
        error instanceof AIConexusError
          ? error
          : new PeerConnectError(`${shortDid(attempt.did)}: ${message}`, "webrtc", error),
      );
    }
  }

  /** Wait until the channel is open. @param {Attempt} attempt @param {RTCPeerConnection} pc @param {Channel} channel */
  async #await(attempt, pc, channel) {
    await channel.opened;
    if (attempt.pc !== pc || attempt.result.isSettled) return;
    clearTimeout(attempt.expiry);
    clearTimeout(attempt.contest);
    this.#attempts.delete(attempt.did);
    pc.onconnectionstatechange = () => {
      if (["failed", "closed"].includes(pc.connectionState)) channel.onClose();
    };
    attempt.result.resolve(this.#hooks.opened(attempt.did, pc, channel, attempt.limit));
  }

  /** Offer in place of the other side, if somebody here still waits. @param {Attempt} attempt @param {Error} error */
  #answeredInVain(attempt, error) {
    if (attempt.result.isSettled) return;
    if (attempt.waiting === 0 || attempt.begins >= BEGINS_MAX) this.#end(attempt, error);
    else this.#offer(attempt);
  }

  /** @param {Attempt} attempt @param {Error} error */
  #end(attempt, error) {
    if (attempt.result.isSettled) return;
    clearTimeout(attempt.expiry);
    clearTimeout(attempt.contest);
    this.#attempts.delete(attempt.did);
    attempt.result.reject(error);
    const { pc } = attempt;
    attempt.pc = null;
    pc?.close();
  }

  /** Find out what to tell of an OFFER that is not answered. @param {Attempt} attempt */
  async #askGateway(attempt) {
    if (!attempt.isOffering || attempt.isAnswered || attempt.sentId === "") return;
    attempt.status = "unknown";
    const { begins } = attempt;
    const status = await this.#hooks.statusOf(attempt.did).catch((error) => {
      return error instanceof GatewayUnreachableError ? "unknown" : "";
    });
    if (attempt.begins === begins) attempt.status = status;
  }

  /** The attempt whose last OFFER or ANSWER has this id. @param {unknown} id */
  #attemptOf(id) {
    if (typeof id !== "string") return undefined;
    return [...this.#attempts.values()].find(({ sentId }) => sentId !== "" && sentId === id.toLowerCase());
  }

  // --- descriptions and candidates -------------------------------------------------------------------------------

  /** @param {Attempt} attempt @param {"offer" | "answer"} type @param {string} sdp */
  async #describeRemote(attempt, type, sdp) {
    const pc = /** @type {RTCPeerConnection} */ (attempt.pc);
    attempt.limit = checkDescription(sdp);
    attempt.candidates += sdp.split("a=candidate:").length - 1;
    if (attempt.candidates > CANDIDATES_MAX) {
      throw new MalformedMessageError("invalid_payload", `more than ${CANDIDATES_MAX} candidates`, {
        field: "payload.sdp",
      });
    }
    await pc.setRemoteDescription({ type, sdp });
    if (attempt.pc !== pc) return;
    const early = attempt.early ?? [];
    attempt.early = null;
    for (const candidate of early) this.#addCandidate(pc, candidate);
  }

  /** @param {RTCPeerConnection} pc @param {Candidate} payload */
  #addCandidate(pc, { candidate, sdp_mid: sdpMid = null, sdp_mline_index: sdpMLineIndex = null }) {
    const place = sdpMid === null && sdpMLineIndex === null ? { sdpMLineIndex: 0 } : { sdpMid, sdpMLineIndex };
    // One that cannot be used is no reason to give up the others.
    Promise.resolve(pc.addIceCandidate(/** @type {any} */ ({ candidate, ...place }))).catch((error) =>
      this.#hooks.warn(`a candidate is not used: ${error.message}`),
    );
  }

  /**
   * Send a candidate of this side: behind the description that it belongs to.
   * @param {Attempt} attempt @param {Candidate} payload @param {boolean} isNew @param {RTCPeerConnection | null} [pc]
   */
  async #trickle(attempt, payload, isNew, pc = attempt.pc) {
    if (attempt.pc !== pc || attempt.result.isSettled) return;
    // An end of no candidates could pass for the news that there is no way; our checks tell where we are (RFC 8863).
    if (payload.candidate === "" && attempt.trickled.size + attempt.gathered.length === 0) return;
    if (isNew && attempt.sentId === "") {
      attempt.gathered.push(payload);
      return;
    }
    const message = createMessage(this.#did, attempt.did, "ICE_CANDIDATE", payload, { correlationId: attempt.offerId });
    attempt.trickled.set(message.id, payload);
    await this.#hooks.send(message).catch((error) => this.#hooks.warn(`a candidate was not sent: ${error.message}`));
  }

  /**
   * Send the OFFER or ANSWER, then what was gathered meanwhile.
   * @param {Attempt} attempt
   * @param {RTCPeerConnection} pc
   */
  async #signal(attempt, pc) {
    if (attempt.pc !== pc) return;
    const [type, correlationId] = attempt.isOffering ? ["OFFER", null] : ["ANSWER", attempt.offer?.id ?? null];
    const payload = { sdp: pc.localDescription?.sdp ?? "" };
    const message = createMessage(this.#did, attempt.did, type, payload, { correlationId });
    attempt.sends++;
    // Candidates that come while it is being signed must not overtake it.
    attempt.sentId = "";
    await this.#hooks.send(message);
    if (attempt.pc !== pc) return;
    attempt.sentId = message.id;
    if (attempt.isOffering) attempt.offerId = message.id;
    for (const candidate of attempt.gathered.splice(0)) await this.#trickle(attempt, candidate, false, pc);
  }

  /** @param {Attempt} attempt */
  #signalAgain(attempt) {
    const { pc } = attempt;
    if (attempt.result.isSettled || attempt.isAnswered || attempt.sentId === "" || pc === null) return;
    this.#signal(attempt, pc).catch((error) => this.#end(attempt, error));
  }
}

/** @param {RTCIceCandidate | null | undefined} candidate Null: there are no more. @returns {Candidate} */
function ourCandidate(candidate) {
  const { candidate: text = "", sdpMid = null, sdpMLineIndex = null } = candidate ?? {};
  if (text === "") return { candidate: "" };
  return {
    candidate: text.replace(/^a=/, ""),
    ...(typeof sdpMid === "string" ? { sdp_mid: sdpMid } : {}),
    ...(Number.isInteger(sdpMLineIndex) ? { sdp_mline_index: sdpMLineIndex } : {}),
  };
}

/**
 * Accept one DataChannel and nothing else: no media codec is to meet a stranger's input.
 * @param {string} sdp
 * @returns {number} How many bytes a message to the other end may have.
 */
function checkDescription(sdp) {
  /** @param {string} text @returns {never} */
  const refuse = (text) => {
    throw new MalformedMessageError("invalid_payload", text, { field: "payload.sdp" });
  };
  const lines = sdp.split(/\r?\n/);
  const media = lines.filter((line) => line.startsWith("m="));
  if (media.length !== 1 || !/^m=application \d+ \S*DTLS\/SCTP .+/.test(media[0]))
    refuse("the SDP must hold exactly one m=application section");
  if (!lines.some((line) => line.startsWith("a=fingerprint:"))) refuse("the SDP names no DTLS fingerprint");
  let limit = Infinity;
  for (const line of lines) {
    const found = /^a=max-message-size:(.*)$/.exec(line);
    if (found === null) continue;
    const size = /^\s*[0-9]{1,20}\s*$/.test(found[1]) ? Number(found[1]) : -1;
    if (size !== 0 && size < 65_536) refuse("a=max-message-size must be 0 or at least 65536");
    limit = Math.min(limit, size === 0 ? LIMITS.DATA_MESSAGE_MAX_BYTES : size, LIMITS.DATA_MESSAGE_MAX_BYTES);
  }
  return limit === Infinity ? 65_536 : limit; // RFC 8841 section 6.1
}

// =================================================================================================================
// The agent
// =================================================================================================================

/**
 * What a capability does.
 * @callback Run
 * @param {any} args By name; bytes come as Uint8Array, and as an async iterable of these where the schema of the
 *   argument says `"stream": true`.
 * @param {Call} call
 * @returns {unknown} JSON or bytes, a promise of it, or an async iterable of parts (an async generator function).
 */
/**
 * @typedef {Run | (Omit<CapabilityCard, "name"> & {run: Run})} Capability A function; or what others are told of it,
 *   with `run`.
 */

/**
 * @typedef {object} AgentOptions
 * @property {string} gateway URL: `wss://gateway.example/ws`.
 * @property {Identity} identity
 * @property {Record<string, Capability>} [capabilities] By name.
 * @property {(intent: Intent, call: Call) => Promise<Quote> | Quote} [onIntent] Says what an intent would take.
 * @property {(did: string) => Promise<boolean> | boolean} [onOffer] Whether another agent may connect; it learns our
 *   addresses only then.
 * @property {string} [gatewayDid] The DID that the gateway must prove. Without it, TLS alone says which gateway it is.
 * @property {boolean} [hidden] Only those who know its DID find it.
 * @property {RTCIceServer[]} [iceServers] Instead of those that the gateway names.
 * @property {Record<string, any>} [rtcConfiguration] More for every RTCPeerConnection.
 * @property {number} [idleTimeout] After how many milliseconds without a call a connection is let go that nobody has
 *   released: 5 minutes; Infinity for never. It is closed if the other side does not need it either.
 * @property {number} [peersMax] When a stranger asks to connect; the next is told busy.
 * @property {any} [WebSocket] Where the runtime has none.
 * @property {any} [RTCPeerConnection] Where the runtime has none.
 */

/**
 * Events: `state` (detail: GatewayState), `peer` (a connection was made; detail: Peer), `peerlost` (detail:
 * {peer, reason}), `warning` (detail: a text; what was refused or dropped, for a log).
 */
export class AgentEvent extends Event {
  /** @param {string} type @param {any} detail */
  constructor(type, detail) {
    super(type);
    this.detail = detail;
  }
}

/**
 * An agent: it can be found, finds others, and both call each other. What they say to each other goes past the gateway:
 * connections outlive it, and the agent returns to it by itself.
 */
export class Agent extends EventTarget {
  #options;
  #identity;
  #gateway;
  #directory;
  #signaling;
  #answers = new Answers();
  /** @type {Map<string, Peer>} */
  #peers = new Map();
  /** @type {Map<string, {run: Run, input: Record<string, any> | undefined}>} */
  #capabilities = new Map();

  /** @param {AgentOptions} options */
  constructor(options) {
    super();
    checkOptions(options);
    const { gateway, identity, capabilities = {}, hidden = false, gatewayDid } = options;
    this.#options = options;
    this.#identity = identity;
    const cards = [];
    for (const [name, capability] of Object.entries(capabilities)) {
      const { run, ...card } = typeof capability === "function" ? { run: capability } : capability;
      this.#capabilities.set(name, { run, input: /** @type {CapabilityCard} */ (card).input });
      const isStream = Object.prototype.toString.call(run) === "[object AsyncGeneratorFunction]";
      cards.push({ name, ...card, ...(isStream ? { stream: true } : {}) });
    }
    const WebSocketClass = options.WebSocket ?? globalThis.WebSocket;
    if (WebSocketClass === undefined) throw new TypeError("this runtime has no WebSocket: give one (npm: ws)");
    const warn = (/** @type {string} */ text) => this.#emit("warning", text);
    this.#gateway = new Gateway(
      gateway,
      identity,
      {
        received: (envelope) => {
          if (envelope.type === "PRESENCE") this.#directory.received(envelope);
          else this.#signaling.received(envelope);
        },
        rejected: (error, envelope) => this.#signaling.rejected(error, envelope),
        stateChanged: (state) => this.#stateChanged(state),
        warn,
      },
      { gatewayDid, hidden, capabilities: cards, WebSocket: WebSocketClass },
    );
    this.#directory = new Directory(this.#gateway, identity.did, warn);
    this.#signaling = new Signaling(identity.did, {
      send: (envelope) => this.#gateway.send(envelope, LIMITS.CONNECT_TIMEOUT_MS),
      reply: (envelope, payload) => this.#gateway.reply(envelope, payload),
      connection: () => this.#newConnection(),
      admit: (did) => this.#admit(did),
      opened: (did, pc, channel, limit) => this.#opened(did, pc, channel, limit),
      gatewayDid: () => this.#gateway.session?.gatewayDid,
      hasGateway: () => this.state === "registered",
      statusOf: async (did) => {
        for await (const { status } of this.#directory.discover({ dids: [did] }, { timeout: ASK_MS })) return status;
        return "offline";
      },
      warn,
    });
  }

  /** Its DID. */
  get did() {
    return this.#identity.did;
  }

  /** Where it is with its gateway. */
  get state() {
    return this.#gateway.state;
  }

  /** What the gateway granted; null before `start`. */
  get session() {
    return this.#gateway.session;
  }

  /** Why it is closed for good; null if it is not, or was closed here. */
  get closedBecause() {
    return this.#gateway.closedBecause;
  }

  /** The agents it is connected with, by DID. @returns {ReadonlyMap<string, Peer>} */
  get peers() {
    return this.#peers;
  }

  /**
   * Register with the gateway. Afterwards it comes back after a drop by itself.
   * @throws {GatewayUnreachableError} @throws {GatewayIdentityError} @throws {RegistrationError}
   */
  async start() {
    await this.#gateway.start();
  }

  /** End everything. The goodbyes leave before the first `await`, so it may be called when a page is about to go. */
  async close() {
    this.#signaling.close();
    const goodbyes = [...this.#peers.values()].map((peer) => peer.close("the agent stops"));
    await Promise.all([...goodbyes, this.#gateway.close()]);
  }

  /**
   * Find agents by what they can do; all conditions must hold for one capability. Only cards that verify are shown.
   * @param {Query} [query] @param {{limit?: number}} [options]
   * @throws {IncompleteAnswerError} Behind what it found: the gateway could not ask all.
   */
  discover(query = {}, options = {}) {
    return this.#directory.discover(query, options);
  }

  /**
   * Hear who comes and goes; first "join" for those that are there. It ends with the signal, or with the agent. A
   * gateway that does not answer in `timeout` milliseconds is asked again.
   * @param {Query} [query] @param {{signal?: AbortSignal, timeout?: number}} [options]
   */
  watch(query = {}, options = {}) {
    return this.#directory.watch(query, options);
  }

  /**
   * The connection with another agent: the one there is, or a new one. Let it go with `peer.release()`; otherwise it
   * is let go when it is idle.
   * @param {string} did
   * @param {{timeout?: number, signal?: AbortSignal}} [options] `timeout` in milliseconds.
   * @returns {Promise<Peer>}
   * @throws {DIDError}
   * @throws {UnknownAgentError} It is not online.
   * @throws {PeerRefusedError}
   * @throws {PeerConnectError}
   * @throws {PeerIdentityError} Somebody else answered for it.
   */
  async connect(did, { timeout = LIMITS.CONNECT_TIMEOUT_MS, signal } = {}) {
    decodeDid(did);
    if (did === this.did) throw new PeerConnectError("this is the agent itself", "self");
    signal?.throwIfAborted();
    let peer = this.#peers.get(did);
    if (peer !== undefined) {
      const late = () => new PeerConnectError(`the last connection with ${shortDid(did)} has not ended`, "timeout");
      if ((await within(peer.settled(), timeout, late)) === "closed") peer = undefined;
    }
    if (peer === undefined && !["registered", "reconnecting"].includes(this.state)) {
      throw this.closedBecause ?? new NotConnectedError(`the agent is ${this.state}: start() it first`, this.state);
    }
    peer ??= await this.#signaling.connect(did, timeout, signal);
    if (peer.state === "closed") throw new PeerConnectError(`${shortDid(did)} went away at once`, "lost");
    peer.hold();
    return peer;
  }

  // --- inside ----------------------------------------------------------------------------------------------------

  /** @param {string} type @param {any} detail */
  #emit(type, detail) {
    this.dispatchEvent(new AgentEvent(type, detail));
  }

  /** @param {GatewayState} state */
  #stateChanged(state) {
    if (state === "registered" || state === "closed") {
      this.#directory.renewed();
      this.#signaling.gatewayReturned();
    }
    this.#emit("state", state);
  }

  #newConnection() {
    const PeerConnection = this.#options.RTCPeerConnection ?? globalThis.RTCPeerConnection;
    if (PeerConnection === undefined) {
      throw new PeerConnectError(
        "this runtime has no RTCPeerConnection: give one (npm: werift, node-datachannel)",
        "no_webrtc",
      );
    }
    const iceServers = this.#options.iceServers ?? this.session?.iceServers ?? [];
    return /** @type {RTCPeerConnection} */ (new PeerConnection({ iceServers, ...this.#options.rtcConfiguration }));
  }

  /** @param {string} did */
  async #admit(did) {
    // One that is connected already was started anew: it replaces its connection.
    if (!this.#peers.has(did) && this.#peers.size + this.#signaling.strangers > (this.#options.peersMax ?? PEERS_MAX))
      return "busy";
    return ((await this.#options.onOffer?.(did)) ?? true) ? null : "declined";
  }

  /** @param {string} did @param {RTCPeerConnection} pc @param {Channel} channel @param {number} limit */
  #opened(did, pc, channel, limit) {
    const replaced = this.#peers.get(did);
    const peer = new Peer(did, pc, channel, limit, {
      identity: this.#identity,
      answers: this.#answers,
      onIntent: (intent, call) => this.#options.onIntent?.(intent, call) ?? { status: "not_understood" },
      onExecute: (name, args, call) => this.#execute(name, args, call),
      idleTimeout: this.#options.idleTimeout ?? LIMITS.PEER_IDLE_MS,
      closed: (gone, reason) => {
        if (this.#peers.get(did) === gone) this.#peers.delete(did);
        this.#emit("peerlost", { peer: gone, reason });
      },
      warn: (text) => this.#emit("warning", text),
    });
    this.#peers.set(did, peer);
    void replaced?.close("a newer connection takes its place");
    this.#emit("peer", peer);
    return peer;
  }

  /** @param {string} name @param {Record<string, any>} args @param {Call} call */
  #execute(name, args, call) {
    const capability = this.#capabilities.get(name);
    if (capability === undefined) {
      const known = [...this.#capabilities.keys()].join(", ") || "none";
      throw new UnknownCapabilityError(
        `no capability ${JSON.stringify(name)}; there is: ${known}`,
        "unknown_capability",
      );
    }
    for (const [name, value] of Object.entries(args)) {
      const takesStream = capability.input?.properties?.[name]?.stream === true;
      const bytes = asBytes(value);
      if (takesStream && bytes !== null)
        args[name] = (async function* () {
          yield bytes;
        })();
      else if (isAsyncIterable(value) && !takesStream)
        throw new InvalidArgumentsError(`${name} takes no stream`, "invalid_arguments");
    }
    const wrong = capability.input === undefined ? null : misfitOfSchema(args, capability.input, "");
    if (wrong !== null) throw new InvalidArgumentsError(wrong, "invalid_arguments");
    return capability.run(args, call);
  }
}

/** Say what to give, to those whom no type checker tells. @param {any} options */
function checkOptions(options) {
  if (!isPlain(options) || (typeof options.gateway !== "string" && !(options.gateway instanceof URL)))
    throw new TypeError('an agent needs its gateway\'s URL: new Agent({ gateway: "wss://host/ws", identity })');
  if (!(options.identity instanceof Identity)) {
    const given = typeof options.identity?.then === "function" ? "; this is a promise of one" : "";
    throw new TypeError(
      `an agent needs an identity: await Identity.load() in a browser, await Identity.generate() elsewhere${given}`,
    );
  }
  const { capabilities = {} } = options;
  if (!isPlain(capabilities)) throw new TypeError("capabilities are an object: { name: async (args) => result }");
  for (const [name, capability] of Object.entries(capabilities)) {
    if (typeof capability === "function" || typeof capability?.run === "function") continue;
    throw new TypeError(`the capability ${name} is a function, or an object with the function as "run"`);
  }
}

/** Whether it has named values, and is not of a class that means something else. @param {any} value */
const isPlain = (value) => Object.prototype.toString.call(value) === "[object Object]" && !isAsyncIterable(value);

/** @type {Readonly<Record<string, (value: any) => boolean>>} */
const SCHEMA_TYPES = {
  object: (value) => isObject(value, null, "") && asBytes(value) === null && !isAsyncIterable(value),
  array: Array.isArray,
  // Bytes, and a stream of them, are described as a string, too.
  string: (value) => typeof value === "string" || asBytes(value) !== null || isAsyncIterable(value),
  number: (value) => typeof value === "number",
  integer: Number.isInteger,
  boolean: (value) => typeof value === "boolean",
  null: (value) => value === null,
};

/**
 * Check a value against the commonest part of JSON Schema 2020-12; keywords that are not known here are not checked.
 * @param {any} value @param {any} schema @param {string} where
 * @returns {string | null} What does not fit.
 */
function misfitOfSchema(value, schema, where) {
  if (!isObject(schema, null, "")) return schema === false ? `${where || "it"} is not allowed` : null;
  const name = where || "the arguments";
  const { type, enum: values, minimum, maximum, minLength, maxLength, properties = {}, required = [], items } = schema;
  const types = type === undefined ? [] : [type].flat();
  if (types.length > 0 && !types.some((type) => SCHEMA_TYPES[type]?.(value) ?? true))
    return `${name}: not ${types.join(" or ")}`;
  if (Array.isArray(values) && !values.includes(value)) return `${name}: not one of ${JSON.stringify(values)}`;
  if (typeof value === "number" && (value < (minimum ?? -Infinity) || value > (maximum ?? Infinity)))
    return `${name}: out of range`;
  if (
    typeof value === "string" &&
    ([...value].length < (minLength ?? 0) || [...value].length > (maxLength ?? Infinity))
  ) {
    return `${name}: its length is out of range`;
  }
  if (Array.isArray(value) && items !== undefined) {
    for (const [index, item] of value.entries()) {
      const wrong = misfitOfSchema(item, items, `${where}[${index}]`);
      if (wrong !== null) return wrong;
    }
  }
  if (!SCHEMA_TYPES.object(value)) return null;
  for (const key of required) if (!Object.hasOwn(value, key)) return `${where ? `${where}.` : ""}${key} is missing`;
  for (const [key, item] of Object.entries(value)) {
    const path = where ? `${where}.${key}` : key;
    const inner = Object.hasOwn(properties, key) ? properties[key] : schema.additionalProperties;
    if (inner === false) return `${path} is unknown`;
    const wrong = inner === undefined ? null : misfitOfSchema(item, inner, path);
    if (wrong !== null) return wrong;
  }
  return null;
}
