"""As much of a W&B server as a run, its files and a dashboard need, on this machine; it keeps what it is told."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Answers the GraphQL operations and uploads of wandb's own code.

    Attributes:
        operations: Names and variables of what was asked, in order.
        lines: Lines of the streamed files by run and file, decoded.
        uploads: Content of the files that were uploaded by name.
        views: What `upsertView` was given.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.operations: list[tuple[str, dict[str, Any]]] = []
        self.lines: dict[tuple[str, str], list[Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def streamed(self, run: str, file: str) -> list[Any]:
        return self.lines.get((run, file), [])

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or [None, "?"])[1]
        self.operations.append((name, variables))
        project = {
            "id": "p",
            "name": "proj",
            "internalId": "1",
            "entityName": "me",
            "entity": {"id": "e", "name": "me"},
        }
        if "upsertView" in query:
            self.views.append(variables)
            kept = {key: variables.get(key) for key in ("name", "displayName", "description", "type", "spec")}
            return {
                "upsertView": {"view": {"id": f"view{len(self.views)}", "project": project, **kept}, "inserted": True}
            }
        if "upsertBucket" in query:
            new = variables["name"] not in self.runs
            run = self.runs.setdefault(variables["name"], {"id": f"id-{variables['name']}"})
            run |= {key: value for key, value in variables.items() if value is not None}
            bucket = {
                **{"id": run["id"], "name": variables["name"], "displayName": run.get("displayName", "run")},
                **{"description": "", "config": "{}", "sweepName": None, "historyLineCount": 0, "project": project},
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "RunResumeStatus" in query:
            run = self.runs.get(variables["name"])
            bucket = run and {
                **{"name": variables["name"], "summaryMetrics": "{}", "displayName": "run", "logLineCount": 0},
                **{"historyLineCount": 1, "eventsLineCount": 0, "historyTail": "[]", "eventsTail": "[]"},
                **{"config": "{}", "tags": [], "wandbConfig": "{}"},
            }
            return {"model": {"id": "p", "name": "proj", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}
        if "createRunFiles" in query:
            files = [{"name": each, "uploadUrl": f"{self.address}/upload/{each}"} for each in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "createArtifactFiles" in query:
            nodes = [
                {
                    **{"id": str(number), "name": each["name"], "displayName": each["name"], "uploadHeaders": []},
                    **{
                        "uploadUrl": f"{self.address}/upload/{each['name']}",
                        "artifact": {"id": "a"},
                        "storagePath": "",
                    },
                    **{"uploadMultipartUrls": None},
                }
                for number, each in enumerate(variables["input"]["artifactFiles"])
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if "createArtifactManifest" in query:
            file = {"id": "f", "name": "manifest", "displayName": "manifest", "uploadHeaders": []}
            file |= {"uploadUrl": f"{self.address}/upload/{variables['artifactID']}-manifest.json"}
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if "createArtifact(" in query:
            self.artifacts.append(variables["input"])
            made = {"id": f"a{len(self.artifacts)}", "state": "PENDING", "artifactSequence": {"id": "s"}}
            return {"createArtifact": {"artifact": made}}
        if "commitArtifact" in query:
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}
        if "updateArtifactManifest" in query:
            file = {"id": "f", "name": "manifest", "displayName": "manifest", "uploadHeaders": []}
            file |= {"uploadUrl": f"{self.address}/upload/manifest.json"}
            return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if name == "ArtifactType":
            # There is none of this name yet.
            return {"project": {"artifact": None}}
        if "models" in query or "projects(" in query:
            project |= {"createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
            page = {"endCursor": None, "hasNextPage": False}
            return {"models": {"edges": [{"node": project, "cursor": ""}], "pageInfo": page}}
        if "project(" in query or "model(" in query:
            return {"project": project, "model": project}
        if "__type" in query:
            return {}
        if "viewer" in query.lower():
            viewer = {"id": "u", "username": "me", "entity": "me", "email": "", "admin": False, "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}, "serverInfo": {"features": []}}
        return {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer: Any = {}
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            run = self.path.split("/")[-2]
            for file, chunk in (json.loads(body).get("files") or {}).items():
                decoded = [_decoded(line) for line in chunk["content"]]
                self.server.lines.setdefault((run, file), []).extend(decoded)
        elif self.path.startswith("/upload/"):
            self.server.uploads[self.path.removeprefix("/upload/")] = body
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST


def _decoded(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server for the length of the context."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
