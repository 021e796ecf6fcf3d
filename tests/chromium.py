"""A headless Chromium driven through its debugging pipe: no driver program and no library in between."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_READ, _WRITE = 3, 4  # the descriptors that --remote-debugging-pipe speaks on


class Browser:
    """One page of a browser of its own; use as a context."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._next_id = 0
        self._buffer = b""

    def __enter__(self) -> "Browser":
        assert PROGRAM is not None
        to_browser, self._input = os.pipe()
        self._output, from_browser = os.pipe()
        # Copies above the two numbers first, so that neither is closed by the move of the other.
        given = f'exec {_READ}<&{to_browser} {_WRITE}>&{from_browser}; exec "$0" "$@"'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        command = ["bash", "-c", given, PROGRAM, *flags, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(entry for entry in targets if entry["type"] == "page")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._input)
        os.close(self._output)
        self._process.kill()
        self._process.wait()

    def send(self, method: str, **parameters: Any) -> Any:
        """The result of one command of the DevTools protocol."""
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": parameters}
        if not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._input, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._next_id:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _receive(self) -> Any:
        while b"\0" not in self._buffer:
            read = os.read(self._output, 1 << 16)
            assert read, "the browser has closed its pipe"
            self._buffer += read
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def open(self, page: Path) -> None:
        """Load a file and wait until it is laid out."""
        self.send("Page.navigate", url=page.as_uri())
        self.evaluate(
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        )

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """A real click in the middle of the first element that fits, scrolled into view."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        """Press and release a key, such as ``press("Tab", 9)``."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def prefer(self, scheme: str) -> None:
        """``light`` or ``dark``."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
