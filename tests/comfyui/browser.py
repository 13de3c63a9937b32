"""Headless Chromium over its DevTools protocol: open a page, run JavaScript, take a picture."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket = socket
        self.ids = itertools.count()

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        id = next(self.ids)
        await self.socket.send_json({"id": id, "method": method, "params": params})
        while True:
            answer = await self.socket.receive_json()
            if answer.get("id") == id:
                assert "error" not in answer, answer
                return answer["result"]

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, seconds: float) -> Any:
        """Its value once it is true."""

        async def wait():
            while not (value := await self.run(script)):
                await asyncio.sleep(0.5)
            return value

        return await asyncio.wait_for(wait(), seconds)

    async def picture(self, left: int, top: int, width: int, height: int) -> bytes:
        clip = {"x": left, "y": top, "width": width, "height": height, "scale": 1}
        found = await self.call("Page.captureScreenshot", format="png", clip=clip)
        return base64.b64decode(found["data"])


@contextlib.asynccontextmanager
async def opened(url: str, profile: Path, size: tuple[int, int], seconds: float):
    profile.mkdir()
    command = [
        CHROMIUM,
        *_OPTIONS,
        f"--user-data-dir={profile}",
        "--window-size={},{}".format(*size),
    ]
    process = subprocess.Popen(
        [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = profile / "DevToolsActivePort"
        deadline = time.monotonic() + seconds
        while not (port.exists() and port.read_text()):
            assert time.monotonic() < deadline, f"Chromium did not start in {seconds} s"
            await asyncio.sleep(0.2)
        address = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
        async with aiohttp.ClientSession() as session:
            async with session.get(address) as answer:
                pages = [x for x in await answer.json() if x["type"] == "page"]
            async with session.ws_connect(
                pages[0]["webSocketDebuggerUrl"], max_msg_size=0
            ) as socket:
                page = Page(socket)
                await page.call("Page.navigate", url=url)
                yield page
    finally:
        process.terminate()
        process.wait(30)
