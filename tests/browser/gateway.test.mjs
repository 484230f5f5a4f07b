// The handshake and the returns of aiconexus.js, with a gateway that does what each test needs.

import assert from "node:assert/strict";
import { webcrypto as crypto } from "node:crypto";
import { once } from "node:events";
import { after, before, beforeEach, test } from "node:test";

import * as ioap from "../../examples/browser_agent/aiconexus.js";
import { newAgent, ws } from "./werift.mjs";

let server;
let url;
let identity;
/** What the gateway does with a connection; a test replaces it. */
let serve;
let proofs = [];

before(async () => {
  server = new ws.WebSocketServer({ host: "127.0.0.1", port: 0, handleProtocols: () => "ioap.v1" });
  await once(server, "listening");
  url = `ws://127.0.0.1:${server.address().port}/ws`;
  server.on("connection", (socket) => serve(new Side(socket)));
});
after(() => server.close());
beforeEach(async () => {
  identity = await ioap.Identity.generate();
  proofs = [];
  serve = (side) => side.register();
});

/** The gateway's end of one connection. */
class Side {
  constructor(socket) {
    this.socket = socket;
    this.messages = [];
    this.waiting = [];
    socket.on("message", (data) => {
      this.messages.push(ioap.decode(String(data)));
      this.waiting.shift()?.();
    });
  }

  async next() {
    while (this.messages.length === 0) await new Promise((resolve) => this.waiting.push(resolve));
    return this.messages.shift();
  }

  async send(type, payload, { to = identity.did, signer = identity, more = {}, ...rest } = {}) {
    const message = { ...ioap.createMessage(signer.did, to, type, payload, rest), ...more };
    this.socket.send(ioap.serialize(signer === null ? message : await ioap.sign(message, signer)));
  }

  async challenge({ signer = identity, more = {}, ext = {}, payload = { public_key: signer.publicKey } } = {}) {
    const nonce = Buffer.from(crypto.getRandomValues(new Uint8Array(32))).toString("base64url");
    await this.send("REGISTER", payload, {
      to: signer.did,
      signer,
      more,
      ext: { nonce, features: [], limits: {}, ping_interval_ms: 25_000, ...ext },
    });
    return nonce;
  }

  async register({ token = `token ${proofs.length}`, signer = identity, more = {} } = {}) {
    await this.challenge({ signer });
    const proof = await this.next();
    proofs.push(proof);
    const ext = {
      session: "s",
      resume_token: token,
      ice_servers: [],
      resumed: proof.ext.resume !== undefined,
      ...more,
    };
    await this.send(
      "REGISTER",
      { public_key: signer.publicKey },
      { to: proof.from, signer, correlationId: proof.id, ext },
    );
    return proof;
  }
}

/** An agent of this gateway that must not be let run. */
const agent = (options = {}) => newAgent({ gateway: `${url}?q=1#part`, ...options });

/** Resolves at the next state of an agent. */
const state = (me, wanted) =>
  new Promise((resolve) => {
    const look = () => me.state === wanted && resolve();
    me.addEventListener("state", look);
    look();
  });

test("the proof signs the nonce, the audience and the card", async () => {
  let nonce;
  serve = async (side) => {
    nonce = await side.challenge();
    const proof = await side.next();
    proofs.push(proof);
    await side.send(
      "REGISTER",
      { public_key: identity.publicKey },
      { to: proof.from, correlationId: proof.id, ext: { session: "s" } },
    );
  };
  const me = await agent({ capabilities: { sing: async () => "la" }, hidden: true });
  await me.start();
  const [proof] = proofs;
  await ioap.verify(proof, { recipient: identity.did, sender: me.did, guard: new ioap.ReplayGuard() });
  assert.equal(proof.payload.public_key, me.did.slice(8));
  assert.equal(proof.ext.nonce, nonce);
  assert.equal(proof.ext.aud, url);
  assert.equal(proof.ext.hidden, true);
  assert.equal((await ioap.verifyCard(proof.ext.card, me.did)).capabilities[0].name, "sing");
  assert.equal(proof.ext.resume, undefined);
  await me.close();
});

test("a gateway that does not prove its key is refused", async () => {
  const other = await ioap.Identity.generate();
  const attempts = {
    "an old challenge": (side) => side.challenge({ more: { timestamp: new Date(Date.now() - 61_000).toISOString() } }),
    "a challenge signed by another key": (side) =>
      side.send(
        "REGISTER",
        { public_key: identity.publicKey },
        {
          to: identity.did,
          more: { from: identity.did },
          signer: { did: identity.did, sign: (data) => other.sign(data) },
          ext: { nonce: "x" },
        },
      ),
    "the key of another": (side) => side.challenge({ payload: { public_key: other.publicKey } }),
    "no nonce": (side) => side.challenge({ ext: { nonce: 1 } }),
    "another message": (side) => side.send("PING", {}, { to: identity.did }),
    "no JSON": (side) => side.socket.send("hello"),
    bytes: (side) => side.socket.send(Buffer.from("{}")),
    "an answer by another gateway": async (side) => {
      await side.challenge();
      const proof = await side.next();
      await side.send(
        "REGISTER",
        { public_key: other.publicKey },
        { signer: other, to: proof.from, correlationId: proof.id, ext: { session: "s" } },
      );
    },
  };
  for (const [name, attempt] of Object.entries(attempts)) {
    serve = attempt;
    await assert.rejects((await agent()).start(), ioap.GatewayIdentityError, name);
  }
});

test("a gateway with another DID than the expected one gets no proof", async () => {
  const gatewayDid = (await ioap.Identity.generate()).did;
  await assert.rejects((await agent({ gatewayDid })).start(), { name: "GatewayIdentityError", code: "wrong_gateway" });
  assert.deepEqual(proofs, []);
});

test("a refusal says why", async () => {
  serve = async (side) => {
    await side.challenge();
    const { id, from } = await side.next();
    const { num, name, code, temporary } = ioap.CAUSES.declined;
    await side.send(
      "ERROR",
      { code, message: "you are not on the list", details: { num, name, temporary } },
      { to: from, correlationId: id },
    );
    side.socket.close(4503, '{"n":"not_allowed","r":0}');
  };
  const me = await agent();
  await assert.rejects(
    me.start(),
    (error) =>
      error instanceof ioap.RegistrationError && /not on the list/.test(error.message) && error.code === "declined",
  );
  assert.equal(me.state, "closed");
});

test("nobody at the address is told at once", async () => {
  await assert.rejects((await agent({ gateway: "ws://127.0.0.1:1/ws" })).start(), ioap.GatewayUnreachableError);
  await assert.rejects(newAgent({ gateway: "http://127.0.0.1/ws" }), TypeError);
});

test("what an agent lacks is told in words", async () => {
  const made = (options) => () => new ioap.Agent(options);
  const gateway = "ws://127.0.0.1:1/ws";
  assert.throws(made(), { name: "TypeError", message: /its gateway's URL/ });
  assert.throws(made({ identity }), { name: "TypeError", message: /its gateway's URL/ });
  assert.throws(made({ gateway }), { name: "TypeError", message: /needs an identity/ });
  assert.throws(made({ gateway, identity: ioap.Identity.generate() }), { name: "TypeError", message: /a promise/ });
  for (const wrong of [{ tags: [] }, null, "sing"]) {
    const capabilities = { sing: wrong };
    assert.throws(made({ gateway, identity, capabilities }), { name: "TypeError", message: /sing is a function/ });
  }
  assert.throws(made({ gateway, identity, capabilities: [] }), { name: "TypeError", message: /are an object/ });
  await assert.rejects(ioap.Identity.load(), { name: "AIConexusError", code: "no_storage", message: /generate/ });
});

test("after a drop it comes back with the token of that gateway, when the gateway says", async () => {
  const drops = [];
  serve = async (side) => {
    await side.register();
    if (proofs.length === 1) {
      drops.push(Date.now());
      side.socket.close(4001, '{"n":"draining","r":300}');
    } else {
      drops.push(Date.now());
    }
  };
  const me = await agent();
  await me.start();
  await state(me, "reconnecting");
  await state(me, "registered");
  assert.equal(proofs[1].ext.resume, "token 0");
  assert.ok(drops[1] - drops[0] >= 290, `${drops[1] - drops[0]} ms`);
  assert.equal(me.session.resumed, true);
  await me.close();
});

test("another gateway at the address does not get the token", async () => {
  const other = await ioap.Identity.generate();
  serve = async (side) => {
    await side.register({ signer: proofs.length === 0 ? identity : other });
    if (proofs.length === 1) side.socket.terminate();
  };
  const me = await agent();
  const warnings = [];
  me.addEventListener("warning", ({ detail }) => warnings.push(detail));
  await me.start();
  await state(me, "reconnecting");
  await state(me, "registered");
  assert.equal(proofs[1].ext.resume, undefined);
  assert.equal(me.session.gatewayDid, other.did);
  assert.ok(warnings.some((text) => text.includes("another gateway answers")));
  await me.close();
});

test("who asks while the gateway is away asks the one that comes, whatever its key", async () => {
  const other = await ioap.Identity.generate();
  const asked = [];
  serve = async (side) => {
    await side.register({ signer: proofs.length === 0 ? identity : other });
    if (proofs.length === 1) return side.socket.close(4001, '{"n":"draining","r":300}');
    while (asked.length < 2) {
      const question = await side.next();
      asked.push(question);
      const agents = [{ did: identity.did, status: "online" }];
      await side.send("PRESENCE", { agents }, { signer: other, to: question.from, correlationId: question.id });
    }
  };
  const me = await agent();
  await me.start();
  await state(me, "reconnecting");
  const watching = me.watch();
  const event = watching.next();
  const found = [];
  for await (const { did } of me.discover()) found.push(did);
  assert.deepEqual(found, [identity.did]);
  assert.equal((await event).value?.agent.did, identity.did);
  assert.equal(me.session.gatewayDid, other.did);
  assert.deepEqual(
    asked.map(({ type, to }) => [type, to]),
    Array(2).fill(["DISCOVER", other.did]),
  );
  await watching.return();
  await me.close();
  assert.equal((await me.watch().next()).done, true);
});

test("a watch begins anew only where it had not begun, or is ended first", async () => {
  const begun = { agents: [], cursor: "more" };
  const busy = {
    code: "CONNECTION_REFUSED",
    message: "busy",
    details: { name: "busy", num: 404, temporary: true },
  };
  for (const [answers, rest] of [
    [[["ERROR", busy]], [true]],
    [
      [
        ["PRESENCE", begun],
        ["ERROR", busy],
      ],
      [undefined, undefined],
    ],
    [[null], [false, true]], // no answer
  ]) {
    const asked = [];
    serve = async (side) => {
      await side.register();
      for (;;) {
        const question = await side.next();
        if (question.type !== "DISCOVER") continue;
        asked.push(question);
        const agents = [{ did: identity.did, status: "online" }];
        const answer = answers.length > 0 ? answers.shift() : ["PRESENCE", { agents }];
        if (answer === null) continue;
        const [type, payload] = answer;
        await side.send(type, payload, { to: question.from, correlationId: question.id });
      }
    };
    const me = await agent();
    await me.start();
    const watching = me.watch({}, { timeout: 2_000 });
    assert.equal((await watching.next()).value.agent.did, identity.did);
    const [first, ...more] = asked;
    assert.equal(first.payload.watch, true);
    assert.deepEqual(
      more.map(({ payload }) => payload.watch),
      rest,
    );
    if (rest[0] === false) assert.equal(more[0].correlation_id, first.id);
    await watching.return();
    await me.close();
  }
});

test("TURN credentials are renewed before they expire, and servers that cannot be used left out", async () => {
  const turn = (credential) => ({
    urls: ["turn:127.0.0.1:1?transport=udp", "turnx:127.0.0.1"],
    username: "1:a",
    credential,
  });
  const more = {
    ice_servers: [
      turn("old"),
      { urls: "stun:127.0.0.1:2" },
      { urls: "stun:127.0.0.1:2?a=b" },
      { urls: ["turn:127.0.0.1:3"] },
      7,
    ],
    ice_servers_ttl_ms: 500,
  };
  const renewals = [];
  serve = async (side) => {
    await side.register({ more });
    const again = await side.next();
    renewals.push(again);
    const ext = { ice_servers: [turn("new")] };
    await side.send("REGISTER", { public_key: identity.publicKey }, { to: again.from, correlationId: again.id, ext });
  };
  const me = await agent({ capabilities: { sing: async () => "la" } });
  await me.start();
  const [first] = me.session.iceServers;
  assert.deepEqual(first, { urls: ["turn:127.0.0.1:1?transport=udp"], username: "1:a", credential: "old" });
  assert.deepEqual(me.session.iceServers.slice(1), [{ urls: ["stun:127.0.0.1:2"] }]);
  while (me.session.iceServers[0].credential !== "new") await new Promise((resolve) => setTimeout(resolve, 10));
  assert.equal(renewals[0].type, "REGISTER");
  assert.deepEqual(renewals[0].ext.card, proofs[0].ext.card);
  assert.equal(me.session.iceServersTtl, null);
  await me.close();
});

test("a terminal close code is the end", async () => {
  for (const code of [4500, 4502, 4503, 4504, 4505, 1000]) {
    proofs = [];
    serve = async (side) => {
      await side.register();
      side.socket.close(code);
    };
    const me = await agent();
    await me.start();
    await state(me, "closed");
    assert.equal(me.closedBecause.code, ioap.closeCode(code).name);
    await assert.rejects(me.connect(identity.did), ioap.GatewayClosedError);
  }
});

test("unsigned messages are taken from the gateway only, and only four types", async () => {
  const stranger = await ioap.Identity.generate();
  /** @type {Side} */
  let side;
  serve = async (connection) => {
    side = connection;
    await side.register();
  };
  const me = await agent();
  const warnings = [];
  me.addEventListener("warning", ({ detail }) => warnings.push(detail));
  await me.start();
  const send = (from, type, payload, to = me.did) =>
    side.socket.send(ioap.serialize(ioap.createMessage(from, to, type, payload)));
  send(stranger.did, "OFFER", { sdp: "v=0" });
  send(identity.did, "OFFER", { sdp: "v=0" });
  send(stranger.did, "ERROR", { code: "TIMEOUT", message: "x" });
  send(stranger.did, "PING", { sequence: 1 });
  send(identity.did, "PING", { sequence: 2 });
  const pong = await side.next();
  assert.equal(pong.type, "PONG");
  assert.equal(pong.payload.sequence, 2);
  assert.equal(warnings.filter((text) => text.includes("missing_signature")).length, 4);
  await side.send("PING", {}, { signer: stranger, to: me.did });
  const refusal = await side.next();
  assert.equal(refusal.payload.details.name, "unexpected_type");
  assert.equal(refusal.to, stranger.did);
  await me.close();
  assert.equal((await side.next()).type, "UNREGISTER");
});

test("an SDP that is not of one DataChannel never reaches WebRTC", async () => {
  const stranger = await ioap.Identity.generate();
  const sdps = [
    "v=0",
    "m=audio 9 UDP/TLS/RTP/SAVPF 0\r\na=fingerprint:sha-256 AA",
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n",
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=fingerprint:sha-256 AA\r\na=max-message-size:1000\r\n",
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=fingerprint:sha-256 AA\r\nm=video 9 UDP/TLS/RTP/SAVPF 96",
  ];
  let side;
  serve = async (connection) => {
    side = connection;
    await side.register();
  };
  const me = await agent();
  await me.start();
  for (const sdp of sdps) {
    await side.send("OFFER", { sdp }, { signer: stranger, to: me.did });
    const refusal = await side.next();
    assert.equal(refusal.type, "ERROR");
    assert.equal(refusal.payload.details.name, "invalid_payload", sdp);
  }
  await me.close();
});
