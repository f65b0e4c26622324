"""What the browser's tests do with a page: ask the kernel, press buttons, read the numbers that a picture carries."""
import json
import struct
import zlib

KERNEL = """async code => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({ code, silent: false, store_history: false });
  let text = '', error = null;
  future.onIOPub = m => { if (m.header.msg_type === 'stream') text += m.content.text;
                          if (m.header.msg_type === 'error') error = m.content.ename + ': ' + m.content.evalue; };
  await future.done;
  return { text, error };
}"""
PICTURE = "async img => Array.from(new Uint8Array(await (await fetch(img.src)).arrayBuffer()))"


def ask(page, expression):
    "The value of an expression in the notebook's kernel."
    answer = page.evaluate(KERNEL, f"import json; print(json.dumps({expression}))")
    assert answer["error"] is None, answer["error"]
    return json.loads(answer["text"])


def drawn(image):
    "What was drawn, read from the very PNG that the page shows; {} before it has one."
    data, at = bytes(image.evaluate(PICTURE)), 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + size]
        if body.startswith(b"qcal_nb\0"):
            assert kind == b"zTXt"
            return json.loads(zlib.decompress(body.split(b"\0", 1)[1][1:]))
        at += 12 + size
    assert not data, "the picture carries no data"
    return {}


def picture(page):
    "What the page's first picture carries."
    return drawn(page.locator("img.qcal-picture").first)


def until(page, expression, value):
    "Wait until the kernel answers `value`."
    for _ in range(1200):
        if (got := ask(page, expression)) == value: return
        page.wait_for_timeout(100)
    raise AssertionError(f"{expression} is {got!r}, not {value!r}")


def click(page, step, phase):
    "Press a button of the stepper; the kernel must reach the phase, and the page must show it."
    from playwright.sync_api import expect
    page.locator(f"button.qcal-{step}").click()
    until(page, "[wb.session.phase, wb.session.running]", [phase, ""])
    names = dict(
        original="Original", initialized="Initialized", started="Calibration", fed="Calibration", ended="Frozen"
    )
    expect(page.locator(".qcal-phase .chip.now")).to_have_text(names[phase])
    legal = ask(page, "{k: v is None for k, v in wb.session.legal().items()}")
    for name, may in legal.items():
        button = page.locator(f"button.qcal-{name.replace('_', '-')}")
        expect(button).to_be_enabled() if may else expect(button).to_be_disabled()


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()
    until(page, "list(wb.panels)[wb.tabs.selected_index]", name)
