"""The demo: base and adapter side by side, in a real browser without a window.

Skipped where the extra `demo` or a Chromium is missing; MOEXTEND_SCREENSHOT names a file for a picture of the page.
"""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import make_base, make_encoder, shake
from test_audio import make_ears
from transformers import AutoTokenizer

from modeling_moextend import MoExtendForCausalLM

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_without_the_extra_its_name_is_said(monkeypatch):
    from modeling_moextend.chat.demo import build_demo

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'moextend\[demo\]'"):
        build_demo(None, None)


@pytest.fixture(scope="module")
def numbers():
    base, folder = str(ROOT / "assets/tiny-moe"), ROOT / "assets/numbers"
    model = MoExtendForCausalLM.from_pretrained(folder, base=base, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_two_answers_and_the_marks(numbers):
    pytest.importorskip("gradio")
    from modeling_moextend.chat.demo import SideBySide

    base, answer, view = SideBySide(*numbers, max_new_tokens=24).answer("1984")
    assert answer == "one thousand nine hundred eighty-four" and "thousand" not in base
    assert "layer 0: new" in view and numbers[0].active_adapters() == ["default"]


def test_an_image_and_a_clip_are_asked_for_where_the_adapter_takes_them(numbers):
    gradio = pytest.importorskip("gradio")
    from modeling_moextend.chat.demo import build_demo

    senses = {"encoder": [make_encoder(), make_ears()], "image_token_id": 5, "audio_token_id": 6}
    both = shake(MoExtendForCausalLM.from_base(make_base(), {1: [0]}, **senses))
    kinds = [{type(block) for block in build_demo(model, None).blocks.values()} for model in (both, numbers[0])]
    assert {gradio.Image, gradio.Audio} <= kinds[0] and not {gradio.Image, gradio.Audio} & kinds[1]


@pytest.fixture
def server(tmp_path):
    """The file as a Space runs it, by itself."""
    pytest.importorskip("gradio")
    shutil.copy(ROOT / "modeling_moextend/chat/demo.py", tmp_path / "app.py")
    more = {"PYTHONPATH": str(ROOT), "MOEXTEND_ADAPTER": "assets/numbers", "GRADIO_SERVER_PORT": "7893"}
    more |= {"GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(tmp_path / "app.py")]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **more}, stdout=log, stderr=log)
    url, end = "http://127.0.0.1:7893", time.monotonic() + 300
    try:
        while True:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_in_a_browser(server, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium")
    with playwright.sync_playwright() as browsers:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox", "--no-proxy-server"]}
        page = browsers.chromium.launch(**options).new_page(viewport={"width": 1100, "height": 700})
        page.goto(server)
        page.get_by_label("question").fill("1984")
        page.get_by_role("button", name="ask").click()
        adapter, base = page.get_by_label("with the adapter"), page.get_by_label("base", exact=True)
        words = "one thousand nine hundred eighty-four"
        playwright.expect(adapter).to_have_value(words, timeout=120_000)
        assert base.input_value() and "thousand" not in base.input_value()
        marked = page.locator("span.new")
        assert marked.count() > 5 and "layer 0: new" in marked.first.get_attribute("title")
        page.screenshot(path=os.environ.get("MOEXTEND_SCREENSHOT", tmp_path / "demo.png"))
