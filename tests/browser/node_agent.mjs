// An agent in Node.js that serves until its stdin ends. It prints its DID, then what becomes of calls, in JSON lines.

import { capabilities, newAgent } from "./werift.mjs";

const { seen, ...offered } = capabilities();
const aborted = seen.aborted;
seen.aborted = { push: (code) => void (aborted.push(code), console.log(JSON.stringify({ aborted: code }))) };
const me = await newAgent(offered);
me.addEventListener("warning", ({ detail }) => console.error(detail));
await me.start();
console.log(JSON.stringify({ did: me.did }));
process.stdin.resume();
process.stdin.on("end", async () => {
  await me.close();
  process.exit(0);
});
