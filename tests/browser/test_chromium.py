"""The page of examples/browser_agent in a real Chromium, with a real gateway and real Python agents.

In a network namespace with loopback alone: a browser offers every address of the machine.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import pytest_asyncio
from javascript import ROOT, MissingError, find_chromium
from loopback import NoNamespaceError, loopback_only
from processes import children

from aiconexus import Agent, Intent, Peer, Quote, capability, current_call
from aiconexus.protocol.errors import CallCancelledError, CapabilityError, PeerLostError

async_api = pytest.importorskip(
    "playwright.async_api", reason="playwright is missing: pip install playwright"
)
expect = async_api.expect

if TYPE_CHECKING:
    from conftest import GatewayProcess
    from playwright.async_api import Browser, Page

EXAMPLE = ROOT / "examples" / "browser_agent"
SECONDS = 20.0  # for anything that must happen at all
FLAGS = [
    "--allow-loopback-in-peer-connection",
    "--disable-features=WebRtcHideLocalIpsWithMdns",
    "--no-sandbox",  # it does not start as root with one
]

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Worker(Agent):
    """Offers something of each kind."""

    def __init__(self, gateway: str) -> None:
        super().__init__(gateway, host_addresses=["127.0.0.1"])
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.released = asyncio.Event()
        self.lost = asyncio.Event()

    @capability(tags=["arithmetic"])
    async def double(self, value: int) -> int:
        """Double a number."""
        return 2 * value

    @capability
    async def tell(self, text: str) -> str:
        """Return <img src=x onerror=alert(1)> and what it is given."""
        return f"<b>{text}</b>"

    @capability
    async def echo(self, data: bytes) -> bytes:
        return data

    @capability
    async def count(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    @capability
    async def hold(self) -> str:
        """Tell how far it is, and run until it is released."""
        self.started.set()
        current_call().progress({"done": 1, "total": 4})
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return "held to the end"

    async def on_intent(self, intent: Intent) -> Quote:
        return Quote(status="understood", required_input="value", cost=f"<i>nothing</i> for {intent.query}")

    async def on_peer_lost(self, peer: Peer, reason: str) -> None:
        self.lost.set()


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("browser_agent_run", EXAMPLE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loopback() -> Iterator[None]:
    try:
        find_chromium()
        with loopback_only():
            yield
    except (MissingError, NoNamespaceError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def isolated_gateway(loopback: None, shared_gateway: GatewayProcess) -> GatewayProcess:
    """A gateway inside of the namespace: that one is entered first."""
    return shared_gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(loopback: None) -> AsyncIterator[Browser]:
    async with async_api.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pages_url(loopback: None) -> AsyncIterator[str]:
    async with load_example().serve_pages(0) as url:
        yield url


@pytest_asyncio.fixture(loop_scope="module")
async def worker(isolated_gateway: GatewayProcess) -> AsyncIterator[Worker]:
    async with Worker(isolated_gateway.url) as worker:
        yield worker


class Tab:
    """A page that is registered, in a profile of its own, and what its console has said."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._console)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    async def open(self) -> str:
        """Load it; return its DID."""
        await self.page.goto(self.url)
        await expect(self.page.locator("#gateway-state")).to_have_attribute("data-state", "registered")
        did: str = await self.page.evaluate("() => aiconexus.agent.did")
        return did

    async def call(self, code: str, *arguments: object) -> Any:
        """Run the body of an async function in the page; `agent` is its agent, `args` are the arguments."""
        function = f"async (args) => {{ const agent = aiconexus.agent; {code} }}"
        return await asyncio.wait_for(self.page.evaluate(function, list(arguments)), SECONDS)

    async def pick(self, agent: Agent, name: str) -> None:
        """Choose an agent of the list and one of its capabilities."""
        await self.page.locator(f'.agent[data-did="{agent.did}"]').click()
        await self.page.locator("#capabilities label", has_text=re.compile(f"^{name}$")).click()


@pytest_asyncio.fixture(loop_scope="module")
async def new_tab(
    browser: Browser, pages_url: str, isolated_gateway: GatewayProcess
) -> AsyncIterator[Callable[..., Any]]:
    tabs: list[Tab] = []

    async def make(gateway: str = isolated_gateway.url, permissions: list[str] | None = None) -> Tab:
        context = await browser.new_context(permissions=permissions)
        tab = Tab(await context.new_page(), f"{pages_url}?gateway={quote(gateway, safe=':/')}")
        tabs.append(tab)
        return tab

    yield make
    for tab in tabs:
        await tab.page.context.close()
    assert [fault for tab in tabs for fault in tab.faults] == []


@pytest_asyncio.fixture(loop_scope="module")
async def tab(new_tab: Callable[..., Any]) -> Tab:
    tab: Tab = await new_tab()
    await tab.open()
    return tab


# --- a person at the page ----------------------------------------------------------------------


async def test_page_lists_who_comes_and_goes(tab: Tab, isolated_gateway: GatewayProcess) -> None:
    await expect(tab.page.locator("#no-agents")).to_be_visible()
    async with Worker(isolated_gateway.url) as worker:
        entry = tab.page.locator(f'.agent[data-did="{worker.did}"]')
        await expect(entry.locator(".chip")).to_have_text(["double", "tell", "echo", "count", "hold"])
        await tab.page.locator("#filter").fill("arithmetic")
        await expect(entry).to_be_visible()
        await tab.page.locator("#filter").fill("nothing like it")
        await expect(entry).to_have_count(0)
        await expect(tab.page.locator("#no-match")).to_be_visible()
        await expect(tab.page.locator("#agent-count")).to_have_text("0 of 1")
        await tab.page.locator("#filter").fill("")
        await expect(tab.page.locator("#no-match")).to_be_hidden()
        await expect(entry).to_be_visible()
    await expect(entry).to_have_count(0)


async def test_person_asks_executes_and_reads(tab: Tab, worker: Worker) -> None:
    page = tab.page
    await tab.pick(worker, "double")
    await page.locator("#intent").fill("doubling")
    await page.locator("#intent").press("Enter")
    await expect(page.locator("#quote")).to_have_text(
        "understood · needs value · costs <i>nothing</i> for doubling"
    )
    await page.locator("input[name=value]").fill("21")
    await page.locator("#run").click()
    await expect(page.locator("#values")).to_have_text("42")
    await expect(page.locator("#path")).to_contain_text("127.0.0.1")
    await expect(page.locator("#ice-kind")).to_contain_text("udp")
    await expect(page.locator("#round-trip")).to_contain_text("ms")
    await expect(page.locator("#peer-state")).to_have_text("connected")

    await tab.pick(worker, "count")
    await page.locator("input[name=to]").fill("3")
    await page.locator("#run").click()
    await expect(page.locator(".value.part")).to_have_text(["0", "1", "2"])

    await page.locator("#disconnect").click()
    await expect(page.locator("#peer-state")).to_have_text("not connected")
    await asyncio.wait_for(worker.lost.wait(), SECONDS)


async def test_text_of_others_is_never_markup(tab: Tab, worker: Worker) -> None:
    await tab.pick(worker, "tell")
    await expect(tab.page.locator("#description")).to_contain_text("<img src=x onerror=alert(1)>")
    await tab.page.locator("[name=text]").fill("<script>alert(2)</script>")
    await tab.page.locator("#run").click()
    await expect(tab.page.locator("#values")).to_have_text("<b><script>alert(2)</script></b>")
    assert await tab.page.locator("main img, main script, #values b").count() == 0


async def test_person_sees_progress_and_cancels(tab: Tab, worker: Worker) -> None:
    page = tab.page
    await tab.pick(worker, "hold")
    await page.locator("#run").click()
    await expect(page.locator("#progress-note")).to_have_text("25 %")
    await expect(page.locator("#progress")).to_have_js_property("value", 0.25)
    await page.locator("#cancel").click()
    await expect(page.locator("#fault")).to_have_text("Cancelled, here and over there.")
    await asyncio.wait_for(worker.cancelled.wait(), SECONDS)


async def test_file_is_sent_and_comes_back(tab: Tab, worker: Worker, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "scan").write_bytes(data)
    await tab.pick(worker, "echo")
    await tab.page.locator("input[name=data]").set_input_files(tmp_path / "scan")
    await tab.page.locator("#run").click()
    await expect(tab.page.locator("#values")).to_contain_text("293.0 KiB of bytes.")
    async with tab.page.expect_download() as waiting:
        await tab.page.locator("#values a").click()
    saved = await (await waiting.value).path()
    assert saved.read_bytes() == data


async def test_reloaded_page_is_the_same_agent(tab: Tab) -> None:
    did = await tab.call("return agent.did")
    assert await tab.open() == did
    assert await tab.call("return agent.state") == "registered"
    # The key is in IndexedDB, and cannot be read even by the page itself.
    fault = await tab.call("""
        const open = indexedDB.open("aiconexus");
        await new Promise((resolve) => (open.onsuccess = resolve));
        const get = open.result.transaction("identities").objectStore("identities").get("default");
        await new Promise((resolve) => (get.onsuccess = resolve));
        return crypto.subtle.exportKey("pkcs8", get.result.privateKey).catch((error) => error.name);
    """)
    assert fault == "InvalidAccessError"


# --- what others ask of the page ---------------------------------------------------------------


async def test_python_asks_the_person_at_the_page(tab: Tab, worker: Worker) -> None:
    did = await tab.call("return agent.did")
    async with worker.connect(did) as peer:
        assert (await peer.intent("may I ask?")).status == "understood"
        asked = asyncio.ensure_future(peer.execute("ask_human", question="<b>Tea</b> or coffee?"))
        question = tab.page.locator(".question")
        await expect(question.locator("p")).to_have_text("<b>Tea</b> or coffee?")
        await question.locator("textarea").fill("Tea, please")
        await question.locator("button[type=submit]").click()
        assert await asyncio.wait_for(asked, SECONDS) == "Tea, please"
        await expect(question).to_have_count(0)

        asked = asyncio.ensure_future(peer.execute("ask_human", question="And with it?"))
        answer = question.locator("textarea")
        await answer.press("Space")
        await answer.press("Enter")
        await expect(answer).to_have_value("")  # nothing is no answer
        await answer.press_sequentially(" Cake")
        await answer.press("Shift+Enter")
        await answer.press_sequentially("or bread ")
        await answer.press("Enter")
        assert await asyncio.wait_for(asked, SECONDS) == "Cake\nor bread"

        asked = asyncio.ensure_future(peer.execute("ask_human", question="Milk?"))
        await question.get_by_text("Decline").click()
        with pytest.raises(CapabilityError, match="the person declined to answer"):
            await asyncio.wait_for(asked, SECONDS)

        asked = asyncio.ensure_future(peer.execute("ask_human", question="Sugar?"))
        await expect(question).to_be_visible()
        asked.cancel()
        await expect(question).to_have_count(0)
        await expect(tab.page.locator("#log")).to_contain_text("has withdrawn the question")


async def test_a_question_is_seen_on_a_phone_and_in_the_title(tab: Tab, worker: Worker) -> None:
    did = await tab.call("return agent.did")
    title = await tab.page.title()
    size = tab.page.viewport_size
    assert size is not None
    await tab.page.set_viewport_size({"width": 375, "height": 740})
    async with worker.connect(did) as peer:
        asked = asyncio.ensure_future(peer.execute("ask_human", question="Where are you?"))
        question = tab.page.locator(".question")
        await expect(question.locator("button[type=submit]")).to_be_in_viewport()
        await expect(tab.page).to_have_title(f"(1) {title}")
        await question.locator("textarea").fill("here")
        await question.locator("button[type=submit]").click()
        assert await asyncio.wait_for(asked, SECONDS) == "here"
        await expect(tab.page).to_have_title(title)
    await tab.page.set_viewport_size(size)


async def test_python_reads_a_stream_of_the_page_and_leaves_it(tab: Tab, worker: Worker) -> None:
    did = await tab.call("return agent.did")
    async with worker.connect(did) as peer:
        assert [part async for part in peer.stream("count_down", start=3, pause=0)] == [3, 2, 1, 0]
        stream = peer.stream("count_down", start=1000, pause=0.01)
        assert await stream.__anext__() == 1000
        await stream.aclose()
        await expect(tab.page.locator("#log")).to_contain_text("stopped the countdown")


# --- agent to agent ----------------------------------------------------------------------------


async def test_four_megabytes_go_there_and_back_in_both_directions(tab: Tab, worker: Worker) -> None:
    size = 4 << 20
    digest = """
        const digest = async (bytes) => new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).join();
        const bytes = new Uint8Array(args[1]).map((_, i) => i * 31);
        const peer = await agent.connect(args[0]);
        const back = await peer.execute("echo", { data: bytes });
        return back.length === bytes.length && (await digest(back)) === (await digest(bytes));
    """
    assert await tab.call(digest, worker.did, size)
    data = os.urandom(size)
    async with worker.connect(await tab.call("return agent.did")) as peer:
        assert await asyncio.wait_for(peer.execute("echo", value=data), SECONDS) == data


async def test_errors_have_their_class_in_the_page(tab: Tab, worker: Worker) -> None:
    names = await tab.call(
        """
        const name = (promise) => promise.then(() => "none", (error) => `${error.name} ${error.code}`);
        const peer = await agent.connect(args[0]);
        return [
            await name(peer.execute("double", { value: "x" })),
            await name(peer.execute("triple")),
            await name(peer.execute("hold", {}, { timeout: 200 })),
            await name(agent.connect("did:key:z6MkiTBz1ymuepAQ4HEHYSF1H8quG5GLVVQR3djdX3mDooWp")),
            await name(agent.connect(agent.did)),
        ];
        """,
        worker.did,
    )
    assert names == [
        "InvalidArgumentsError invalid_arguments",
        "UnknownCapabilityError unknown_capability",
        "CallTimeoutError timeout",
        "UnknownAgentError UNKNOWN_AGENT",
        "PeerConnectError self",
    ]
    await asyncio.wait_for(worker.cancelled.wait(), SECONDS)


async def test_glare_with_python_ends_in_one_connection_every_time(tab: Tab, worker: Worker) -> None:
    did = await tab.call("return agent.did")
    for _ in range(4):
        page = asyncio.ensure_future(
            tab.call(
                """
                const peer = await agent.connect(args[0]);
                const result = await peer.execute("double", { value: 4 });
                await peer.release();
                return result;
                """,
                worker.did,
            )
        )
        async with worker.connect(did) as peer:
            assert await peer.execute("echo", value=1) == 1
            assert await page == 8
        assert len(worker.peers) <= 1
        await tab.call(
            "while (agent.peers.size > 0) await new Promise((resolve) => setTimeout(resolve, 10));"
        )


async def test_two_pages_work_together(new_tab: Callable[..., Any]) -> None:
    # Chromium offers no address of loopback before a page may use a microphone. To Python it connects all the
    # same: its packets tell where it is.
    tab, other = await new_tab(permissions=["microphone"]), await new_tab(permissions=["microphone"])
    await tab.open()
    did = await other.open()
    seen = await tab.call(
        """
        const peer = await agent.connect(args[0]);
        const seen = [];
        for await (const part of peer.stream("count_down", { start: 3, pause: 0 })) seen.push(part);
        const long = "x".repeat(300_000);
        seen.push((await peer.execute("echo", { value: { long } })).long === long);
        await peer.release();
        return seen;
        """,
        did,
    )
    assert seen == [3, 2, 1, 0, True]


async def test_call_outlives_the_gateway_and_the_page_returns_to_it(
    loopback: None, start_gateway: Callable[..., GatewayProcess], new_tab: Callable[..., Any]
) -> None:
    gateway = start_gateway()
    tab = await new_tab(gateway.url)
    did = await tab.open()
    async with Worker(gateway.url) as worker:
        running = asyncio.ensure_future(
            tab.call("return (await agent.connect(args[0])).execute('hold')", worker.did)
        )
        await asyncio.wait_for(worker.started.wait(), SECONDS)
        status = tab.page.locator(f'.agent[data-did="{worker.did}"] .status')
        await expect(status).to_have_attribute("data-status", "online")
        gateway.kill()
        await expect(tab.page.locator("#gateway-state")).to_have_text("reconnecting")
        await expect(status).to_have_attribute("data-status", "unknown")
        await expect(tab.page.locator("#no-gateway")).to_be_visible()
        async with worker.connect(did) as peer:  # the connection there is
            assert await peer.execute("echo", value="still here") == "still here"
        worker.released.set()
        assert await running == "held to the end"
        gateway.start()
        await expect(tab.page.locator("#gateway-state")).to_have_text("registered", timeout=SECONDS * 1e3)
        await expect(status).to_have_attribute("data-status", "online", timeout=SECONDS * 1e3)
        await expect(tab.page.locator("#no-gateway")).to_be_hidden()
    # What Chromium says of a connection that is refused.
    tab.faults = [fault for fault in tab.faults if "WebSocket connection to" not in fault]


async def test_python_learns_at_once_that_the_page_is_gone(tab: Tab, worker: Worker) -> None:
    did = await tab.call("return agent.did")
    peer = await worker.connect(did)
    asked = asyncio.ensure_future(peer.execute("ask_human", question="Are you there?"))
    await expect(tab.page.locator(".question")).to_be_visible()
    await tab.page.goto("about:blank")
    with pytest.raises((PeerLostError, CallCancelledError), match=r"stops|cancelled"):
        await asyncio.wait_for(asked, 4)  # Chromium alone would leave it in the dark for 5 s
    await asyncio.wait_for(worker.lost.wait(), SECONDS)


async def test_identity_that_is_used_elsewhere_is_told(tab: Tab, isolated_gateway: GatewayProcess) -> None:
    second = await tab.page.context.new_page()
    other = Tab(second, tab.url)
    assert await other.open() == await tab.call("return agent.did")
    await expect(tab.page.locator("#banner")).to_contain_text("Another tab uses this identity now.")
    await expect(tab.page.locator("#gateway-state")).to_have_attribute("data-state", "closed")
    assert other.faults == []


# --- one command -------------------------------------------------------------------------------


async def test_one_command_starts_everything_and_stops_it(browser: Browser) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLE / "run.py"), stdout=PIPE, stderr=PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.ensure_future(process.stderr.read())
    context = await browser.new_context(color_scheme="dark", viewport={"width": 420, "height": 900})
    try:
        url = ""
        async for line in process.stdout:
            if line.startswith(b"page"):
                url = line.decode().split()[1]
                break
        tab = Tab(await context.new_page(), url)
        await tab.open()
        page = tab.page
        await page.locator(".agent", has_text="tell_story").click()
        await page.locator("#capabilities label", has_text="tell_story").click()
        await page.locator("input[name=pause]").fill("0")
        await page.locator("#run").click()
        await expect(page.locator(".value.part")).to_have_count(7)
        await page.locator("#capabilities label", has_text="inspect_file").click()
        data = bytes(range(256)) * 8192
        await page.locator("input[name=file]").set_input_files(
            {"name": "scan", "mimeType": "application/octet-stream", "buffer": data}
        )
        await page.locator("#run").click()
        await expect(page.locator("#values td")).to_have_text([str(len(data)), sha256(data).hexdigest()])
        await page.locator("#capabilities label", has_text="interview").click()
        await page.locator("#run").click()
        await page.locator(".question textarea").fill("They are everywhere")
        await page.locator(".question button[type=submit]").click()
        await expect(page.locator("#values")).to_have_text("They said: “They are everywhere”")
        missing = await page.request.get(f"{url.partition('?')[0]}run.py")
        assert missing.status == 404
        assert await page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        assert tab.faults == []
    finally:
        await context.close()
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.stdout.read(), SECONDS)
        assert await asyncio.wait_for(process.wait(), SECONDS) == 0
        assert "Traceback" not in (await errors).decode()  # not even where a page was closed in haste


async def test_one_command_ends_when_a_part_of_it_has_died() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLE / "run.py"),
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            if line.startswith(b"Open the page"):
                break
        _, agent = children(process.pid)  # in the order in which they were started
        os.kill(agent, signal.SIGKILL)
        _, errors = await asyncio.wait_for(process.communicate(), SECONDS)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert process.returncode == 1
    last = errors.decode().splitlines()[-1]
    assert last == "the Python agent ended by itself, so everything was stopped"
