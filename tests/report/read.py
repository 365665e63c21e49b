"""Reads what `nightporter report` prints with other people's parsers, strictly, and says as JSON what it found."""

import csv
import io
import json
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser


class Tags(HTMLParser):
    """Text and tags as a browser would find them, not as XML would."""

    def __init__(self):
        super().__init__()
        self.seen, self.text, self.inside = {}, [], []

    def handle_starttag(self, tag, attributes):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        bad = [key for key, value in attributes if key.startswith("on") or "nan" in (value or "").lower().split()]
        assert not bad, (tag, attributes)
        self.inside.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag, (tag, self.inside)

    def handle_data(self, data):
        if "style" not in self.inside:
            self.text.append(data)


def html(text):
    root = xml.etree.ElementTree.fromstring(text)
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.inside == [], tags.inside
    space = "{http://www.w3.org/1999/xhtml}"
    names = [element.text for element in root.iter(space + "bdi")]
    return {"tags": tags.seen, "text": "".join(tags.text), "names": names}


def table(text):
    assert text.endswith("\r\n")
    # Without a line end in a cell every row ends as RFC 4180 wants it.
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert len({len(row) for row in rows}) == 1, [len(row) for row in rows]
    return [dict(zip(rows[0], row)) for row in rows[1:]]


def metrics(text):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
    from prometheus_client.parser import text_string_to_metric_families as classic

    found = {}
    for family in openmetrics(text):
        assert family.documentation and family.type != "unknown", family
        for sample in family.samples:
            assert sample.timestamp is None, sample
            key = sample.name + "".join(f"|{k}={v}" for k, v in sorted(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    # Prometheus's older format, which node_exporter's textfile collector reads: the same samples.
    old = {}
    for family in classic(text):
        for sample in family.samples:
            old[sample.name + "".join(f"|{k}={v}" for k, v in sorted(sample.labels.items()))] = sample.value
    differs = [key for key in set(old) | set(found) if float(old.get(key, "nan")) != float(found.get(key, "nan"))]
    assert not differs, [(key, old.get(key), found.get(key)) for key in differs]
    return found


print(json.dumps({"html": html, "csv": table, "metrics": metrics}[sys.argv[1]](sys.stdin.buffer.read().decode())))
