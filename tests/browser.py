# SPDX-License-Identifier: Apache-2.0
"""Open a page in headless Chromium with the network off, and ask it what a reader would see.

Spoken to over the browser's own debugging protocol, because only there a phone's width, a colour scheme and the list of
everything that a page asked for can be had.
"""

import asyncio
import base64
import io
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from PIL import Image
from tornado.websocket import websocket_connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next((found for name in NAMES if (found := shutil.which(name))), None)
# No name resolves and no proxy answers: whatever a page would load from outside fails, and is seen to be asked for.
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--proxy-server=127.0.0.1:9",
    "--remote-debugging-port=0",
)


class Browser:
    """One Chromium; `with Browser() as browser`."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [PROGRAM, *OPTIONS, f"--user-data-dir={self.folder.name}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.loop = asyncio.new_event_loop()
        self.numbers = itertools.count(1)
        self.events = []
        try:
            self.socket = self.loop.run_until_complete(self._connect())
        except BaseException:
            self.process.kill()
            raise
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=20)
        self.loop.close()
        self.folder.cleanup()

    def open(self, path, *, width=1280, height=900, dark=False):
        """Load a file at a width in CSS pixels and a colour scheme; returns what is to be seen of it."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=Path(path).absolute().as_uri())
        self.wait_for("Page.loadEventFired")
        return self

    def requests(self):
        """Every address that the page asked for since it was opened, its own and data in it left out."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        addresses = [one["request"]["url"] for one in sent if one["type"] != "Document"]
        return [address for address in addresses if not address.startswith("data:")]

    def ask(self, expression):
        """Evaluate JavaScript beside the page, whose own scripts and policy have no part in it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, *, whole=False, path=None):
        """Take a picture of the window, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        pixels = base64.b64decode(data)
        if path:
            Path(path).write_bytes(pixels)
        return Image.open(io.BytesIO(pixels)).convert("RGB")

    def call(self, method, **params):
        """Send one command of the protocol and return its answer."""
        return self.loop.run_until_complete(self._call(method, params))

    def wait_for(self, method, timeout_s=30):
        """Wait until an event of this name has come."""
        self.loop.run_until_complete(self._wait_for(method, timeout_s))

    async def _connect(self):
        told = Path(self.folder.name, "DevToolsActivePort")
        deadline = time.monotonic() + 60
        while not (told.exists() and told.read_text().count("\n")):
            assert self.process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
            await asyncio.sleep(0.05)
        port, path = told.read_text().splitlines()[:2]
        return await websocket_connect(f"ws://127.0.0.1:{port}{path}", max_message_size=2**28)

    async def _call(self, method, params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        await self.socket.write_message(json.dumps(message))
        while True:
            answer = await self._read(60)
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    async def _wait_for(self, method, timeout_s):
        while not any(event["method"] == method for event in self.events):
            await self._read(timeout_s)

    async def _read(self, timeout_s):
        message = json.loads(await asyncio.wait_for(self.socket.read_message(), timeout_s))
        if "method" in message:
            self.events.append(message)
        return message
