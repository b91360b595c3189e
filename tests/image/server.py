"""A small HTTP function: reads samples as JSON, answers with statistics as JSON or as a page."""

import asyncio
import datetime
import decimal
import http.server
import json
import os
import pathlib
import urllib.parse

import jinja2
import numpy
import yaml

HERE = pathlib.Path(__file__).parent
CONFIG = yaml.safe_load((HERE / "config.yaml").read_text())
PAGE = jinja2.Environment(autoescape=True).from_string((HERE / "page.html").read_text())


async def summarise(samples):
    """Statistics of a list of numbers, exact where decimals are."""
    values = numpy.asarray(samples, dtype=float)
    total = sum((decimal.Decimal(str(sample)) for sample in samples), decimal.Decimal())
    return {
        "count": int(values.size),
        "total": str(total),
        "mean": float(values.mean()),
        "percentiles": {str(p): float(numpy.percentile(values, p)) for p in CONFIG["percentiles"]},
    }


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /, /page and /healthz."""

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/healthz":
            return self.answer("text/plain", "ok\n")
        query = urllib.parse.parse_qs(url.query)
        samples = json.loads(query["samples"][0]) if "samples" in query else CONFIG["samples"]
        summary = asyncio.run(summarise(samples))
        summary["at"] = datetime.datetime.now(datetime.timezone.utc).isoformat()
        if url.path == "/page":
            return self.answer("text/html", PAGE.render(summary=summary))
        return self.answer("application/json", json.dumps(summary) + "\n")

    def answer(self, content_type, text):
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    address = (os.environ.get("HOST", ""), int(os.environ.get("PORT", "8080")))
    http.server.ThreadingHTTPServer(address, Handler).serve_forever()
