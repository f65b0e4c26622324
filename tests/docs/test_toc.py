"nbs/_toc.yml names every chapter once and nothing else; positions are counted from it."
import toc


def wrong(listed: list[str], there: list[str]) -> list[str]:
    "What is listed twice, listed but missing, there but not listed."
    twice = [f"{doc}: listed twice" for doc in sorted({d for d in listed if listed.count(d) > 1})]
    missing = [f"{doc}: no such notebook" for doc in sorted(set(listed) - set(there))]
    return twice + missing + [f"{doc}: not listed" for doc in sorted(set(there) - set(listed) - set(toc.UNLISTED))]


def test_every_notebook_is_listed_once():
    assert wrong([c.doc for c in toc.chapters()], toc.notebooks()) == [], "mend nbs/_toc.yml"
    assert len(toc.chapters()) > 10


def test_what_is_wrong_is_seen():
    assert wrong(["a", "a", "b"], ["a", "c", "app"]) == ["a: listed twice", "b: no such notebook", "c: not listed"]


def test_parts_say_what_they_are():
    for part in toc.parts():
        assert set(part) <= {"part", "about", "numbered", "chapters"}
        assert part["about"].endswith(".") and part["chapters"]
    assert [c.doc for c in toc.chapters()][0] == "index"


def test_positions_are_counted():
    walkthroughs = [c.place for c in toc.chapters() if c.part == "Walkthroughs"]
    assert walkthroughs == [f"{i} of {len(walkthroughs)}" for i in range(1, len(walkthroughs) + 1)]
    assert {c.place for c in toc.chapters() if c.part == "Measured"} == {""}


def test_a_module_has_one_chapter():
    with_module = [c.doc for c in toc.chapters() if toc.module(c.doc)]
    assert list(toc.modules().values()) == with_module and "qcal_nb.observers.base" in toc.modules()


def test_a_chapter_introduces_itself():
    for chapter in toc.chapters():
        assert toc.title(chapter.doc) and toc.summary(chapter.doc), chapter.doc
