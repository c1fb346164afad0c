"""An SVG file as an element of a page: no style attributes, which a strict policy blocks, and ids that nobody else has.

It reads only what `drawing` wrote.
"""

from __future__ import annotations

import re
from html import escape
from xml.etree import ElementTree

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_FONT = re.compile(r"^(?:(?P<style>italic|oblique) )?(?:(?P<weight>bold|\d{3}) )?(?P<size>[\d.]+px) (?P<family>.+)$")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def to_inline(svg: str, identity: str, title: str) -> str:
    """One `<svg>` element with presentation attributes instead of styles.

    Args:
        svg: a file that matplotlib wrote.
        identity: a word unique on the page; all ids begin with it.
        title: read out instead of the picture.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set("id", f"{identity}-{value}")
            elif name == f"{{{_LINK}}}href":
                del element.attrib[name]
                element.set("href", "#" + f"{identity}-{value.removeprefix('#')}")
            elif name == "style":
                del element.attrib["style"]
                for key, setting in _declarations(value):
                    element.set(key, setting)
        for name, value in list(element.attrib.items()):
            element.set(name, _REFERENCE.sub(lambda found: f"url(#{identity}-{found[1]})", value))
    box = root.get("viewBox", "0 0 100 100")
    inside = "".join(ElementTree.tostring(child, encoding="unicode").strip() for child in root)
    width = box.split()[2]
    return (
        f'<svg class="lens" viewBox="{box}" width="{width}" role="img" aria-label="{escape(title)}" '
        f'stroke-linejoin="round" stroke-linecap="butt">{inside}</svg>'
    )


def _declarations(style: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for declaration in filter(None, (part.strip() for part in style.split(";"))):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        font = _FONT.match(value) if name == "font" else None
        if font:
            parts = {"font-style": font["style"], "font-weight": font["weight"]}
            parts |= {"font-size": font["size"], "font-family": font["family"]}
            found += [(key, setting) for key, setting in parts.items() if setting]
        else:
            found.append((name, value))
    return found
