// @ts-check
/**
 * The page: an agent that a person sits in front of. Whatever comes from others is untrusted, so it gets into the page
 * as text only (`textContent`), never as markup.
 *
 * The address may name the gateway and which of this browser's identities to use:
 * `?gateway=ws://127.0.0.1:8000/ws&as=somebody`
 */

import { Agent, Identity, shortDid } from "./aiconexus.js";

/** @typedef {import("./aiconexus.js").Found} Found */
/** @typedef {import("./aiconexus.js").Peer} Peer */
/** @typedef {import("./aiconexus.js").CapabilityCard} CapabilityCard */

const PATH_MS = 3_000; // between two looks at the round trip and the path
const LOG_MAX = 40; // entries that stay
const PARTS_MAX = 500; // of a stream that stay on the page

const address = new URLSearchParams(location.search);
const GATEWAY =
  address.get("gateway") ?? `${location.protocol === "https:" ? "wss" : "ws"}://${location.hostname}:8000/ws`;

/** @param {string} id @returns {any} */
const $ = (id) => document.getElementById(id);

/**
 * Make an element. Text becomes a text node.
 * @param {string} tag @param {Record<string, any>} [properties] @param {(Node | string)[]} children @returns {any}
 */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) /** @type {any} */ (made)[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A picture of a DID: the same one always looks the same. @param {string} did */
function identicon(did) {
  let state = 2166136261;
  for (const letter of did) state = Math.imul(state ^ letter.charCodeAt(0), 16777619); // FNV-1a
  const next = () => {
    state = Math.imul(state ^ (state >>> 15), 2246822519);
    return (state >>> 8) & 0xff;
  };
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 5 5");
  svg.setAttribute("aria-hidden", "true");
  const color = `hsl(${(next() * 360) >> 8} 62% 55%)`;
  for (let x = 0; x < 3; x++) {
    for (let y = 0; y < 5; y++) {
      if (next() < 118) continue;
      for (const column of new Set([x, 4 - x])) {
        const cell = document.createElementNS(svg.namespaceURI, "rect");
        for (const [name, value] of Object.entries({ x: column, y, width: 1.02, height: 1.02, fill: color }))
          cell.setAttribute(name, String(value));
        svg.append(cell);
      }
    }
  }
  return svg;
}

/** @param {number} ms */
const duration = (ms) =>
  ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`;

/** @param {number} bytes */
const amount = (bytes) =>
  bytes < 1024
    ? `${bytes} bytes`
    : bytes < 1 << 20
      ? `${(bytes / 1024).toFixed(1)} KiB`
      : `${(bytes / (1 << 20)).toFixed(1)} MiB`;

// --- what others ask of this page ---------------------------------------------------------------------------------

/** @param {...(Node | string)} what */
function note(...what) {
  const now = new Date();
  $("log").prepend(
    element(
      "li",
      {},
      element("time", { dateTime: now.toISOString() }, now.toLocaleTimeString()),
      element("p", {}, ...what),
    ),
  );
  while ($("log").children.length > LOG_MAX) $("log").lastElementChild.remove();
  $("no-calls").hidden = true;
}

/** @param {string} text */
const code = (text) => element("code", {}, text);

const TITLE = document.title;

/** Show in the title how many questions wait: the tab may be behind others. */
function showWaiting() {
  const waiting = $("questions").childElementCount;
  document.title = waiting > 0 ? `(${waiting}) ${TITLE}` : TITLE;
}

/** @type {Record<string, import("./aiconexus.js").Capability>} */
const capabilities = {
  ask_human: {
    description: "Show a question to the person in front of this page and return the answer.",
    tags: ["people"],
    input: {
      type: "object",
      properties: { question: { type: "string", minLength: 1, maxLength: 2000 } },
      required: ["question"],
      additionalProperties: false,
    },
    output: { type: "string" },
    run: ({ question }, { caller, signal }) =>
      new Promise((resolve, reject) => {
        const input = element("textarea", {
          required: true,
          ariaLabel: "Your answer",
          placeholder: "Your answer; Shift+Enter begins a new line",
          onkeydown: (/** @type {KeyboardEvent} */ event) => {
            // The Enter that ends the choice of a character is not meant for the form.
            if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
            event.preventDefault();
            form.requestSubmit();
          },
        });
        const form = element(
          "form",
          { className: "question" },
          element("small", {}, "asked by ", code(shortDid(caller))),
          element("p", {}, question),
          input,
          element(
            "div",
            { className: "row" },
            element("button", { type: "submit", className: "primary" }, "Answer"),
            element(
              "button",
              {
                type: "button",
                onclick: () => end(() => reject(new Error("the person declined to answer")), "was told nothing"),
              },
              "Decline",
            ),
          ),
        );
        /** @param {() => void} settle @param {string} what */
        const end = (settle, what) => {
          form.remove();
          showWaiting();
          signal.removeEventListener("abort", withdraw);
          note(code(shortDid(caller)), ` asked “${question}” and ${what}`);
          settle();
        };
        const withdraw = () => end(() => reject(signal.reason), "has withdrawn the question");
        form.addEventListener("submit", (/** @type {Event} */ event) => {
          event.preventDefault();
          input.value = input.value.trim();
          if (form.reportValidity()) end(() => resolve(input.value), "has your answer");
        });
        signal.addEventListener("abort", withdraw);
        $("questions").append(form);
        showWaiting();
        input.focus({ preventScroll: true });
      }),
  },
  count_down: {
    description: "Count down to zero, one number after the other.",
    tags: ["numbers", "stream"],
    input: {
      type: "object",
      properties: {
        start: { type: "integer", minimum: 0, maximum: 1000 },
        pause: { type: "number", minimum: 0, maximum: 10, description: "seconds between two numbers" },
      },
      required: ["start"],
      additionalProperties: false,
    },
    output: { type: "integer" },
    run: async function* ({ start, pause = 0.5 }, { caller, signal }) {
      note(code(shortDid(caller)), ` lets this page count down from ${start}`);
      for (let number = start; number >= 0; number--) {
        yield number;
        await new Promise((resolve) => setTimeout(resolve, pause * 1000));
        if (signal.aborted) {
          note(code(shortDid(caller)), ` stopped the countdown at ${number}`);
          return;
        }
      }
    },
  },
  echo: {
    description: "Return what it is given: JSON or bytes of any size.",
    tags: ["test"],
    input: { type: "object", properties: { value: {} }, required: ["value"], additionalProperties: false },
    run: async ({ value }) => value,
  },
};

// --- values -------------------------------------------------------------------------------------------------------

/** Show a value that somebody sent. @param {any} value @returns {HTMLElement} */
function show(value) {
  if (value instanceof Uint8Array) {
    const link = element(
      "a",
      { download: "result.bin", href: URL.createObjectURL(new Blob([/** @type {any} */ (value)])) },
      "Save",
    );
    return element("div", { className: "value" }, `${amount(value.length)} of bytes. `, link);
  }
  if (typeof value === "string") return element("div", { className: "value" }, value);
  const isFlat = (/** @type {any} */ row) =>
    typeof row === "object" &&
    row !== null &&
    !Array.isArray(row) &&
    Object.values(row).every((cell) => typeof cell !== "object" || cell === null);
  const rows = Array.isArray(value) ? value : [value];
  if (rows.length > 0 && rows.length <= 200 && rows.every(isFlat)) {
    const columns = [...new Set(rows.flatMap(Object.keys))];
    if (columns.length > 0 && columns.length <= 8) {
      return element(
        "table",
        {},
        element("thead", {}, element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)))),
        element(
          "tbody",
          {},
          ...rows.map((row) => element("tr", {}, ...columns.map((name) => element("td", {}, String(row[name] ?? ""))))),
        ),
      );
    }
  }
  const text = JSON.stringify(value, null, 2);
  return element(
    "div",
    { className: "value" },
    element("pre", {}, text.length > 20_000 ? `${text.slice(0, 20_000)}…` : text),
  );
}

// --- forms from JSON Schema ---------------------------------------------------------------------------------------

/**
 * Follow `$ref` and take the part of a choice that is not null.
 * @param {any} schema
 * @param {any} root
 * @returns {any}
 */
function resolved(schema, root) {
  for (let depth = 0; depth < 8 && typeof schema === "object" && schema !== null; depth++) {
    if (typeof schema.$ref === "string") {
      const found = schema.$ref
        .replace(/^#\//, "")
        .split("/")
        .reduce((/** @type {any} */ at, /** @type {string} */ key) => at?.[key], root);
      schema = { ...found, ...schema, $ref: undefined };
    } else if (Array.isArray(schema.anyOf)) {
      const choices = schema.anyOf.filter((/** @type {any} */ choice) => choice?.type !== "null");
      if (choices.length !== 1) return schema;
      schema = { ...choices[0], ...schema, anyOf: undefined };
    } else {
      return schema;
    }
  }
  return schema ?? {};
}

/**
 * A field for one argument.
 * @param {string} name @param {any} schema @param {boolean} isRequired
 * @returns {{row: HTMLElement, read: () => any}} `read` gives undefined where nothing was filled in; it may throw, or
 *   be a promise.
 */
function field(name, schema, isRequired) {
  const id = `argument-${name}`;
  const { type, description, enum: choices, default: initial } = schema;
  const isBytes =
    type === "string" &&
    (schema.format === "binary" || schema.format === "base64url" || schema.contentEncoding !== undefined);
  const shown =
    initial === undefined || initial === null
      ? ""
      : typeof initial === "object"
        ? JSON.stringify(initial)
        : String(initial);
  /** @type {any} */
  let input;
  /** @type {() => any} */
  let read;
  let kind = type ?? "JSON";

  if (Array.isArray(choices)) {
    input = element(
      "select",
      {},
      ...(isRequired ? [] : [element("option", { value: "" }, "–")]),
      ...choices.map((choice, index) =>
        element("option", { value: String(index), selected: choice === initial }, String(choice)),
      ),
    );
    read = () => (input.value === "" ? undefined : choices[Number(input.value)]);
  } else if (type === "boolean") {
    input = element("input", { type: "checkbox", checked: initial === true });
    read = () => input.checked;
  } else if (isBytes) {
    input = element("input", { type: "file" });
    kind = "file";
    read = async () => {
      if (input.files.length === 0) return undefined;
      // Where the capability reads it as it comes, a file of any size needs no room here.
      return schema.stream === true ? input.files[0].stream() : new Uint8Array(await input.files[0].arrayBuffer());
    };
  } else if (type === "integer" || type === "number") {
    input = element("input", { type: "number", value: shown, step: type === "integer" ? "1" : "any" });
    if (schema.minimum !== undefined) input.min = schema.minimum;
    if (schema.maximum !== undefined) input.max = schema.maximum;
    read = () => (input.value === "" ? undefined : Number(input.value));
  } else if (type === "string") {
    const isLong = (schema.maxLength ?? 200) >= 200 && /text|body|content|message|question|prompt/i.test(name);
    input = isLong
      ? element("textarea", { value: shown })
      : element("input", { type: "text", value: shown, autocomplete: "off" });
    read = () => (input.value === "" && !isRequired ? undefined : input.value);
  } else if (type === "array" && schema.items?.type === "string") {
    input = element("textarea", {
      value: Array.isArray(initial) ? initial.join("\n") : "",
      placeholder: "one in each line",
    });
    kind = "list";
    read = () =>
      input.value.trim() === "" && !isRequired
        ? undefined
        : input.value.split("\n").filter((/** @type {string} */ line) => line.trim() !== "");
  } else {
    input = element("textarea", { value: shown, placeholder: "JSON", spellcheck: false });
    read = () => (input.value.trim() === "" ? undefined : JSON.parse(input.value));
  }
  input.id = id;
  input.name = name;
  if (isRequired && type !== "boolean") input.required = true;
  const label = element(
    "label",
    { htmlFor: id },
    name,
    " ",
    element("span", { className: "type" }, isRequired ? kind : `${kind}, optional`),
  );
  const hint = typeof description === "string" ? [element("span", { className: "hint" }, description)] : [];
  const isCheck = type === "boolean";
  return {
    row: element(
      "div",
      { className: isCheck ? "field check" : "field" },
      ...(isCheck ? [input, label] : [label, input]),
      ...hint,
    ),
    read,
  };
}

// --- the page -----------------------------------------------------------------------------------------------------

/** @type {Map<string, Found>} */
const agents = new Map();
/** @type {Agent} */
let me;
let selected = "";
/** @type {CapabilityCard | null} */
let chosen = null;
/** @type {(() => Promise<Record<string, any>>) | null} */
let readArguments = null;
/** @type {AbortController | null} Of the call that runs. */
let running = null;
/** Connections that this page asked for. @type {Map<string, Promise<Peer>>} */
const connections = new Map();

/** @param {HTMLElement} pill @param {string} state @param {string} [text] */
function setState(pill, state, text = state) {
  pill.dataset.state = state;
  pill.textContent = text;
}

/** @param {string} text */
function banner(text) {
  $("banner").hidden = false;
  $("banner").firstElementChild.textContent = text;
}

function renderAgents() {
  const words = $("filter").value.toLowerCase().trim();
  const list = [...agents.values()].filter(
    ({ did, capabilities }) =>
      words === "" ||
      did.toLowerCase().includes(words) ||
      capabilities.some(({ name, description = "", tags = [] }) =>
        [name, description, ...tags].some((text) => text.toLowerCase().includes(words)),
      ),
  );
  list.sort((a, b) => (a.did < b.did ? -1 : 1));
  const focused = document.activeElement?.getAttribute("data-did");
  $("agents").replaceChildren(
    ...list.map(({ did, status, capabilities }) => {
      const icon = element("span", { className: "identicon" }, identicon(did));
      const chips = capabilities.slice(0, 8).map(({ name }) => element("span", { className: "chip" }, name));
      if (capabilities.length > 8) chips.push(element("span", { className: "chip" }, `+${capabilities.length - 8}`));
      if (chips.length === 0) chips.push(element("span", { className: "chip" }, "offers nothing"));
      const known = me.state === "registered" ? status : "unknown"; // nobody says what has become of it meanwhile
      const button = element(
        "button",
        { type: "button", className: "agent", onclick: () => select(did), title: did },
        icon,
        code(shortDid(did)),
        element("span", { className: "status", title: known, "data-status": known }),
        element("span", { className: "chips" }, ...chips),
      );
      button.dataset.did = did;
      button.setAttribute("aria-pressed", String(did === selected));
      return element("li", {}, button);
    }),
  );
  if (focused)
    /** @type {HTMLElement | null} */ (document.querySelector(`.agent[data-did="${CSS.escape(focused)}"]`))?.focus();
  $("agent-count").textContent = words === "" ? String(agents.size) : `${list.length} of ${agents.size}`;
  $("no-gateway").hidden = agents.size === 0 || me.state === "registered";
  $("no-agents").hidden = agents.size > 0 || me.state !== "registered";
  $("no-match").hidden = agents.size === 0 || list.length > 0;
}

/** @param {string} did */
function select(did) {
  running?.abort(new Error("another agent was picked"));
  selected = did;
  chosen = null;
  $("welcome").hidden = true;
  $("peer").hidden = false;
  $("peer-icon").replaceChildren(identicon(did));
  $("peer-did").textContent = did;
  $("quote").hidden = $("result").hidden = $("call-form").hidden = true;
  renderCapabilities();
  renderAgents();
  renderPeer();
  if (matchMedia("(max-width: 48rem)").matches) $("workbench").scrollIntoView({ block: "start" });
}

function renderCapabilities() {
  const { capabilities = [] } = agents.get(selected) ?? {};
  $("capabilities").replaceChildren(
    ...capabilities.map((capability) => {
      const input = element("input", {
        type: "radio",
        name: "capability",
        value: capability.name,
        onchange: () => choose(capability),
      });
      input.checked = capability.name === chosen?.name;
      return element("label", { className: "tab" }, input, element("span", {}, capability.name));
    }),
  );
  if (capabilities.length === 0) $("capabilities").append(element("p", { className: "empty" }, "It offers none."));
  if (chosen === null && capabilities.length > 0) {
    $("capabilities").querySelector("input").checked = true;
    choose(capabilities[0]);
  }
}

/** @param {CapabilityCard} capability */
function choose(capability) {
  chosen = capability;
  const { description = "", input = {} } = capability;
  const properties = Object.entries(input.properties ?? {});
  const required = new Set(Array.isArray(input.required) ? input.required : []);
  const fields = properties.map(([name, schema]) => ({
    name,
    ...field(name, resolved(schema, input), required.has(name)),
  }));
  $("description").textContent = description;
  $("fields").replaceChildren(...fields.map(({ row }) => row));
  $("run").textContent = capability.stream ? "Stream" : "Execute";
  $("call-form").hidden = false;
  if (running === null) $("result").hidden = true;
  readArguments = async () => {
    const args = {};
    for (const { name, read } of fields) {
      const value = await read();
      if (value !== undefined) Object.assign(args, { [name]: value });
    }
    return args;
  };
}

/** Connect at the first use. @param {string} did */
async function connected(did) {
  const peer = await connections.get(did)?.catch(() => undefined);
  if (peer?.state === "open") return peer;
  const connecting = me.connect(did);
  connections.set(did, connecting);
  if (did === selected) setState($("peer-state"), "connecting");
  try {
    return await connecting;
  } finally {
    renderPeer();
  }
}

async function renderPeer() {
  const did = selected;
  const peer = me.peers.get(did);
  const isOpen = peer !== undefined && peer.state !== "closed";
  setState(
    $("peer-state"),
    isOpen ? peer.state : "disconnected",
    isOpen ? (peer.state === "open" ? "connected" : peer.state) : "not connected",
  );
  $("facts").hidden = $("disconnect").hidden = !isOpen;
  if (!isOpen) return;
  const [path, roundTrip] = await Promise.all([peer.path(), peer.ping().catch(() => null)]);
  if (did !== selected) return;
  $("path").textContent = path === null ? "not told" : `${path.local} ⇄ ${path.remote}`;
  $("ice-kind").textContent = path === null ? "–" : `${path.kind}, ${path.protocol}`;
  $("round-trip").textContent = roundTrip === null ? "–" : duration(roundTrip);
}

/** How far a call is: a share of 1, or `done` of `total`; anything else is shown as it is. @param {any} value */
function showProgress(value) {
  const share =
    typeof value === "number" ? value : typeof value === "object" && value?.total > 0 ? value.done / value.total : NaN;
  $("progress").hidden = $("progress-note").hidden = false;
  if (Number.isFinite(share)) $("progress").value = Math.max(0, Math.min(1, share));
  const text = typeof value === "string" ? value : value?.text;
  $("progress-note").textContent =
    text ?? (Number.isFinite(share) ? `${Math.round(share * 100)} %` : JSON.stringify(value));
}

/** @param {SubmitEvent} event */
async function run(event) {
  event.preventDefault();
  if (running !== null || chosen === null || readArguments === null) return;
  const { name, stream: isStream = false } = chosen;
  const controller = (running = new AbortController());
  const did = selected;
  $("values").replaceChildren();
  $("result").hidden = $("cancel").hidden = false;
  $("fault").hidden = $("progress-note").hidden = true;
  $("progress").removeAttribute("value");
  $("progress").hidden = false;
  $("run").disabled = true;
  $("timing").textContent = "";
  const begin = performance.now();
  let parts = 0;
  try {
    const args = await readArguments().catch((error) => Promise.reject(new Error(`the arguments: ${error.message}`)));
    const peer = await connected(did);
    const options = { signal: controller.signal, onProgress: showProgress };
    if (isStream) {
      for await (const part of peer.stream(name, args, options)) {
        const shown = show(part);
        shown.classList.add("part");
        $("values").append(shown);
        if (++parts > PARTS_MAX) $("values").firstElementChild.remove();
        $("values").scrollTop = $("values").scrollHeight;
        $("timing").textContent = `${parts} ${parts === 1 ? "part" : "parts"}, ${duration(performance.now() - begin)}`;
      }
    } else {
      $("values").replaceChildren(show(await peer.execute(name, args, options)));
    }
    $("timing").textContent =
      `${isStream ? `${parts} parts in ` : ""}${duration(performance.now() - begin)}, signed by the agent`;
  } catch (error) {
    const { name: kind, message } = /** @type {Error} */ (error);
    $("fault").hidden = false;
    $("fault").textContent = controller.signal.aborted ? "Cancelled, here and over there." : `${kind}: ${message}`;
    $("timing").textContent = duration(performance.now() - begin);
  } finally {
    $("progress").hidden = $("cancel").hidden = true;
    $("progress-note").hidden = true;
    $("run").disabled = false;
    running = null;
    renderPeer();
  }
}

/** @param {SubmitEvent} event */
async function ask(event) {
  event.preventDefault();
  const output = $("quote");
  output.hidden = false;
  output.textContent = "asking …";
  try {
    const peer = await connected(selected);
    const { status, requiredInput, cost } = await peer.intent($("intent").value);
    // What stands behind the first word may be the name of a capability.
    const words = [status.replace(/^\w+/, (word) => word.replaceAll("_", " "))];
    if (requiredInput !== undefined) words.push(`needs ${[requiredInput].flat().join(", ")}`);
    if (cost !== undefined) words.push(`costs ${cost}`);
    output.textContent = words.join(" · ");
  } catch (error) {
    output.textContent = `${/** @type {Error} */ (error).name}: ${/** @type {Error} */ (error).message}`;
  }
}

async function watch() {
  for await (const { event, agent } of me.watch()) {
    if (agent.did === me.did) continue;
    if (event === "leave") agents.delete(agent.did);
    else agents.set(agent.did, agent);
    renderAgents();
    if (agent.did === selected && event === "update") renderCapabilities();
  }
}

async function main() {
  me = new Agent({
    gateway: GATEWAY,
    identity: await Identity.load(address.get("as") ?? "default"),
    capabilities,
    onIntent: ({ caller, query, task }) => {
      note(code(shortDid(caller)), ` asked: “${query ?? task}”`);
      return { status: "understood", requiredInput: "question", cost: "the time of a person" };
    },
  });
  $("my-did").textContent = shortDid(me.did);
  $("my-did").title = me.did;
  $("my-icon").replaceChildren(identicon(me.did));
  $("copy-did").onclick = async () => {
    await navigator.clipboard.writeText(me.did);
    $("copy-did").textContent = "Copied";
    setTimeout(() => ($("copy-did").textContent = "Copy DID"), 1500);
  };
  me.addEventListener("state", () => {
    setState($("gateway-state"), me.state);
    renderAgents();
    if (me.state === "closed" && me.closedBecause !== null) {
      const isReplaced = me.closedBecause.code === "replaced";
      banner(isReplaced ? "Another tab uses this identity now." : me.closedBecause.message);
    }
  });
  me.addEventListener("peer", (/** @type {any} */ { detail: peer }) => {
    note(code(shortDid(peer.did)), " is connected");
    if (peer.did === selected) renderPeer();
  });
  me.addEventListener("peerlost", (/** @type {any} */ { detail: { peer, reason } }) => {
    note(code(shortDid(peer.did)), ` is no longer connected: ${reason}`);
    if (peer.did === selected) renderPeer();
  });
  me.addEventListener("warning", (/** @type {any} */ { detail }) => console.info(detail));
  $("filter").oninput = renderAgents;
  $("call-form").onsubmit = run;
  $("intent-form").onsubmit = ask;
  $("cancel").onclick = () => running?.abort(new Error("cancelled"));
  $("disconnect").onclick = () => me.peers.get(selected)?.close("the person at the page closed it");
  $("again").onclick = () => location.reload();
  addEventListener("pagehide", () => void me.close());
  addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
  setInterval(() => document.visibilityState === "visible" && selected !== "" && void renderPeer(), PATH_MS);
  setState($("gateway-state"), "connecting");
  await me.start();
  await watch();
}

main().catch((error) => {
  if ((me?.closedBecause ?? null) !== null) return; // the page says it already
  setState($("gateway-state"), "closed", "not registered");
  banner(`${error.message}. Is a gateway running at ${GATEWAY}?`);
});

Object.assign(globalThis, {
  aiconexus: {
    get agent() {
      return me;
    },
  },
}); // for the console, and for tests
