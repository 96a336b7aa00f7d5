"""A W&B server in memory on 127.0.0.1, enough for wandb 0.31's client from init to finish.

with FakeWandb() as server:
    ...  # a client with the variables of server.env()
    server.runs["RUN_ID"].history

An operation that it does not know is answered as an error and kept in `unknown`. It must never raise: the
client retries server errors for minutes.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "0" * 40
"""The client wants 40 characters."""


@dataclass
class FakeRun:
    """What the server was told about one run."""

    run_id: str
    entity: str = "fake"
    project: str = "p"
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """File name -> line number -> text: history, summary and output are streamed this way."""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    complete: bool = False
    exit_code: int | None = None
    upserts: int = 0

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of a streamed file, in their order."""
        lines = self.lines.get(name, {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.rows("wandb-history.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        rows = self.rows("wandb-summary.json")
        return rows[-1] if rows else {}


class FakeWandb:
    """The server; a context manager. `runs` by id, `unknown` what it could not answer."""

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.unknown: list[str] = []
        self.views: list[dict[str, Any]] = []
        """What was saved of workspaces and reports."""
        self.stop_requested = False
        """Whether somebody has pressed "Stop run"."""
        self.delay = 0.0
        """Seconds before each answer."""
        self._artifacts: list[dict[str, Any]] = []
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeWandb:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def env(self) -> dict[str, str]:
        """The variables that send a client here and nowhere else."""
        local = "127.0.0.1,localhost"
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": API_KEY,
            "NO_PROXY": local,
            "no_proxy": local,
        }

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON for one request."""
        with self._lock:
            stream = re.match(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path)
            if stream:
                return self._file_stream(json.loads(body or b"{}"), *stream.groups())
            if path.startswith("/graphql"):
                return self._graphql(json.loads(body))
            if path.startswith("/storage/"):
                run_id, _, name = path.removeprefix("/storage/").partition("/")
                if run_id in self.runs:
                    self.runs[run_id].files[name] = body
                return 200, {}
            if path.startswith(("/sdk/otel/", "/ready", "/healthz")):
                return 200, {}
            self.unknown.append(f"{method} {path}")
            return 404, {"error": "unknown path"}

    def _run(self, run_id: str, entity: str | None = None, project: str | None = None) -> FakeRun:
        return self.runs.setdefault(run_id, FakeRun(run_id, entity or "fake", project or "p"))

    def _file_stream(
        self, request: dict[str, Any], entity: str, project: str, run_id: str
    ) -> tuple[int, dict[str, Any]]:
        run = self._run(run_id, entity, project)
        for name, chunk in request.get("files", {}).items():
            lines = run.lines.setdefault(name, {})
            lines |= {chunk["offset"] + number: line for number, line in enumerate(chunk["content"])}
        if request.get("complete"):
            run.complete, run.exit_code = True, request.get("exitcode")
        return 200, {"exitcode": None, "limits": {}, "stopped": self.stop_requested}

    def _graphql(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        named = re.search(r"(?:query|mutation)\s+(\w+)", request.get("query", ""))
        name = request.get("operationName") or (named[1] if named else "?")
        variables = request.get("variables") or {}
        operation: Callable[[dict[str, Any]], Any] | None = getattr(self, f"_do_{name}", None)
        if operation is None:
            self.unknown.append(f"graphql {name} {json.dumps(variables)[:200]}")
            return 200, {"errors": [{"message": f"fake: unknown operation {name}"}], "data": None}
        try:
            return 200, {"data": operation(variables)}
        except (KeyError, TypeError, ValueError) as error:
            self.unknown.append(f"graphql {name} {error!r} {json.dumps(variables)[:300]}")
            return 400, {"errors": [{"message": f"fake: {error!r}"}]}

    def _bucket(self, run: FakeRun) -> dict[str, Any]:
        """The run as the server describes it; on resuming the client reads its counters here."""
        history = run.lines.get("wandb-history.jsonl", {})
        return {
            "id": f"storage-{run.run_id}",
            "name": run.run_id,
            "displayName": run.run_id,
            "description": None,
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "sweepName": None,
            "project": {
                "id": "project",
                "name": run.project,
                "entity": {"id": "entity", "name": run.entity},
            },
            "historyLineCount": len(history),
            "eventsLineCount": len(run.lines.get("wandb-events.jsonl", {})),
            "logLineCount": len(run.lines.get("output.log", {})),
            "historyTail": json.dumps([history[max(history)]] if history else []),
            "eventsTail": "[]",
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
            "stopped": self.stop_requested,
            "files": {"edges": []},
        }

    def _upload(self, *path: str) -> dict[str, Any]:
        return {"uploadUrl": "/".join([self.url, "storage", *path]), "uploadHeaders": []}

    def _do_ServerFeaturesQuery(self, variables: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _do_ServerInfo(self, variables: dict[str, Any]) -> Any:
        newest = {"max_cli_version": "99.0.0"}
        return {"serverInfo": {"cliVersionInfo": newest, "latestLocalVersionInfo": None, "features": []}}

    def _do_Viewer(self, variables: dict[str, Any]) -> Any:
        viewer = {"id": "u", "entity": "fake", "username": "fake", "email": "f@x", "flags": "{}"}
        return {"viewer": viewer | {"admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    def _do_RunResumeStatus(self, variables: dict[str, Any]) -> Any:
        run = self.runs.get(variables.get("name", ""))
        model = {
            "id": "project",
            "name": variables.get("project") or "p",
            "entity": {"id": "entity", "name": "fake"},
        }
        return {"model": model | {"bucket": self._bucket(run) if run else None}}

    def _do_UpsertBucket(self, variables: dict[str, Any]) -> Any:
        run_id = variables.get("name") or str(variables.get("id", "")).removeprefix("storage-")
        run = self._run(run_id, variables.get("entity"), variables.get("project"))
        run.upserts += 1
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": run.upserts == 1}}

    def _do_RunStoppedStatus(self, variables: dict[str, Any]) -> Any:
        return {"project": {"run": {"stopped": self.stop_requested}}}

    def _do_NotifyScriptableRunAlert(self, variables: dict[str, Any]) -> Any:
        self._run(variables["runName"]).alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _do_CreateRunFiles(self, variables: dict[str, Any]) -> Any:
        run_id = variables["run"]
        files = [{"name": name} | self._upload(run_id, name) for name in variables["files"]]
        return {"createRunFiles": {"runID": f"storage-{run_id}", "uploadHeaders": [], "files": files}}

    def _do_MarkRunFilesUploaded(self, variables: dict[str, Any]) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    def _do_OrganizationCoreWeaveOrganizationID(self, variables: dict[str, Any]) -> Any:
        return {"entity": {"organization": None}}

    def _do_ArtifactType(self, variables: dict[str, Any]) -> Any:
        return {"project": {"artifact": None}}

    def _do_CreateArtifact(self, variables: dict[str, Any]) -> Any:
        """A logged table is an artifact: created, its files and manifest uploaded, committed."""
        artifact_id = f"artifact{len(self._artifacts)}"
        self._artifacts.append(variables)
        sequence = {"latestArtifact": None}
        artifact = {"id": artifact_id, "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _manifest(self, artifact_id: str) -> dict[str, Any]:
        return {"id": f"manifest-{artifact_id}", "file": {"id": "f"} | self._upload("manifest", artifact_id)}

    def _do_CreateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        manifest = self._manifest(variables["artifactID"])
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _do_UpdateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        manifest = self._manifest(variables["artifactManifestID"].removeprefix("manifest-"))
        return {"updateArtifactManifest": {"artifactManifest": manifest}}

    def _do_CreateArtifactFiles(self, variables: dict[str, Any]) -> Any:
        edges = []
        for file in variables.get("input", variables)["artifactFiles"]:
            owner = {"artifact": {"id": file["artifactID"]}, "uploadMultipartUrls": None}
            upload = self._upload("artifact", file["artifactID"], file["name"])
            edges.append({"node": {"storagePath": file["name"]} | upload | owner})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _do_CommitArtifact(self, variables: dict[str, Any]) -> Any:
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}

    def _do_UpsertView2(self, variables: dict[str, Any]) -> Any:
        self.views.append(variables)
        project = {"id": "project", "name": variables["projectName"], "entityName": variables["entityName"]}
        names = ("type", "name", "displayName", "description", "spec")
        view = {name: variables[name] for name in names} | {"id": f"view{len(self.views)}", "project": project}
        return {"upsertView": {"view": view | {"updatedAt": "2026-01-01T00:00:00"}, "inserted": True}}

    _do_upsertView = _do_UpsertView2

    def _do_ProjectInternalId(self, variables: dict[str, Any]) -> Any:
        known = variables["projectName"] == "p"
        return {"project": {"internalId": "cHJvamVjdA=="} if known else None}

    def _do_GetProjects(self, variables: dict[str, Any]) -> Any:
        facts = {"entityName": variables["entity"], "createdAt": "2026-01-01T00:00:00", "isBenchmark": False}
        node = facts | {"id": "UHJvamVjdDox", "name": "p", "user": None}
        return {"models": {"pageInfo": {"hasNextPage": False, "endCursor": None}, "edges": [{"node": node}]}}

    def _do_UseArtifact(self, variables: dict[str, Any]) -> Any:
        return {"useArtifact": {"artifact": {"id": variables["artifactID"]}}}


def _handler(fake: FakeWandb) -> type[BaseHTTPRequestHandler]:
    """The request handler that asks `fake` for its answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not printed."""

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                body = b""
                while length := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(length)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _answer(self) -> None:
            body = self._body()
            time.sleep(fake.delay)
            status, answer = fake.answer(self.command, self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

    return Handler
