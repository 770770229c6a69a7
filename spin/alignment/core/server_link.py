"""JSON over HTTP to a server that may be busy, restart or vanish: many requests in flight, each tried a few times."""

from __future__ import annotations

import asyncio
import concurrent.futures
import email.utils
import ipaddress
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from spin.alignment.core.errors import InputError

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Request timeout, too early, too many requests: the same request may succeed later. Every 5xx too, except "not implemented".
PASSING_STATUS = frozenset({408, 425, 429})
NOT_IMPLEMENTED = 501
CONNECT_TIMEOUT = 10.0  # seconds
# Its own, so that a failing server does not move the random numbers of the program.
_jitter = random.Random()


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently a request is tried. All times in seconds.

    The defaults wait three to six minutes in all, which is long enough for a server to load its model again.

    Attributes:
        attempts: tries of one request, the first included.
        first_delay: wait behind the first failure; it doubles with every further one.
        longest_delay: the doubling ends here.
        longest_told_delay: a server that asks (Retry-After) for more than this gets this.
        timeout: how long an answer may take, beside what its length adds (:attr:`seconds_per_token`).
        seconds_per_token: the slowest decoding that is still taken for life.
    """

    attempts: int = 12
    first_delay: float = 1.0
    longest_delay: float = 60.0
    longest_told_delay: float = 600.0
    timeout: float = 600.0
    seconds_per_token: float = 0.2

    def delay(self, failures: int, told: float | None = None) -> float:
        """Return the wait behind the ``failures``-th failure: doubled each time, spread so that a crowd does not return at once.

        ``told`` is what the server asked for; the wait is never shorter than that.
        """
        full = min(self.longest_delay, self.first_delay * 2.0 ** (failures - 1))
        return max(min(told or 0.0, self.longest_told_delay), full * _jitter.uniform(0.5, 1.0))


class TryAgain(Exception):
    """This answer is none, but the next may be: ``told`` is the number of seconds the server asked to be left alone."""

    def __init__(self, reason: str, told: float | None = None) -> None:
        super().__init__(reason)
        self.told = told


def told_delay(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for (a number or a date, RFC 9110 10.2.3); None for none."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def is_this_machine(host: str) -> bool:
    """Return whether a host name or address is the loopback, where no proxy belongs in between."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def checked_url(base_url: str | None) -> httpx2.URL:
    """Return the address of the server; raise :class:`InputError` for one that cannot be that."""
    mend = "pass --base_url http://host:port/v1"
    if not base_url:
        raise InputError(f"the openai backend needs the address of a running server: {mend}")
    try:
        url = httpx2.URL(base_url.strip().rstrip("/"))
    except httpx2.InvalidURL as error:
        raise InputError(f"base_url {base_url} is no address ({error}): {mend}") from error
    if url.userinfo:
        raise InputError("base_url holds a user name or a password: leave it out and set OPENAI_API_KEY")
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"base_url {base_url} is no address of a server: {mend}")
    return url


class ServerLink:
    """A client on an event loop in a thread of its own, so that a request in flight can be given up at any moment."""

    def __init__(self, base_url: str | None, connections: int, api_key: str = "") -> None:
        """Open nothing yet; ``connections`` is the number of requests in flight at most."""
        self.url = checked_url(base_url)
        # A header that cannot be sent would be quoted in the error, and the key with it.
        if not (api_key.isascii() and api_key.isprintable()):
            raise InputError("OPENAI_API_KEY holds characters that no key has: set it again")
        self._told = 0.0
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=not is_this_machine(self.url.host),
            follow_redirects=False,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server-link", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the loop; cancelling its future closes its connection, and the server stops working on it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def send(
        self,
        path: str,
        purpose: str,
        policy: RetryPolicy,
        body: dict[str, Any] | None = None,
        tokens: int = 0,
        check: Callable[[Any], None] = lambda answer: None,
    ) -> Any:
        """Return the JSON answer of GET ``path``, or of POST when there is a ``body``.

        Args:
            purpose: what the request is for, in the words of an error ("prompt p7").
            tokens: the longest answer, which the time limit allows for.
            check: may raise :class:`TryAgain` about an answer.

        Raises:
            InputError: refused (4xx), not JSON, or no answer after all tries.
        """
        for failures in range(1, policy.attempts + 1):
            try:
                answer = await self._send_once(path, purpose, body, policy.timeout + policy.seconds_per_token * tokens)
                check(answer)
                return answer
            except TryAgain as failure:
                last = failure
            if failures < policy.attempts:
                delay = policy.delay(failures, last.told)
                self._tell(f"the server at {self.url} did not answer ({last}): trying again")
                await asyncio.sleep(delay)
        raise InputError(
            f"the server at {self.url} did not answer {purpose} after {policy.attempts} tries (last: {last}): "
            "start it and run the same command again"
        ) from last

    async def _send_once(self, path: str, purpose: str, body: dict[str, Any] | None, patience: float) -> Any:
        timeout = httpx2.Timeout(patience, connect=CONNECT_TIMEOUT, pool=None)
        address, method = f"{self.url}{path}", "GET" if body is None else "POST"
        try:
            response = await self._client.request(method, address, json=body, timeout=timeout)
        except httpx2.TransportError as error:
            raise TryAgain(": ".join(filter(None, (type(error).__name__, str(error))))) from error
        except httpx2.DecodingError as error:
            raise TryAgain(f"an answer cut short: {error}") from error
        status = response.status_code
        if status in PASSING_STATUS or (status >= 500 and status != NOT_IMPLEMENTED):
            raise TryAgain(f"HTTP {status}: {error_message(response)}", told_delay(response.headers.get("retry-after")))
        if status != 200:
            raise InputError(
                f"the server at {self.url} refused {purpose} with HTTP {status}: {error_message(response)}"
                + hint(status, path)
            )
        try:
            return response.json()
        except ValueError as error:
            raise InputError(
                f"{address} answered with something that is not JSON: base_url must be the address of an "
                "OpenAI-compatible server, such as http://host:port/v1"
            ) from error

    def _tell(self, message: str) -> None:
        """Log a warning, but not one for each of many requests that meet the same trouble."""
        now = time.monotonic()
        if now - self._told > 10.0:
            self._told = now
            logger.warning(message)

    def close(self) -> None:
        """Give up what is in flight, close the connections, end the thread. May be called twice."""
        if self._loop.is_closed():
            return
        self.start(self._finish()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()


def error_message(response: httpx2.Response) -> str:
    """Return what the server says went wrong: ``error.message`` of the OpenAI form, else the start of the body."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        if message:
            return str(message)[:500]
    return " ".join(response.text.split())[:200] or response.reason_phrase


def hint(status: int, path: str) -> str:
    """Return the mend for a refusal that is not about one request."""
    if status in (401, 403):
        return ": set OPENAI_API_KEY to a key the server knows"
    if status == 404 and path == "/models":
        return ": base_url must be the address of an OpenAI-compatible server, such as http://host:port/v1"
    return ""
