"""The page of allocmoe-server in a real browser, Chromium without a window, driven by its debugging protocol over pipes."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time

from conftest import plan_under_rule
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs Chromium (Debian: apt install chromium)", allow_module_level=True)

from test_llama_server import serving  # noqa: E402  skips where the server is not built

SECONDS = 120  # for an answer of a few tokens on a busy machine


class Browser:
    def __init__(self, folder) -> None:
        to_read, self.to_write = os.pipe()
        self.to_hear, to_say = os.pipe()
        # out of the way of 3 and 4, which the protocol takes
        far = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (to_read, to_say)]
        os.close(to_read), os.close(to_say)
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [
            "--remote-debugging-pipe",
            "--window-size=1100,750",
            f"--user-data-dir={folder / 'profile'}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(far[0], 3), os.dup2(far[1], 4)),
            pass_fds=(3, 4),
        )
        for fd in far:
            os.close(fd)
        self.buffer, self.number, self.events, self.session = b"", 0, [], None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.close(self.to_write), os.close(self.to_hear)
        self.process.kill()
        self.process.wait()

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                more = os.read(self.to_hear, 1 << 16)
                assert more, "the browser has ended"
                self.buffer += more
            line, _, self.buffer = self.buffer.partition(b"\0")
            found = json.loads(line)
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def run(self, script: str):
        """The value of a JavaScript expression on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.run(script):
            assert time.monotonic() < end, f"{script}\n{self.run('document.body.innerText')}"
            time.sleep(0.1)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.body && document.body.dataset.ready === 'yes'")

    def picture(self, path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def seen(self, method: str) -> list:
        return [event["params"] for event in self.events if event.get("method") == method]


@pytest.fixture
def browser(tmp_path):
    with contextlib.closing(Browser(tmp_path)) as found:
        yield found


@pytest.fixture(scope="module")
def url(testbed_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    path = plan_under_rule(testbed_path, folder / "planned.gguf", "off")
    with serving(folder, path, "-c", "2048", "-np", "2", "-n", "24", "--ignore-eos") as (url, _, _):
        yield url


def send(browser: Browser, text: str) -> None:
    browser.run(f"$('text').value = {json.dumps(text)}; $('form').requestSubmit()")
    browser.wait("!stop")


def heights(browser: Browser, column: str, kind: str) -> list:
    return browser.run(
        f"[...document.querySelectorAll('#{column} rect.{kind}')].map(x => Number(x.getAttribute('height')))"
    )


def errors(browser: Browser) -> list:
    said = [entry["entry"]["text"] for entry in browser.seen("Log.entryAdded")]
    return said + [thrown["exceptionDetails"]["text"] for thrown in browser.seen("Runtime.exceptionThrown")]


def test_a_chat_with_a_budget(browser, url, tmp_path):
    browser.open(f"{url}/budget")
    assert browser.run("$('one-slider').value") == "180" and "50%, 180 of 360" in browser.run("document.body.innerText")
    assert heights(browser, "one", "room") == [12] * 30 and set(heights(browser, "one", "spent")) == {0}
    browser.run("$('one-slider').value = 90; $('one-slider').oninput()")
    assert "25%, 90 of 360" in browser.run("document.body.innerText")
    send(browser, "What is the capital of France?")
    talk = browser.run("[...document.querySelectorAll('#one .talk div')].map(x => [x.className, x.textContent])")
    assert talk[0] == ["user", "What is the capital of France?"] and talk[1][0] == "assistant" and talk[1][1]
    # under `off` each token spends its budget exactly
    assert sum(heights(browser, "one", "spent")) == 90
    stats = browser.run("document.querySelector('#one .stats').innerText")
    assert "tokens/s" in stats and "90.0 activations per token of 90 asked" in stats
    # the talk goes on
    send(browser, "And of Italy?")
    assert browser.run("columns[0].messages.length") == 4
    browser.picture(tmp_path / "chat.png")
    browser.run("$('clear').click()")
    assert browser.run("document.querySelectorAll('#one .talk div').length") == 0
    assert not errors(browser)
    # nothing from anywhere else
    asked = [request["request"]["url"] for request in browser.seen("Network.requestWillBeSent")]
    assert asked and all(each.startswith((url, "about:")) for each in asked)


def test_two_budgets_side_by_side(browser, url, tmp_path):
    browser.open(f"{url}/budget")
    browser.run("$('compare').click()")
    browser.run("document.querySelector('#one .budget button').click()")  # fast
    send(browser, "Tell me about the sea.")
    assert sum(heights(browser, "one", "spent")) == 120 and sum(heights(browser, "two", "spent")) == 360
    answers = browser.run("[...document.querySelectorAll('.assistant')].map(x => x.textContent)")
    assert len(answers) == 2 and answers[0] != answers[1]
    browser.picture(tmp_path / "compare.png")
    assert not errors(browser)


def test_a_model_without_experts(browser, dense_path, tmp_path):
    with serving(tmp_path, dense_path, "-c", "512", "-n", "4") as (url, _, _):
        browser.open(f"{url}/budget")
        assert "there is nothing to choose" in browser.run("document.body.innerText")
        send(browser, "Hello")
        assert browser.run("document.querySelector('.assistant').textContent")
        assert not errors(browser)
        # a message that is refused is no part of the talk, which goes on
        send(browser, "word " * 3000)
        assert "exceeds the available context" in browser.run("document.querySelector('.error').textContent")
        send(browser, "Hello again")
        talk = browser.run("[...document.querySelectorAll('#one .talk div')].map(x => x.className)")
        assert talk == ["user", "assistant", "user", "error", "user", "assistant"]
        assert browser.run("columns[0].messages.length") == 4


def test_several_models_to_choose_from(browser, testbed_path, dense_path, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    plan_under_rule(testbed_path, models / "planned.gguf", "off")
    (models / "dense.gguf").symlink_to(dense_path)
    with serving(tmp_path, "--models-dir", models, "-c", "512", "-np", "1", "-n", "4") as (url, _, _):
        browser.open(f"{url}/budget")
        assert browser.run("[...$('models').options].map(x => x.value)") == ["", "dense", "planned"]
        send(browser, "Hello")  # no model yet: nothing happens
        assert browser.run("document.querySelectorAll('.talk div').length") == 0
        for name, heard in (("planned", "activations per token of 180 asked"), ("dense", "tokens/s")):
            browser.run(f"$('models').value = '{name}'; $('models').onchange()")
            browser.wait(f"chosen === '{name}'")
            send(browser, "Hello")
            assert heard in browser.run("document.querySelector('#one .stats').innerText")
            browser.picture(tmp_path / f"{name}.png")
        assert "there is nothing to choose" in browser.run("document.body.innerText")
        assert not errors(browser)


def test_a_server_that_wants_a_key(browser, url, testbed_path, tmp_path):
    with serving(tmp_path, testbed_path, "-c", "512", "-n", "4", "--api-key", "secret") as (url, _, _):
        browser.call("Page.addScriptToEvaluateOnNewDocument", source="window.prompt = () => 'secret'")
        browser.open(f"{url}/budget")
        assert "No other budget: " in browser.run("document.body.innerText")
        send(browser, "Hello")
        assert browser.run("document.querySelector('.assistant').textContent")
