// What an agent of aiconexus.js does with a peer that breaks the rules of section 13. AICONEXUS_GATEWAY is the URL of a
// real gateway; the peer is an agent, too, whose DataChannel the tests write to themselves.

import assert from "node:assert/strict";
import { webcrypto as crypto } from "node:crypto";
import { after, before, beforeEach, test } from "node:test";

import * as ioap from "../../examples/browser_agent/aiconexus.js";
import { RTCPeerConnection, capabilities, newAgent } from "./werift.mjs";

const { LIMITS } = ioap;
const served = capabilities();
let me;
let rogue;
let identity;
let channel;
/** Texts that the rogue has received and no test has looked at. */
let texts = [];
let waiting = [];

/** Its channel is open to everybody. */
class OpenConnection extends RTCPeerConnection {
  createDataChannel(...args) {
    channel = super.createDataChannel(...args);
    channel.onMessage.subscribe((data) => {
      if (typeof data !== "string") return;
      texts.push(data);
      for (const look of waiting.splice(0)) look();
    });
    return channel;
  }
}

/** The next message that fits, as its envelope; others stay. */
async function received(fits) {
  for (;;) {
    const index = texts.findIndex((text) => fits(ioap.decode(text, LIMITS.DATA_MESSAGE_MAX_BYTES)));
    if (index >= 0) return ioap.decode(texts.splice(index, 1)[0], LIMITS.DATA_MESSAGE_MAX_BYTES);
    await new Promise((resolve) => waiting.push(resolve));
  }
}

const answerTo = (id) => received(({ correlation_id: asked }) => asked === id);

/** A message of the rogue to `me`, not signed. */
const message = (type, payload, more = {}) => ioap.createMessage(rogue.did, me.did, type, payload, more);

/** Sign and send; `change` spoils it after that. */
async function send(envelope, change = {}) {
  const signed = { ...(await ioap.sign(envelope, identity)), ...change };
  channel.send(ioap.serialize(signed));
  return signed;
}

const request = (capability, args = {}, more = {}) =>
  message("EXEC_REQUEST", { args, timeout_ms: 30_000, ...more }, { ext: { capability, ...more.ext } });

const digest = async (bytes) => ioap.toHex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)));

before(
  async () => {
    me = await newAgent(served);
    identity = await ioap.Identity.generate();
    rogue = await newAgent({ ...capabilities(), identity, RTCPeerConnection: OpenConnection });
    await Promise.all([me.start(), rogue.start()]);
    await rogue.connect(me.did);
  },
  { timeout: 30_000 },
);
beforeEach(() => (texts = []));
after(async () => {
  await rogue.close();
  await me.close();
});

// --- as caller ----------------------------------------------------------------------------------

test("a request that is not proven is refused, and not executed", async () => {
  const runs = served.seen.runs;
  const other = (await ioap.Identity.generate()).did;
  const good = request("double", { value: 1 });
  const spoiled = {
    bad_signature: [good, { payload: { ...good.payload, args: { value: 2 } } }],
    missing_signature: [request("double", { value: 1 }), { signature: null }],
    wrong_recipient: [{ ...request("double", { value: 1 }), to: other }, {}],
    wrong_sender: [request("double", { value: 1 }), { from: other }],
    stale_timestamp: [{ ...request("double", { value: 1 }), timestamp: "2020-01-01T00:00:00Z" }, {}],
    invalid_ext: [message("EXEC_REQUEST", { args: {} }, { ext: {} }), {}],
    invalid_payload: [message("EXEC_REQUEST", { args: {}, timeout_ms: 0 }, { ext: { capability: "double" } }), {}],
    unexpected_type: [message("OFFER", { sdp: "v=0" }), {}],
    unknown_type: [message("HELLO", {}), {}],
  };
  for (const [cause, [envelope, change]] of Object.entries(spoiled)) {
    await send(envelope, change);
    const { type, payload } = await answerTo(envelope.id);
    assert.equal(type, "ERROR");
    assert.equal(payload.details.name, cause);
  }
  channel.send("{");
  assert.equal((await received(({ type }) => type === "ERROR")).payload.details.name, "not_json");
  assert.equal(served.seen.runs, runs);
});

test("the same request again is not executed again, but answered alike", async () => {
  const runs = served.seen.runs;
  const envelope = request("double", { value: 4 });
  const signed = await send(envelope);
  const first = await answerTo(envelope.id);
  assert.equal(first.payload.result, 8);
  channel.send(ioap.serialize(signed));
  assert.deepEqual(await answerTo(envelope.id), first);
  await send({ ...envelope, payload: { ...envelope.payload, args: { value: 5 } } });
  assert.equal((await answerTo(envelope.id)).payload.details.name, "replayed");
  assert.equal(served.seen.runs, runs + 1);
});

test("attachments are what the request has signed, or it fails", async () => {
  const bytes = Uint8Array.of(1, 2, 3);
  const attached = async (entry) => {
    const envelope = request(
      "echo",
      {},
      { ext: { attachments: [{ at: "/args/value", as: "bytes", size: 3, ...entry }] } },
    );
    envelope.payload = { args: {} };
    await send(envelope);
    return envelope.id;
  };
  let id = await attached({ sha256: await digest(Uint8Array.of(3, 2, 1)) });
  channel.send(Buffer.from(ioap.dataFrame(id, bytes)));
  let answer = await answerTo(id);
  assert.equal(answer.ext.error.name, "invalid_arguments");
  assert.match(answer.payload.error, /not what its digest says/);

  id = await attached({ sha256: await digest(bytes) });
  channel.send(Buffer.from(ioap.dataFrame(id, bytes)));
  assert.deepEqual((await answerTo(id)).ext.attachments[0].sha256, await digest(bytes));

  answer = await answerTo(await attached({}));
  assert.equal(answer.payload.details.name, "invalid_ext"); // signed, but without a digest
  answer = await answerTo(await attached({ size: LIMITS.ATTACHMENTS_MAX_BYTES + 1, sha256: await digest(bytes) }));
  assert.equal(answer.ext.error.name, "invalid_arguments");
});

test("frames that nobody has announced are refused, those of no call ignored", async () => {
  for (const frame of ["01", "0400", `02${"0".repeat(30)}`]) {
    channel.send(Buffer.from(frame, "hex"));
    assert.equal((await received(({ type }) => type === "ERROR")).payload.details.name, "bad_frame");
  }
  const envelope = request("hold");
  await send(envelope);
  channel.send(Buffer.from(ioap.dataFrame(crypto.randomUUID(), Uint8Array.of(1))));
  channel.send(Buffer.from(ioap.creditFrame(envelope.id, 1_000_000)));
  channel.send(Buffer.from(ioap.dataFrame(envelope.id, Uint8Array.of(1))));
  const { type, payload } = await answerTo(envelope.id);
  assert.equal(type, "ERROR");
  assert.equal(payload.details.name, "bad_frame");
});

test("an early end of a request leaves nothing behind", async () => {
  const size = LIMITS.ATTACHMENTS_MAX_BYTES;
  for (let round = 0; round < 3; round++) {
    const envelope = request("echo", {}, {});
    envelope.payload = { args: {} };
    envelope.ext.attachments = [{ at: "/args/value", as: "bytes", size, sha256: "0".repeat(64) }];
    await send(envelope);
    await send(message("INTENT", { status: "cancel" }, { correlationId: envelope.id }));
    const { payload } = await answerTo(envelope.id);
    assert.equal(payload.status, "cancelled"); // not "busy": the room of the one before is free again
  }
});

test("more calls than it runs at a time are told busy", async () => {
  const requests = Array.from({ length: 70 }, () => request("hold", {}, { timeout_ms: 2000 }));
  for (const envelope of requests) await send(envelope);
  const answers = await Promise.all(requests.map(({ id }) => answerTo(id)));
  const names = answers.map(({ ext }) => ext.error.name);
  assert.equal(names.filter((name) => name === "busy").length, 6);
  assert.equal(names.filter((name) => name === "timeout").length, 64);
});

// --- as callee ----------------------------------------------------------------------------------

/** A call of `me` that the rogue is asked, and does not answer by itself. */
async function called(begin) {
  const peer = await me.connect(rogue.did);
  const result = begin(peer);
  result.catch(() => {});
  const { id } = await received(({ type, ext }) => type === "EXEC_REQUEST" && ext.capability === "hold");
  await peer.release();
  return { id, result };
}

const response = (id, payload, ext) =>
  message("EXEC_RESPONSE", payload, { correlationId: id, ...(ext ? { ext } : {}) });

test("an answer that the other agent has not signed fails its call", async () => {
  const forgeries = [
    (id) => [response(id, { status: "success", result: 1 }), { signature: null }],
    (id) => [response(id, { status: "success", result: 1 }), { payload: { status: "success", result: 2 } }],
    (id) => [{ ...response(id, { status: "success", result: 1 }), timestamp: "not one" }, {}],
  ];
  const expected = [ioap.PeerIdentityError, ioap.PeerIdentityError, ioap.CallError];
  for (const [index, forge] of forgeries.entries()) {
    const { id, result } = await called((peer) => peer.execute("hold"));
    await send(...forge(id));
    await assert.rejects(result, expected[index]);
  }
});

test("a stream that is not what was signed fails its call", async () => {
  const read = async (peer) => {
    const parts = [];
    for await (const part of peer.stream("hold")) parts.push(part);
    return parts;
  };
  const stream = new ioap.StreamDigest();
  stream.add(1);
  const one = stream.summary();
  const ends = [
    [{ stream: one }, (parts) => parts.then((value) => assert.deepEqual(value, [1]))],
    [{ stream: { ...one, parts: 2 } }, (parts) => assert.rejects(parts, ioap.PeerIdentityError)],
    [{ stream: { ...one, sha256: "0".repeat(64) } }, (parts) => assert.rejects(parts, ioap.PeerIdentityError)],
    [undefined, (parts) => assert.rejects(parts, ioap.PeerIdentityError)],
  ];
  for (const [ext, check] of ends) {
    const { id, result } = await called(read);
    channel.send(ioap.serialize(response(id, { status: "partial", result: 1 })));
    await send(response(id, { status: "success" }, ext));
    await check(result);
  }
});

test("who sends more than there is credit for fails its own call", async () => {
  let readOn;
  const { id, result } = await called(async (peer) => {
    const stream = peer.stream("hold");
    await stream.next(); // and read no more
    await new Promise((resolve) => (readOn = resolve));
    const rest = [];
    for await (const part of stream) rest.push(part);
    return rest;
  });
  const part = ioap.serialize(response(id, { status: "partial", result: "x".repeat(60_000) }));
  for (let count = 0; count < 45; count++) channel.send(part.replace(/"id":"[^"]+"/, `"id":"${crypto.randomUUID()}"`));
  assert.equal((await answerTo(id)).payload.details.name, "bad_frame");
  readOn();
  await assert.rejects(result, (error) => error.code === "bad_frame");
});

test("the connection has outlived all of it", async () => {
  const envelope = request("double", { value: 3 });
  await send(envelope);
  assert.equal((await answerTo(envelope.id)).payload.result, 6);
});
