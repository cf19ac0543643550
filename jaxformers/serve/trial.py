"""A grammar tried in a process of its own, so that one that crashes, hangs or fills the memory harms no server.

Run as a script it is that process: a line of JSON in, a line of JSON out. It needs nothing but `llguidance`, and knows
nothing of requests.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_SECONDS = 3.0  # for one grammar, from its text to the end of its trial
MAX_STEP_SECONDS = 0.5  # of processor time, for the tokens that may come next, once
MAX_MEMORY = 4 << 30  # bytes of address space of the whole process
STEPS = 12  # random tokens taken
TOO_LARGE = "is too large or too complex"

_START_SECONDS = 60.0  # for the process to come up and read a tokenizer


def limits() -> LLParserLimits:
    """What a grammar may cost to build and for each token; half of the library's own or less."""
    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=25_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


class Trials:
    """The process that tries grammars for one tokenizer; started when first needed, and again after one that broke it.

    May be called by any thread; grammars are tried one after the other.
    """

    def __init__(self, tokenizer: str, vocab_size: int, stop_ids: list[int]):
        """tokenizer: the text of a tokenizer.json. stop_ids: ids that end a text, at least one."""
        self._tokenizer = {"tokenizer": tokenizer, "vocab_size": vocab_size, "stop_ids": stop_ids}
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def fault_of(self, grammar: str) -> str | None:
        """What is wrong with the grammar, in the library's words or ours; None where it is fit for use."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                )
                if self._ask(self._tokenizer, _START_SECONDS) is None:
                    self.close()
                    raise RuntimeError("the process that tries grammars does not start")
            answer = self._ask(grammar, MAX_SECONDS)
            if answer is None:
                self.close()
                return TOO_LARGE
            return answer["fault"]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    __del__ = close

    def _ask(self, question: Any, seconds: float) -> dict[str, Any] | None:
        """The answer, None where the process died over it or took longer."""
        assert self._process is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith("\n") else None


def tried(tokenizer: LLTokenizer, grammar: str, stop_ids: list[int]) -> str | None:
    """What is wrong with the grammar after a few random tokens, None for nothing."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    draw = random.Random(0)
    for _ in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        start = time.process_time()  # which other processes do not lengthen
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if time.process_time() - start > MAX_STEP_SECONDS:
            return TOO_LARGE
        for stop in stop_ids:
            mask &= ~(1 << stop)
        if matcher.is_error() or not mask:
            break
        matcher.consume_token(_any_bit(mask, draw))
    return matcher.get_error() or None


def _any_bit(mask: int, draw: random.Random) -> int:
    """The place of a set bit, at or after a random place where there is one."""
    later = mask >> (start := draw.randrange(mask.bit_length())) << start
    return ((later & -later).bit_length()) - 1


def main() -> None:
    """Reads a tokenizer, then grammars, from the standard input, and answers each."""
    try:
        import resource
    except ImportError:  # no such limit on this system
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    given = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(given["tokenizer"], n_vocab=given["vocab_size"], eos_token=given["stop_ids"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        _end_in(3 * MAX_SECONDS)
        print(json.dumps({"fault": tried(tokenizer, json.loads(line), given["stop_ids"])}), flush=True)
        _end_in(0)


def _end_in(seconds: float) -> None:
    """The system ends this process then, whatever it does, even if the one that watches it is gone. 0: it does not."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
