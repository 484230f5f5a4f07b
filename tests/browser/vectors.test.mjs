// The module of examples/browser_agent against tests/vectors, as another implementation of the protocol.

import assert from "node:assert/strict";
import { webcrypto as crypto } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import * as ioap from "../../examples/browser_agent/aiconexus.js";

const read = (name) => JSON.parse(readFileSync(new URL(`../vectors/${name}.json`, import.meta.url), "utf8"));
const { Assembly, Identity, LIMITS, ReplayGuard, StreamDigest, fromHex, toHex } = ioap;

const IDENTITIES = read("identities");
const MESSAGES = read("messages");

async function identityOf(did) {
  return Identity.fromSeed(fromHex(IDENTITIES.find((identity) => identity.did === did).seed));
}

// --- identity -----------------------------------------------------------------------------------

for (const { name, seed, public_key: publicKey, did } of IDENTITIES) {
  test(`identity of ${name}`, async () => {
    assert.equal((await Identity.fromSeed(fromHex(seed))).did, did);
    assert.equal(toHex(ioap.decodeDid(did)), publicKey);
    assert.equal(ioap.encodeDid(fromHex(publicKey)), did);
  });
}

test("a DID that is not canonical is refused", () => {
  const { did } = IDENTITIES[0];
  const wrong = [
    "",
    1,
    null,
    did.slice(0, -1),
    `${did}1`,
    `${did}#key`,
    did.replace("z6Mk", "Q6Mk"),
    did.replace(/.$/, "0"),
    did.replace("did:key", "did:web"),
    did.replace("z6Mk", "z7Mk"),
    `did:key:z${"1".repeat(47)}`,
    `did:key:z${"z".repeat(47)}`,
  ];
  for (const text of wrong) assert.throws(() => ioap.decodeDid(text), ioap.DIDError, String(text));
});

test("a generated identity signs what its DID verifies", async () => {
  const identity = await Identity.generate();
  const data = new TextEncoder().encode("anything");
  const signature = await identity.sign(data);
  assert.equal(await ioap.verifySignature(identity.did, data, signature), true);
  assert.equal(await ioap.verifySignature(identity.did, data.subarray(1), signature), false);
  assert.equal(await ioap.verifySignature(IDENTITIES[0].did, data, signature), false);
});

test("signatures are checked as strictly as libsodium does", async () => {
  const identity = await Identity.generate();
  const data = new TextEncoder().encode("anything");
  const signature = await identity.sign(data);
  const order = (1n << 252n) + 27742317777372353535851937790883648493n;
  const scalar = BigInt("0x" + toHex(signature.slice(32).reverse()));
  const malleable = signature.slice();
  malleable.set(fromHex((scalar + order).toString(16).padStart(64, "0")).reverse(), 32);
  assert.equal(await ioap.verifySignature(identity.did, data, malleable), false);
  // A key of order 1 verifies any message under S = 0 and R = the identity, where nobody looks.
  const neutral = fromHex("01" + "00".repeat(31));
  const universal = new Uint8Array(64);
  universal.set(neutral);
  assert.equal(await ioap.verifySignature(ioap.encodeDid(neutral), data, universal), false);
  assert.equal(await ioap.verifySignature(identity.did, data, signature.slice(0, 63)), false);
});

// --- JSON ---------------------------------------------------------------------------------------

for (const { text, canonical } of read("canonical")) {
  test(`canonical form of ${text.slice(0, 40)}`, () =>
    assert.equal(ioap.canonicalize(ioap.parseJson(text)), canonical));
}

test("what was parsed is what JSON.parse reads", () => {
  const texts = [
    '{"a":[1,-2.5e-3,"\\u00e9\\ud83d\\ude00\\n",true,false,null,{}]}',
    '"x"',
    " 1 ",
    "[]",
    '{"__proto__":{"a":1},"constructor":2}',
  ];
  for (const text of texts) assert.deepEqual(ioap.parseJson(text), JSON.parse(text));
  assert.equal(ioap.serialize(ioap.parseJson('{"__proto__":1}')), '{"__proto__":1}');
  assert.equal({}.a, undefined);
});

test("what has no canonical form is refused", () => {
  const wrong = [NaN, Infinity, "\ud800", 1n, new Map(), new Uint8Array(1), () => {}, { a: Symbol("a") }];
  for (const value of wrong) assert.throws(() => ioap.canonicalize(value), ioap.MalformedMessageError);
  let deep = [];
  for (let level = 1; level < 33; level++) deep = [deep];
  assert.throws(() => ioap.canonicalize(deep), { code: "too_deep" });
  assert.equal(ioap.canonicalize(deep[0]).length, 64);
});

test("a float that looks like an integer keeps its kind on the wire", () => {
  assert.equal(ioap.serialize(1e20), "1e+20");
  assert.equal(ioap.canonicalize(ioap.parseJson("1e20")), "100000000000000000000");
  assert.equal(ioap.serialize(Number.MAX_SAFE_INTEGER), "9007199254740991");
});

// --- messages -----------------------------------------------------------------------------------

for (const { name, wire, canonical, signature } of MESSAGES) {
  test(`message ${name}`, async () => {
    const envelope = ioap.decode(wire, LIMITS.DATA_MESSAGE_MAX_BYTES);
    const { signature: _, ...unsigned } = envelope;
    assert.equal(ioap.canonicalize(unsigned), canonical);
    assert.equal(ioap.serialize(envelope), wire);
    if (signature === null) return;
    await ioap.verify(envelope, {
      recipient: envelope.to,
      guard: new ReplayGuard(),
      now: Date.parse(envelope.timestamp),
    });
    assert.equal((await ioap.sign(unsigned, await identityOf(envelope.from))).signature, signature);
  });
}

read("refusals").forEach(({ wire, cause, by }, number) => {
  if (by === "gateway") return;
  test(`refusal ${number}: ${cause}`, () => assert.throws(() => ioap.decode(wire), { code: cause }));
});

const OFFER = MESSAGES.find(({ name }) => name === "offer");
const at = (text) => Date.parse(text);

test("a message is proven in the order of section 5.2", async () => {
  const offer = ioap.decode(OFFER.wire);
  const now = at(offer.timestamp);
  const options = { recipient: offer.to, guard: new ReplayGuard(), now };
  const fails = (envelope, more, code) => assert.rejects(ioap.verify(envelope, { ...options, ...more }), { code });
  await fails(offer, { sender: offer.to }, "wrong_sender");
  await fails({ ...offer, signature: undefined }, {}, "missing_signature");
  await fails({ ...offer, id: offer.id.replace("4", "5") }, {}, "bad_signature");
  await fails(
    { ...offer, signature: `${offer.signature.slice(0, -3)}${offer.signature.at(-3) === "A" ? "B" : "A"}==` },
    {},
    "bad_signature",
  );
  await fails(offer, { recipient: offer.from }, "wrong_recipient");
  await fails(offer, { now: now + 120_001 }, "stale_timestamp");
  await fails(offer, { now: now - 120_001 }, "stale_timestamp");
  await ioap.verify(offer, options);
  await fails(offer, {}, "replayed");
});

test("a signature has one text", async () => {
  const offer = ioap.decode(OFFER.wire);
  const options = () => ({ recipient: offer.to, guard: new ReplayGuard(), now: at(offer.timestamp) });
  const last = offer.signature.at(-3);
  const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const sibling = alphabet[alphabet.indexOf(last) + 1]; // the same 64 bytes, other trailing bits
  const texts = [
    `${offer.signature.slice(0, -3)}${sibling}==`,
    offer.signature.slice(0, -2),
    `${offer.signature}\n`,
    ` ${offer.signature}`,
  ];
  for (const signature of texts)
    await assert.rejects(ioap.verify({ ...offer, signature }, options()), { code: "bad_signature" });
});

test("values are not coerced", () => {
  const candidate = MESSAGES.find(({ name }) => name === "ice-candidate").wire;
  for (const value of ["0.0", "0e0", "true", '"0"', "-1", "1.5"]) {
    const wire = candidate.replace('"sdp_mline_index":0', `"sdp_mline_index":${value}`);
    assert.notEqual(wire, candidate);
    assert.throws(() => ioap.decode(wire), { code: "invalid_payload" }, value);
  }
  ioap.decode(candidate.replace('"sdp_mline_index":0', '"sdp_mline_index":null'));
});

test("a timestamp is RFC 3339 in UTC, of a day that the calendar has", () => {
  assert.equal(ioap.parseTimestamp("2026-01-12T10:00:00Z"), 1768212000000);
  assert.equal(ioap.parseTimestamp("2026-01-12T10:00:00.123456789Z"), 1768212000123.456789);
  const wrong = [
    "2026-01-12T10:00:00",
    "2026-01-12T10:00:00+00:00",
    "2026-01-12 10:00:00Z",
    "2026-02-30T10:00:00Z",
    "2026-13-01T10:00:00Z",
    "2026-01-12T24:00:00Z",
    "2026-01-12T10:00:60Z",
    "2026-01-12T10:00:00.Z",
    "2026-01-12T10:00:00.1234567890Z",
    "2026-01-12T10:00Z",
  ];
  for (const text of wrong) assert.ok(Number.isNaN(ioap.parseTimestamp(text)), text);
});

test("a message that is too large is refused", () => {
  const long = OFFER.wire.replace('"v=0', `"${"é".repeat(40_000)}v=0`);
  assert.throws(() => ioap.decode(long), { code: "too_large" });
  assert.equal(ioap.decode(long, LIMITS.DATA_MESSAGE_MAX_BYTES).type, "OFFER");
});

// --- replay guard -------------------------------------------------------------------------------

const uuid = (number) => `00000000-0000-4000-8000-${String(number).padStart(12, "0")}`;
const stamped = (from, number, ms) => ({ from, id: uuid(number), timestamp: new Date(ms).toISOString() });

test("a full guard forgets those who sent the most, and lets no replay in", () => {
  const guard = new ReplayGuard(120_000, 64);
  const now = 1_768_212_000_000;
  guard.accept(stamped("quiet", 0, now - 5000), now);
  for (let i = 1; i <= 200; i++) guard.accept(stamped("loud", i, now + i), now);
  assert.ok(guard.size <= 64);
  for (let i = 1; i <= 200; i++) {
    assert.throws(
      () => guard.accept(stamped("loud", i, now + i), now),
      (error) => ["replayed", "stale_timestamp"].includes(error.code),
    );
  }
  assert.throws(() => guard.accept(stamped("quiet", 0, now - 5000), now), { code: "replayed" });
  guard.accept(stamped("quiet", 1000, now - 4000), now);
});

test("ids of UUIDs compare without regard to case", () => {
  const guard = new ReplayGuard();
  const id = "abcdef00-0000-4000-8000-000000000000";
  const timestamp = new Date().toISOString();
  guard.accept({ from: "a", id, timestamp });
  assert.throws(() => guard.accept({ from: "a", id: id.toUpperCase(), timestamp }), { code: "replayed" });
  guard.accept({ from: "b", id, timestamp });
});

test("a guard forgets what is stale anyway, and many senders of one message each", () => {
  const guard = new ReplayGuard(1000, 32);
  const now = 1_768_212_000_000;
  for (let i = 0; i < 100; i++) guard.accept(stamped(`sender ${i}`, i, now + i), now);
  assert.ok(guard.size <= 32);
  for (let i = 0; i < 100; i++) assert.throws(() => guard.accept(stamped(`sender ${i}`, i, now + i), now));
  guard.accept(stamped("later", 0, now + 5000), now + 5000);
  assert.equal(guard.size, 1);
});

// --- cards --------------------------------------------------------------------------------------

read("cards").forEach(({ card, did, reason }, number) => {
  test(`card ${number}: ${reason || "good"}`, async () => {
    if (!reason) {
      assert.equal((await ioap.verifyCard(card, did)).did, did);
      const again = await ioap.signCard(card.capabilities, await identityOf(did), card.issued_at);
      assert.equal(again.signature, card.signature);
      return;
    }
    const kind = reason === "signature" ? ioap.InvalidSignatureError : ioap.MalformedMessageError;
    await assert.rejects(ioap.verifyCard(card, did), kind);
  });
});

// --- tables -------------------------------------------------------------------------------------

test("the causes are those of the protocol", () => {
  assert.deepEqual(
    Object.values(ioap.CAUSES),
    read("causes").map(({ num, name, code, temporary }) => ({ num, name, code, temporary })),
  );
});

test("the close codes are those of the protocol", () => {
  const expected = read("close_codes").map(({ retry_after_ms: retryAfter, number, name, reconnect }) => ({
    number,
    name,
    reconnect,
    retryAfter,
  }));
  assert.deepEqual([...ioap.CLOSE_CODES.values()], expected);
  assert.equal(ioap.closeCode(4444).reconnect, true);
  assert.equal(ioap.closeCode(4599).reconnect, false);
  assert.equal(ioap.closeCode(3000).reconnect, true);
});

test("a CLOSE may name the time of the return", () => {
  const draining = ioap.closeCode(4001);
  assert.equal(ioap.retryAfter(draining, '{"n":"draining","r":1234}'), 1234);
  for (const reason of ["", "going", "null", '{"r":-1}', '{"r":"1"}', '{"r":1.5}'])
    assert.equal(ioap.retryAfter(draining, reason), 500);
  assert.equal(ioap.retryAfter(draining, '{"r":99999999999}'), 3_600_000);
});

test("the limits are those of the protocol", () => {
  const document = readFileSync(new URL("../../PROTOCOL_DESIGN.md", import.meta.url), "utf8");
  const table = document.slice(document.indexOf("<!-- begin limits -->"), document.indexOf("<!-- end limits -->"));
  const limits = new Map(
    [...table.matchAll(/^\| `(\w+)` \| ([0-9.,]+)/gm)].map(([, name, value]) => [
      name,
      Number(value.replaceAll(",", "")),
    ]),
  );
  const aliases = { REGISTER_CLOCK_SKEW_MS: "REGISTER_CLOCK_SKEW_SECONDS", CLOCK_SKEW_MS: "CLOCK_SKEW_SECONDS" };
  for (const [name, value] of Object.entries(LIMITS)) {
    const seconds = aliases[name] ?? name.replace(/_MS$/, "_SECONDS");
    if (name === "RETRY_AFTER_MAX_MS") continue; // section 11 has it
    assert.equal(value, limits.has(name) ? limits.get(name) : limits.get(seconds) * 1000, name);
  }
});

// --- frames and streams -------------------------------------------------------------------------

for (const { frame, kind, call, chunk, taken } of read("frames")) {
  test(`frame ${frame.slice(0, 40) || "of nothing"}`, () => {
    const bytes = fromHex(frame);
    if (kind === "") {
      assert.throws(() => ioap.parseFrame(bytes), { code: "bad_frame" });
      return;
    }
    const found = ioap.parseFrame(bytes);
    assert.equal(found.kind, kind);
    assert.equal(found.call, call);
    if (kind === "end") {
      assert.equal(found.digest, chunk);
      assert.equal(toHex(ioap.endFrame(call, chunk)), frame);
    } else if (kind === "data") {
      assert.equal(toHex(found.chunk), chunk);
      assert.equal(toHex(ioap.dataFrame(call, fromHex(chunk))), frame);
    } else {
      assert.equal(found.taken, taken);
      assert.equal(toHex(ioap.creditFrame(call, taken)), frame);
    }
  });
}

read("streams").forEach(({ parts, stream }, number) => {
  test(`stream ${number}`, () => {
    const digest = new StreamDigest();
    for (const part of parts) digest.add("bytes" in part ? fromHex(part.bytes) : part.json);
    assert.deepEqual(digest.summary(), stream);
  });
});

test("SHA-256 in steps is that of WebCrypto at every length", async () => {
  for (const size of [0, 1, 54, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1000, 100_000]) {
    const bytes = Uint8Array.from({ length: size }, (_, i) => (i * 31) & 0xff);
    const envelope = (sha256) => ({
      id: uuid(1),
      type: "EXEC_RESPONSE",
      payload: { status: "success" },
      signature: "x",
      ext: { attachments: [{ at: "/result", as: "bytes", size, sha256 }] },
    });
    const sha256 = toHex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)));
    const assembly = new Assembly(envelope(sha256));
    for (let i = 0; i < size; i += 777) assembly.add(bytes.subarray(i, i + 777));
    assert.equal(assembly.missing, 0);
    assert.deepEqual(assembly.payload().result, bytes);
    if (size > 0) {
      const other = new Assembly(envelope(sha256));
      other.add(bytes.map((byte, i) => (i === size - 1 ? byte ^ 1 : byte)));
      assert.throws(() => other.payload(), { code: "invalid_ext" });
    }
  }
});

test("attachments come to their places", () => {
  const json = '{"b":[1,2.5],"ü":"€"}';
  const data = [new TextEncoder().encode(json), Uint8Array.of(1, 2, 3), new Uint8Array(0)];
  const places = ["/args", "/args/a~1b~0", "/args/empty"];
  const assembly = new Assembly({
    id: uuid(1),
    type: "EXEC_REQUEST",
    payload: { args: {} },
    ext: { attachments: places.map((at, i) => ({ at, as: i === 0 ? "json" : "bytes", size: data[i].length })) },
  });
  assert.equal(assembly.room, data[0].length); // a frame never holds bytes of two
  assembly.add(data[0].subarray(0, 5));
  assembly.add(data[0].subarray(5));
  assert.equal(assembly.room, 3);
  assembly.add(data[1]);
  assert.equal(assembly.missing, 0);
  assert.deepEqual(assembly.payload().args, { b: [1, 2.5], ü: "€", "a/b~": data[1], empty: data[2] });
});

test("an integer in canonical JSON that is too large for one is a double", () => {
  const bytes = new TextEncoder().encode("[1e+21,100000000000000000000,9007199254740992]");
  const assembly = new Assembly({
    id: uuid(1),
    type: "EXEC_REQUEST",
    payload: { args: {} },
    ext: { attachments: [{ at: "/args/x", as: "json", size: bytes.length }] },
  });
  assembly.add(bytes);
  assert.deepEqual(assembly.payload().args.x, [1e21, 1e20, 2 ** 53]);
});

test("an attachment that is not canonical JSON, or has no place, is refused", () => {
  const of = (entries, payload = { args: {} }, type = "EXEC_REQUEST") =>
    new Assembly({ id: uuid(1), type, payload, ext: { attachments: entries } });
  for (const text of [
    '{"b":1,"a":2}',
    '{"a": 1}',
    '{"a":1,"a":1}',
    '{"a":9007199254740993}',
    "{",
    '"\\u0041"',
    "1.0",
  ]) {
    const bytes = new TextEncoder().encode(text);
    const assembly = of([{ at: "/args/x", as: "json", size: bytes.length }]);
    assembly.add(bytes);
    assert.throws(() => assembly.payload(), { code: "invalid_ext" }, text);
  }
  const one = { at: "/args/x", as: "json", size: 1 };
  const wrong = [
    [{ ...one, at: "/result" }],
    [{ ...one, at: "/args/a/b" }],
    [{ ...one, at: "/args/~2" }],
    [{ ...one, at: "x" }],
    [one, one],
    [{ ...one, as: "text" }],
    [{ at: "/args/x", as: "json" }],
    [{ at: "/args/x", as: "bytes", sha256: "0".repeat(64) }],
    [{ at: "/args/x", as: "bytes" }, one],
    [{ ...one, size: -1 }],
    [{ ...one, size: 1.5 }],
    [{ ...one, sha256: "ff" }],
    [{ at: "/args", as: "bytes", size: 1 }],
    Array.from({ length: 65 }, (_, i) => ({ ...one, at: `/args/${i}` })),
    {},
    [1],
  ];
  for (const entries of wrong)
    assert.throws(() => of(entries), { code: "invalid_ext" }, JSON.stringify(entries).slice(0, 80));
  assert.throws(() => of([one], { args: { x: 1 } }), { code: "invalid_ext" });
  assert.throws(() => of([{ ...one, at: "/args" }], { args: { y: 1 } }), { code: "invalid_ext" });
  assert.throws(() => of([{ at: "/result", as: "json", size: 1 }], { result: 1 }, "EXEC_RESPONSE"), {
    code: "invalid_ext",
  });
});
