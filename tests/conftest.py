"""Fixtures that tests share, and one rule: where CI is set, nothing is skipped.

`open_nb("index.ipynb")` opens a notebook of nbs/ in a real JupyterLab in a real Chromium, runs it and returns the page.
One server and one browser serve the whole session; each notebook gets a fresh tab and a fresh kernel of this very
environment. Chromium comes from the system (`apt-get install chromium`, or $QCAL_CHROMIUM); without it these tests are
skipped, except in CI.

`make pytest` runs two workers (pytest-xdist). A file stays on one of them, so that what it builds once is built once;
so do all files whose names end with _browser.py.
"""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

# before torch is imported; holds for programs that tests start, too
os.environ.setdefault("OMP_NUM_THREADS", "1")

hypothesis.settings.register_profile("no times", deadline=None)           # machines are shared; no test asserts a time
hypothesis.settings.load_profile("no times")
ROOT = Path(__file__).resolve().parents[1]
# what failing pages looked like; ignored by git
SHOTS = ROOT/"tests"/"shots"
NO_CHROMIUM = "no Chromium: apt-get install chromium (or set QCAL_CHROMIUM to a browser)"

def in_ci() -> bool: return os.environ.get("CI", "").lower() not in ("", "0", "false")

# --- in CI a skip is a failure ---

def skip_fails(report):
    "Turn a skipped report into a failed one where CI is set; an expected failure (xfail) is not a skip."
    if in_ci() and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome, report.longrepr = "failed", f"skipped in CI, where everything has to run: {reason}"
    return report

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = skip_fails((yield))
    setattr(item, f"report_{report.when}", report)                        # open_nb asks whether the test failed
    return report

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector):
    return skip_fails((yield))

# --- workers ---

def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that no worker is left with it at the end: the browser's files, then those
    with slow tests, then others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    # a stable sort: files stay together
    items.sort(key=lambda item: (not in_browser(item.path.name), item.path not in slow))

def in_browser(file: str) -> bool: return file.endswith("_browser.py")

@pytest.hookimpl(optionalhook=True)                                       # pytest does without xdist, too
def pytest_xdist_make_scheduler(config, log):
    "`--dist loadfile`, but all files of the browser stay together: they share one JupyterLab and one Chromium."
    if config.getvalue("dist") != "loadfile": return None
    from xdist.scheduler import LoadFileScheduling
    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "browser" if in_browser(file) else file
    return Files(config, log)

def pytest_terminal_summary(terminalreporter):
    "What tests tell by `record_property('tell', ...)`; what workers print is lost."
    passed = terminalreporter.getreports("passed")
    for told in dict.fromkeys(value for report in passed for key, value in report.user_properties if key == "tell"):
        terminalreporter.write_line(told)

@pytest.fixture(autouse=True)
def number_of_threads(request):
    """One thread a test, whatever the machine: bits of sums depend on their number. `@pytest.mark.threads(2)` says that
    a test needs two."""
    # nothing to set; test_harness starts many of us
    if "torch" not in sys.modules:
        yield
        return
    import torch
    marker = request.node.get_closest_marker("threads")
    torch.set_num_threads(marker.args[0] if marker else 1)
    yield
    torch.set_num_threads(1)

# --- the site ---

@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site of `make docs`, built once; a warning of Sphinx is a failure"
    work = tmp_path_factory.mktemp("site")
    (work/"source").mkdir()
    flags = ["-q", "-W", "--keep-going", "-c", ROOT/"docs", "-d", work/"doctrees"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *flags, work/"source", work/"_docs"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout+done.stderr
    return work/"_docs"

# --- observers ---

@pytest.fixture(autouse=True)
def observers_of_a_test_end_with_it():
    "Observers that a test registers are unknown to the next one, whatever the order; names and classes go together."
    if "torch" not in sys.modules:
        yield
        return
    from qcal_nb.observers import Registry
    before = dict(Registry._classes), dict(Registry._names)
    yield
    for table, kept in zip((Registry._classes, Registry._names), before, strict=True):
        table.clear()
        table.update(kept)

# --- JupyterLab ---

# no news, no autosave, every cell stays in the page
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": dict(
        fetchNews="false", checkForUpdates=False, doNotDisturbMode=True
    ),
    "@jupyterlab/notebook-extension/tracker": dict(windowingMode="none"),
    "@jupyterlab/docmanager-extension/plugin": dict(autosave=False),
}

@dataclass
class Lab:
    "A running JupyterLab: its address, token, and the folder that it serves, a copy of nbs/."
    base: str
    token: str
    root: Path
    log: Path

    def api(self, path: str, method: str = "GET"):
        "JSON answer of the server's REST interface; None where it answers nothing"
        request = urllib.request.Request(f"{self.base}/api/{path}?token={self.token}", method=method)
        with urllib.request.urlopen(request, timeout=60) as answer: body = answer.read()
        return json.loads(body) if body else None

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")

def lab_environment(work: Path) -> dict[str, str]:
    "The server's environment: nothing of the user's Jupyter; kernels are this interpreter and find this qcal_nb"
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    write_json(
        work/"data"/"kernels"/"python3"/"kernel.json", dict(argv=argv, display_name="python3", language="python")
    )
    own = dict(
        JUPYTER_CONFIG_DIR=work/"config", JUPYTER_DATA_DIR=work/"data", JUPYTER_PATH=work/"data",
        JUPYTER_RUNTIME_DIR=work/"runtime", IPYTHONDIR=work/"ipython",
        IN_TEST="1"     # a notebook's nbdev_export() does nothing
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return dict(os.environ) | {k: str(v) for k, v in own.items()} | dict(PYTHONPATH=path)

def lab_command(lab: Lab, work: Path, port: int) -> list[str]:
    options = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0,
        "ServerApp.root_dir": lab.root, "ServerApp.terminals_enabled": False, "ServerApp.allow_root": True,
        "ServerApp.open_browser": False, "IdentityProvider.token": lab.token,
        "LabApp.user_settings_dir": work/"settings", "LabApp.workspaces_dir": work/"workspaces",
        "LabApp.expose_app_in_browser": True, "LabApp.extension_manager": "readonly"
    }
    return [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())]

def wait_until_up(process: subprocess.Popen, lab: Lab, seconds: float = 180) -> None:
    deadline = time.monotonic()+seconds
    while time.monotonic() < deadline:
        if process.poll() is not None: break
        try: return lab.api("status")
        except OSError: time.sleep(0.1)
    pytest.fail(f"JupyterLab did not come up (exit status {process.poll()})\n{lab.log.read_text()[-2000:]}")

@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A JupyterLab that serves a copy of nbs/, so that nothing a test saves reaches the repository"
    work, port = tmp_path_factory.mktemp("lab"), free_port()
    running = Lab(f"http://127.0.0.1:{port}", secrets.token_hex(16), work/"nbs", work/"lab.log")
    shutil.copytree(ROOT/"nbs", running.root, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name, value in SETTINGS.items(): write_json(work/"settings"/f"{name}.jupyterlab-settings", value)
    with open(running.log, "w") as log:
        process = subprocess.Popen(
            lab_command(running, work, port), env=lab_environment(work), stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True
        )
        try:
            wait_until_up(process, running)
            yield running
        finally:
            process.terminate()                                           # ends the kernels too
            try: process.wait(15)
            except subprocess.TimeoutExpired: process.kill(); process.wait()

# --- Chromium ---

@pytest.fixture(scope="session")
def browser():
    "Chromium, headless"
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    program = os.environ.get("QCAL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not program: pytest.skip(NO_CHROMIUM)
    sync_api.expect.set_options(timeout=60_000)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield chromium
        chromium.close()

# Run All before the kernel is connected is silently lost, and no element of the page tells: ask the page's own session
# object.
READY = """async seconds => {
  const ready = async () => {
    for (;;) {
      const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
      if (panel && panel.sessionContext && panel.content && panel.content.widgets) {
        await panel.context.ready; await panel.sessionContext.ready;
        const kernel = panel.sessionContext.session && panel.sessionContext.session.kernel;
        if (kernel && kernel.connectionStatus === 'connected') {
          await kernel.info;
          if (kernel.status === 'idle') return true;
        }
      }
      await new Promise(resolve => setTimeout(resolve, 100));
    }
  };
  return Promise.race([ready(), new Promise(resolve => setTimeout(() => resolve(false), 1000*seconds))]);
}"""
READY_SECONDS = 180                                                       # a machine that does other work, too, is slow
RUN_ALL = """async () => {
  await window.jupyterapp.commands.execute('notebook:run-all-cells');
  return window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code').map(c => ({
    source: c.model.sharedModel.getSource(), count: c.model.executionCount,
    errors: c.model.outputs.toJSON().filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)}));
}"""

def run_all(page) -> None:
    "Run every cell; a cell that fails or was never run fails the test"
    cells = [c for c in page.evaluate(RUN_ALL) if c["source"].strip()]
    assert not (failed := [c for c in cells if c["errors"]]), failed
    assert not (lost := [c["source"] for c in cells if not c["count"]]), f"never run: {lost}"

def new_page(browser, viewport):
    "A tab of its own; `page.console_errors` collects what the page throws"
    page = browser.new_context(viewport=viewport).new_page()
    page.set_default_timeout(120_000)
    page.console_errors = []
    page.on("pageerror", lambda error: page.console_errors.append(str(error)))
    return page

@pytest.fixture
def open_nb(lab, browser, request):
    "`open_nb(path, run=True)` opens nbs/`path` in a fresh tab, runs all cells unless told not to, returns the page"
    pages = []
    def open_notebook(path: str, run: bool = True, viewport: tuple[int, int] = (1280, 1600)):
        page = new_page(browser, dict(width=viewport[0], height=viewport[1])); pages.append(page)
        page.goto(f"{lab.base}/doc/tree/{path}?reset&token={lab.token}", wait_until="domcontentloaded")
        if not page.evaluate(READY, READY_SECONDS):
            pytest.fail(f"{path}: no idle kernel after {READY_SECONDS} s: {page.inner_text('body')[-500:]}")
        if run: run_all(page)
        return page
    yield open_notebook
    failed = getattr(getattr(request.node, "report_call", None), "failed", False)
    for i, page in enumerate(pages):
        if failed:
            SHOTS.mkdir(exist_ok=True)
            page.screenshot(path=SHOTS/f"{request.node.name.replace('/', '-')}-{i}.png", full_page=True)
        page.context.close()
    for session in lab.api("sessions"): lab.api(f"sessions/{session['id']}", "DELETE")
