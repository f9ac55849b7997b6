"""`eva02-at search --serve`: a page to type into, on this machine.

The page talks to three addresses: `/ask` answers a question as JSON, `/video/N` is a file of the
index (parts of it, as players ask for them), `/frame/N/SECONDS.jpg` is a picture of it. Files are
named by their number in the index: no path ever comes from outside. Who asks from another machine
must show the token; whoever asks under another host's name is refused (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
import multiprocessing
import secrets
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from datamodules.video.frames import UNREADABLE
from datamodules.video.windows import Unreadable, Window
from lightning_modules.inference.search import FolderSearch
from lightning_modules.inference.search_index import Among
from lightning_modules.inference.search_page import NOTHING_FITS, clock, picture_at
from lightning_modules.pages import base_style

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MOST = 60  # hits a question
# Nothing from elsewhere, no code in the page, no frame around it.
_POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'"
)


class SearchSite:
    """The page's addresses over one folder and one or more models.

    Args:
        searches: One a model, of the same folder.
        template: Each question is put in here.
        token: What a request must show, as `?token=` or as the cookie set then; None for nobody
            but this machine.
    """

    def __init__(
        self, searches: Sequence[FolderSearch], template: str = "{}", token: str | None = None
    ) -> None:
        self.searches, self.template, self.token = searches, template, token
        self.folder = searches[0].folder
        videos = dict.fromkeys(v.path for search in searches for v in search.index.videos)
        self.videos = list(videos)
        self.number = {path: n for n, path in enumerate(self.videos)}
        self._pictures = _Pictures()

    def app(self, host: str) -> Starlette:
        """Build the application.

        Args:
            host: Name or address under which it is asked.
        """
        hosts = [*LOOPBACK, host] if host not in ("0.0.0.0", "::") else ["*"]
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/site/{name}", self.asset),
                Route("/ask", self.ask),
                Route("/video/{number:int}", self.video),
                Route("/frame/{number:int}/{time_s:float}.jpg", self.frame),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self._pictures.close()

    def _admit(self, request: Request) -> None:
        shown = request.query_params.get("token") or request.cookies.get("token") or ""
        if self.token is not None and not secrets.compare_digest(shown, self.token):
            raise HTTPException(403, "the token is missing or wrong; open the address as printed")

    async def page(self, request: Request) -> Response:
        """The page itself; the token moves from its address into a cookie."""
        self._admit(request)
        response = Response(_asset("search.html"), media_type="text/html")
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        if self.token is not None:
            response.set_cookie("token", self.token, httponly=True, samesite="strict")
        return response

    async def asset(self, request: Request) -> Response:
        """The page's script and style."""
        name = request.path_params["name"]
        if name == "search.js":
            return Response(_asset(name), media_type="text/javascript")
        if name == "search.css":
            return Response(base_style() + _asset(name), media_type="text/css")
        raise HTTPException(404)

    async def ask(self, request: Request) -> Response:
        """Answer `?q=QUESTION[&top=12][&video=LETTERS][&from=SECONDS][&to=SECONDS]`."""
        self._admit(request)
        given = request.query_params
        question = given.get("q", "").strip()
        try:
            top = int(given.get("top", 12))
            among = Among(
                given.get("video", "").strip(),
                float(given.get("from") or 0),
                float(given.get("to") or "inf"),
            )
        except ValueError as error:
            raise HTTPException(400, f"top, from and to must be numbers: {error}") from None
        if not question or not 1 <= top <= _MOST:
            raise HTTPException(400, f"a question, and top from 1 to {_MOST}")
        answers = await run_in_threadpool(self._answers, question, top, among)
        return JSONResponse({"question": question, "models": answers})

    def _answers(self, question: str, top: int, among: Among) -> list[dict[str, Any]]:
        models = []
        for search in self.searches:
            (answer,) = search.ask([question], top, self.template, among)
            hits = [
                {
                    **asdict(hit.window),
                    "video": str(hit.window.video.relative_to(self.folder)),
                    "number": self.number[str(hit.window.video.relative_to(self.folder))],
                    "span": f"{clock(hit.window.start_s)} – {clock(hit.window.end_s)}",
                    "score": hit.score,
                    "sure": answer.sure[rank] if answer.sure else None,
                }
                for rank, hit in enumerate(answer.hits)
            ]
            warning = None if answer.fits else NOTHING_FITS
            name = str(search.loaded.source.path)
            models.append({"model": name, "warning": warning, "hits": hits})
        return models

    def _path(self, request: Request) -> Path:
        self._admit(request)
        number = request.path_params["number"]
        if number >= len(self.videos):
            raise HTTPException(404, f"no video {number}")
        path = self.folder / self.videos[number]
        if not path.is_file():
            raise HTTPException(404, f"{self.videos[number]} has left the folder")
        return path

    async def video(self, request: Request) -> Response:
        """A file, or the part of it that a player asks for."""
        path = self._path(request)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return FileResponse(path, media_type=kind)

    async def frame(self, request: Request) -> Response:
        """The picture at a moment, decoded in a child process."""
        path = self._path(request)
        time_s = request.path_params["time_s"]
        picture = await asyncio.to_thread(self._pictures.at, Window(path, time_s, time_s))
        if isinstance(picture, Unreadable):
            raise HTTPException(404, picture.reason)
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})


class _Pictures:
    """Decodes in processes of its own: a video that crashes the decoder costs its picture alone.

    Spawned, not forked: this process has threads, and a fork of it can hang on their locks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def at(self, window: Window) -> bytes | Unreadable:
        """A JPEG, or why there is none."""
        with self._lock:
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(2, mp_context=context)
            pool = self._pool
        try:
            return pool.submit(picture_at, window).result()
        except UNREADABLE as error:
            return Unreadable(window.video, str(error))
        except BrokenProcessPool:
            with self._lock:
                if self._pool is pool:
                    self._pool = None
            return Unreadable(window.video, "its decoder crashed")

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("site", name).read_text(encoding="utf-8")


def serve(site: SearchSite, host: str, port: int) -> None:
    """Answer until the process is stopped.

    Args:
        site: What to serve.
        host: Address to listen on.
        port: 0 takes any that is free.

    Raises:
        OSError: The address cannot be had.
    """
    import socket

    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    shown = f"[{host}]" if ":" in host else host
    token = f"/?token={site.token}" if site.token else "/"
    print(f"http://{shown}:{listener.getsockname()[1]}{token}  (Ctrl-C ends)", flush=True)
    config = uvicorn.Config(site.app(host), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
