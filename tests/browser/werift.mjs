// Agents in Node.js, over npm's werift and ws. AICONEXUS_NODE_PACKAGES names the folder they are installed in.

import { createRequire } from "node:module";
import { join } from "node:path";

import { Agent, Identity } from "../../examples/browser_agent/aiconexus.js";

const require = createRequire(join(process.env.AICONEXUS_NODE_PACKAGES, "package.json"));
export const ws = require("ws");
export const { RTCPeerConnection } = require("werift");

export const GATEWAY = process.env.AICONEXUS_GATEWAY;

/** Make an agent that offers 127.0.0.1 and complains loudly. */
export async function newAgent(options = {}) {
  return new Agent({
    gateway: GATEWAY,
    identity: await Identity.generate(),
    WebSocket: globalThis.WebSocket ?? ws.WebSocket,
    RTCPeerConnection,
    rtcConfiguration: { iceAdditionalHostAddresses: ["127.0.0.1"], iceUseIpv6: false },
    ...options,
  });
}

/** What the agents of the tests can do, and what has become of it. */
export function capabilities() {
  const seen = { running: 0, aborted: [], runs: 0, yielded: 0 };
  const value = {
    type: "object",
    properties: { value: { type: "number" } },
    required: ["value"],
    additionalProperties: false,
  };
  return {
    seen,
    capabilities: {
      double: {
        description: "Double a number.",
        tags: ["arithmetic"],
        input: value,
        output: { type: "number" },
        run: async ({ value }) => {
          seen.runs++;
          return 2 * value;
        },
      },
      fail: async () => {
        throw new RangeError("there is nothing here");
      },
      echo: async (args) => args.value,
      measure: {
        input: {
          type: "object",
          properties: { data: { type: "string", format: "binary", stream: true }, enough: { type: "integer" } },
          required: ["data"],
        },
        run: async ({ data, enough = Infinity }) => {
          let size = 0;
          for await (const chunk of data) {
            size += chunk.length;
            if (size >= enough) break;
          }
          return size;
        },
      },
      hold: (args, { signal, progress }) =>
        new Promise((resolve, reject) => {
          seen.running++;
          progress("holding");
          signal.addEventListener("abort", () => {
            seen.running--;
            seen.aborted.push(signal.reason.code);
            reject(signal.reason);
          });
        }),
      count: async function* ({ to, size = 0 }, { progress }) {
        try {
          for (let number = 0; number < to; number++) {
            progress({ done: number, total: to });
            seen.yielded++;
            yield size > 0 ? new Uint8Array(size).fill(number) : number;
          }
        } finally {
          seen.aborted.push("left");
        }
      },
    },
    onIntent: ({ query, task }) => ({
      status: "understood",
      requiredInput: ["value"],
      cost: `nothing for ${query ?? task}`,
    }),
  };
}
