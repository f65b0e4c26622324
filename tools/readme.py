"README.md and its pictures from nbs/index.ipynb: `make readme`."
import base64
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = "nbs/images"
NOTEBOOK = re.compile(r"(\]\()([^)\s:]+\.ipynb)")
BESIDE = re.compile(r"(\]\()\.\./(?=[\w.]+\.md\b)")
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?!\w+:)")


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def output_markdown(output: dict, name: str, pictures: dict[str, bytes]) -> str:
    "One output as markdown; a PNG goes into `pictures` under `name`."
    data = output.get("data", {})
    if "image/png" in data:
        path = f"{PICTURES}/{name}.png"
        pictures[path] = base64.b64decode(joined(data["image/png"]))
        return f"![]({path})"
    if "text/html" in data:
        return re.sub(r"<style.*?</style>\s*", "", joined(data["text/html"]), flags=re.S).strip("\n")
    text = joined(output.get("text") or data.get("text/plain", "")).rstrip("\n")
    return f"```text\n{text}\n```" if text.strip() else ""


def cell_markdown(cell: dict, pictures: dict[str, bytes]) -> list[str]:
    "One cell as pieces of markdown; links are made relative to the repository's root."
    source = joined(cell["source"])
    if cell["cell_type"] == "markdown":
        source = BESIDE.sub(r"\1", NOTEBOOK.sub(r"\1nbs/\2", source))
        return [PICTURE.sub(r"\1nbs/", source)]
    directives = set(re.findall(r"^#\|\s*(.+?)\s*$", source, re.M))
    if cell["cell_type"] != "code" or "hide" in directives:
        return []
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
    pieces = [] if "echo: false" in directives else [f"```python\n{code}\n```"]
    return pieces + [output_markdown(o, f"readme-{cell['id']}-{i}", pictures) for i, o in enumerate(cell["outputs"])]


def readme(root: Path = ROOT) -> tuple[str, dict[str, bytes]]:
    "README.md's text and its pictures (path → PNG)."
    notebook = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    pictures: dict[str, bytes] = {}
    pieces = [piece for cell in notebook["cells"] for piece in cell_markdown(cell, pictures) if piece]
    return "\n\n".join(["<!-- Made from nbs/index.ipynb by `make readme`. -->", *pieces]) + "\n", pictures


def write(root: Path = ROOT) -> None:
    text, pictures = readme(root)
    for old in (root / PICTURES).glob("readme-*.png"):
        old.unlink()
    for path, png in pictures.items():
        (root / path).write_bytes(png)
    (root / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
