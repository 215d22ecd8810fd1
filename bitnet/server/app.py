"""The routes: JSON in, JSON or server-sent events out (interfaces of the OpenAI API), and a page to chat on.

GET  /  /health  /v1/models  /metrics            POST /v1/completions  /v1/chat/completions  /tokenize  /detokenize
"""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from bitnet.chat_template import Template
from bitnet.errors import BitnetError
from bitnet.server import protocol, replies
from bitnet.server.answers import Answer, Defaults, Piece, Prompt, chat_prompt, completion_prompts
from bitnet.server.dialects import Chats, Completions, Dialect, spelling
from bitnet.server.engine import Engine
from bitnet.server.fields import INVALID
from bitnet.server.metrics import exposition
from bitnet.server.protocol import ApiError, Options
from bitnet.server.replies import Finished
from bitnet.tokenizer import Tokenizer

MOST_BYTES = 8 << 20  # of a request's body
PING_SECONDS = 10.0  # between comments in a stream that has nothing to say: proxies close silent connections
STEP_SECONDS = 0.2  # that a step which is running has to end when the server does; then it is left alone
SSE = "text/event-stream"
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass
class Service:
    """A model that answers. queue: texts that may wait for a slot; a request beyond them is refused."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    template: Template
    defaults: Defaults
    queue: int = 256


@dataclass(frozen=True)
class Access:
    """Who may use the server. keys: any of these, none needed where there are none; origins: of pages elsewhere."""

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class Application:
    """What the routes share: the service once it is loaded, and who may use it."""

    def __init__(self, load: Callable[[], Service], access: Access, log: Callable[[str], None]) -> None:
        self.service: Service | None = None
        self.failure: BaseException | None = None
        self.access, self.log = access, log
        self.started = int(time.time())
        self.on_loaded: Callable[[], None] = lambda: None
        self._load = load

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Opens the model on a thread of its own, so that the server answers meanwhile."""
        threading.Thread(target=self._open, name="bitnet loader", daemon=True).start()
        try:
            yield
        finally:
            self.stop()
            if self.service is not None:
                self.service.engine.join(STEP_SECONDS)

    def stop(self) -> None:
        """Ends what is being answered: who waits for it hears that the server stops."""
        if self.service is not None:
            self.service.engine.stop()

    def _open(self) -> None:
        try:
            self.service = self._load()
        except BaseException as error:  # told by who runs the server
            self.failure = error
        self.on_loaded()

    def ready(self, request: Request) -> Service:
        """The service, for a request that may have it. ApiError otherwise."""
        self._check_key(request)
        if self.service is None:
            raise ApiError(503, "the model is being opened", "unavailable_error")
        return self.service

    def _check_key(self, request: Request) -> None:
        if not self.access.keys:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        found = [hmac.compare_digest(given.encode(), key.encode()) for key in self.access.keys]  # all, in equal time
        if kind.lower() != "bearer" or not any(found):
            raise ApiError(401, "a key is needed: send Authorization: Bearer KEY", "authentication_error")

    # ---- what is told -----------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return HTMLResponse(files("bitnet.server").joinpath("page.html").read_text(encoding="utf-8"))

    async def health(self, request: Request) -> Response:
        if self.service is None:
            raise ApiError(503, "the model is being opened", "unavailable_error")
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JSONResponse(replies.models([self.ready(request).name], self.started))

    async def model(self, request: Request) -> Response:
        name, own = request.path_params["name"], self.ready(request).name
        if name != own:
            raise ApiError(404, f"there is no model {name!r} here, but {own!r}", "not_found_error", "model",
                           "model_not_found")  # fmt: skip
        return JSONResponse(replies.model(own, self.started))

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(exposition(self.ready(request).engine), media_type="text/plain; version=0.0.4")

    async def tokenize(self, request: Request) -> Response:
        service, body = self.ready(request), await _json(request)
        text = protocol.checked_text(body.get("content"), "content")
        try:
            return JSONResponse({"tokens": service.tokenizer.encode(text)})
        except BitnetError as error:
            raise ApiError(400, str(error), param="content") from None

    async def detokenize(self, request: Request) -> Response:
        service, body = self.ready(request), await _json(request)
        ids = body.get("tokens")
        if not isinstance(ids, list) or any(type(id_) is not int for id_ in ids):
            raise ApiError(400, "tokens must be a list of integers", param="tokens")
        try:
            return JSONResponse({"content": service.tokenizer.decode(ids)})
        except BitnetError as error:
            raise ApiError(400, str(error), param="tokens") from None

    # ---- what is generated ------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        service = self.ready(request)
        asked = protocol.completion_request(await _json(request))
        prompts = await asyncio.to_thread(completion_prompts, asked, service.tokenizer, service.engine)
        dialect = Completions(service.name, asked.options, spelling(service.tokenizer))
        return await self._answer(request, service, prompts, asked.options, dialect)

    async def chat(self, request: Request) -> Response:
        service = self.ready(request)
        asked = protocol.chat_request(await _json(request))
        prompt = await asyncio.to_thread(chat_prompt, asked, service.tokenizer, service.engine, service.template)
        dialect = Chats(service.name, asked.options, spelling(service.tokenizer))
        return await self._answer(request, service, [prompt], asked.options, dialect)

    async def _answer(
        self, request: Request, service: Service, prompts: list[Prompt], options: Options, dialect: Dialect
    ) -> Response:
        start = time.perf_counter()
        answer = Answer(service.engine, service.tokenizer, service.defaults).add(prompts, options)
        waiting = service.engine.waiting
        if waiting and waiting + len(answer.choices) > service.queue:
            raise ApiError(429, f"{waiting} texts wait for a slot already: try again later", "rate_limit_error")
        if options.stream:
            return StreamingResponse(self._events(request, answer, options, dialect, start), 200, SSE_HEADERS, SSE)
        try:
            await _unless_gone(request, _drained(answer))
        finally:
            answer.close()
        finished = [choice.finished() for choice in answer.choices]
        self._log(request, finished, start)
        # Scores of hundreds of texts are megabytes, which would keep the loop for seconds.
        return await asyncio.to_thread(lambda: JSONResponse(dialect.whole(finished)))

    async def _events(
        self, request: Request, answer: Answer, options: Options, dialect: Dialect, start: float
    ) -> AsyncIterator[str]:
        """Server-sent events. Starlette ends this generator where the client is gone."""
        try:
            async for piece in _pinged(answer):
                if piece is None:
                    yield ": still here\n\n"
                else:
                    for chunk in dialect.chunks(piece):
                        yield _event(chunk)
            finished = [choice.finished() for choice in answer.choices]
            if options.include_usage:
                yield _event(dialect.usage(finished))
            yield "data: [DONE]\n\n"
            self._log(request, finished, start)
        except ApiError as error:
            yield _event(error.body())
        finally:
            answer.close()

    def _log(self, request: Request, finished: list[Finished], start: float) -> None:
        seconds = time.perf_counter() - start
        read, drawn = (sum(getattr(one, name) for one in finished) for name in ("prompt_tokens", "completion_tokens"))
        self.log(f"{request.url.path}: {read} + {drawn} tokens, {seconds:.2f} s, {drawn / seconds:.1f} tokens/s")

    # ---- as a whole -------------------------------------------------------------------------------------------------

    def starlette(self) -> Starlette:
        """The application for a server of ASGI."""
        routes = [Route("/", self.page)]
        for prefix in ("", "/v1"):
            routes += [
                Route(f"{prefix}/health", self.health),
                Route(f"{prefix}/models", self.models),
                Route(f"{prefix}/completions", self.completions, methods=["POST"]),
                Route(f"{prefix}/chat/completions", self.chat, methods=["POST"]),
            ]
        routes += [
            Route("/v1/models/{name:path}", self.model),
            Route("/metrics", self.metrics),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]
        origins = list(self.access.origins)
        cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        handlers: Any = {ApiError: _refused, ClientDisconnect: _left, HTTPException: _unknown, Exception: _failed}
        return Starlette(False, routes, [cors] if origins else [], handlers, lifespan=self.lifespan)


# ---- bodies and errors ----------------------------------------------------------------------------------------------


async def _json(request: Request) -> dict[str, Any]:
    """The body of a request. ApiError for one that is too long, or is no JSON object.

    Only as application/json: that is what keeps pages of other origins from sending requests unasked.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"send Content-Type: application/json, not {kind or 'none'}")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ApiError(413, f"the body has more than {MOST_BYTES:,} bytes")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.status in (429, 503):
        headers["Retry-After"] = "1"
    return JSONResponse(error.body(), error.status, headers)


async def _left(request: Request, error: Exception) -> Response:
    """For a client that is gone: nobody reads it, and the log says nothing."""
    return Response(status_code=400)


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = f"{request.method} {request.url.path} is nothing that this server has"
    kind = "not_found_error" if error.status_code == 404 else INVALID
    return JSONResponse(ApiError(error.status_code, sentence, kind).body(), error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed; its log says why", "server_error").body(), 500)


# ---- waiting --------------------------------------------------------------------------------------------------------


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _drained(answer: Answer) -> None:
    async for _ in answer:
        pass


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.25)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Does work. ClientDisconnect where the client does not wait for it."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def _pinged(answer: Answer) -> AsyncIterator[Piece | None]:
    """The pieces of an answer; None where none came for a while."""
    pieces = aiter(answer)
    coming: asyncio.Future[Piece] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(pieces))
            done, _ = await asyncio.wait([coming], timeout=PING_SECONDS)
            if not done:
                yield None
                continue
            try:
                piece = coming.result()
            except StopAsyncIteration:
                return
            finally:
                coming = None
            yield piece
    finally:
        if coming is not None:
            coming.cancel()
