// Two agents of aiconexus.js talk through a real gateway and over real WebRTC (werift). AICONEXUS_GATEWAY is its URL.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import * as ioap from "../../examples/browser_agent/aiconexus.js";
import { capabilities, newAgent, ws } from "./werift.mjs";

const served = capabilities();
let me;
let other;
let peer;

/** Wait for something that must happen. */
async function until(condition) {
  for (let left = 3000; left > 0; left--) {
    if (condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  assert.fail(`it did not happen: ${condition}`);
}

before(
  async () => {
    other = await newAgent(served);
    me = await newAgent(capabilities());
    await Promise.all([other.start(), me.start()]);
    peer = await me.connect(other.did);
  },
  { timeout: 30_000 },
);
after(async () => {
  await me.close();
  await other.close();
});

test("agents are found by what they can do, with cards that they have signed", async () => {
  const found = [];
  for await (const agent of me.discover({ capability: "double", tag: "arithmetic" })) found.push(agent);
  assert.deepEqual(new Set(found.map(({ did }) => did)), new Set([me.did, other.did]));
  assert.equal(found[0].capabilities.find(({ name }) => name === "count").stream, true);
  const none = [];
  for await (const agent of me.discover({ capability: "triple" })) none.push(agent);
  assert.deepEqual(none, []);
  const one = [];
  for await (const agent of me.discover({}, { limit: 1 })) one.push(agent);
  assert.equal(one.length, 1);
});

test("a watch tells who comes, what changes, and who goes", async () => {
  const late = await newAgent({ capabilities: { sing: async () => "la" } });
  const controller = new AbortController();
  const events = [];
  const watching = (async () => {
    for await (const { event, agent } of me.watch({ capability: "sing" }, { signal: controller.signal }))
      events.push([event, agent.did]);
  })();
  await late.start();
  await until(() => events.length === 1);
  await late.close();
  await until(() => events.length === 2);
  assert.deepEqual(events, [
    ["join", late.did],
    ["leave", late.did],
  ]);
  controller.abort();
  await watching;
});

test("arguments go by name", async () => {
  for (const wrong of ["abc", 7, null, ["abc"], new Uint8Array(3), new Map()]) {
    await assert.rejects(peer.execute("double", wrong), { name: "TypeError", message: /^double: .* by name/ });
    await assert.rejects(peer.stream("double", wrong).next(), TypeError);
  }
  await assert.rejects(peer.execute(undefined), TypeError);
  await assert.rejects(peer.intent(undefined), TypeError);
});

test("a connect to an agent that is away says so", async () => {
  let socket;
  class Interrupted extends ws.WebSocket {
    constructor(url, protocol) {
      super(socket === undefined ? url : "ws://127.0.0.1:1/ws", protocol);
      socket ??= this;
    }
  }
  const away = await newAgent({ WebSocket: Interrupted });
  await away.start();
  const watching = me.watch({ dids: [away.did] });
  assert.equal((await watching.next()).value?.event, "join");
  socket.terminate();
  assert.equal((await watching.next()).value?.event, "away");
  await assert.rejects(me.connect(away.did, { timeout: 3000 }), {
    name: "PeerConnectError",
    code: "timeout",
    message: /in 3 s: it is away: its connection to the gateway is interrupted; try again/,
  });
  await watching.return();
  await away.close();
});

test("an intent is answered, both ways", async () => {
  assert.deepEqual(await peer.intent("double it"), {
    status: "understood",
    requiredInput: ["value"],
    cost: "nothing for double it",
  });
  const back = await other.connect(me.did);
  assert.equal((await back.intent({ task: "double", params: { value: 1 } })).cost, "nothing for double");
  await back.release();
  assert.equal(peer.state, "open");
});

test("executions give results, and every failure its error", async () => {
  assert.equal(await peer.execute("double", { value: 21 }), 42);
  await assert.rejects(
    peer.execute("triple"),
    (error) =>
      error instanceof ioap.UnknownCapabilityError && !error.temporary && /there is: double/.test(error.message),
  );
  await assert.rejects(peer.execute("double", { value: "1" }), ioap.InvalidArgumentsError);
  await assert.rejects(peer.execute("double", { value: 1, more: 1 }), ioap.InvalidArgumentsError);
  await assert.rejects(
    peer.execute("fail"),
    (error) => error instanceof ioap.CapabilityError && error.message === "RangeError: there is nothing here",
  );
  await assert.rejects(
    peer.execute("double", { value: 1e308 }),
    (error) =>
      error instanceof ioap.CapabilityError && error.message === "the result cannot be sent: JSON has no Infinity",
  );
  await assert.rejects(peer.execute("echo", { value: { nested: new Uint8Array(1) } }), ioap.InvalidArgumentsError);
  await assert.rejects(
    peer.execute("hold", {}, { timeout: 100 }),
    (error) => error instanceof ioap.CallTimeoutError && error.code === "timeout",
  );
  assert.equal(await peer.execute("double", { value: 1 }), 2);
});

test("what a signal aborts is cancelled over there", async () => {
  await until(() => served.seen.running === 0);
  served.seen.aborted.length = 0;
  const controller = new AbortController();
  const call = peer.execute(
    "hold",
    {},
    { signal: controller.signal, onProgress: () => controller.abort(new Error("enough")) },
  );
  await assert.rejects(call, { message: "enough" });
  await until(() => served.seen.running === 0);
  assert.deepEqual(served.seen.aborted, ["cancelled"]);
  await assert.rejects(peer.execute("hold", {}, { signal: controller.signal }), { message: "enough" });
});

test("a stream comes in parts, with progress; collected it is a list", async () => {
  const seen = [];
  for await (const part of peer.stream("count", { to: 5 }, { onProgress: ({ done }) => seen.push(`p${done}`) }))
    seen.push(part);
  assert.deepEqual(seen.filter(Number.isInteger), [0, 1, 2, 3, 4]);
  assert.ok(seen.includes("p0"));
  assert.deepEqual(await peer.execute("count", { to: 3 }), [0, 1, 2]);
  assert.deepEqual(await peer.execute("count", { to: 0 }), []);
  assert.deepEqual(await peer.execute("count", { to: 3 }, { onProgress: () => {} }), [0, 1, 2]);
  assert.deepEqual(await peer.execute("count", { to: 2, size: 3 }), Uint8Array.of(0, 0, 0, 1, 1, 1));
  const whole = [];
  for await (const part of peer.stream("double", { value: 2 })) whole.push(part);
  assert.deepEqual(whole, [4]);
});

test("leaving the loop cancels the stream over there", async () => {
  served.seen.aborted.length = 0;
  for await (const part of peer.stream("count", { to: 1e9 })) if (part === 3) break;
  await until(() => served.seen.aborted.includes("left"));
});

test("who does not read holds up the sender, and misses nothing", async () => {
  served.seen.yielded = 0;
  const stream = peer.stream("count", { to: 40, size: 100_000 });
  assert.equal((await stream.next()).value[0], 0);
  // The window is 1 MiB, and what has left it counts until it is taken.
  await until(() => served.seen.yielded >= 11);
  await peer.execute("double", { value: 1 }); // another call is not held up
  assert.ok(served.seen.yielded <= 15, `${served.seen.yielded} parts left for a reader of one`);
  let count = 1;
  for await (const part of stream) assert.equal(part[0], count++);
  assert.equal(count, 40);
});

test("bytes and long JSON travel beside their envelope", async () => {
  const bytes = new Uint8Array(700_001).map((_, i) => i * 31);
  assert.deepEqual(await peer.execute("echo", { value: bytes }), bytes);
  const json = { text: "ü€😀".repeat(20_000), list: [1, 2.5, null, true] };
  assert.deepEqual(await peer.execute("echo", { value: json }), json);
  assert.deepEqual(await peer.execute("echo", { value: new Uint8Array(0) }), new Uint8Array(0));
  assert.equal(await peer.execute("echo", { value: 1e20 }), 1e20);
});

test("an argument may be a stream of bytes, which is read while it is made", async () => {
  async function* source(count, fault) {
    yield new Uint8Array(0);
    for (let number = 0; number < count; number++) yield new Uint8Array(50_000).fill(number);
    if (fault) throw fault;
  }
  assert.equal(await peer.execute("measure", { data: source(8) }), 400_000);
  assert.equal(await peer.execute("measure", { data: source(0) }), 0);
  assert.equal(await peer.execute("measure", { data: new Blob(["€".repeat(1000)]).stream() }), 3000);
  assert.equal(await peer.execute("measure", { data: new Uint8Array(7) }), 7);
  assert.ok((await peer.execute("measure", { data: source(1e9), enough: 100_000 })) >= 100_000); // it has read enough
  await assert.rejects(peer.execute("measure", { data: source(2, new Error("no more")) }), /no more/);
  await assert.rejects(peer.execute("double", { value: source(1) }), /value takes no stream/);
  await assert.rejects(peer.execute("measure", { data: source(1), more: source(1) }), ioap.InvalidArgumentsError);
  assert.equal(await peer.execute("double", { value: 1 }), 2);
});

test("calls take turns: a short one overtakes a long one", async () => {
  const order = [];
  await Promise.all([
    peer.execute("echo", { value: new Uint8Array(600_000) }).then(() => order.push("long")),
    peer.execute("double", { value: 1 }).then(() => order.push("short")),
  ]);
  assert.deepEqual(order, ["short", "long"]);
});

test("both have a receipt of a call: the texts that were signed", async () => {
  const receipts = [];
  await peer.execute("double", { value: 4 }, { onReceipt: (receipt) => receipts.push(receipt) });
  const [{ request, response }] = receipts;
  const answer = ioap.decode(response);
  assert.equal(answer.correlation_id, ioap.decode(request).id);
  await ioap.verify(answer, { recipient: me.did, sender: other.did, guard: new ioap.ReplayGuard() });
});

test("glare ends in one connection, every time", async () => {
  for (let round = 0; round < 3; round++) {
    const one = await newAgent(capabilities());
    const two = await newAgent(capabilities());
    await Promise.all([one.start(), two.start()]);
    const [there, back] = await Promise.all([one.connect(two.did), two.connect(one.did)]);
    assert.deepEqual(
      await Promise.all([there.execute("double", { value: 1 }), back.execute("double", { value: 2 })]),
      [2, 4],
    );
    assert.equal(one.peers.size, 1);
    assert.equal(two.peers.size, 1);
    await Promise.all([there.release(), back.release()]);
    await until(() => one.peers.size === 0 && two.peers.size === 0);
    await Promise.all([one.close(), two.close()]);
  }
});

test("a connection stays until both need it no longer, and opens again", async () => {
  const one = await newAgent(capabilities());
  await one.start();
  const there = await one.connect(other.did);
  const back = await other.connect(one.did);
  await there.release();
  assert.equal(there.state, "open");
  assert.equal(await back.execute("double", { value: 3 }), 6);
  await back.release();
  await until(() => there.state === "closed");
  const again = await one.connect(other.did);
  assert.equal(await again.execute("double", { value: 5 }), 10);
  await one.close();
  await until(() => !other.peers.has(one.did));
});

test("a connection is let go when nobody has used it for some time", async () => {
  const idleTimeout = 6_000; // each looks after 5 s of silence
  const [one, two, three] = await Promise.all([1, 2, 3].map(() => newAgent({ ...capabilities(), idleTimeout })));
  await Promise.all([one.start(), two.start(), three.start()]);
  const busy = await one.connect(two.did);
  const stop = new AbortController();
  const held = assert.rejects(busy.execute("hold", {}, { signal: stop.signal }), { name: "AbortError" });
  const unused = await three.connect(two.did);
  const pinging = setInterval(() => void unused.ping().catch(() => {}), 1_000); // that is no use
  await two.connect(three.did);
  await until(() => unused.state === "closed");
  clearInterval(pinging);
  stop.abort();
  await held;
  const usedAt = Date.now();
  await until(() => busy.state === "closed");
  assert.ok(Date.now() - usedAt >= idleTimeout);
  await until(() => two.peers.size === 0);
  await Promise.all([one.close(), two.close(), three.close()]);
});

test("who releases a connection after it was idle takes it from nobody else", async () => {
  const one = await newAgent({ idleTimeout: 1_000 });
  await one.start();
  const there = await one.connect(other.did);
  const back = await other.connect(one.did);
  const younger = await one.connect(me.did);
  await until(() => younger.state === "closed"); // so the older one has been let go, too
  assert.equal(await one.connect(other.did), there);
  await there.release(); // that of the first connect
  assert.equal(await there.execute("double", { value: 4 }), 8);
  await back.release();
  assert.equal(there.state, "open");
  await one.close();
});

test("who is not there, or does not want to, is told apart", async () => {
  const nobody = (await ioap.Identity.generate()).did;
  await assert.rejects(
    me.connect(nobody),
    (error) => error instanceof ioap.UnknownAgentError && error.reason === "not_online",
  );
  await assert.rejects(me.connect("did:key:z6Mk"), ioap.DIDError);
  const shy = await newAgent({ onOffer: () => false });
  await shy.start();
  await assert.rejects(
    me.connect(shy.did),
    (error) => error instanceof ioap.PeerRefusedError && error.reason === "declined",
  );
  await shy.close();
  await assert.rejects(shy.connect(me.did), ioap.NotConnectedError);
});

test("a call fails at once when the other agent leaves", async () => {
  const one = await newAgent(capabilities());
  await one.start();
  const there = await me.connect(one.did);
  const call = there.execute("hold", {}, { onProgress: () => void one.close() });
  await assert.rejects(
    call,
    (error) => error instanceof ioap.PeerLostError && error.temporary && /the agent stops/.test(error.message),
  );
  await assert.rejects(there.execute("double", { value: 1 }), ioap.PeerLostError);
});

test("a newer session of the same identity replaces the older for good", async () => {
  const identity = await ioap.Identity.generate();
  const old = await newAgent({ identity });
  await old.start();
  const young = await newAgent({ identity });
  await young.start();
  await until(() => old.state === "closed");
  assert.ok(old.closedBecause instanceof ioap.GatewayClosedError);
  assert.equal(old.closedBecause.code, "replaced");
  await young.close();
});
