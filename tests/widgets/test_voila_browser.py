"""The app: `voila nbs/app.ipynb` in Chromium, without a notebook around it."""
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, free_port, lab_environment, new_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def app(tmp_path, browser):
    pytest.importorskip("voila", reason="no voila: pip install -e '.[browser]'")
    port, token = free_port(), secrets.token_hex(8)
    shutil.copy(ROOT / "nbs" / "app.ipynb", tmp_path)
    command = [
        sys.executable, "-m", "voila", str(tmp_path / "app.ipynb"), f"--port={port}", "--no-browser",
        f"--base_url=/{token}/"
    ]
    with open(tmp_path / "voila.log", "w") as log:
        process = subprocess.Popen(
            command, env=lab_environment(tmp_path), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            address, deadline = f"http://127.0.0.1:{port}/{token}/", time.monotonic() + 180
            while True:
                try: urllib.request.urlopen(f"{address}static/voila.js", timeout=30); break
                except urllib.error.HTTPError: break  # it answers
                except OSError:
                    waiting = process.poll() is None and time.monotonic() < deadline
                    assert waiting, (tmp_path / "voila.log").read_text()[-2000:]
                    time.sleep(0.2)
            yield new_page(browser, dict(width=1400, height=1800)), address
        finally:
            process.terminate()
            process.wait(60)


def test_the_app_calibrates(app):
    from playwright.sync_api import expect
    page, address = app
    page.goto(address, wait_until="domcontentloaded")
    expect(page.locator("button.qcal-initialize")).to_be_visible(timeout=180_000)
    assert page.get_by_text("import Workbench").count() == 0  # no code
    for step, chip in (
        ("initialize", "Initialized"), ("start", "Calibration"), ("feed-all", "Calibration"), ("end", "Frozen")
    ):
        expect(page.locator(f"button.qcal-{step}")).to_be_enabled(timeout=180_000)
        page.locator(f"button.qcal-{step}").click()
        expect(page.locator(".qcal-phase .chip.now")).to_have_text(chip, timeout=180_000)
        if step == "feed-all": expect(page.locator(".qcal-note")).to_contain_text("16 of 16 batches", timeout=180_000)
    expect(page.get_by_role("alert")).to_have_count(0)
    shots = os.environ.get("QCAL_SHOTS")
    if shots: page.screenshot(path=f"{shots}/voila.png")
    assert not page.console_errors
