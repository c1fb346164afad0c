"""Reads a page as a browser would, far enough to say what it loads and where its links go."""

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "input", "link", "hr", "path", "rect", "circle"}


class Page(HTMLParser):
    """Collects tags, attributes and ids, and refuses tags that are closed in the wrong order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.attributes, self.open = [], [], [], [], []
        self.csp = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        if found.get("http-equiv") == "Content-Security-Policy":
            self.csp = found["content"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
