"""JSON over HTTP to a server that may be busy, restart or disappear: many concurrent requests, each with retries."""

from __future__ import annotations

import asyncio
import concurrent.futures
import email.utils
import ipaddress
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import httpx2

from spin.alignment.core.errors import InputError

Item = TypeVar("Item")
T = TypeVar("T")
logger = logging.getLogger(__name__)

# Request timeout, too early, too many requests: worth a retry, as is every 5xx except "not implemented".
PASSING_STATUS = frozenset({408, 425, 429})
NOT_IMPLEMENTED = 501
CONNECT_TIMEOUT = 10.0  # seconds
# A separate generator, so that a failing server does not advance the program's random state.
_jitter = random.Random()


@dataclass(frozen=True)
class RetryPolicy:
    """Retries, exponential backoff and timeouts of a request. All times in seconds.

    The defaults wait three to six minutes in total, long enough for a server to reload its model.

    Attributes:
        attempts: attempts per request, the first included.
        first_delay: wait after the first failure; it doubles with each further failure.
        max_delay: upper limit of the doubling.
        max_retry_after: upper limit of the wait that a server requests (Retry-After).
        timeout: time allowed for a response, plus :attr:`seconds_per_token` per token of it.
        seconds_per_token: the slowest decoding that is not treated as a hang.
    """

    attempts: int = 12
    first_delay: float = 1.0
    max_delay: float = 60.0
    max_retry_after: float = 600.0
    timeout: float = 600.0
    seconds_per_token: float = 0.2

    def delay(self, failures: int, retry_after: float | None = None) -> float:
        """Return the wait after the ``failures``-th failure: doubled each time, with jitter so that clients spread out.

        ``retry_after`` is the wait that the server requested; the result is never shorter, up to ``max_retry_after``.
        """
        full = min(self.max_delay, self.first_delay * 2.0 ** (failures - 1))
        return max(min(retry_after or 0.0, self.max_retry_after), full * _jitter.uniform(0.5, 1.0))


class TryAgain(Exception):
    """The request failed but may succeed later; ``retry_after`` is the wait in seconds that the server requested."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Refused(InputError):
    """The server refused the request itself (4xx): trying again would not help, another request might."""


def retry_after_delay(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header requests (a number or a date, RFC 9110 10.2.3), or None."""
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
    """Return whether a host name or address is the loopback interface, which must not be reached through a proxy."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def checked_url(base_url: str | None) -> httpx2.URL:
    """Return the server's address as a URL; raise :class:`InputError` if it is not a valid one."""
    fix = "pass --base_url http://host:port/v1"
    if not base_url:
        raise InputError(f"the openai backend needs the address of a running server: {fix}")
    try:
        url = httpx2.URL(base_url.strip().rstrip("/"))
    except httpx2.InvalidURL as error:
        raise InputError(f"base_url {base_url} is not a valid URL ({error}): {fix}") from error
    if url.userinfo:
        raise InputError("base_url contains a user name or password: remove it and set OPENAI_API_KEY")
    if url.query or url.fragment:
        raise InputError("base_url contains a query (?...): remove it, and set OPENAI_API_KEY if it was a key")
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"base_url {base_url} is not the address of a server: {fix}")
    return url


class ServerLink:
    """An HTTP client on an event loop in its own thread, so that a request in flight can be cancelled at any time."""

    def __init__(self, base_url: str | None, connections: int, api_key: str = "") -> None:
        """Start the loop without opening a connection; ``connections`` limits the requests in flight."""
        self.url = checked_url(base_url)
        # httpx would quote an invalid header, and with it the key, in its error.
        if not (api_key.isascii() and api_key.isprintable()):
            raise InputError("OPENAI_API_KEY contains characters that are not allowed in a key: set it again")
        self._last_warning = 0.0
        self._api_key = api_key
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=not is_this_machine(self.url.host),
            follow_redirects=False,  # a redirect would send the key to another address
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server-link", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the loop; cancelling its future closes the connection, so the server stops working on it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def answers(
        self, items: Iterable[Item], ask: Callable[[Item], Coroutine[Any, Any, T]], in_flight: int
    ) -> Iterator[tuple[Item, T]]:
        """Yield each item with its answer as it arrives. At most ``in_flight`` requests are open; closing cancels them."""
        waiting, asked = iter(items), dict[concurrent.futures.Future[T], Item]()
        try:
            while True:
                for item in islice(waiting, in_flight - len(asked)):
                    asked[self.start(ask(item))] = item
                if not asked:
                    return
                done, _ = concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield asked.pop(future), future.result()
        finally:
            for future in asked:
                future.cancel()

    async def send(
        self,
        path: str,
        purpose: str,
        policy: RetryPolicy,
        body: dict[str, Any] | None = None,
        tokens: int = 0,
        check: Callable[[Any], None] = lambda answer: None,
        as_text: bool = False,
    ) -> Any:
        """Return the JSON response to GET ``path``, or to POST if there is a ``body``.

        Args:
            purpose: what the request is for, as named in errors ("prompt p7").
            tokens: the longest possible response, for which the timeout is extended.
            check: may raise :class:`TryAgain` to reject a response.
            as_text: return the response as a text, which need not be JSON.

        Raises:
            Refused: the request was refused (4xx).
            InputError: the response is not JSON, or all attempts failed.
        """
        for failures in range(1, policy.attempts + 1):
            try:
                timeout = policy.timeout + policy.seconds_per_token * tokens
                response = await self._send_once(path, purpose, body, timeout)
                answer = response.text if as_text else self._json(response)
                check(answer)
                return answer
            except TryAgain as failure:
                last = failure
            if failures < policy.attempts:
                delay = policy.delay(failures, last.retry_after)
                self._warn(f"the server at {self.url} did not answer ({last}): trying again")
                await asyncio.sleep(delay)
        raise InputError(
            f"the server at {self.url} did not answer {purpose} after {policy.attempts} tries (last: {last}): "
            "start it and run the same command again"
        ) from last

    async def _send_once(
        self, path: str, purpose: str, body: dict[str, Any] | None, timeout_seconds: float
    ) -> httpx2.Response:
        # No limit on waiting for a free connection: with many requests in flight that is normal.
        timeout = httpx2.Timeout(timeout_seconds, connect=CONNECT_TIMEOUT, pool=None)
        address, method = f"{self.url}{path}", "GET" if body is None else "POST"
        try:
            response = await self._client.request(method, address, json=body, timeout=timeout)
        except httpx2.TransportError as error:
            raise TryAgain(": ".join(filter(None, (type(error).__name__, str(error))))) from error
        except httpx2.DecodingError as error:
            raise TryAgain(f"truncated response: {error}") from error
        status = response.status_code
        if status in PASSING_STATUS or (status >= 500 and status != NOT_IMPLEMENTED):
            raise TryAgain(
                f"HTTP {status}: {self._error_message(response)}",
                retry_after_delay(response.headers.get("retry-after")),
            )
        if status != 200:
            raise Refused(
                f"the server at {self.url} refused {purpose} with HTTP {status}: {self._error_message(response)}"
                + hint(status, path)
            )
        return response

    def _json(self, response: httpx2.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise InputError(
                f"the response from {response.url} is not JSON: base_url must be the address of an "
                "OpenAI-compatible server, such as http://host:port/v1"
            ) from error

    def _error_message(self, response: httpx2.Response) -> str:
        """Return the server's error message without the key, which some servers repeat; messages go to logs."""
        message = error_message(response)
        return message.replace(self._api_key, "(the key)") if self._api_key else message

    def _warn(self, message: str) -> None:
        """Log a warning at most every ten seconds, as many requests fail for the same reason."""
        now = time.monotonic()
        if now - self._last_warning > 10.0:
            self._last_warning = now
            logger.warning(message)

    def close(self) -> None:
        """Cancel requests in flight, close the connections and stop the thread. May be called twice."""
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
    """Return the server's error message: ``error.message`` as in the OpenAI API, otherwise the start of the body."""
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
    """Return the fix for a refusal that does not concern a single request, or an empty string."""
    if status in (401, 403):
        return ": set OPENAI_API_KEY to a key that the server accepts"
    if status == 404 and path == "/models":
        return ": base_url must be the address of an OpenAI-compatible server, such as http://host:port/v1"
    return ""
