// An agent in Node.js that calls everything of the Python agent whose DID it is given, and cancels one call when it
// reads something on stdin.

import assert from "node:assert/strict";

import { newAgent } from "./werift.mjs";

const me = await newAgent();
await me.start();
const peer = await me.connect(process.argv[2]);
assert.equal((await peer.intent("doubling")).cost, "nothing for doubling");
assert.equal(await peer.execute("double", { value: 21 }), 42);
await assert.rejects(peer.execute("double", { value: "1" }), { name: "InvalidArgumentsError" });
await assert.rejects(peer.execute("triple"), { name: "UnknownCapabilityError" });

const parts = [];
const seen = [];
const onProgress = (value) => seen.push(value);
for await (const part of peer.stream("count", { to: 5 }, { onProgress })) parts.push(part);
assert.deepEqual(parts, [0, 1, 2, 3, 4]);
assert.equal(seen[0].total, 5);
assert.deepEqual(await peer.execute("count", { to: 2 }), [0, 1]);

const bytes = new Uint8Array(1_500_000).map((_, i) => i * 31);
assert.deepEqual(await peer.execute("echo", { value: bytes }), bytes);

async function* source() {
  for (let number = 0; number < 10; number++) yield new Uint8Array(50_000);
}
assert.equal(await peer.execute("measure", { data: source() }), 500_000);

const controller = new AbortController();
process.stdin.once("data", () => controller.abort(new Error("enough")));
await assert.rejects(peer.execute("hold", {}, { signal: controller.signal }), { message: "enough" });
await peer.release();
await me.close();
process.exit(0);
